"""How the head's time grows with bank rows, classes, dimension and batch, and the fit's with images: fitted exponents.

    python benchmarks/growth.py [--quick] [--json FILE] [--plot FILE.svg]

The head alone, three OOD prototypes, int8 rows, random statistics, onnxruntime, one thread; around 1,000 rows, 100
classes, d 1280 and batch 1, one quantity at a time, all sizes in turn. Images: scale.py on features of 512, each number
in a process of its own. An exponent is the slope of a least squares line through log size and log time; the one of the
largest two sizes shows what remains when fixed costs have faded.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
from head_alone import HeadAlone
from plots import growth_plots
from ratios import interleaved, machine

from grood_edge.scoring import Head, OodHead, ScoreMap, class_distances, log_s_of

USUAL = {"bank rows": 1000, "classes": 100, "d": 1280, "batch": 1}
SIZES = {
    "bank rows": (250, 500, 1000, 2000, 4000, 8000),
    "classes": (10, 30, 100, 300, 1000, 3000),
    "d": (128, 256, 512, 1024, 2048, 4096),
    "batch": (1, 2, 4, 8, 16, 32, 64),
}
IMAGES = (12_500, 25_000, 50_000, 100_000)
QUICK_SIZES = {"batch": (1, 2, 4)}
SECONDS = 8.0


@dataclass(frozen=True)
class Growth:
    """Median `values` of a quantity at `sizes`, and the exponents: over all sizes, and between the largest two."""

    name: str
    unit: str
    sizes: tuple[int, ...]
    values: tuple[float, ...]
    exponent: float
    at_the_end: float


def growth_of(name: str, unit: str, sizes: Sequence[int], values: Sequence[float]) -> Growth:
    """Fit the exponents."""
    exponent = fitted_exponent(sizes, values)
    at_the_end = fitted_exponent(sizes[-2:], values[-2:])
    return Growth(name, unit, tuple(sizes), tuple(values), round(exponent, 3), round(at_the_end, 3))


def fitted_exponent(sizes: Sequence[int], values: Sequence[float]) -> float:
    """Return b of value = a size^b, least squares of the logarithms."""
    x, y = np.log(np.asarray(sizes, np.float64)), np.log(np.asarray(values, np.float64))
    x = x - x.mean()
    return float(x @ y / (x @ x))


def measured(quick: bool) -> list[Growth]:
    """Measure all quantities."""
    found = []
    for name, sizes in (QUICK_SIZES if quick else SIZES).items():
        sides = [head_run(USUAL | {name: size}) for size in sizes]
        times = interleaved(sides, 0 if quick else SECONDS, least=3 if quick else 15, warm_up=2)
        found.append(growth_of(name, "ms", sizes, (1000 * np.median(times, axis=0)).round(4).tolist()))
    return found if quick else [*found, *by_images()]


def head_run(sizes: dict[str, int]) -> Callable[[], np.ndarray]:
    """Make a head of these sizes, and features near its prototypes."""
    rng = np.random.default_rng(0)
    rows, classes, d, batch = (sizes[name] for name in USUAL)
    prototypes = rng.standard_normal((classes, d))
    bank = prototypes[rng.integers(0, classes, rows)] + 0.5 * rng.standard_normal((rows, d))
    distances = class_distances(bank, prototypes)
    heads = []
    for position in (prototypes.mean(axis=0), 0.5 * prototypes[0], np.zeros(d)):
        log_s = log_s_of(distances, np.linalg.norm(bank - position, axis=1), 1.0)
        heads.append(OodHead(position, log_s, ScoreMap(0.0, 0.2, np.linspace(-5, 5, 16), np.full(16, 0.01))))
    head = Head(prototypes, bank, tuple(heads), "int8")
    features = prototypes[rng.integers(0, classes, batch)] + 0.5 * rng.standard_normal((batch, d))
    return partial(HeadAlone(head), features.astype(np.float32))


def by_images() -> list[Growth]:
    """Run scale.py; return the growth of gathering, of fitting and of peak memory."""
    with tempfile.TemporaryDirectory() as folder:
        part = Path(folder) / "scale.json"
        command = [sys.executable, str(Path(__file__).parent / "scale.py"), "--images", *map(str, IMAGES)]
        subprocess.run([*command, "--json", str(part)], check=True, capture_output=True)
        runs = json.loads(part.read_text())["runs"]
    names = {"seconds_gathering": ("images, gathering", "s"), "seconds_fitting": ("images, fitting", "s"),
             "peak_mb": ("images, peak memory", "MB")}  # fmt: skip
    return [growth_of(*names[key], IMAGES, [run[key] for run in runs]) for key in names]


def table_text(found: Sequence[Growth]) -> str:
    """Return the exponents as a markdown table."""
    rows = ["| in | from | to | exponent | between the largest two |", "|---|---:|---:|---:|---:|"]
    for one in found:
        ends = " | ".join(
            f"{size:,}: {value:.3g} {one.unit}"
            for size, value in zip((one.sizes[0], one.sizes[-1]), (one.values[0], one.values[-1]), strict=True)
        )
        rows.append(f"| {one.name} | {ends} | **{one.exponent:.2f}** | {one.at_the_end:.2f} |")
    return "\n".join(rows)


def main() -> None:
    """Parse the options, measure, print the table, and write JSON and plots when asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="three batch sizes: shows that it works")
    parser.add_argument("--json", type=Path, help="write the result here")
    parser.add_argument("--plot", type=Path, help="write the plots here, as SVG")
    arguments = parser.parse_args()
    found = measured(arguments.quick)
    print(table_text(found))
    if arguments.json:
        document = {"machine": machine(), "growth": [asdict(one) for one in found]}
        arguments.json.write_text(json.dumps(document, indent=2) + "\n")
    if arguments.plot:
        arguments.plot.write_text(growth_plots([asdict(one) for one in found]))


if __name__ == "__main__":
    main()
