"""benchmarks/: the pure parts of `make bench`, and the parts that are quick enough to run."""

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest

from grood_edge.artifact import read_artifact
from grood_edge.demo.images import DemoImages
from grood_edge.images import find_images, load_image
from grood_edge.runtime.selftest import MODEL
from grood_edge.scoring import Head, OodHead, class_distances, log_s_of, ood_scores

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
PAGE = BENCHMARKS.parent / "docs" / "performance.md"


@pytest.fixture(scope="module")
def module() -> Iterator[Any]:
    """Import benchmarks by name, as their scripts import one another."""
    before = set(sys.modules)
    sys.path.insert(0, str(BENCHMARKS))
    yield importlib.import_module
    sys.path.remove(str(BENCHMARKS))
    for name in set(sys.modules) - before:
        if Path(getattr(sys.modules[name], "__file__", None) or "").parent == BENCHMARKS:
            del sys.modules[name]


@pytest.fixture(scope="module")
def ratios(module: Any) -> ModuleType:
    return module("ratios")  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def bench(module: Any) -> ModuleType:
    return module("bench")  # type: ignore[no-any-return]


def line(ratios: ModuleType, sense: str, target: float) -> Any:
    ratio = ratios.Ratio(2.0, 1.8, 2.2, 4.0, 2.0, 40)
    return ratios.Line("Start", "`ours`", "theirs", ratio, "ms", ratios.Target(sense, target))


class TestRatios:
    def test_the_ratio_lies_in_its_interval(self, ratios: ModuleType) -> None:
        times = np.random.default_rng(0).uniform(0.9, 1.1, (40, 2)) * [1.0, 2.0]
        found = ratios.ratio_of([times, 3 * times], over=1, under=0)
        assert 1.8 < found.low <= found.value <= found.high < 2.2
        assert found.turns == 80

    def test_every_side_is_called_as_often_and_each_goes_first_in_turn(self, ratios: ModuleType) -> None:
        calls: list[str] = []
        times = ratios.interleaved([lambda: calls.append("a"), lambda: calls.append("b")], 0, least=2, warm_up=0)
        assert times.shape == (2, 2)
        assert sorted(["".join(calls[:2]), "".join(calls[2:])]) == ["ab", "ba"]

    @pytest.mark.parametrize(
        ("sense", "target", "met"),
        [("at least", 1.5, "yes"), ("at least", 2.5, "no"), ("at most", 2.5, "yes"), ("at most", 1.5, "no"),
         ("at least", 2.1, "on the line")],
    )  # fmt: skip
    def test_a_target_is_met_or_not(self, ratios: ModuleType, sense: str, target: float, met: str) -> None:
        text = ratios.table_text([line(ratios, sense, target)])
        assert (
            text.splitlines()[-1] == f"| `ours` | theirs | **2** (1.800 to 2.2) | 4 / 2 ms | {sense} {target} | {met} |"
        )

    def test_lines_come_back_from_json(self, ratios: ModuleType, bench: ModuleType) -> None:
        one = line(ratios, "at most", 3)
        found = ratios.Found((one,))
        assert bench.line_of(json.loads(json.dumps(ratios.as_document(found)))["lines"][0]) == one


class TestGrowth:
    def test_an_exponent_is_found(self, module: Any) -> None:
        sizes = (10, 20, 40, 80)
        one = module("growth").growth_of("rows", "ms", sizes, [0.3 * size**1.5 for size in sizes])
        assert (one.exponent, one.at_the_end) == (1.5, 1.5)

    def test_a_fixed_cost_fades(self, module: Any) -> None:
        sizes = (10, 100, 1000)
        one = module("growth").growth_of("rows", "ms", sizes, [100 + size for size in sizes])
        assert one.exponent < one.at_the_end < 1

    def test_plots_are_well_formed(self, module: Any) -> None:
        one = {"name": "rows & columns", "unit": "ms", "sizes": [1, 2], "values": [1.0, 2.0], "exponent": 1.0}
        svg = ElementTree.fromstring(module("plots").growth_plots([one, one]))
        assert len(svg.findall("{http://www.w3.org/2000/svg}circle")) == 4

    def test_a_head_of_any_size_runs(self, module: Any) -> None:
        run = module("growth").head_run({"bank rows": 20, "classes": 3, "d": 8, "batch": 2})
        assert np.isfinite(run()).all()


class TestPage:
    def test_the_text_between_markers_is_replaced(self, bench: ModuleType) -> None:
        page = "before\n<!-- bench:table -->\nold\n<!-- /bench:table -->\nafter\n"
        assert bench.replaced(page, "table", "new") == page.replace("old", "new")

    @pytest.mark.parametrize("page", ["", "<!-- /bench:table --><!-- bench:table -->", "<!-- bench:table -->"])
    def test_a_page_without_its_markers_is_refused(self, bench: ModuleType, page: str) -> None:
        with pytest.raises(ValueError, match="expected one <!-- bench:table -->"):
            bench.replaced(page, "table", "new")

    def test_a_run_that_failed_is_said_and_the_others_are_written(
        self, ratios: ModuleType, bench: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "results").mkdir()
        page = tmp_path / "performance.md"
        page.write_text(PAGE.read_text())
        monkeypatch.setattr(bench, "HERE", tmp_path)
        monkeypatch.setattr(bench, "PAGE", page)
        found = ratios.Found((line(ratios, "at least", 1.5),), (("pytorch-ood", "no torchvision"),))
        results = {"head_speed": ratios.as_document(found), "growth": {"failed": "out of memory"}}

        path = bench.write_results(results, "2026-01-31")

        assert path == tmp_path / "results" / "2026-01-31.json"
        assert json.loads(path.read_text())["growth"] == {"failed": "out of memory"}
        text = page.read_text()
        assert "| `ours` | theirs | **2**" in text
        assert "`growth` failed: out of memory" in text
        assert "pytorch-ood: no torchvision" in text

    def test_a_script_that_fails_does_not_end_the_run(self, bench: ModuleType, tmp_path: Path) -> None:
        assert "not there" in bench.run_benchmark(bench.Benchmark("no_such_script"), tmp_path, True)["failed"]


class TestPhases:
    def test_time_belongs_to_the_label_that_ended_it(self, module: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        cost = module("export_cost")
        clock = iter([0.0, 1.0, 3.0, 6.0, 10.0, 15.0, 21.0])
        monkeypatch.setattr(cost.time, "perf_counter", lambda: next(clock))
        phases = cost.Phases()
        for label, done in (("loading the classifier", 0), ("loading the classifier", 1), ("reading x", 9)):
            phases(label, done, None)
        for done in (0, 1):
            phases("fitting statistics", done, 1)
        found = phases.end()
        # 0-1 before loading; 1-3 loading; 3-6 reading, and on to 10 until fitting begins; 10-15 fitting; 15-21 writing
        assert found == {"opening": 1.0, "loading the classifier": 2.0, "reading x": 7.0, "fitting statistics": 5.0,
                         "writing": 6.0}  # fmt: skip
        assert cost.groups(found) == {"opening": 3.0, "reading": 7.0, "checks": 0.0, "network again": 0.0,
                                      "statistics": 5.0, "writing": 6.0}  # fmt: skip


@pytest.fixture(scope="module")
def head(digits: DemoImages) -> Head:
    """Digits with one OOD prototype: pixels stand for features."""
    paths = find_images(digits.train)[::10]
    rows = np.stack([load_image(path)[::8, ::8, 0].ravel() / 64.0 for path in paths])
    labels = np.array([int(path.parent.name) for path in paths])
    prototypes = np.stack([rows[labels == label].mean(axis=0) for label in np.unique(labels)])
    position = prototypes.mean(axis=0)
    log_s = log_s_of(class_distances(rows, prototypes), np.linalg.norm(rows - position, axis=1), 1.0)
    return Head(prototypes, rows, (OodHead(position, log_s),))


class TestOtherWays:
    """What is timed against us computes the same."""

    @pytest.mark.parametrize("way", ["autograd_scores", "numpy_scores"])
    def test_other_ways_give_the_scores_of_the_definition(
        self, module: Any, head: Head, way: str, digits: DemoImages
    ) -> None:
        paths = find_images(digits.near)[:30]
        features = np.stack([load_image(path)[::8, ::8, 0].ravel() / 64.0 for path in paths])
        score = getattr(module("other_ways"), way)(head, "NumPy")
        np.testing.assert_allclose(score(features.astype(np.float32)), ood_scores(features, head), atol=1e-3)


def test_photos_are_of_a_cameras_size_and_differ(module: Any, tmp_path: Path) -> None:
    setting = module("setting")
    setting.write_photos(tmp_path, {"fit": 2})
    frames = [load_image(path) for path in find_images(tmp_path / "fit")]
    assert {frame.shape for frame in frames} == {(480, 640, 3)}
    assert len({frame.tobytes() for frame in frames}) == 2 * len(setting.PHOTOS)


def test_start_up_measures_a_process_of_the_runtime(module: Any) -> None:
    start_up = module("start_up")
    code = start_up.OURS.replace("(224, 224, 3)", str(read_artifact(MODEL).contract.preprocessing.input_shape))
    imported, answered, resident, peak = start_up.in_process(code, MODEL)
    assert 0 < imported < answered
    assert 10 < resident <= peak
