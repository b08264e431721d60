"""The demo: train, export, verify, score; everything below one folder that appears only when all went well."""

import json
import shutil
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from grood_edge.contract_rows import guarantee_sentence
from grood_edge.demo.images import SIZE, DemoImages, write_images
from grood_edge.demo.network import trained_network
from grood_edge.demo.picture import draw_overview
from grood_edge.errors import OutputError, UsageError, VerificationError
from grood_edge.evaluate.metrics import auroc, fpr95
from grood_edge.export import ExportOptions, PreprocessingOptions, export_model
from grood_edge.export.fit import MAX_SEED
from grood_edge.export.torch_classifier import onnx_from_torch
from grood_edge.probes import replay_probes
from grood_edge.progress import Progress, silent
from grood_edge.runtime.score import ScoreRow, row_writer, score_images
from grood_edge.runtime.session import Session, open_session

__all__ = ["DemoReport", "TestSet", "run_demo"]

MARKER = "demo.json"


@dataclass(frozen=True)
class TestSet:
    """One scored test set; AUROC and FPR95 against the ID test images, None for those themselves."""

    name: str
    images: int
    auroc: float | None
    fpr95: float | None
    flagged_share: float


@dataclass(frozen=True)
class DemoReport:
    """All that the demo measured and wrote."""

    artifact: Path
    accuracy: float
    sets: tuple[TestSet, ...]
    guarantee: str
    seconds: float
    paths: dict[str, Path]


def run_demo(out: Path, seed: int = 0, force: bool = False, progress: Progress = silent) -> DemoReport:
    """Run the whole demo into the folder `out`.

    Raises:
        UsageError: a seed out of range.
        OutputError: `out` cannot be written, or exists (an earlier demo is replaced with `force`, anything else never).
        VerificationError: the artifact failed its own probes.
    """
    _check_folder(out, force)
    if not 0 <= seed <= MAX_SEED:
        raise UsageError(f"--seed {seed}; expected a number from 0 to {MAX_SEED}")
    try:
        return _run(out, seed, progress)
    except OSError as error:
        raise OutputError(f"cannot write the demo to {out}: {error.strerror or error}; nothing was changed") from error


def _run(out: Path, seed: int, progress: Progress) -> DemoReport:
    started = time.monotonic()
    work = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.resolve().parent))
    try:
        images = write_images(work / "images", seed)
        artifact = _export(images, work, seed, progress)
        with open_session(artifact) as session:
            _verify(session)
            rows = _score(session, images, (work, out), progress)
            guarantee = guarantee_sentence(session.contract)
        draw_overview(rows, work / "overview.png")
        paths = {name: out / name for name in sorted(p.name for p in work.iterdir())}
        accuracy = float(np.mean([row.class_name == Path(row.path).parent.name for row in rows[_ID]]))
        report = DemoReport(
            out / artifact.name, accuracy, _sets(rows), guarantee, round(time.monotonic() - started, 1), paths
        )
        (work / MARKER).write_text(json.dumps(asdict(report), indent=2, default=str) + "\n")
        if out.exists():
            shutil.rmtree(out)
        work.chmod(0o755)
        work.rename(out)
        return report
    finally:
        shutil.rmtree(work, ignore_errors=True)


_ID = "ID test: digits 0-6"


def _check_folder(out: Path, force: bool) -> None:
    if not out.resolve().parent.is_dir():
        raise OutputError(f"the folder {out.resolve().parent} does not exist; create it first")
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not (out / MARKER).is_file():
        raise OutputError(f"{out} exists and is no earlier demo; choose another folder with --out")
    if not force:
        raise OutputError(f"{out} holds an earlier demo; use --force to replace it, or --out for another folder")


def _export(images: DemoImages, work: Path, seed: int, progress: Progress) -> Path:
    network = trained_network(images.train, seed, progress)
    progress("tracing the network", 0, None)
    classifier, _ = onnx_from_torch(network, None, (SIZE, SIZE))
    progress("tracing the network", 1, 1)
    (work / "classifier.onnx").write_bytes(classifier.SerializeToString())
    options = ExportOptions(
        calibration_data=images.calibration,
        preprocessing=PreprocessingOptions(mean=(0.0,), std=(1.0,)),
        seed=seed,
    )
    export_model(work / "classifier.onnx", images.train, work / "model.onnx", options, progress)
    return work / "model.onnx"


def _verify(session: Session) -> None:
    report = replay_probes(session.contract, session.backend.run, "cpu")
    if not report.passed:
        raise VerificationError(f"{report.flips} probes flipped, largest score error {report.largest_error:.1e}")


def _score(
    session: Session, images: DemoImages, folders: tuple[Path, Path], progress: Progress
) -> dict[str, list[ScoreRow]]:
    work, out = folders
    sets = {
        _ID: images.test,
        "near-OOD: digits 7-9": images.near,
        "far-OOD: photos": images.far_photos,
        "far-OOD: noise": images.far_noise,
    }
    found: dict[str, list[ScoreRow]] = {}
    for name, folder in sets.items():
        rows: list[ScoreRow] = []
        score_images(session, [folder], rows.append, progress=progress)
        with row_writer(work / f"scores-{folder.name}.jsonl", force=False) as write:
            for row in rows:
                write(replace(row, path=str(out / Path(row.path).relative_to(work))))  # where it will lie in the end
        found[name] = rows
    return found


def _sets(rows: dict[str, list[ScoreRow]]) -> tuple[TestSet, ...]:
    scores = {name: np.array([row.ood_score for row in found], np.float32) for name, found in rows.items()}
    return tuple(
        TestSet(
            name=name,
            images=len(found),
            auroc=None if name == _ID else auroc(scores[_ID], scores[name]),
            fpr95=None if name == _ID else fpr95(scores[_ID], scores[name]),
            flagged_share=float(np.mean([row.is_ood for row in found])),
        )
        for name, found in rows.items()
    )
