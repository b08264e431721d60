"""What the head costs: an artifact beside the same graph without a head, and beside the bare classifier.

    python benchmarks/head_cost.py [--quick] [--json FILE]

Networks of full size with random weights (classifier_graphs.py), heads over random prototypes and bank rows, opened as
`grood-edge` opens them, in one process. `network`: normalisation and classifier, from uint8 pixels to logits and
features; the artifact is that with the head. `classifier`: the classifier alone, from float32 pixels that somebody else
has normalised. `--bank auto` chooses by the images: none at all for ten animals, 4,096 rows for garments
(docs/method.md); here banks have none, 1,000 and 2,000 rows, int8 unless said. Every round opens all sides anew, and
what has a target takes the most rounds. A target is held against both: over `network` it is what the head adds, over
`classifier` what a user sees, who pays for the normalisation as well.

With one thread the time is CPU time of that thread, to which other programs add little; with two it is wall time, and
each side waits first until the other sessions' threads sleep: onnxruntime lets them spin for some 35 ms after a run.
The last lines are sizes: the graph of an artifact without a bank over the classifier's file. The JSON's `details` have
the profile of each head that has a target (head_profile.py).
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
from classifier_graphs import SIDE, classifier_model
from head_profile import Profile, group_times
from ratios import Found, Line, Target, Times, Timing, counted, interleaved, ratio_of, run_as_script

from grood_edge.conformal import DecisionRule
from grood_edge.export import PreprocessingOptions
from grood_edge.export.classifier import ClassifierGraph, ClassifierOptions, graph_from_onnx
from grood_edge.export.graph import attach_head, base_model
from grood_edge.ort import open_ort
from grood_edge.preprocessing import resolve_preprocessing
from grood_edge.scoring import IDENTITY, BankDtype, Head, OodHead, ScoreMap, class_distances, log_s_of

ROUNDS, ROUNDS_AIMED, SECONDS = 3, 8, 3.5  # seconds a round, all sides together
LEAST, WARM_UP = 5, 3  # turns
PAUSE = 0.1  # seconds
CALIBRATION, KNOTS = 1000, 16
FILE_SIZE = Target("at most", 1.02)


@dataclass(frozen=True)
class Kind:
    """A head: OOD prototypes, bank rows, the space that it reads, what it may cost, and how the rows are stored."""

    ood_prototypes: int
    rows: int
    space: Literal["features", "logits"] = "features"
    target: float | None = None
    bank_dtype: BankDtype = "int8"

    def text(self) -> str:
        """Say which head this is."""
        stored = "" if self.bank_dtype == "int8" else f" {self.bank_dtype}"
        bank = f"{self.rows:,}{stored} rows" if self.rows else "no bank"
        space = ", logit space" if self.space == "logits" else ""
        return f"{self.ood_prototypes} OOD prototype{'s' * (self.ood_prototypes > 1)}, {bank}{space}"


@dataclass(frozen=True)
class Case:
    """A network with the heads that are measured on it, all in turn."""

    network: str
    classes: int
    batch: int
    threads: int
    kinds: tuple[Kind, ...]

    def text(self) -> str:
        """Say which network, batch and threads."""
        threads = f"{self.threads} thread{'s' * (self.threads > 1)}"
        return f"{self.network}, {self.classes:,} classes, batch {self.batch}, {threads}"

    @property
    def rounds(self) -> int:
        """How many rounds are measured."""
        return ROUNDS_AIMED if any(kind.target for kind in self.kinds) else ROUNDS


SMALL = (Kind(1, 0), Kind(1, 1000, target=1.03), Kind(3, 1000, target=1.05), Kind(1, 1000, "logits", target=1.01))
LARGE = (Kind(1, 2000, target=1.10), Kind(3, 2000, target=1.10))
FLOAT32 = Kind(1, 1000, bank_dtype="float32")
PLAIN = (Kind(1, 1000), Kind(3, 1000))
CASES = (  # every target, and every value of each quantity at least once; all combinations would take hours
    Case("efficientnet-lite0", 10, 1, 1, SMALL),
    Case("efficientnet-lite0", 100, 1, 1, (*SMALL, FLOAT32)),
    Case("efficientnet-lite0", 1000, 1, 1, LARGE),
    Case("efficientnet-lite0", 100, 8, 1, PLAIN),
    Case("efficientnet-lite0", 100, 1, 2, PLAIN),
    Case("resnet-18", 100, 1, 1, (Kind(1, 0), *PLAIN)),
    Case("resnet-18", 1000, 8, 2, (Kind(3, 2000),)),
    Case("resnet-50", 10, 1, 1, PLAIN),
    Case("resnet-50", 1000, 1, 2, (Kind(3, 2000),)),
)


def random_head(kind: Kind, classes: int, dimension: int) -> Head:
    """Return a head over random features; values are of ordinary size, so that nothing overflows or is denormal."""
    rng = np.random.default_rng(0)
    prototypes = 0.3 * np.abs(rng.standard_normal((classes, dimension)))
    bank = np.abs(prototypes[rng.integers(0, classes, kind.rows)] + 0.3 * rng.standard_normal((kind.rows, dimension)))
    mean = prototypes.mean(axis=0)
    points = (mean, mean + 0.1 * np.abs(rng.standard_normal(dimension)), np.zeros(dimension))[: kind.ood_prototypes]
    bend = ScoreMap(0.1, 0.2, np.linspace(-5, 5, KNOTS), np.full(KNOTS, 0.05)) if kind.ood_prototypes > 1 else IDENTITY
    heads = tuple(OodHead(p, _log_s(bank, prototypes, p), bend) for p in points)
    return Head(prototypes, bank, heads, kind.bank_dtype)


def _log_s(bank: np.ndarray, prototypes: np.ndarray, point: np.ndarray) -> np.ndarray:
    if not len(bank):
        return np.zeros(0)
    return log_s_of(class_distances(bank, prototypes), np.linalg.norm(bank - point, axis=1), 1.0)


@dataclass(frozen=True)
class Models:
    """The sides of a case as files: `classifier`, `network`, and one artifact graph for each kind of head."""

    graph: ClassifierGraph
    classifier: bytes
    network: bytes
    artifacts: tuple[bytes, ...]


def models_of(case: Case) -> Models:
    """Build the sides of a case."""
    made = classifier_model(case.network, case.classes)
    graph = graph_from_onnx(made, "onnx", ClassifierOptions())
    network = base_model(graph, resolve_preprocessing(PreprocessingOptions(preset="imagenet"), 3, (SIDE, SIDE)))
    scores = np.sort(np.random.default_rng(1).standard_normal(CALIBRATION)).astype(np.float32)
    rule = DecisionRule((scores,), (39,), np.zeros(case.classes, np.int32))
    artifacts = []
    for kind in case.kinds:
        dimension = graph.dimension if kind.space == "features" else case.classes
        artifacts.append(attach_head(network, random_head(kind, case.classes, dimension), kind.space, rule))
    return Models(
        graph,
        made.SerializeToString(),
        network.SerializeToString(),
        tuple(model.SerializeToString() for model in artifacts),
    )


def sides_of(models: Models, case: Case) -> list[Callable[[], Any]]:
    """Open all sides anew: classifier, network, artifacts."""
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (case.batch, SIDE, SIDE, 3), np.uint8)
    normal = rng.standard_normal((case.batch, 3, SIDE, SIDE)).astype(np.float32)
    feeds = [{"image": normal}, *[{"image": pixels}] * (1 + len(models.artifacts))]
    opened = [open_ort(m, threads=case.threads) for m in (models.classifier, models.network, *models.artifacts)]

    def side(index: int) -> Callable[[], Any]:
        model, fed = opened[index], feeds[index]
        return lambda: model.run(fed)

    return [side(index) for index in range(len(opened))]


def times_of(sides: Sequence[Callable[[], Any]], seconds: float, threads: int, least: int = LEAST) -> Times:
    """Call all sides in turn, each after a call of its own; return milliseconds `[turns, sides]`."""
    timing = Timing(time.thread_time, True) if threads == 1 else Timing(time.perf_counter, True, PAUSE)
    return 1000 * interleaved(sides, seconds, least, WARM_UP, timing)


def measured_case(case: Case, models: Models, quick: bool) -> list[Line]:
    """Time all sides of a case in turn; a line for the network, two for each head."""
    section = f"Head cost: {case.text()}"
    count, seconds, least = (1, 0.0, 2) if quick else (case.rounds, SECONDS, LEAST)
    rounds = [times_of(sides_of(models, case), seconds, case.threads, least) for _ in range(count)]
    lines = [Line(section, "network with its normalisation", "classifier", ratio_of(rounds, 1, 0), "ms")]
    for index, kind in enumerate(case.kinds, 2):
        target = Target("at most", kind.target) if kind.target else None
        for against, under in (("network", 1), ("classifier", 0)):
            lines.append(Line(section, kind.text(), against, ratio_of(rounds, index, under), "ms", target))
    return lines


def profiles_of(case: Case, models: Models, lines: Sequence[Line], quick: bool) -> list[Profile]:
    """Profile each head of a case that has a target; `lines` are those of the case."""
    image = np.random.default_rng(0).integers(0, 256, (case.batch, SIDE, SIDE, 3), np.uint8)
    profiles = []
    for kind, model in zip(case.kinds, models.artifacts, strict=True):
        if kind.target:
            (line,) = (one for one in lines if (one.what, one.against) == (kind.text(), "network"))
            allowed, added = (kind.target - 1) * line.ratio.under, line.ratio.over - line.ratio.under
            times, others = group_times(model, image, quick)
            head = f"{case.classes:,} classes, {kind.text()}"
            profiles.append(Profile(head, kind.target, 1000 * allowed, 1000 * added, times, others))
    return profiles


def file_line(classes: int) -> Line:
    """Return how large an artifact's graph without bank is beside the classifier's file."""
    models = models_of(Case("efficientnet-lite0", classes, 1, 1, (Kind(1, 0),)))
    tensors = {t.name: len(t.raw_data) for t in onnx.load_model_from_string(models.artifacts[0]).graph.initializer}
    note = f"class prototypes {tensors['grood/prototypes_t'] / 1e6:.2f} MB"
    ratio = counted(len(models.artifacts[0]) / 1e6, len(models.classifier) / 1e6)
    what = f"artifact's graph, {classes:,} classes"
    return Line("File: efficientnet-lite0, no bank, no probes", what, "classifier's file", ratio, "MB", FILE_SIZE, note)


def measured(work: Path, quick: bool) -> Found:
    """Measure all cases; the quick way, a few calls of each."""
    lines: list[Line] = []
    profiles: list[Profile] = []
    for case in CASES:
        models = models_of(case)
        found = measured_case(case, models, quick)
        lines += found
        profiles += profiles_of(case, models, found, quick)
    lines += [file_line(classes) for classes in (10, 100, 1000)]
    return Found(tuple(lines), details={"profile": [asdict(one) for one in profiles]})


if __name__ == "__main__":
    run_as_script(__doc__, measured)
