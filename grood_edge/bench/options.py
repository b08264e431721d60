"""What was asked of `grood-edge bench`, and whether it can be done."""

from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import numpy as np

from grood_edge.contract import Contract
from grood_edge.errors import UsageError
from grood_edge.runtime.choose import Choice

__all__ = ["BenchOptions", "batch_sizes", "parse_batches", "refuse_baseline", "require_possible"]

_USUAL = (1, 8)  # batch sizes
MAX_BATCH, MAX_SIZES, MAX_SECONDS, MAX_THREADS = 1024, 8, 3600.0, 1024
MAX_INPUT_BYTES = 1 << 30


@dataclass(frozen=True)
class BenchOptions:
    """What was asked for.

    batches: None takes 1 and 8, or what the artifact and the baseline take of these. seconds: of measuring a batch
    size, both sides together, and at most as long to warm up. baseline: a classifier's .onnx; None cuts the head off.
    """

    batches: tuple[int, ...] | None = None
    seconds: float = 10.0
    baseline: Path | None = None

    def __post_init__(self) -> None:
        sizes = self.batches
        if sizes is not None and not (
            1 <= len(set(sizes)) == len(sizes) <= MAX_SIZES and all(1 <= size <= MAX_BATCH for size in sizes)
        ):
            raise UsageError(
                f"--batch {','.join(map(str, sizes))[:40]}; expected one to {MAX_SIZES} different numbers from 1 to "
                f"{MAX_BATCH:,}, such as 1,8"
            )
        if not 0 < self.seconds <= MAX_SECONDS:
            raise UsageError(f"--seconds {self.seconds:g}; expected a number above 0, at most {MAX_SECONDS:g}")


def parse_batches(text: str) -> tuple[int, ...]:
    """Read `1,8`.

    Raises:
        UsageError: anything else than whole numbers.
    """
    parts = [part.strip() for part in text.split(",")]
    if len(text) > 80 or not all(part.isascii() and part.isdigit() for part in parts):
        raise UsageError(f"--batch {text[:40]!r}; expected whole numbers separated by commas, such as 1,8")
    return tuple(int(part) for part in parts)


def require_possible(options: BenchOptions, choice: Choice) -> None:
    """Find contradictions before anything is opened.

    Raises:
        UsageError: names the options.
    """
    if choice.threads is not None and not 1 <= choice.threads <= MAX_THREADS:
        raise UsageError(f"--threads {choice.threads}; expected a number from 1 to {MAX_THREADS:,}")
    if choice.backend in ("tensorrt", "tensorrt-rtx"):
        if choice.threads is not None:
            raise UsageError(
                f"--threads are onnxruntime's, and --backend {choice.backend} was asked for; leave one out"
            )
        if options.baseline is not None:
            refuse_baseline(choice.backend)


def refuse_baseline(provider: str) -> NoReturn:
    """Say why an engine is not compared with a classifier file.

    Raises:
        UsageError: always.
    """
    raise UsageError(
        f"--baseline runs on onnxruntime, and the artifact on {provider}: that would compare two runtimes. Leave it "
        "out, or use --backend onnxruntime"
    )


def batch_sizes(options: BenchOptions, contract: Contract) -> tuple[int, ...]:
    """Return the batch sizes.

    Raises:
        UsageError: the artifact takes single images, or the images of a batch would need more than 1 GiB.
    """
    single = contract.classifier.batch == "1"
    sizes = options.batches or (_USUAL[:1] if single else _USUAL)
    if single and sizes != (1,):
        raise UsageError(f"--batch {','.join(map(str, sizes))}; this artifact takes one image at a time: --batch 1")
    p = contract.preprocessing
    needed = max(sizes) * max(int(np.prod(p.input_shape)), 4 * p.height * p.width * p.channels)
    if needed > MAX_INPUT_BYTES:
        raise UsageError(
            f"--batch {max(sizes)} needs {needed:,} bytes for its images alone; at most {MAX_INPUT_BYTES:,} are "
            "taken. Name a smaller batch"
        )
    return sizes
