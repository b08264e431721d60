"""`grood-edge watch`: a camera, video or recording in; states, and whatever outputs were asked for, out."""

import contextlib
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from grood_edge.cli_options import Alpha, Backend, Force, Json, Provider, Threads, Trust
from grood_edge.errors import GroodEdgeError, OutputError, SourceError, Terminated, UsageError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from grood_edge.runtime.capture.sources import Source
    from grood_edge.runtime.stream import StreamVerdict
    from grood_edge.telemetry.watching import Tally

__all__ = ["watch_command"]


def watch_command(
    model: Annotated[Path, typer.Argument(help="The artifact.")],
    source: Annotated[
        str,
        typer.Argument(
            help="Video, folder or glob of images, .mcap or ROS 2 bag, camera (0, v4l2:///dev/video0), rtsp://, or a "
            "GStreamer pipeline."
        ),
    ],
    decision: Annotated[
        str, typer.Option(help="per-frame, hysteresis or e-cusum; settings after a colon (docs/stream.md).")
    ] = "hysteresis",
    policy: Annotated[
        str | None, typer.Option(help="newest, every or drop-oldest:N. (default: newest for cameras, every for files)")
    ] = None,
    max_age: Annotated[float, typer.Option(help="Seconds after which a frame is STALE.")] = 0.5,
    topic: Annotated[str | None, typer.Option(help="Image topic of a bag; needed where it has several.")] = None,
    fps: Annotated[float | None, typer.Option(help="Frames a second of a source that does not say.")] = None,
    show: Annotated[bool, typer.Option("--show", help="A window with the overlay; q ends.")] = False,
    record: Annotated[Path | None, typer.Option(help="Overlay as .mp4.")] = None,
    log: Annotated[Path | None, typer.Option(help="One JSON line a frame, .jsonl.")] = None,
    mcap: Annotated[Path | None, typer.Option(help="The same as .mcap, for Foxglove.")] = None,
    rerun: Annotated[
        str | None, typer.Option(help="spawn (the viewer), NAME.rrd, or rerun+http://HOST:9876/proxy.")
    ] = None,
    metrics: Annotated[str | None, typer.Option(help="[ADDRESS]:PORT for Prometheus, such as :9464.")] = None,
    on_unknown: Annotated[str | None, typer.Option(help="save:DIR keeps the frames around each alarm.")] = None,
    alpha: Alpha = None,
    backend: Backend = "onnxruntime",
    provider: Provider = None,
    trusted: Trust = None,
    threads: Threads = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Watch a camera or a recording: which frames are known, and what that amounts to over time."""
    from grood_edge.runtime.capture.mailbox import Capture, parse_policy
    from grood_edge.runtime.capture.sources import SourceOptions, open_source
    from grood_edge.runtime.session import open_session
    from grood_edge.runtime.stream import stream_rules, verdicts
    from grood_edge.telemetry.outputs import Asked, open_sinks
    from grood_edge.telemetry.screen import status_line
    from grood_edge.telemetry.watching import Tally, watch
    from grood_edge.terminal import progress_bars, tell_notes
    from grood_edge.threads import limited_threads

    tally = Tally()
    try:
        with contextlib.ExitStack() as stack:
            stack.enter_context(limited_threads(threads))
            _require_elsewhere(source, (record, log, mcap, *map(_path_in, (rerun, on_unknown))))
            frames = open_source(source, SourceOptions(topic=topic, fps=fps))
            stack.callback(frames.close)
            with progress_bars() as progress:
                session = stack.enter_context(
                    open_session(
                        model, alpha=alpha, backend=backend, provider=provider, color=frames.color,
                        trusted_engine=trusted, progress=progress,
                    )
                )  # fmt: skip
            tell_notes(session.fallbacks)
            rules = stream_rules(session.contract, frames, decision, fps=fps, alpha=alpha, max_age=max_age)
            capture = Capture(frames, parse_policy(policy, frames.live), rules.health.max_age)
            asked = Asked(show, record, log, mcap, rerun, metrics, on_unknown)
            sinks = open_sinks(asked, session, capture, force)
            stack.enter_context(capture)
            stream = _with_note(verdicts(session, capture, rules), frames)
            watch(stream, sinks, tally, stack.enter_context(status_line()))
    except GroodEdgeError as error:
        _conclude(tally, str(error), as_json)
        if isinstance(error, OutputError):
            error.exit_code = 4
        raise
    except KeyboardInterrupt as error:
        ended, code = ("terminated", 128 + error.number) if isinstance(error, Terminated) else ("interrupted", 130)
        _conclude(tally, ended, as_json)
        raise typer.Exit(code) from error
    _conclude(tally, tally.cut_off or "the source has ended", as_json)
    if tally.cut_off:
        raise SourceError(f"{frames.name}: {tally.cut_off}. The frames before it were judged")


def _require_elsewhere(source: str, outputs: tuple[Path | None, ...]) -> None:
    """Refuse to write over what is being watched, or into a folder that is, `--force` or not."""
    path = source.removeprefix("replay:")
    if not os.path.exists(path):  # nor where a link leads nowhere, or to itself
        return
    real = Path(os.path.realpath(path))
    for out in outputs:
        if out is None:
            continue
        target = Path(os.path.realpath(out))
        if real in (target, *target.parents) or (os.path.exists(out) and os.path.samefile(path, out)):
            raise UsageError(f"{out} is what is watched, or lies in it; name another output")


def _with_note(stream: "Iterator[StreamVerdict]", source: "Source") -> "Iterator[StreamVerdict]":
    """Say once that a rate is assumed, where it is."""
    from grood_edge.runtime.stream import FILE_FPS, untimed
    from grood_edge.terminal import tell_notes

    told = False
    for found in stream:
        if not told and untimed(found.frame, source):
            told = True
            tell_notes(
                [
                    f"{source.name} does not say when its frames were taken: they count as {FILE_FPS:g} a second; "
                    "say it with --fps"
                ]
            )
        yield found


def _path_in(target: str | None) -> Path | None:
    return Path(target.removeprefix("save:")) if target else None


def _conclude(tally: "Tally", ended: str, as_json: bool) -> None:
    """Say what was seen, however it ended; nothing where not one frame came."""
    from grood_edge.telemetry.screen import watch_tables
    from grood_edge.terminal import print_json, show

    summary = tally.summary(ended)
    if as_json:
        print_json(summary)
    elif summary.frames:
        for table in watch_tables(summary):
            show(table)
