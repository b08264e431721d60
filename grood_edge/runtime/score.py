"""Score files, folders, globs and .npz archives: one row an image, streamed to JSON lines, CSV or Parquet."""

import csv
import json
import os
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import AbstractContextManager, closing, contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from grood_edge.arrays import Frame, InputFrame
from grood_edge.decoding import decoded
from grood_edge.errors import DatasetError, MissingExtraError, UsageError
from grood_edge.images import UNREADABLE_LIMIT, UnreadableImageError, find_images, load_image, name_some, open_npz
from grood_edge.progress import Progress, silent
from grood_edge.publishing import published
from grood_edge.runtime.session import Session

__all__ = [
    "ScoreRow",
    "ScoreSummary",
    "require_batch_size",
    "require_readable",
    "row_writer",
    "rows_of",
    "score_images",
    "summarised",
]

_PARQUET_ROWS = 4096
_ODD_NAMES = "backslashreplace"  # a byte that is no UTF-8 becomes \udcXX: JSON's own way to write what Python has


@dataclass(frozen=True)
class ScoreRow:
    """One image. `logit_margin` is the largest logit less the second, None where the logits are not finite.

    The last four are there with `explain`: see `explain.Reason`; `log_s` is the largest over the OOD prototypes.
    """

    path: str
    class_id: int
    class_name: str
    logit_margin: float | None
    ood_score: float
    p_value: float
    is_ood: bool
    valid: bool
    nearest_class: str | None = None
    log_s: float | None = None
    bank_class: str | None = None
    bank_path: str | None = None


@dataclass(frozen=True)
class ScoreSummary:
    """Counts over all rows; `unreadable` holds (path, reason)."""

    images: int
    flagged: int
    invalid: int
    classes: dict[str, int]
    unreadable: tuple[tuple[str, str], ...]

    @property
    def flagged_share(self) -> float:
        """Share of the images with `is_ood`."""
        return self.flagged / max(1, self.images)


Write = Callable[[ScoreRow], None]


def score_images(
    session: Session,
    sources: Iterable[str | Path],
    write: Write,
    batch_size: int = 32,
    progress: Progress = silent,
    explain: bool = False,
) -> ScoreSummary:
    """Score every image of the sources, in order, and hand each row to `write`; with `explain`, reasons as well.

    Raises:
        DatasetError: a source is missing or empty.
        UsageError: a batch size below 1.
        BackendError: the device failed.
        ArtifactError: with `explain`, as `Session.predict`.
    """
    require_batch_size(batch_size)
    parts = [_open_source(source) for source in sources]
    total = sum(count for count, _ in parts)
    unreadable: list[tuple[str, str]] = []
    # Closed here: the traceback of an error would keep the threads that decode alive.
    with closing(_batches(parts, session, batch_size, unreadable)) as prepared:
        batches = (rows_of(session, names, frames, explain) for names, frames in prepared)
        return summarised(batches, unreadable, write, lambda done: progress("scoring", done, total))


def require_batch_size(size: int) -> None:
    """Refuse a batch without images.

    Raises:
        UsageError: a batch size below 1.
    """
    if size < 1:
        raise UsageError(f"--batch-size {size}; expected a number from 1")


def summarised(
    batches: Iterable[Iterable[ScoreRow]],
    unreadable: list[tuple[str, str]],
    write: Write,
    report: Callable[[int], None],
) -> ScoreSummary:
    """Hand every row to `write` and count; `unreadable` may grow while `batches` are read."""
    classes: Counter[str] = Counter()
    flagged = invalid = done = 0
    for rows in batches:
        for row in rows:
            write(row)
            flagged += row.is_ood
            invalid += not row.valid
            classes[row.class_name] += 1
            done += 1
        report(done + len(unreadable))
    return ScoreSummary(done, flagged, invalid, dict(classes.most_common()), tuple(unreadable))


def require_readable(summary: ScoreSummary) -> None:
    """Fail a run in which too much was unreadable; the rows of the others are kept.

    Raises:
        DatasetError: more than 1 % of the images are unreadable; names some.
    """
    total = summary.images + len(summary.unreadable)
    if len(summary.unreadable) > UNREADABLE_LIMIT * total:
        shown = name_some(summary.unreadable)
        raise DatasetError(
            f"{len(summary.unreadable)} of {total} images cannot be read: {shown}. The others were scored; repair or "
            "remove these, or accept it with --allow-unreadable"
        )


def row_writer(path: Path, force: bool) -> AbstractContextManager[Write]:
    """Open a table of rows for writing; it appears at `path` only when the block ends well.

    Raises:
        UsageError: the suffix is none of .jsonl, .csv, .parquet.
        MissingExtraError: .parquet without pyarrow.
        OutputError: the file cannot be written, or exists without `force`.
    """
    writers = {".jsonl": _json_lines, ".csv": _csv, ".parquet": _parquet}
    if path.suffix.lower() not in writers:
        raise UsageError(f"--out {path}: expected a name ending in {', '.join(writers)}")
    return writers[path.suffix.lower()](path, force)


Source = tuple[int, Iterator[tuple[str, Callable[[], Frame]]]]


def _open_source(source: str | Path) -> Source:
    path = Path(source)
    if os.path.isfile(path) and path.suffix.lower() == ".npz":  # False for a name that is too long
        archive = open_npz(path)
        named = ((f"{source}[{index}]", frame) for index, frame in enumerate(archive.frames()))
        return len(archive), (
            (name, [frame].pop) for name, frame in named
        )  # taken once, and not held until it is scored
    paths = find_images(source)
    return len(paths), ((str(p), lambda p=p: load_image(p)) for p in paths)


def _batches(
    parts: list[Source], session: Session, size: int, unreadable: list[tuple[str, str]]
) -> Generator[tuple[list[str], list[InputFrame]], None, None]:
    """Load and resize at once: a batch of full camera frames would be a hundred times larger.

    A batch is what can be read of `size` images that follow each other, so that shards of an archive have the same.
    """
    names: list[str] = []
    frames: list[InputFrame] = []
    every = (image for _, images in parts for image in images)
    for place, ((name, _), frame) in enumerate(decoded(every, lambda image: session.prepare(image[1]()))):
        if isinstance(frame, UnreadableImageError):
            unreadable.append((name, str(frame)))
        else:
            names.append(name)
            frames.append(frame)
        if (place + 1) % size == 0 and frames:
            yield names, frames
            names, frames = [], []
    if frames:
        yield names, frames


def rows_of(session: Session, names: list[str], frames: list[InputFrame], explain: bool) -> Iterator[ScoreRow]:
    """Run one batch of prepared frames, and say what the session says about each."""
    outputs = session.infer_prepared(np.stack(frames))
    top_two = np.partition(outputs.logits, -2, axis=1)[:, -2:]
    with np.errstate(invalid="ignore"):
        margins = top_two[:, 1] - top_two[:, 0]
    for name, margin, verdict in zip(names, margins, session.verdicts(outputs, explain), strict=True):
        reason = verdict.reason
        yield ScoreRow(
            path=name,
            class_id=verdict.class_id,
            class_name=verdict.class_name,
            logit_margin=float(margin) if np.isfinite(margin) else None,
            ood_score=verdict.ood_score,
            p_value=verdict.p_value,
            is_ood=verdict.is_ood,
            valid=verdict.valid,
            nearest_class=reason.nearest_class if reason else None,
            log_s=max(reason.log_s.values()) if reason else None,
            bank_class=reason.bank_class if reason else None,
            bank_path=reason.bank_path if reason else None,
        )


@contextmanager
def _json_lines(path: Path, force: bool) -> Iterator[Write]:
    with published(path, force) as temporary, temporary.open("w", encoding="ascii") as file:
        # ASCII alone: names may hold what terminals obey, and bytes that are no UTF-8
        yield lambda row: print(json.dumps(asdict(row), allow_nan=False), file=file)


@contextmanager
def _csv(path: Path, force: bool) -> Iterator[Write]:
    with (
        published(path, force) as temporary,
        temporary.open("w", encoding="utf-8", errors=_ODD_NAMES, newline="") as file,
    ):
        writer = csv.writer(file)
        writer.writerow([field.name for field in fields(ScoreRow)])
        yield lambda row: writer.writerow(asdict(row).values())


@contextmanager
def _parquet(path: Path, force: bool) -> Iterator[Write]:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise MissingExtraError("pyarrow", "parquet", "Writing .parquet") from error
    kinds: dict[str, Any] = {"class_id": pa.int32(), "is_ood": pa.bool_(), "valid": pa.bool_()}
    kinds |= dict.fromkeys(("logit_margin", "ood_score", "p_value", "log_s"), pa.float32())
    schema = pa.schema([(field.name, kinds.get(field.name, pa.string())) for field in fields(ScoreRow)])
    pending: list[dict[str, object]] = []
    with published(path, force) as temporary, pq.ParquetWriter(temporary, schema) as writer:

        def flush() -> None:
            writer.write_table(pa.Table.from_pylist(pending, schema))
            pending.clear()

        def write(row: ScoreRow) -> None:
            pending.append(asdict(row) | {"path": row.path.encode("utf-8", _ODD_NAMES).decode()})
            if len(pending) == _PARQUET_ROWS:
                flush()

        yield write
        flush()
