"""What the head costs: an artifact beside the same graph without a head, and beside the bare classifier.

    python benchmarks/head_cost.py [--quick] [--json FILE]

Networks of full size with random weights (classifier_graphs.py), heads over random prototypes and bank rows, opened as
`grood-edge` opens them, in one process. `network`: normalisation and classifier, from uint8 pixels to logits and
features; the artifact is that with the head. `classifier`: the classifier alone, from float32 pixels that somebody else
has normalised. `--bank auto` chooses by the images: none at all for ten animals, 4,096 rows for garments
(docs/method.md); here banks have none, 1,000 and 2,000 rows, int8. Every round opens all sides anew.

With one thread the time is CPU time of that thread, to which other programs add little; with two it is wall time.
The JSON's `details` have the slowest nodes of the head by onnxruntime's profile, and the growth of the file.
"""

import json
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from classifier_graphs import SIDE, classifier_model
from ratios import LEAST, WARM_UP, Found, Line, Target, Times, ratio_of, run_as_script

from grood_edge.conformal import DecisionRule
from grood_edge.export import PreprocessingOptions
from grood_edge.export.classifier import ClassifierGraph, ClassifierOptions, graph_from_onnx
from grood_edge.export.graph import attach_head, base_model
from grood_edge.ort import open_ort
from grood_edge.preprocessing import resolve_preprocessing
from grood_edge.scoring import IDENTITY, Head, OodHead, ScoreMap, class_distances, log_s_of

SECTION = "head cost"
ROUNDS, SECONDS, QUICK_SECONDS = 5, 4.0, 3.5  # seconds a round, all sides together
CALIBRATION, KNOTS = 1000, 16
PROFILED = 100


@dataclass(frozen=True)
class Kind:
    """A head: OOD prototypes, bank rows, the space that it reads, and what it may cost of `network`."""

    ood_prototypes: int
    rows: int
    space: str = "features"
    target: float | None = None

    def text(self) -> str:
        """Say which head this is."""
        bank = f"{self.rows:,} rows" if self.rows else "no bank"
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


SMALL = (Kind(1, 0), Kind(1, 1000, target=1.03), Kind(3, 1000, target=1.05), Kind(1, 1000, "logits", target=1.01))
LARGE = (Kind(1, 2000, target=1.10), Kind(3, 2000, target=1.10))


def quick_cases() -> Iterator[Case]:
    """Yield the cases that have targets, and one larger network."""
    for classes in (10, 100):
        yield Case("efficientnet-lite0", classes, 1, 1, SMALL)
    yield Case("efficientnet-lite0", 1000, 1, 1, LARGE)
    yield Case("resnet-18", 100, 1, 1, (Kind(1, 1000), Kind(3, 1000)))


def all_cases() -> Iterator[Case]:
    """Yield every network with every number of classes, batch and threads; targets stand where they were set."""
    for network in ("efficientnet-lite0", "resnet-18", "resnet-50"):
        for classes in (10, 100, 1000):
            for batch, threads in ((1, 1), (8, 1), (1, 2), (8, 2)):
                aimed = network == "efficientnet-lite0" and batch == threads == 1
                kinds: tuple[Kind, ...] = LARGE if classes == 1000 else (*SMALL, *LARGE)
                if not aimed:
                    kinds = tuple(Kind(k.ood_prototypes, k.rows) for k in kinds if k.space == "features")
                yield Case(network, classes, batch, threads, kinds)


def random_head(kind: Kind, classes: int, dimension: int) -> Head:
    """Return a head over random features; values are of ordinary size, so that nothing overflows or is denormal."""
    rng = np.random.default_rng(0)
    prototypes = 0.3 * np.abs(rng.standard_normal((classes, dimension)))
    bank = np.abs(prototypes[rng.integers(0, classes, kind.rows)] + 0.3 * rng.standard_normal((kind.rows, dimension)))
    mean = prototypes.mean(axis=0)
    points = (mean, mean + 0.1 * np.abs(rng.standard_normal(dimension)), np.zeros(dimension))[: kind.ood_prototypes]
    bend = ScoreMap(0.1, 0.2, np.linspace(-5, 5, KNOTS), np.full(KNOTS, 0.05)) if kind.ood_prototypes > 1 else IDENTITY
    heads = tuple(OodHead(p, _log_s(bank, prototypes, p), bend) for p in points)
    return Head(prototypes, bank, heads, "int8")


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


def interleaved(sides: list[Callable[[], Any]], seconds: float, threads: int) -> Times:
    """Call all sides in turn, each first as often; return milliseconds `[turns, sides]`.

    The call that counts follows one of its own kind, as in use: caches hold what it left there, not another network.
    """
    clock = time.thread_time if threads == 1 else time.perf_counter
    for _ in range(WARM_UP):
        for side in sides:
            side()
    times: list[list[float]] = []
    ends = time.perf_counter() + seconds
    while len(times) < LEAST or time.perf_counter() < ends:
        turn = [0.0] * len(sides)
        for index in np.roll(range(len(sides)), len(times)).tolist():
            sides[index]()
            started = clock()
            sides[index]()
            turn[index] = 1000 * (clock() - started)
        times.append(turn)
    return np.array(times)


def measured_case(case: Case, models: Models, seconds: float) -> list[Line]:
    """Time all sides of a case in turn; a line for the network, two for each head."""
    rounds = [interleaved(sides_of(models, case), seconds, case.threads) for _ in range(ROUNDS)]
    lines = [Line(SECTION, f"network: {case.text()}", "classifier", ratio_of(rounds, 1, 0), "ms")]
    for index, kind in enumerate(case.kinds, 2):
        target = Target("at most", kind.target) if kind.target else None
        what = f"{kind.text()}: {case.text()}"
        lines.append(Line(SECTION, what, "network", ratio_of(rounds, index, 1), "ms", target))
        lines.append(Line(SECTION, what, "classifier", ratio_of(rounds, index, 0), "ms"))
    return lines


def slowest_nodes(model: bytes, most: int = 12) -> dict[str, Any]:
    """Profile the head in its graph: median microseconds of its slowest nodes, of all of it, and of everything."""
    import onnxruntime

    with tempfile.TemporaryDirectory() as folder:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = 1, 3
        options.enable_profiling, options.profile_file_prefix = True, str(Path(folder) / "profile")
        options.add_session_config_entry("session.disable_quant_qdq", "1")  # as open_ort does
        session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        pixels = np.random.default_rng(0).integers(0, 256, (1, SIDE, SIDE, 3), np.uint8)
        for _ in range(PROFILED):
            session.run(None, {"image": pixels})
        events = json.loads(Path(session.end_profiling()).read_text())
    times: dict[str, list[int]] = {}
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            times.setdefault(f"{event['name'][: -len('_kernel_time')]} {event['args']['op_name']}", []).append(
                event["dur"]
            )
    medians = {name: float(np.median(values)) for name, values in times.items()}
    head = {name: value for name, value in medians.items() if name.startswith("grood/")}
    slowest = dict(sorted(head.items(), key=lambda item: -item[1])[:most])
    return {
        "slowest": slowest,
        "nodes of the head": len(head),
        "head us": sum(head.values()),
        "all us": sum(medians.values()),
    }


def file_growth(classes: int) -> dict[str, Any]:
    """Return how large an artifact's graph without bank is beside the classifier's file."""
    case = Case("efficientnet-lite0", classes, 1, 1, (Kind(1, 0),))
    models = models_of(case)
    tensors = {t.name: len(t.raw_data) for t in onnx.load_model_from_string(models.artifacts[0]).graph.initializer}
    return {
        "classes": classes,
        "classifier bytes": len(models.classifier),
        "ratio": round(len(models.artifacts[0]) / len(models.classifier), 4),
        "class prototypes bytes": tensors["grood/prototypes_t"],
    }


def measured(work: Path, quick: bool) -> Found:
    """Measure all cases, or those with targets."""
    lines: list[Line] = []
    for case in quick_cases() if quick else all_cases():
        lines += measured_case(case, models_of(case), QUICK_SECONDS if quick else SECONDS)
    shown = Case("efficientnet-lite0", 100, 1, 1, (Kind(1, 1000), Kind(3, 1000)))
    profiles = zip(shown.kinds, models_of(shown).artifacts, strict=True)
    details = {
        "profile": {kind.text(): slowest_nodes(model) for kind, model in profiles},
        "file": [file_growth(classes) for classes in (10, 100, 1000)],
    }
    return Found(tuple(lines), details=details)


if __name__ == "__main__":
    run_as_script(__doc__, measured)
