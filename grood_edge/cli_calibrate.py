"""The command `grood-edge calibrate`: on images, and with --episodes on video."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from grood_edge.cli_export import print_written
from grood_edge.cli_options import (
    AllowUnreadable,
    Alpha,
    Engine,
    Force,
    Json,
    Labels,
    PerClassOrNone,
    RayAddress,
    RuleOrNone,
    Threads,
)
from grood_edge.errors import UsageError

if TYPE_CHECKING:
    from grood_edge.runtime.episode_report import EpisodeReport

__all__ = ["calibrate_command"]


def calibrate_command(
    model: Annotated[Path, typer.Argument(help="The artifact.")],
    data: Annotated[str | None, typer.Option(help="ID images the network was never trained on.")] = None,
    episodes: Annotated[
        Path | None,
        typer.Option(
            help="Instead of --data: ID video for decisions over time; each entry of the folder is one independent "
            "episode, a video or a folder of images in order.",
            metavar="DIR",
        ),
    ] = None,
    fps: Annotated[
        float | None, typer.Option(help="Frames a second of the episodes. (default: as the videos say)")
    ] = None,
    threshold_only: Annotated[
        bool, typer.Option("--threshold-only", help="Keep prototypes and bank; replace the calibration scores.")
    ] = False,
    out: Annotated[Path | None, typer.Option(help="Where to write; without it the artifact is replaced.")] = None,
    alpha: Alpha = None,
    delta: Annotated[float | None, typer.Option(help="Risk that the rate exceeds alpha after all.")] = None,
    rule: RuleOrNone = None,
    per_class: PerClassOrNone = None,
    labels: Labels = "folder",
    engine: Engine = "local",
    ray_address: RayAddress = None,
    seed: Annotated[int, typer.Option(help="Of every random choice.")] = 0,
    threads: Threads = None,
    force: Force = False,
    allow_unreadable: AllowUnreadable = False,
    as_json: Json = False,
) -> None:
    """Refit an artifact on new ID images, or measure ID video for it; on the device: needs neither torch nor onnx."""
    from grood_edge.terminal import progress_bars
    from grood_edge.threads import limited_threads

    if (data is None) == (episodes is None):
        given = "neither" if data is None else "both"
        raise UsageError(f"calibrate was given {given} of --data and --episodes; expected one: images, or ID video")
    if episodes is not None:
        of_images = {
            "--threshold-only": threshold_only,
            "--alpha": alpha is not None,
            "--delta": delta is not None,
            "--rule": rule is not None,
            "--per-class": per_class is not None,
            "--labels": labels != "folder",
            "--seed": seed != 0,
            "--engine": engine != "local",
            "--ray-address": ray_address is not None,
        }
        if surplus := [option for option, given in of_images.items() if given]:
            raise UsageError(
                f"--episodes measures video and takes no {', '.join(surplus)}; leave that out, or use --data"
            )
        with limited_threads(threads):
            _calibrate_episodes(model, episodes, out, fps, force, allow_unreadable, as_json)
        return
    if fps is not None:
        raise UsageError("--fps is of --episodes, and --data are images without time; leave it out")
    from grood_edge.export.recalibrate import RecalibrateOptions, recalibrate

    options = RecalibrateOptions(
        threshold_only=threshold_only,
        labels=labels,
        alpha=alpha,
        delta=delta,
        marginal=None if rule is None else rule == "marginal",
        per_class=per_class,
        seed=seed,
        force=force,
        allow_unreadable=allow_unreadable,
        engine=engine,
        ray_address=ray_address,
    )
    with limited_threads(threads), progress_bars() as progress:
        report = recalibrate(model, data, out, options, progress)
    print_written(report, as_json, f"grood-edge verify {report.path}")


def _calibrate_episodes(
    model: Path, episodes: Path, out: Path | None, fps: float | None, force: bool, allow_unreadable: bool, as_json: bool
) -> None:
    from grood_edge.runtime.episodes import EpisodeOptions, calibrate_episodes
    from grood_edge.terminal import print_json, progress_bars, show, tell, tell_notes

    options = EpisodeOptions(fps, force, allow_unreadable)
    with progress_bars() as progress:
        report = calibrate_episodes(model, episodes, out, options, progress)
    tell_notes(report.warnings, report.unreadable)
    if as_json:
        print_json(_document(report))
        return
    show(_table(report))
    if report.stream.interval is not None or report.threshold is not None:
        tell(f"Next: grood-edge watch {report.path} SOURCE --decision e-cusum:hours=8")
    else:
        tell(f"Next: more or longer episodes; until then: grood-edge watch {report.path} SOURCE --decision hysteresis")


def _document(report: "EpisodeReport") -> dict[str, Any]:
    import dataclasses
    import math

    return {
        "path": str(report.path),
        "stream": dataclasses.asdict(report.stream),
        "correlation": dataclasses.asdict(report.correlation),
        "hours": report.hours,
        "threshold_by_episode": report.threshold,
        "episodes_needed": report.needed,
        "alarm_rates": [
            {**dataclasses.asdict(rate), "upper": rate.upper if math.isfinite(rate.upper) else None}
            for rate in report.rates
        ],
        "not_valid": report.not_valid,
        "unhealthy": report.unhealthy,
        "unreadable": [{"path": path, "reason": reason} for path, reason in report.unreadable],
        "warnings": list(report.warnings),
    }


def _table(report: "EpisodeReport") -> Any:
    import math

    from grood_edge.tables import key_values

    stream = report.stream
    if report.threshold is None:
        threshold = (
            f"none: 5 % of episodes with 95 % confidence need {report.needed} episodes, here are {stream.episodes}"
        )
    else:
        threshold = (
            f"log M {report.threshold:.2f}: at most 5 % of episodes like these raise an alarm, with 95 % confidence "
            f"({report.needed} episodes are enough)"
        )
    rows = [
        ("episodes", f"{stream.episodes:,}, {stream.frames:,} frames scored, {report.not_valid:,} not valid"),
        ("not scored", ", ".join(f"{n:,} {status}" for status, n in report.unhealthy.items()) or "none"),
        ("hours", f"{report.hours:.3g} at {stream.fps:g} frames a second"),
        ("correlation time", "none found" if stream.correlation is None else f"{stream.correlation:.3g} s"),
        ("", report.correlation.reason),
        ("fed", "every frame, no decimation" if stream.interval is None else f"a frame every {stream.interval:.3g} s"),
        ("threshold by episode", threshold),
    ]
    for rate in report.rates:
        upper = "" if math.isinf(rate.upper) else f" and at most {rate.upper:.2g} h"
        rows.append(
            (
                f"e-cusum:hours={rate.set_to:g}",
                f"{rate.alarms} alarms in {report.hours:.2g} h of ID video: at least {rate.lower:.2g} h{upper} between "
                "them, each with 95 % confidence",
            )
        )
    return key_values(f"wrote {report.path}", rows)
