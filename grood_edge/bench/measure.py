"""The spine of `grood-edge bench`: open, run every batch size in turn with the bare classifier, split the time."""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from grood_edge import __version__
from grood_edge.arrays import Frames, InputFrame
from grood_edge.artifact import Artifact, read_artifact
from grood_edge.bench.bare import Bare, cut_classifier, open_classifier
from grood_edge.bench.loop import Clock, Side, times_in_turn, warmed_up
from grood_edge.bench.options import BenchOptions, batch_sizes, refuse_baseline, require_possible
from grood_edge.bench.profile import profiled_parts
from grood_edge.bench.results import BatchResult, BenchReport, FrameKind, Memories, batch_result, doubts
from grood_edge.contract import Contract
from grood_edge.errors import UsageError
from grood_edge.ort import PROVIDERS
from grood_edge.probes import decode_png
from grood_edge.progress import Progress, silent
from grood_edge.runtime.choose import Choice
from grood_edge.runtime.machine import machine_state, memory
from grood_edge.runtime.session import Session, open_session

__all__ = ["bench"]

_CALLS, _CALL_BYTES = 4, 64 << 20  # different inputs that take turns, and what they may take
_FIRST_RUNS = 3  # before memory is read


def bench(
    model: Path,
    options: BenchOptions,
    choice: Choice,
    progress: Progress = silent,
    clock: Clock = time.perf_counter,
) -> BenchReport:
    """Measure an artifact on this machine.

    Raises:
        UsageError: options that contradict each other, or a batch that the artifact or the baseline does not take.
        ArtifactError, BackendError, VerificationError: as `open_session`.
        ClassifierError: the baseline cannot be opened, or does not take the artifact's images.
    """
    require_possible(options, choice)
    before, memory_before = machine_state(), memory()
    with open_session(
        model,
        backend=choice.backend,
        provider=choice.provider,
        threads=choice.threads,
        trusted_engine=choice.trusted,
        progress=progress,
    ) as session:
        sizes = batch_sizes(options, session.contract)
        frames, source = _frames(session.contract)
        for size in sizes:
            for _ in range(_FIRST_RUNS):
                session.predict_batch(_calls(frames, size)[0])
        memory_alone = memory()
        artifact = read_artifact(model)  # again: the session let go of its bytes, so that its memory could be read
        notes = list(session.fallbacks)
        bare = _bare(options, choice, artifact, session, notes)
        if bare is not None:
            sizes = _sizes_for(bare, sizes, options, notes)
            notes += _differences(bare, artifact.contract, session, _calls(frames, 1)[0])
        run = _Run(session, artifact, bare, options.seconds, choice.threads, progress, clock)
        results = tuple(run.measured(size, _calls(frames, size)) for size in sizes)
        provider = session.backend.provider
    after = machine_state()
    return BenchReport(
        grood_edge=__version__,
        model=str(model),
        provider=provider,
        precision=artifact.contract.precision.name,
        threads=choice.threads,
        seconds=options.seconds,
        frames=FrameKind(source, frames[0].shape),
        baseline=None if bare is None else bare.name,
        batches=results,
        memory=Memories(memory_before.resident, memory_alone.peak, memory().peak),
        before=before,
        after=after,
        notes=(*notes, *doubts(results, before, after)),
    )


def _sizes_for(bare: Bare, sizes: tuple[int, ...], options: BenchOptions, notes: list[str]) -> tuple[int, ...]:
    if not bare.single or sizes == (1,):
        return sizes
    if options.batches is not None:
        raise UsageError(
            f"--batch {','.join(map(str, sizes))}; {bare.name} takes one image at a time: --batch 1, or save the "
            "classifier with a free batch dimension"
        )
    notes.append(f"batch 1 alone: {bare.name} takes one image at a time")
    return (1,)


def _frames(contract: Contract) -> tuple[list[InputFrame], str]:
    """Return frames of the graph's input size, and where they come from."""
    p = contract.preprocessing
    if contract.probes:
        count = len(contract.probes)
        return [decode_png(probe.png, p) for probe in contract.probes], f"the {count} probes in the artifact"
    rng = np.random.default_rng(0)
    count = max(1, min(_CALLS, _CALL_BYTES // int(np.prod(p.input_shape))))
    noise = [rng.integers(0, 256, p.input_shape, np.uint8) for _ in range(count)]
    return noise, "seeded noise: the artifact has no probes"


def _calls(frames: list[InputFrame], size: int) -> list[list[InputFrame]]:
    """Return some batches that take turns, so that no run finds its own input in the cache."""
    count = max(1, min(_CALLS, len(frames), _CALL_BYTES // (4 * size * frames[0].size)))
    return [[frames[(call * size + i) % len(frames)] for i in range(size)] for call in range(count)]


def _bare(options: BenchOptions, choice: Choice, artifact: Artifact, session: Session, notes: list[str]) -> Bare | None:
    provider = session.backend.provider
    if provider not in PROVIDERS:
        if options.baseline is not None:  # `auto` took an engine
            refuse_baseline(provider)
        notes.append(f"no ratio: on {provider} there is no bare classifier to compare with")
        return None
    if options.baseline is None:
        return cut_classifier(artifact, provider, choice.threads)
    return open_classifier(options.baseline, artifact, provider, choice.threads)


def _differences(bare: Bare, contract: Contract, session: Session, frames: list[InputFrame]) -> Iterator[str]:
    """Say what the two sides do not have in common."""
    ready = _prepared(session, frames)
    if not bare.gives(bare.tensor(ready), session.infer_prepared(ready).logits):
        yield (
            f"{bare.name} does not give the artifact's logits: it is another classifier, or one of another precision, "
            "and the ratio compares two networks"
        )
    if contract.preprocessing.camera is not None and not bare.has_preprocessing:
        yield (
            "the artifact's side resizes the camera's frames in its graph, and the bare classifier was given them "
            "resized: leave --baseline out to compare with the artifact without its head"
        )


def _prepared(session: Session, frames: list[InputFrame]) -> Frames:
    return np.stack([session.prepare(frame) for frame in frames])


@dataclass(frozen=True)
class _Run:
    """What measuring a batch size needs."""

    session: Session
    artifact: Artifact
    bare: Bare | None
    seconds: float
    threads: int | None
    progress: Progress
    clock: Clock

    def measured(self, size: int, calls: list[list[InputFrame]]) -> BatchResult:
        provider = self.session.backend.provider
        ready = [_prepared(self.session, call) for call in calls]
        sides = [_artifact_side(self.session, calls, self.clock)]
        if self.bare is not None:
            sides.append(_bare_side(self.bare, ready, provider, self.clock))
        report = partial(self._report, f"batch {size}: warming up")
        warm_up = warmed_up(sides, self.seconds, self.clock, report)
        report = partial(self._report, f"batch {size}: measuring")
        times = times_in_turn(sides, self.seconds, self.clock, report)
        parts = None
        if provider == "cpu":
            self.progress(f"batch {size}: splitting the time", 0, None)
            graph = float(np.median(times[0][:, 1]))
            parts = profiled_parts(self.artifact.model, ready[0], self.threads, graph, self.clock)
            self.progress(f"batch {size}: splitting the time", 1, 1)
        return batch_result(size, times, warm_up, parts, copies=provider != "cpu")

    def _report(self, label: str, passed: float) -> None:
        self.progress(label, int(passed), max(1, int(self.seconds)))


def _artifact_side(session: Session, calls: list[list[InputFrame]], clock: Clock) -> Side:
    """Do what `predict_batch` does, and look at the clock in between: host preprocessing, graph, decision."""

    def side(number: int) -> tuple[float, ...]:
        frames = calls[number % len(calls)]
        started = clock()
        with session.lane(len(frames)) as lane:
            for frame, target in zip(frames, lane.frames, strict=True):
                session.write(frame, target)
            written = clock()
            outputs = lane.run()
            ran = clock()
            session.verdicts(outputs)
            decided = clock()
        return written - started, ran - written, decided - ran

    return side


def _bare_side(bare: Bare, ready: list[Frames], provider: str, clock: Clock) -> Side:
    placed = bare.runner([bare.tensor(frames) for frames in ready], provider)

    def side(number: int) -> tuple[float, ...]:
        run = placed(number)
        started = clock()
        run()
        return (clock() - started,)

    return side
