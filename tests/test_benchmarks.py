"""benchmarks/: the pure parts of `make bench`, and the parts that are quick enough to run."""

import json
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest

from grood_edge.artifact import read_artifact
from grood_edge.conformal import DecisionRule
from grood_edge.demo.images import DemoImages
from grood_edge.export.graph import attach_head
from grood_edge.images import find_images, load_image
from grood_edge.ort import open_ort
from grood_edge.runtime.selftest import MODEL
from grood_edge.scoring import Head, OodHead, class_distances, log_s_of, ood_scores

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
PAGE = BENCHMARKS.parent / "docs" / "performance.md"


@pytest.fixture(scope="module")
def ratios(benchmark_script: Any) -> ModuleType:
    return benchmark_script("ratios")  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def bench(benchmark_script: Any) -> ModuleType:
    return benchmark_script("bench")  # type: ignore[no-any-return]


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
        times = ratios.interleaved([lambda: calls.append("a"), lambda: calls.append("b")], 0.0, least=2, warm_up=0)
        assert times.shape == (2, 2)
        assert sorted(["".join(calls[:2]), "".join(calls[2:])]) == ["ab", "ba"]

    @pytest.mark.parametrize(
        ("sense", "target", "met"),
        [("at least", 1.5, "yes"), ("at least", 2.5, "no"), ("at most", 2.5, "yes"), ("at most", 1.5, "no"),
         ("at least", 2.1, "no (not certain)"), ("at least", 1.9, "yes (not certain)"),
         ("at most", 2.1, "yes (not certain)"), ("at most", 1.9, "no (not certain)")],
    )  # fmt: skip
    def test_a_target_is_met_or_not(self, ratios: ModuleType, sense: str, target: float, met: str) -> None:
        text = ratios.table_text([line(ratios, sense, target)])
        assert (
            text.splitlines()[-1] == f"| `ours` | theirs | **2** (1.800 to 2.2) | 4 / 2 ms | {sense} {target} | {met} |"
        )

    @pytest.mark.parametrize(("rounds", "unit"), [(1, "turns"), (3, "rounds")])
    def test_few_turns_or_rounds_give_a_range_and_no_interval(self, ratios: ModuleType, rounds: int, unit: str) -> None:
        turns = [np.array([[1.0, value]]) for value in (1.5, 2.0, 3.0)]
        found = ratios.ratio_of([np.concatenate(turns)] if rounds == 1 else turns, over=1, under=0)
        assert (found.low, found.value, found.high, found.basis) == (1.5, 2.0, 3.0, f"range of 3 {unit}")
        assert ratios.Target("at least", 1.6).met(found) == f"yes (range of 3 {unit})"
        table = ratios.table_text([ratios.Line("s", "a", "b", found, "s")])
        assert f"| **2** (1.500 to 3, range of 3 {unit}) |" in table

    def test_a_count_has_no_interval(self, ratios: ModuleType) -> None:
        found = ratios.counted(1.02, 1.0)
        assert ratios.Target("at most", 1.02).met(found) == "yes"
        assert "| **1.020** |" in ratios.table_text([ratios.Line("s", "a", "b", found, "MB")])

    def test_lines_come_back_from_json(self, ratios: ModuleType, bench: ModuleType) -> None:
        one = line(ratios, "at most", 3)
        found = ratios.Found((one,))
        assert bench.line_of(json.loads(json.dumps(ratios.as_document(found)))["lines"][0]) == one


class TestGrowth:
    def test_an_exponent_is_found(self, benchmark_script: Any) -> None:
        sizes = (10, 20, 40, 80)
        one = benchmark_script("growth").growth_of("rows", "ms", sizes, [0.3 * size**1.5 for size in sizes])
        assert (one.exponent, one.at_the_end) == (1.5, 1.5)

    def test_a_fixed_cost_fades(self, benchmark_script: Any) -> None:
        sizes = (10, 100, 1000)
        one = benchmark_script("growth").growth_of("rows", "ms", sizes, [100 + size for size in sizes])
        assert one.exponent < one.at_the_end < 1

    def test_plots_are_well_formed(self, benchmark_script: Any) -> None:
        one = {"name": "rows & columns", "unit": "ms", "sizes": [1, 2], "values": [1.0, 2.0], "exponent": 1.0}
        svg = ElementTree.fromstring(benchmark_script("plots").growth_plots([one, one]))
        assert len(svg.findall("{http://www.w3.org/2000/svg}circle")) == 4

    def test_a_head_of_any_size_runs(self, benchmark_script: Any) -> None:
        run = benchmark_script("growth").head_run({"bank rows": 20, "classes": 3, "d": 8, "batch": 2})
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
        results = {name: {**one, "took seconds": 61.5} for name, one in results.items()}

        path = bench.write_json(results, "2026-01-31")
        bench.write_page(results, "2026-01-31")

        assert path == tmp_path / "results" / "2026-01-31.json"
        document = json.loads(path.read_text())
        assert document["growth"]["failed"] == "out of memory"
        assert document["took seconds"] == 123
        text = page.read_text()
        assert "| `ours` | theirs | **2**" in text
        assert "`growth` failed: out of memory" in text
        assert "pytorch-ood: no torchvision" in text
        assert "Took 123 s: `head_speed` 62 s, `growth` 62 s." in text

    @pytest.mark.parametrize(
        ("script", "said"),
        [(None, "No such file"), ("import sys; sys.exit('no images')", "no images"),
         ("", "without a result"), ("import sys; open(sys.argv[2], 'w').write('[]')", "holds no object"),
         ("import time; time.sleep(60)", "stopped after 2 s")],
    )  # fmt: skip
    def test_a_script_that_fails_does_not_end_the_run(
        self, bench: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str | None, said: str
    ) -> None:
        monkeypatch.setattr(bench, "HERE", tmp_path)
        if script is not None:
            (tmp_path / "one.py").write_text(script)
        found = bench.run_benchmark(bench.Benchmark("one", limit=2), tmp_path, quick=False)
        assert said in found["failed"]
        assert found["took seconds"] >= 0

    @pytest.mark.parametrize("part", [["--only", "growth"], ["--quick"]])
    def test_a_part_does_not_overwrite_the_page(
        self, bench: ModuleType, part: list[str], capsys: pytest.CaptureFixture[str]
    ) -> None:
        with pytest.raises(SystemExit, match="2"):
            bench.main([*part, "--write"])
        assert "--write replaces the whole table" in capsys.readouterr().err

    def test_what_there_is_is_written_before_a_part_that_breaks(
        self, bench: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "results").mkdir()
        monkeypatch.setattr(bench, "HERE", tmp_path)

        def run(benchmark: Any, work: Path, quick: bool) -> dict[str, Any]:
            if benchmark.name == "head_speed":
                raise KeyboardInterrupt
            return {"lines": [], "took seconds": 1.0}

        monkeypatch.setattr(bench, "run_benchmark", run)
        with pytest.raises(KeyboardInterrupt):
            bench.main(["--write"])
        (written,) = (tmp_path / "results").iterdir()
        assert json.loads(written.read_text())["head_cost"] == {"lines": [], "took seconds": 1.0}


class TestPhases:
    def test_time_belongs_to_the_label_that_ended_it(
        self, benchmark_script: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        cost = benchmark_script("export_cost")
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
        self, benchmark_script: Any, head: Head, way: str, digits: DemoImages
    ) -> None:
        paths = find_images(digits.near)[:30]
        features = np.stack([load_image(path)[::8, ::8, 0].ravel() / 64.0 for path in paths])
        score = getattr(benchmark_script("other_ways"), way)(head, "NumPy")
        np.testing.assert_allclose(score(features.astype(np.float32)), ood_scores(features, head), atol=1e-3)

    def test_rows_in_coordinates_of_every_direction_give_the_same_scores(
        self, benchmark_script: Any, head: Head, digits: DemoImages
    ) -> None:
        features = np.stack([load_image(path)[::8, ::8, 0].ravel() for path in find_images(digits.near)[:30]]) / 64.0
        rule = DecisionRule((np.zeros(1, np.float32),), (1,), np.zeros(len(head.prototypes), np.int32))
        base = benchmark_script("head_alone")._without_network(len(head.prototypes), head.bank.shape[1])
        whole = attach_head(base, replace(head, bank_dtype="int8"), "features", rule).SerializeToString()
        logits = np.zeros((len(features), len(head.prototypes)), np.float32)
        every, few = (benchmark_script("bank_directions").in_coordinates(whole, n) for n in (head.bank.shape[1], 2))
        feeds = {"features_in": features.astype(np.float32), "logits_in": logits}
        expected, same, other = (open_ort(m).run(feeds, ["ood_score"])["ood_score"] for m in (whole, every, few))
        np.testing.assert_allclose(same, expected, atol=1e-3)
        assert abs(other - expected).max() > 0.01


def test_photos_are_of_a_cameras_size_and_differ(benchmark_script: Any, tmp_path: Path) -> None:
    photos = benchmark_script("photos")
    count = 2 * len(photos.NAMES) + 1
    photos.write_photos(tmp_path / "fit", count)
    frames = [load_image(path) for path in find_images(tmp_path / "fit")]
    assert {frame.shape for frame in frames} == {(480, 640, 3)}
    assert len({frame.tobytes() for frame in frames}) == count


def test_start_up_measures_a_process_of_the_runtime(benchmark_script: Any) -> None:
    start_up = benchmark_script("start_up")
    code = start_up.OURS.replace("(224, 224, 3)", str(read_artifact(MODEL).contract.preprocessing.input_shape))
    imported, answered, resident, peak = start_up.in_process(code, MODEL)
    assert 0 < imported < answered
    assert 10 < resident <= peak
