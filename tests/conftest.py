"""Fixtures that many tests share: real digits, a network trained on them, and the artifact made of both."""
# ruff: noqa: E402

import importlib
import json
import signal
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

# Whatever the package imports while jaxtyping's hook is at work is compiled anew: it looks for bytecode of its own.
import beartype  # noqa: F401
import onnx  # noqa: F401
import pytest
import sklearn.datasets  # noqa: F401
import torch

from tests import hook

hook.install()

from grood_edge.demo.images import DemoImages, write_images
from grood_edge.demo.network import DigitNetwork, trained_network
from grood_edge.demo.run import DemoReport, TestSet, run_demo
from grood_edge.export import ExportOptions, PreprocessingOptions, export_model
from tests.shared import made_once

# A shell that starts the suite in the background leaves SIGINT ignored, and commands under test would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)

DIGIT_OPTIONS = ExportOptions(preprocessing=PreprocessingOptions(input_size=(32, 32), mean=(0.0,), std=(1.0,)))


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> DemoImages:
    """Folders of PNG: digits 0-6 in train, calibration and test; 7-9 near; photo crops and noise far. Read-only."""
    folder = made_once(tmp_path_factory, "digits", write_images)
    return DemoImages(*(folder / name for name in ("train", "calibration", "test", "near", "far-photos", "far-noise")))


@pytest.fixture(scope="session")
def network(tmp_path_factory: pytest.TempPathFactory, digits: DemoImages) -> DigitNetwork:
    """A small CNN trained on digits 0-6, in eval mode; inputs [N, 1, 32, 32], 64 features, 7 classes."""
    folder = made_once(
        tmp_path_factory, "network", lambda out: torch.save(trained_network(digits.train).state_dict(), out / "weights")
    )
    trained = DigitNetwork(classes=7)
    trained.load_state_dict(torch.load(folder / "weights"))
    return trained.eval()


@pytest.fixture(scope="session")
def artifact_path(tmp_path_factory: pytest.TempPathFactory, digits: DemoImages, network: DigitNetwork) -> Path:
    """The artifact of that network, calibrated on unseen digits. Read-only: copy it before changing it."""
    options = ExportOptions(calibration_data=digits.calibration, preprocessing=DIGIT_OPTIONS.preprocessing)
    folder = made_once(
        tmp_path_factory, "artifact", lambda out: export_model(network, digits.train, out / "digits.onnx", options)
    )
    return folder / "digits.onnx"


@dataclass(frozen=True)
class Demo:
    """What `grood-edge demo` left and returned; nothing else was in the folder around it. Read-only."""

    folder: Path
    report: DemoReport


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Demo:
    def make(out: Path) -> None:
        (out / "around").mkdir()
        report = run_demo(out / "around" / "grood-demo")
        (out / "report.json").write_text(json.dumps(asdict(report), default=str))

    made = made_once(tmp_path_factory, "demo", make)
    told = json.loads((made / "report.json").read_text())
    told |= {
        "artifact": Path(told["artifact"]),
        "sets": tuple(TestSet(**one) for one in told["sets"]),
        "paths": {name: Path(path) for name, path in told["paths"].items()},
    }
    return Demo(made / "around" / "grood-demo", DemoReport(**told))


@pytest.fixture(scope="module")
def benchmark_script() -> Iterator[Any]:
    """Import a script of benchmarks/ by name, as they import one another."""
    folder, before = Path(__file__).parents[1] / "benchmarks", set(sys.modules)
    sys.path.insert(0, str(folder))
    yield importlib.import_module
    sys.path.remove(str(folder))
    for name in set(sys.modules) - before:
        if Path(getattr(sys.modules[name], "__file__", None) or "").parent == folder:
            del sys.modules[name]
