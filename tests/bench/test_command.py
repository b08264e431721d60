"""`grood-edge bench` on the packaged artifact: what it reports, what it compares with, and what it refuses."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, compose, helper
from typer.testing import CliRunner, Result

from grood_edge.artifact import Artifact, artifact_bytes, read_artifact
from grood_edge.bench import measure, options
from grood_edge.bench.bare import cut_classifier, open_classifier
from grood_edge.bench.measure import bench
from grood_edge.bench.options import BenchOptions
from grood_edge.cli import app
from grood_edge.errors import ArtifactError, ClassifierError
from grood_edge.preprocessing import normalised_frames
from grood_edge.runtime.choose import Choice
from grood_edge.runtime.onnxrt import OnnxRuntimeBackend
from grood_edge.runtime.selftest import MODEL
from grood_edge.runtime.session import Session
from grood_edge.stored_head import without_head
from tests.test_camera_part import SELFTEST_CAMERA, with_camera


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, ["bench", *map(str, arguments)], env={"COLUMNS": "200"})


def document(result: Result) -> dict[str, Any]:
    assert result.exit_code == 0, result.output
    found: dict[str, Any] = json.loads(result.stdout)
    return found


@pytest.fixture(scope="module")
def artifact() -> Artifact:
    return read_artifact(MODEL)


def classifier_of(artifact: Artifact, batch: int | str = "N", size: int = 32, kind: int = TensorProto.FLOAT) -> bytes:
    """The packaged artifact's own classifier: `[N, 1, 32, 32]` float32 to logits, as it was before the export."""
    model = onnx.load_model_from_string(without_head(artifact.model))
    kept = [node for node in model.graph.node if not node.name.startswith("preprocess/")]
    made = {name for node in kept for name in node.output} | {tensor.name for tensor in model.graph.initializer}
    (source,) = {name for node in kept for name in node.input if name and name not in made}
    for node in kept:
        node.input[:] = ["x" if name == source else name for name in node.input]
    image = helper.make_tensor_value_info("x", kind, [batch, 1, size, size])
    logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, [batch, len(artifact.contract.classes)])
    weights = [tensor for tensor in model.graph.initializer if not tensor.name.startswith("preprocess/")]
    graph = helper.make_graph(kept, "classifier", [image], [logits], weights)
    found: bytes = helper.make_model(graph, opset_imports=model.opset_import, ir_version=8).SerializeToString()
    return found


@pytest.fixture(scope="module")
def classifier(artifact: Artifact, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bare") / "classifier.onnx"
    path.write_bytes(classifier_of(artifact))
    return path


@pytest.fixture(scope="module")
def frames() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (3, 32, 32, 1), np.uint8)


class TestTheBareClassifier:
    def test_the_artifact_without_its_head_gives_its_logits_and_nothing_else(
        self, artifact: Artifact, frames: np.ndarray
    ) -> None:
        bare = cut_classifier(artifact, "cpu", 1)
        assert bare.model.outputs == ["logits"]
        expected = OnnxRuntimeBackend(artifact).run(frames).logits
        np.testing.assert_array_equal(bare.model.run({"image": bare.tensor(frames)})["logits"], expected)
        cut = onnx.load_model_from_string(without_head(artifact.model))
        onnx.checker.check_model(cut)
        used = {name for node in cut.graph.node for name in node.input} | {"logits"}
        assert all(set(node.output) & used for node in cut.graph.node), "a node that nothing needs is measured as well"
        assert not [item.name for item in (*cut.graph.node, *cut.graph.initializer) if item.name.startswith("grood/")]

    def test_a_model_without_a_head_is_refused(self, artifact: Artifact) -> None:
        with pytest.raises(ArtifactError, match="0 nodes of a head"):
            without_head(without_head(artifact.model))

    def test_a_classifier_file_gets_the_artifacts_images(
        self, artifact: Artifact, classifier: Path, frames: np.ndarray
    ) -> None:
        bare = open_classifier(classifier, artifact, "cpu", 1)
        tensor = bare.tensor(frames)
        np.testing.assert_array_equal(tensor, normalised_frames(frames, artifact.contract.preprocessing, "NCHW", False))
        logits = OnnxRuntimeBackend(artifact).run(frames).logits
        assert bare.gives(tensor, logits)
        assert not bare.gives(tensor, logits + 1)
        assert not bare.gives(tensor, logits[:, :-1])

    @pytest.mark.parametrize(("size", "kind"), [(28, TensorProto.FLOAT), (32, TensorProto.UINT8)])
    def test_another_input_is_refused(self, artifact: Artifact, tmp_path: Path, size: int, kind: int) -> None:
        image = helper.make_tensor_value_info("x", kind, ["N", 1, size, size])
        out = helper.make_tensor_value_info("y", kind, ["N", 1, size, size])
        graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "g", [image], [out])
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=8)
        (tmp_path / "other.onnx").write_bytes(model.SerializeToString())
        with pytest.raises(ClassifierError, match=r"takes 'x' tensor.*; the artifact's classifier takes one float32"):
            open_classifier(tmp_path / "other.onnx", artifact, "cpu", 1)

    def test_two_inputs_are_refused(self, artifact: Artifact, classifier: Path, tmp_path: Path) -> None:
        one = onnx.load(classifier)
        both = compose.merge_models(
            compose.add_prefix(one, "a/"), compose.add_prefix(one, "b/"), io_map=[], outputs=["a/logits", "b/logits"]
        )
        onnx.save(both, tmp_path / "both.onnx")
        with pytest.raises(ClassifierError, match=r"takes 'a/x' .*, 'b/x'"):
            open_classifier(tmp_path / "both.onnx", artifact, "cpu", 1)

    def test_a_classifier_that_does_not_run_is_refused(self, artifact: Artifact, tmp_path: Path) -> None:
        image = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 1, 32, 32])
        out = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 1024])
        fixed = onnx.numpy_helper.from_array(np.array([1, 1024], np.int64), "shape")
        graph = helper.make_graph([helper.make_node("Reshape", ["x", "shape"], ["y"])], "g", [image], [out], [fixed])
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=8)
        (tmp_path / "one.onnx").write_bytes(model.SerializeToString())
        bare = open_classifier(tmp_path / "one.onnx", artifact, "cpu", 1)
        with pytest.raises(ClassifierError, match=r"one.onnx does not run on \[2, 1, 32, 32\]"):
            bare.runner([np.zeros((2, 1, 32, 32), np.float32)], "cpu")

    @pytest.mark.parametrize(
        ("content", "message"), [(None, "cannot read"), (b"", "0 ONNX graphs"), (b"\x3a\x02\x0a\x00", "cannot open")]
    )
    def test_a_file_that_is_no_classifier(
        self, artifact: Artifact, tmp_path: Path, content: bytes | None, message: str
    ) -> None:
        if content is not None:
            (tmp_path / "none.onnx").write_bytes(content)
        with pytest.raises(ClassifierError, match=f"--baseline .*{message}"):
            open_classifier(tmp_path / "none.onnx", artifact, "cpu", 1)

    def test_data_in_another_file_are_not_followed(self, artifact: Artifact, classifier: Path, tmp_path: Path) -> None:
        path = tmp_path / "external.onnx"
        onnx.save(
            onnx.load(classifier), path, save_as_external_data=True, size_threshold=0, location="external.onnx.data"
        )
        with pytest.raises(ClassifierError, match="keeps its data in another file"):
            open_classifier(path, artifact, "cpu", 1)


def test_the_report(classifier: Path) -> None:
    found = document(run(MODEL, "--seconds", "0.2", "--threads", "1", "--baseline", classifier, "--json"))
    assert (found["provider"], found["threads"], found["baseline"]) == ("cpu", 1, str(classifier))
    assert found["frames"] == {"source": "the 10 probes in the artifact", "shape": [32, 32, 1]}
    assert [row["batch"] for row in found["batches"]] == [1, 8]
    for row in found["batches"]:
        latency, split, ratio = row["latency"], row["split"], row["ratio"]
        assert latency["runs"] == ratio["pairs"] >= 20
        assert latency["p50"] > 0
        assert (latency["p99"] is None) == (latency["runs"] < 368)
        assert split["copy"] == 0
        parts = sum(split[name] for name in ("graph_preprocessing", "network", "head"))
        assert parts == pytest.approx(split["graph"], abs=0.001)
        assert min(split["host_preprocessing"], split["decision"], split["network"], split["head"]) > 0
        assert ratio["low"] <= ratio["high"]
        assert ratio["value"] > 1  # a head of many nodes on a network of twelve
        assert row["warm_up"]["runs"] >= 10
    memory = found["memory"]
    assert memory["before"] < memory["artifact"] <= memory["peak"]
    assert not any("does not give the artifact's logits" in note for note in found["notes"])


def test_tables_and_the_next_command() -> None:
    result = run(MODEL, "--seconds", "0.05", "--batch", "2")
    assert result.exit_code == 0, result.output
    for words in ("over the bare classifier", "95 %", "p99.9", "+ head", "decision", "resident memory"):
        assert words in result.stdout
    assert "the artifact without its head" in result.stdout
    assert "--baseline CLASSIFIER.onnx" in result.stderr


def test_another_classifier_is_told(artifact: Artifact, tmp_path: Path) -> None:
    model = onnx.load_model_from_string(classifier_of(artifact))
    for tensor in model.graph.initializer:
        if tensor.data_type == TensorProto.FLOAT:
            values = onnx.numpy_helper.to_array(tensor)
            tensor.CopyFrom(onnx.numpy_helper.from_array(values * np.float32(1.5), tensor.name))
    path = tmp_path / "other.onnx"
    path.write_bytes(model.SerializeToString())
    found = bench(MODEL, BenchOptions((1,), 0.02, path), Choice(threads=1))
    assert any("does not give the artifact's logits" in note for note in found.notes)


def test_a_baseline_of_single_images(artifact: Artifact, tmp_path: Path) -> None:
    path = tmp_path / "single.onnx"
    path.write_bytes(classifier_of(artifact, batch=1))
    found = bench(MODEL, BenchOptions(None, 0.02, path), Choice(threads=1))
    assert [row.batch for row in found.batches] == [1]
    assert any("takes one image at a time" in note for note in found.notes)
    refused = run(MODEL, "--batch", "1,8", "--baseline", path)
    assert refused.exit_code == 2
    assert "takes one image at a time: --batch 1" in refused.stderr


def test_an_artifact_for_a_camera(artifact: Artifact, classifier: Path, tmp_path: Path) -> None:
    path = tmp_path / "camera.onnx"
    path.write_bytes(with_camera(artifact, SELFTEST_CAMERA))
    own = bench(path, BenchOptions((2,), 0.05), Choice(threads=1))
    assert own.frames.shape == SELFTEST_CAMERA.shape
    assert (own.batches[0].split.graph_preprocessing or 0) > 0
    assert not any("resizes the camera's frames" in note for note in own.notes)
    against = bench(path, BenchOptions((2,), 0.05, classifier), Choice(threads=1))
    assert any("resizes the camera's frames" in note for note in against.notes)
    assert not any("does not give" in note for note in against.notes)


def test_an_artifact_without_probes_is_measured_on_noise(artifact: Artifact, tmp_path: Path) -> None:
    path = tmp_path / "bare.onnx"
    path.write_bytes(artifact_bytes(artifact.model, replace(artifact.contract, probes=())))
    found = bench(path, BenchOptions((1,), 0.02), Choice(threads=1))
    assert found.frames.source.startswith("seeded noise")


@pytest.fixture
def engine(artifact: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is asked for, a session runs on something that calls itself TensorRT."""

    class Engine(OnnxRuntimeBackend):
        def __init__(self) -> None:
            super().__init__(artifact)
            self.provider = "tensorrt"

    monkeypatch.setattr(measure, "open_session", lambda *arguments, **words: Session(artifact, Engine()))


@pytest.mark.usefixtures("engine")
def test_an_engine_tells_neither_its_parts_nor_a_ratio() -> None:
    found = bench(MODEL, BenchOptions((2,), 0.02), Choice("tensorrt"))
    (row,) = found.batches
    assert (found.provider, found.baseline, row.ratio) == ("tensorrt", None, None)
    assert (row.split.copy, row.split.graph_preprocessing, row.split.network, row.split.head) == (None,) * 4
    assert row.split.graph > 0
    assert any(note.startswith("no ratio: on tensorrt") for note in found.notes)
    shown = run(MODEL, "--backend", "tensorrt", "--seconds", "0.02", "--batch", "2").stdout
    assert "cannot be told apart with this backend" in shown
    assert "over the bare classifier" not in shown


@pytest.mark.usefixtures("engine")
def test_auto_that_takes_an_engine_has_no_use_for_a_baseline(classifier: Path) -> None:
    result = run(MODEL, "--backend", "auto", "--baseline", classifier)
    assert result.exit_code == 2
    assert "--baseline runs on onnxruntime, and the artifact on tensorrt" in result.stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--batch", "0"), "--batch 0; expected one to 8 different numbers from 1 to 1,024"),
        (("--batch", "100000"), "--batch 100000; expected"),
        (("--batch", "1,1"), "--batch 1,1; expected one to 8 different"),
        (("--batch", "one"), "--batch 'one'; expected whole numbers"),
        (("--batch", "-1"), "--batch '-1'; expected whole numbers"),
        (("--seconds", "0"), "--seconds 0; expected a number above 0"),
        (("--seconds", "nan"), "--seconds nan; expected"),
        (("--threads", "0"), "--threads 0; expected a number from 1"),
        (("--backend", "tensorrt", "--baseline", "x.onnx"), "would compare two runtimes"),
        (("--backend", "tensorrt", "--threads", "1"), "--threads are onnxruntime's"),
        (("--backend", "auto", "--provider", "cpu"), "leave one of the two out"),
    ],
)
def test_options_that_make_no_sense(words: tuple[str, ...], message: str) -> None:
    result = run(MODEL, *words)
    assert result.exit_code == 2
    assert message in result.stderr
    assert result.stdout == ""


def test_a_batch_that_needs_too_much_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(options, "MAX_INPUT_BYTES", 4 * 32 * 32 * 100)
    assert run(MODEL, "--batch", "100", "--seconds", "0.02").exit_code == 0
    result = run(MODEL, "--batch", "101")
    assert result.exit_code == 2
    assert "--batch 101 needs 413,696 bytes for its images alone; at most 409,600" in result.stderr


def test_a_wrong_file(classifier: Path, tmp_path: Path) -> None:
    for path, message in ((classifier, "without a grood-edge contract"), (tmp_path / "none.onnx", "cannot read")):
        result = run(path)
        assert (result.exit_code, result.stderr.count("\n")) == (1, 1)
        assert message in result.stderr


def test_ctrl_c_ends_it_cleanly(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*arguments: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(measure, "times_in_turn", interrupted)
    result = run(MODEL, "--seconds", "0.02", "--json")
    assert (result.exit_code, result.stdout) == (130, "")
    assert result.stderr == "interrupted; nothing was written\n"
