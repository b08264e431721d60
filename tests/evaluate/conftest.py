"""One evaluation of the digit artifact with everything on, shared by the tests that read it."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from grood_edge.demo.images import DemoImages
from grood_edge.evaluate.evaluation import EvaluateOptions, evaluate
from grood_edge.evaluate.results import Evaluation
from grood_edge.images import find_images
from grood_edge.runtime.session import Session, open_session

OOD = ("near", "far-photos")


def copied(source: Path, target: Path, every: int = 1) -> Path:
    """Copy every `every`-th image of each folder, folders kept."""
    groups: dict[Path, list[Path]] = {}
    for path in find_images(source):
        groups.setdefault(path.parent, []).append(path)
    for paths in groups.values():
        for path in paths[::every]:
            goal = target / path.relative_to(source)
            goal.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, goal)
    return target


@pytest.fixture(scope="session")
def few(tmp_path_factory: pytest.TempPathFactory, digits: DemoImages) -> Path:
    """A fifth of the test images: `test` with class folders, and the OOD folders."""
    folder = tmp_path_factory.mktemp("few")
    copied(digits.test, folder / "test", 5)
    for name, source in (("near", digits.near), ("far-photos", digits.far_photos)):
        copied(source, folder / name, 5)
    return folder


@pytest.fixture
def session(artifact_path: Path) -> Iterator[Session]:
    with open_session(artifact_path) as opened:
        yield opened


@pytest.fixture(scope="session")
def options(artifact_path: Path, digits: DemoImages, few: Path) -> EvaluateOptions:
    ood = tuple((name, few / name) for name in OOD)
    return EvaluateOptions(artifact_path, few / "test", ood, corrupt=True, baselines=True, fit=str(digits.train))


@pytest.fixture(scope="session")
def evaluation(options: EvaluateOptions) -> Evaluation:
    with open_session(options.model) as opened:
        return evaluate(opened, options)
