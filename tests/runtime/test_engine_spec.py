"""What may be asked for, and when two engines are the same one."""

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from grood_edge.artifact import Artifact, read_artifact
from grood_edge.demo.images import DemoImages
from grood_edge.errors import UsageError
from grood_edge.export.recalibrate import RecalibrateOptions, recalibrate
from grood_edge.runtime.engine_spec import (
    BuildSpec,
    Device,
    check_spec,
    engine_key,
    engine_name,
    fitting_batch,
    known_targets,
    parse_batch,
    parse_targets,
    source_digest,
)
from grood_edge.runtime.trt_api import TrtApi
from tests.runtime.engines import RTX_3060, changed

NOBODY = Device("no GPU", None, None)
ORIN = Device("Orin", (8, 7), "12.6")
JETPACK = TrtApi(SimpleNamespace(__version__="10.3.0"), "tensorrt", "10.3.0")


class TestSpec:
    @pytest.mark.parametrize("batch", [(0, 1, 8), (2, 1, 8), (1, 9, 8), (1, 1, 4097), (-1, -1, -1)])
    def test_batch_sizes_ascend_from_1(self, batch: tuple[int, int, int]) -> None:
        with pytest.raises(UsageError, match=r"--batch is .*ascending order"):
            BuildSpec(batch)

    def test_turing_is_refused_with_its_reason(self) -> None:
        with pytest.raises(UsageError, match="no float32 matrix product on Turing"):
            BuildSpec(targets=("SM86", "SM75"))

    @pytest.mark.parametrize(
        ("targets", "message"),
        [
            (("sm86",), "no GPU"),
            (("SM86; rm",), "no GPU"),
            (("SM86", "SM86"), "names a GPU twice"),
            (("CURRENT", "SM86"), "this machine's GPU alone"),
        ],
    )
    def test_targets_that_make_no_sense(self, targets: tuple[str, ...], message: str) -> None:
        with pytest.raises(UsageError, match=message):
            BuildSpec(targets=targets)

    def test_options_as_people_write_them(self) -> None:
        assert parse_batch("1, 4,16") == (1, 4, 16)
        assert parse_targets("120,86, 8.9") == ("SM86", "SM89", "SM120")
        assert parse_targets("sm86,Current") == ("SM86", "CURRENT")
        for text in ("1,8", "1,1,8,16", "1,x,8", "1,,8", "", "1,-1,8", "1,²,8"):
            with pytest.raises(UsageError, match="--batch"):
                parse_batch(text)
        for text in ("", "86,", "turing", "8", "86 89", "8600", "²²"):
            with pytest.raises(UsageError, match="--sm"):
                parse_targets(text)


class TestContradictions:
    def test_one_image_at_a_time(self, single_path: Path, rtx: TrtApi) -> None:
        contract = read_artifact(single_path).contract
        assert fitting_batch(contract) == (1, 1, 1)
        check_spec(rtx, contract, BuildSpec((1, 1, 1)), NOBODY)
        with pytest.raises(UsageError, match="one image at a time"):
            check_spec(rtx, contract, BuildSpec(), NOBODY)

    def test_tensorrt_has_no_targets(self, digit_artifact: Artifact) -> None:
        with pytest.raises(UsageError, match="tensorrt builds for the GPU of this machine alone"):
            check_spec(JETPACK, digit_artifact.contract, BuildSpec(targets=("SM87",)), ORIN)
        assert known_targets(JETPACK) == ()

    def test_a_jetson_is_no_target(self, digit_artifact: Artifact, rtx: TrtApi) -> None:
        with pytest.raises(UsageError, match=r"--sm 87: .*it knows 80,86,89,120,121\..*Jetson"):
            check_spec(rtx, digit_artifact.contract, BuildSpec(targets=("SM86", "SM87")), NOBODY)

    def test_current_needs_a_gpu(self, digit_artifact: Artifact, rtx: TrtApi) -> None:
        with pytest.raises(UsageError, match="no usable GPU"):
            check_spec(rtx, digit_artifact.contract, BuildSpec(targets=("CURRENT",)), NOBODY)
        check_spec(rtx, digit_artifact.contract, BuildSpec(targets=("CURRENT",)), RTX_3060)


class TestKey:
    def test_recalibrating_keeps_it_and_refitting_does_not(
        self, artifact_path: Path, digits: DemoImages, tmp_path: Path, rtx: TrtApi
    ) -> None:
        before = read_artifact(artifact_path)
        found = {}
        for name, options in {
            "per class": RecalibrateOptions(threshold_only=True, per_class=True, alpha=0.2, delta=0.2),
            "refit": RecalibrateOptions(),
        }.items():
            report = recalibrate(artifact_path, digits.test, tmp_path / f"{name}.onnx", options)
            after = read_artifact(report.path)
            assert after.graph_digest != before.graph_digest, name
            found[name] = engine_key(after, rtx, NOBODY, BuildSpec())
        own = engine_key(before, rtx, NOBODY, BuildSpec())
        assert found["per class"] == own
        assert found["refit"] != own

    @pytest.mark.parametrize("name", ["classifier/body.10.bias", "grood/bank", "grood/scale", "grood/prototypes_t"])
    def test_every_other_tensor_counts(self, digit_artifact: Artifact, name: str) -> None:
        model = onnx.load_model_from_string(digit_artifact.model)
        tensor = next(t for t in model.graph.initializer if t.name == name)
        values = numpy_helper.to_array(tensor).copy()
        values.flat[0] += np.array(1, values.dtype)
        tensor.CopyFrom(numpy_helper.from_array(values, name))
        assert source_digest(model.SerializeToString()) != source_digest(digit_artifact.model)

    def test_a_node_counts(self, digit_artifact: Artifact) -> None:
        model = onnx.load_model_from_string(digit_artifact.model)
        relu = next(node for node in model.graph.node if node.op_type == "Relu")
        relu.op_type = "Elu"
        after = changed(digit_artifact, model)
        assert source_digest(after.model) != source_digest(digit_artifact.model)

    def test_versions_batch_and_targets_count(self, digit_artifact: Artifact, rtx: TrtApi) -> None:
        def key(api: TrtApi = rtx, device: Device = NOBODY, **spec: Any) -> str:
            return engine_key(digit_artifact, api, device, BuildSpec(**spec))

        different = [
            key(),
            key(api=dataclasses.replace(rtx, version="1.8.0.1")),
            key(api=JETPACK, device=ORIN),
            key(batch=(1, 1, 16)),
            key(targets=("SM86",)),
            key(targets=("SM86", "SM89")),
            key(targets=("CURRENT",), device=RTX_3060),
        ]
        assert len(set(different)) == len(different)
        assert key(targets=("SM89", "SM86")) == key(targets=("SM86", "SM89"))
        assert key(timing_cache=Path("x")) == key()

    def test_the_gpu_counts_where_the_engine_is_built_for_it(self, digit_artifact: Artifact, rtx: TrtApi) -> None:
        others = [
            dataclasses.replace(ORIN, name="Orin NX"),
            dataclasses.replace(ORIN, driver="12.7"),
            dataclasses.replace(ORIN, compute_capability=(11, 0)),
        ]
        keys = {engine_key(digit_artifact, JETPACK, device, BuildSpec()) for device in (ORIN, *others)}
        assert len(keys) == 4
        assert len({engine_key(digit_artifact, rtx, device, BuildSpec()) for device in (ORIN, NOBODY)}) == 1

    def test_names_say_what_an_engine_is(self, digit_artifact: Artifact, rtx: TrtApi) -> None:
        def name(api: TrtApi, device: Device, *targets: str) -> str:
            return engine_name("model", digit_artifact, api, device, BuildSpec(targets=targets))

        digest = engine_key(digit_artifact, JETPACK, ORIN, BuildSpec())[:8]
        assert name(JETPACK, ORIN) == f"model.tensorrt-10.3.0-sm87-fp32-{digest}.engine"
        assert name(rtx, NOBODY).startswith(f"model.tensorrt-rtx-{rtx.version}-portable-fp32-")
        assert name(rtx, NOBODY, "SM86", "SM120").startswith(f"model.tensorrt-rtx-{rtx.version}-sm86_120-fp32-")
        assert name(rtx, RTX_3060, "CURRENT").startswith(f"model.tensorrt-rtx-{rtx.version}-sm86-fp32-")
