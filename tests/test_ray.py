"""A real Ray cluster with two workers, of which one is killed in the middle: everything is as it is without Ray."""

import importlib.util
import logging
import os
import subprocess
import sys
from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from grood_edge.demo.images import DemoImages
from grood_edge.demo.network import DigitNetwork
from grood_edge.errors import BackendError, ClassifierError, DatasetError, MissingExtraError, UsageError
from grood_edge.evaluate.evaluation import EvaluateOptions, evaluate
from grood_edge.evaluate.passes import score_set
from grood_edge.evaluate.sets import ood_set
from grood_edge.evaluate.summary import evaluation_document
from grood_edge.export import ExportOptions, export_model
from grood_edge.export import shards as export_shards
from grood_edge.export.dataset import open_dataset
from grood_edge.export.features import Reading, collect_features
from grood_edge.export.recalibrate import RecalibrateOptions, recalibrate
from grood_edge.export.spool import SpoolPlan
from grood_edge.ort import open_ort
from grood_edge.ray_engine import (
    Cluster,
    Work,
    _read_again,
    _result,
    _settings,
    _task,
    load_shared,
    opened_engine,
    require_engine,
    shards_of,
)
from grood_edge.runtime import open_session
from grood_edge.runtime import shards as runtime_shards
from grood_edge.runtime.score import ScoreRow, score_images
from grood_edge.runtime.shards import score_with_workers, workers_for
from grood_edge.versions import numeric_versions
from tests import ray_workers
from tests.conftest import DIGIT_OPTIONS
from tests.export.test_features import COLOURS, colour_graph
from tests.export.test_spool import after, colour_folder, same


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A cluster of this machine with two workers, which every command of this module finds; where deaths are noted."""
    try:
        require_engine("ray", None)
        import ray
    except MissingExtraError as error:
        pytest.skip(str(error))
    deaths = tmp_path_factory.mktemp("deaths")
    os.environ[ray_workers.DEATHS] = str(deaths)
    with _settings(None):
        ray.init(
            "local",
            num_cpus=2,
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
        )
        yield deaths
        ray.shutdown()
    del os.environ[ray_workers.DEATHS]


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (export_shards, runtime_shards):
        monkeypatch.setattr(module, "SHARD_IMAGES", 64)
    monkeypatch.setattr(export_shards, "_read", ray_workers.read)
    monkeypatch.setattr(runtime_shards, "_rows", ray_workers.rows)
    monkeypatch.setattr(runtime_shards, "_infer", ray_workers.infer)


@pytest.mark.usefixtures("small_shards")
def test_export_gives_the_same_bytes(
    cluster: Path, artifact_path: Path, digits: DemoImages, network: DigitNetwork, tmp_path: Path
) -> None:
    options = ExportOptions(
        calibration_data=digits.calibration, preprocessing=DIGIT_OPTIONS.preprocessing, engine="ray"
    )
    (cluster / "read").unlink(missing_ok=True)
    export_model(network, digits.train, tmp_path / "digits.onnx", options)
    assert (cluster / "read").exists()  # a worker was killed
    assert (tmp_path / "digits.onnx").read_bytes() == artifact_path.read_bytes()


@pytest.mark.usefixtures("small_shards")
@pytest.mark.parametrize("threshold_only", [False, True])
def test_calibrate_gives_the_same_bytes(
    threshold_only: bool, cluster: Path, artifact_path: Path, digits: DemoImages, tmp_path: Path
) -> None:
    (cluster / "read").unlink(missing_ok=True)
    options = RecalibrateOptions(threshold_only=threshold_only)
    recalibrate(artifact_path, digits.test, tmp_path / "here.onnx", options)
    recalibrate(artifact_path, digits.test, tmp_path / "ray.onnx", replace(options, engine="ray"))
    assert (cluster / "read").exists()
    assert (tmp_path / "here.onnx").read_bytes() == (tmp_path / "ray.onnx").read_bytes()


@pytest.mark.usefixtures("small_shards")
def test_damaged_images_and_an_interruption_change_nothing(cluster: Path, tmp_path: Path) -> None:
    """Batches with holes are the same batches; a spool that was begun without Ray goes on with it, and back again."""
    images, spools = tmp_path / "images", tmp_path / "spools"
    images.mkdir()
    spools.mkdir()
    data = open_dataset(colour_folder(images), "folder")
    graph = colour_graph()
    model = open_ort(graph)
    reading = Reading(COLOURS, 3, hold_out=True, allow_unreadable=True, max_rows=60)
    whole = collect_features(data, model, reading)
    assert whole.unreadable
    with opened_engine("ray") as joined:
        assert joined is not None
        spread = replace(reading, workers=export_shards.Workers(joined, graph, None))
        told: list[int] = []
        found = collect_features(data, model, spread, lambda _, done, total: told.append(done))
        assert same(_relative(found), _relative(whole))
        assert told == sorted(told)
        assert told[-1] == whole.fit.images + whole.held_out.images  # type: ignore[union-attr]
        spool = SpoolPlan(spools, "0" * 64)
        for batches, one in ((2, spread), (4, reading), (6, spread)):
            with pytest.raises(KeyboardInterrupt):
                collect_features(data, model, replace(one, spool=spool), after(batches))
        assert same(_relative(collect_features(data, model, replace(reading, spool=spool))), _relative(whole))


@pytest.mark.usefixtures("small_shards")
@pytest.mark.parametrize("explain", [False, True])
def test_score_gives_the_same_rows(explain: bool, cluster: Path, artifact_path: Path, digits: DemoImages) -> None:
    (cluster / "rows").unlink(missing_ok=True)
    here: list[ScoreRow] = []
    spread: list[ScoreRow] = []
    sources = [digits.near, *sorted((digits.test / "3").iterdir())[:5]]
    with open_session(artifact_path, any_size=True) as session, opened_engine("ray") as joined:
        assert joined is not None
        summary = score_images(session, sources, here.append, 24, explain=explain)
        workers = workers_for(joined, artifact_path, session)
        assert score_with_workers(workers, sources, spread.append, 24, explain=explain) == summary
    assert (cluster / "rows").exists()
    assert spread == here


@pytest.mark.usefixtures("small_shards")
def test_evaluate_gives_the_same_document(cluster: Path, artifact_path: Path, digits: DemoImages) -> None:
    (cluster / "infer").unlink(missing_ok=True)
    options = EvaluateOptions(artifact_path, digits.test, (("near", digits.near),), baselines=True)
    with open_session(artifact_path, any_size=True) as session:
        here = evaluation_document(evaluate(session, options))
        assert evaluation_document(evaluate(session, replace(options, engine="ray"))) == here
    assert (cluster / "infer").exists()


def test_a_shard_that_kills_its_worker_each_time_is_an_error(cluster: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("grood_edge.ray_engine.RETRIES", 1)
    work = Work(ray_workers.opened, ray_workers.always_die, 0)
    with pytest.raises(BackendError, match=r"a Ray worker failed: .*--engine ray out"):
        list(Cluster(2).ordered(work, [0]))


def test_results_come_once_and_in_order(cluster: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    work = Work(ray_workers.opened, ray_workers.half, "job")
    found = list(Cluster(2).ordered(work, shards_of(3, 50, 5)))
    assert [job for job, _ in found] == ["job"] * 10
    assert [total for _, total in found] == [sum(range(*span)) for span in shards_of(3, 50, 5)]
    monkeypatch.setattr("grood_edge.ray_engine.numeric_versions", lambda: {"numpy": "0.1"})
    with pytest.raises(BackendError, match=r"the Ray worker on .* has .*Install the same on every machine"):
        list(Cluster(2).ordered(work, shards_of(0, 5, 5)))


@pytest.mark.usefixtures("cluster")
def test_a_ray_that_cannot_be_put_behind_a_token_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray._raylet", None)
    with pytest.raises(BackendError, match=r"Ray .* cannot be put behind a token here .*call ray.init before"):
        _read_again()


OWN_CLUSTER = """
import os, ray
from grood_edge.ray_engine import Work, opened_engine, shards_of
from tests import ray_workers
found = {name: os.environ.get(name) for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_USAGE_STATS_ENABLED")}
try:
    with opened_engine("ray") as cluster:
        token, results = os.environ["RAY_AUTH_TOKEN"], cluster.ordered(
            Work(ray_workers.opened, ray_workers.half, "job"), shards_of(0, 5000, 5))
        for done in results:
            raise OSError(28, "No space left on device")
except OSError as error:
    print(error)
assert not ray.is_initialized()
results.close()
assert not ray.is_initialized()
assert found == {name: os.environ.get(name) for name in found}
assert token not in map(str, os.environ.values())
"""


@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed")
def test_a_cluster_of_ones_own_is_gone_after_an_error_and_leaves_nothing() -> None:
    """In a program that imported Ray before, and keeps what still wants to cancel shards."""
    outside = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    done = subprocess.run(
        [sys.executable, "-c", OWN_CLUSTER],
        cwd=Path(__file__).parents[1],
        env=outside,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "[Errno 28] No space left on device\n", "")


# Without Ray.


@dataclass(frozen=True)
class Here(Cluster):
    """A cluster whose shards run in this process; `ends` says whether nobody waits for more."""

    ends: list[str] = field(default_factory=list)

    def ordered(self, work: Work, shards: Iterable[Any]) -> Generator[Any, None, None]:
        opened = work.open(work.job)
        try:
            for shard in shards:
                yield work.run(opened, shard)
        finally:
            self.ends.append("closed")


def test_shards_in_flight_are_let_go_while_the_error_is_still_held(
    artifact_path: Path, digits: DemoImages, tmp_path: Path
) -> None:
    """Once its traceback is dropped, the cluster is gone."""

    def fails(*_: object) -> None:
        raise KeyboardInterrupt

    def export(here: Here) -> object:
        graph = colour_graph()
        reading = Reading(COLOURS, 3, allow_unreadable=True, workers=export_shards.Workers(here, graph, None))
        return collect_features(open_dataset(colour_folder(tmp_path), "folder"), open_ort(graph), reading, fails)

    with open_session(artifact_path, any_size=True) as session:

        def score(here: Here) -> object:
            return score_with_workers(workers_for(here, artifact_path, session), [digits.near], fails)

        def evaluate_one(here: Here) -> object:
            workers = workers_for(here, artifact_path, session)
            return score_set(ood_set("near", digits.near), session, progress=fails, workers=workers)

        for command in (export, score, evaluate_one):
            here, held = Here(1), None
            try:
                command(here)
            except KeyboardInterrupt as error:
                held = error
            assert held is not None
            assert here.ends == ["closed"]


def test_shards_end_at_multiples() -> None:
    assert list(shards_of(0, 10, 4)) == [(0, 4), (4, 8), (8, 10)]
    assert list(shards_of(5, 12, 4)) == [(5, 8), (8, 12)]
    assert list(shards_of(4, 4, 4)) == []


def test_errors_of_workers_are_raised_as_they_are() -> None:
    def run(_: Any, shard: Exception) -> None:
        raise shard

    for error in (ClassifierError("NaN"), MissingExtraError("onnxruntime", "cpu", "Running a model")):
        with pytest.raises(type(error)) as raised:
            _result(_task(ray_workers.opened, run, 0, "key", numeric_versions(), error))
        assert str(raised.value) == str(error)


def test_file_that_a_worker_does_not_see_is_named(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"does not see .*7\.png; expected every machine of the cluster to have"):
        load_shared(tmp_path / "7.png")


def test_missing_ray_and_misused_addresses_are_refused_before_any_work(
    monkeypatch: pytest.MonkeyPatch, artifact_path: Path, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match="--ray-address auto has no use without --engine ray"):
        require_engine("local", "auto")
    with pytest.raises(UsageError, match=r"--ray-address ray://head:10001; expected host:port"):
        require_engine("ray", "ray://head:10001")
    monkeypatch.setitem(sys.modules, "ray", None)
    for call in (
        lambda: recalibrate(artifact_path, tmp_path, options=RecalibrateOptions(engine="ray")),
        lambda: export_model("no.onnx", tmp_path, tmp_path / "out.onnx", ExportOptions(engine="ray")),
    ):
        with pytest.raises(
            MissingExtraError, match=r"--engine ray needs the package ray.*pip install 'grood-edge\[ray\]'"
        ):
            call()


def test_images_that_are_no_files_are_refused() -> None:
    with pytest.raises(UsageError, match="--engine ray needs a folder of image files"):
        export_shards.require_listing(open_dataset([], "predicted"))


def _relative(found: Any) -> Any:
    """Workers name files by absolute paths, also in the reasons why one cannot be read."""
    return replace(found, unreadable=tuple((name, "") for name, _ in found.unreadable), notes=())
