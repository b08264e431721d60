"""The contract as text: golden bytes, round trip, and everything that a strict reader must refuse."""

import base64
import copy
import dataclasses
import hashlib
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from grood_edge.artifact import read_artifact
from grood_edge.conformal import rank_for
from grood_edge.contract import (
    CONTRACT_VERSION,
    MAX_SKETCH,
    BankTrial,
    Calibration,
    Candidate,
    Classifier,
    Contract,
    Fit,
    GradientBank,
    OodPrototype,
    Precision,
    PrecisionTrial,
    Probe,
    Scale,
    ScaleTrial,
    Selection,
    StreamCalibration,
    decode_scores,
    encode_array,
    encode_scores,
)
from grood_edge.contract_reader import MAX_CONTRACT_BYTES, contract_from_json
from grood_edge.contract_rules import MAX_TRIALS
from grood_edge.errors import ArtifactError, CalibrationError
from grood_edge.preprocessing import Preprocessing

PNG = "iVBORw0KGgoAAAANSUhEUgAAAAMAAAACCAAAAAC4HznGAAAAEElEQVR4nGNk0NBgrNDQAAADrAEbq0H03wAAAABJRU5ErkJggg=="  # 3x2

HAND_MADE = Contract(
    classes=("ж cup", 'plate "blue"'),
    preprocessing=Preprocessing(
        preset="custom", height=2, width=3, channels=1, filter="bilinear", crop="stretch", short_side=None,
        mean=(0.0,), std=(255.0,), camera=None,
    ),
    classifier=Classifier(
        source="onnx", layout="NCHW", bgr=False, batch="dynamic", opset=19, features_tensor="f", features_pooled=True,
        logits_tensor="l", dimension=4,
    ),
    precision=Precision(
        name="int8", asked="auto", reason="decides alike", float_layers=("conv_0", "fc"), ranges="percentile", images=6,
        float32_size=4000,
        trials=(PrecisionTrial("int8", 2, 1000, 0.125, 0.25, None, 0.5, 0.25),),
    ),
    space="features",
    scale=Scale(
        value=0.125, asked="auto", reason="tells them apart", trials=(ScaleTrial(0.125, 0.75), ScaleTrial(1.0, 0.5)),
    ),
    selection=Selection(
        asked="auto", reason="mean is clearly better", classes=2, images=4,
        candidates=(Candidate("combination", 0.5, None, None), Candidate("mean", 0.75, 0.25, 0.125)),
    ),
    ood_prototypes=(OodPrototype(source="mixup", images=3, uses_ood_data=False, layer="relu_1"),),
    bank=GradientBank(
        choice="kmeans", rows=2, candidates=5, dtype="int8", asked="auto", reason="small enough",
        trials=(BankTrial(rows=5, auroc=0.75, changed=0.0), BankTrial(rows=2, auroc=0.75, changed=0.25)),
        classes="AQAAAAAAAAA=", paths=("a/ж.png", "b/2.png"),
    ),
    fit=Fit(
        images=6, unreadable=0, labels="folder", accuracy=0.833333, seed=0, data_digest="a" * 64,
        sketch="AQAAAAAAAAD//////////w==", classes_without_prototype=(),
    ),
    calibration=Calibration(
        provenance="unseen", method="separate", guarantee="conformal", alpha=0.5, delta=0.25, n=4, k=1,
        class_sizes=(2, 2), class_ranks=(1, 1), scores="AAAgwAAAgD4AAIC/AAAAPw==", data_digest="b" * 64,
        quantiles=(-2.5, -2.35, -1.75, -0.375, 0.125, 0.25, 0.5),
    ),
    stream=StreamCalibration(
        fps=30.0, episodes=2, frames=900, correlation=0.25, interval=0.5, maxima=(2.5, 0.125), data_digest="c" * 64,
    ),
    tools={"numpy": "2.0", "grood-edge": "0.1.0"},
    probes=(
        Probe(
            name="ramp", png=PNG, logits=(1.5, -0.0), class_id=0, ood_score=-1.25, p_value=0.75, is_ood=False,
            valid=True,
        ),
    ),
)  # fmt: skip

GOLDEN = (
    '{"bank":{"asked":"auto","candidates":5,"choice":"kmeans","classes":"AQAAAAAAAAA=","dtype":"int8",'
    '"paths":["a/ж.png","b/2.png"],"reason":"small enough","rows":2,'
    '"trials":[{"auroc":0.75,"changed":0.0,"rows":5},{"auroc":0.75,"changed":0.25,"rows":2}]},'
    '"calibration":{"alpha":0.5,"class_ranks":[1,1],"class_sizes":[2,2],"data_digest":"' + "b" * 64 + '",'
    '"delta":0.25,"guarantee":"conformal","k":1,"method":"separate","n":4,"provenance":"unseen",'
    '"quantiles":[-2.5,-2.35,-1.75,-0.375,0.125,0.25,0.5],"scores":"AAAgwAAAgD4AAIC/AAAAPw=="},'
    '"classes":["ж cup","plate \\"blue\\""],'
    '"classifier":{"batch":"dynamic","bgr":false,"dimension":4,"features_pooled":true,"features_tensor":"f",'
    '"layout":"NCHW","logits_tensor":"l","opset":19,"source":"onnx"},'
    '"fit":{"accuracy":0.833333,"classes_without_prototype":[],"data_digest":"' + "a" * 64 + '","images":6,'
    '"labels":"folder","seed":0,"sketch":"AQAAAAAAAAD//////////w==","unreadable":0},'
    '"ood_prototypes":[{"images":3,"layer":"relu_1","source":"mixup","uses_ood_data":false}],'
    '"precision":{"asked":"auto","float32_size":4000,"float_layers":["conv_0","fc"],"images":6,"name":"int8",'
    '"ranges":"percentile","reason":"decides alike","trials":[{"auroc_drop":0.25,"auroc_drop_bound":null,'
    '"feature_error":0.125,"flips":0.5,"flips_bound":0.25,"float_layers":2,"precision":"int8","size":1000}]},'
    '"preprocessing":{"camera":null,"channels":1,"crop":"stretch","filter":"bilinear","height":2,"mean":[0.0],"preset":"custom",'
    '"short_side":null,"std":[255.0],"width":3},'
    '"probes":[{"class_id":0,"is_ood":false,"logits":[1.5,-0.0],"name":"ramp","ood_score":-1.25,"p_value":0.75,'
    '"png":"' + PNG + '","valid":true}],'
    '"scale":{"asked":"auto","reason":"tells them apart",'
    '"trials":[{"auroc":0.75,"scale":0.125},{"auroc":0.5,"scale":1.0}],"value":0.125},'
    '"schema":"grood-edge.contract",'
    '"selection":{"asked":"auto","candidates":['
    '{"auroc":0.5,"difference":null,"name":"combination","standard_error":null},'
    '{"auroc":0.75,"difference":0.25,"name":"mean","standard_error":0.125}],'
    '"classes":2,"images":4,"reason":"mean is clearly better"},'
    '"space":"features",'
    '"stream":{"correlation":0.25,"data_digest":"' + "c" * 64 + '","episodes":2,"fps":30.0,"frames":900,"interval":0.5,'
    '"maxima":[2.5,0.125]},'
    '"tools":{"grood-edge":"0.1.0","numpy":"2.0"},'
    '"version":1}'
)
GOLDEN_DIGEST = "0c4d8a71ea26e3dae32c032bb610a64d0de946d0eae6f9754fe3e1f42b48f86a"


@pytest.fixture(scope="module")
def real(artifact_path: Path) -> Contract:
    return read_artifact(artifact_path).contract


@pytest.fixture
def document() -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads(GOLDEN)
    return loaded


def read(document: Any) -> Contract:
    return contract_from_json(json.dumps(document))[0]


def changed(document: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    result = copy.deepcopy(document)
    *folders, last = path.split(".")
    target: Any = result
    for name in folders:
        target = target[int(name)] if name.isdigit() else target[name]
    target[int(last) if last.isdigit() else last] = value
    return result


def test_golden_bytes() -> None:
    assert HAND_MADE.to_json() == GOLDEN
    assert HAND_MADE.digest() == hashlib.sha256(GOLDEN.encode("utf-8")).hexdigest() == GOLDEN_DIGEST


def test_golden_bytes_are_read_back() -> None:
    contract, digests = contract_from_json(GOLDEN)
    assert contract == HAND_MADE
    assert digests == {}
    assert isinstance(contract.probes[0].logits[1], float)
    first, second = contract.calibration.grouped_scores()
    np.testing.assert_array_equal(first, np.array([-2.5, 0.25], np.float32))
    np.testing.assert_array_equal(second, np.array([-1, 0.5], np.float32))
    np.testing.assert_array_equal(contract.calibration.sorted_scores(), np.array([-2.5, -1, 0.25, 0.5], np.float32))
    np.testing.assert_array_equal(contract.bank.row_classes(), np.array([1, 0], np.int32))
    np.testing.assert_array_equal(contract.fit.sketch_hashes(), np.array([1, 2**64 - 1], np.uint64))
    assert (contract.head_dimension, contract.prototype_count) == (4, 2)
    assert dataclasses.replace(contract, space="logits").head_dimension == 2


def test_round_trip_of_a_real_contract(real: Contract) -> None:
    text = real.to_json({"graph": "1" * 64, "contract": "2" * 64})
    again, digests = contract_from_json(text)
    assert again == real
    assert digests == {"graph": "1" * 64, "contract": "2" * 64}
    assert again.to_json(digests) == text
    assert again.digest() == real.digest()
    assert len(real.probes) > 3


def test_canonical_form(real: Contract) -> None:
    text = real.to_json()
    document = json.loads(text)
    assert text == json.dumps(document, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    assert document["version"] == CONTRACT_VERSION
    assert "digests" not in document
    assert "digests" in json.loads(real.to_json({"graph": "x"}))


def test_digest_covers_every_value(document: dict[str, Any]) -> None:
    seen = {HAND_MADE.digest()}
    for path, value in [
        ("classes.0", "mug"), ("preprocessing.std.0", 254.0), ("classifier.features_tensor", "g"),
        ("bank.candidates", 4),
        ("fit.images", 7), ("calibration.alpha", 0.4), ("tools.numpy", "2.1"), ("probes.0.ood_score", -1.0),
        ("space", "logits"), ("selection.candidates.1.auroc", 0.5), ("bank.paths.1", "x"),
        ("fit.sketch", "AQAAAAAAAAA="), ("scale.value", 0.25), ("scale.trials.1.auroc", 0.25),
    ]:  # fmt: skip
        seen.add(read(changed(document, path, value)).digest())
    assert len(seen) == 15


def every_object(value: Any, path: str = "") -> list[str]:
    """Return the paths of all JSON objects below `value`, but `tools`, whose keys are free."""
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    found = [path] if isinstance(value, dict) and path != ".tools" else []
    for key, child in children:
        found += every_object(child, f"{path}.{key}")
    return found


def at(document: Any, path: str) -> Any:
    for name in path.strip(".").split(".") if path else []:
        document = document[int(name)] if name.isdigit() else document[name]
    return document


def test_unknown_keys(document: dict[str, Any]) -> None:
    paths = every_object(document)
    assert len(paths) == 19
    for path in paths:
        other = copy.deepcopy(document)
        at(other, path)["surprise"] = 1
        with pytest.raises(ArtifactError, match=r"unknown keys.*surprise"):
            read(other)


def test_missing_keys(document: dict[str, Any]) -> None:
    count = 0
    for path in every_object(document):
        for key in at(document, path):
            other = copy.deepcopy(document)
            del at(other, path)[key]
            expected = {"schema": "schema is not", "version": "version None"}
            with pytest.raises(ArtifactError, match=expected.get(key, rf"missing keys.*'{key}'")):
                read(other)
            count += 1
    assert count == 16 + 7 + 10 + 9 + 8 + 8 + 4 + 2 * 2 + 5 + 2 * 4 + 4 + 9 + 2 * 3 + 8 + 12 + 8


WRONG_TYPES: list[tuple[str, Any]] = [
    ("classes", "cup"), ("classes", {"0": "cup", "1": "plate"}), ("classes.0", 1), ("classes.0", None),
    ("preprocessing", []), ("preprocessing.height", 2.0), ("preprocessing.height", "2"), ("preprocessing.height", True),
    ("preprocessing.mean", 0.0), ("preprocessing.mean.0", "0"), ("preprocessing.filter", "box"),
    ("preprocessing.short_side", 2.5), ("classifier.bgr", 0), ("classifier.batch", 1), ("classifier.layout", "CHWN"),
    ("classifier.dimension", 4.0), ("precision", "fp16"), ("precision.name", "fp64"), ("precision.ranges", "mean"),
    ("precision.float_layers", "conv"), ("precision.trials.0", None), ("precision.trials.0.precision", "fp32"),
    ("precision.trials.0.auroc_drop", "0"), ("precision.images", 1.0), ("ood_prototypes", None),
    ("ood_prototypes.0", "mean"),
    ("ood_prototypes.0.layer", 1), ("bank.rows", None), ("bank.dtype", "int4"), ("bank.trials", None),
    ("bank.trials.0", 5), ("bank.trials.0.changed", "0"), ("bank.classes", [1, 0]), ("bank.paths", "a.png"),
    ("bank.paths.0", None), ("space", "pixels"), ("scale", 1.0), ("scale.value", "1"),
    ("scale.value", None), ("scale.trials", None), ("scale.trials.0", 1.0),
    ("scale.trials.0.auroc", None), ("selection", None), ("selection.candidates.0", "mean"),
    ("selection.candidates.0.difference", "0"), ("fit.sketch", [1]), ("calibration.class_sizes", 4),
    ("calibration.class_sizes.0", 2.0), ("calibration.class_ranks", None),
    ("fit.accuracy", "1"), ("fit.accuracy", True), ("fit.classes_without_prototype", None),
    ("calibration.alpha", None), ("calibration.alpha", [0.05]), ("calibration.delta", "0.05"), ("calibration.n", 3.0),
    ("calibration.scores", [-2.5, -1.0, 0.25]), ("calibration.guarantee", "strong"), ("tools", ["numpy"]),
    ("tools.numpy", 2), ("probes", {}), ("probes.0.is_ood", 0), ("probes.0.logits", None), ("probes.0.ood_score", None),
    ("digests", []), ("digests", {"graph": 1}),
]  # fmt: skip


@pytest.mark.parametrize(("path", "value"), WRONG_TYPES)
def test_wrong_types(document: dict[str, Any], path: str, value: Any) -> None:
    with pytest.raises(ArtifactError, match=path.replace(".0", r"(\[0\])?").replace(".", r"\.")):
        read(changed(document, path, value))


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999", "-1e999", "1" * 400, "1" * 5000])
@pytest.mark.parametrize("path", ["calibration.alpha", "preprocessing.mean.0", "probes.0.ood_score", "fit.seed"])
def test_numbers_that_are_none(document: dict[str, Any], path: str, number: str) -> None:
    text = json.dumps(changed(document, path, "NUMBER")).replace('"NUMBER"', number)
    with pytest.raises(ArtifactError):
        contract_from_json(text)


def test_nan_is_not_written() -> None:
    broken = dataclasses.replace(HAND_MADE, fit=dataclasses.replace(HAND_MADE.fit, accuracy=math.nan))
    with pytest.raises(ValueError, match="not JSON compliant"):
        broken.to_json()


@pytest.mark.parametrize("version", [2, 0, "1", 1.0, True, None, [1], 10**30])
def test_other_versions(document: dict[str, Any], version: Any) -> None:
    with pytest.raises(ArtifactError, match=r"reads version 1; upgrade grood-edge|not valid JSON"):
        read(changed(document, "version", version))


@pytest.mark.parametrize("schema", ["grood-edge", "", None, 1, ["grood-edge.contract"]])
def test_other_schemas(document: dict[str, Any], schema: Any) -> None:
    with pytest.raises(ArtifactError, match="another tool wrote this file"):
        read(changed(document, "schema", schema))


CONTRADICTIONS: list[tuple[str, Any, str]] = [
    ("precision.name", "fp32", "layers kept in float32 in a graph that is float32"),
    ("precision.name", "fp16", "ranges of activations in fp16"),
    ("precision.images", -1, "judged on fewer than no images"),
    ("precision.float32_size", -1, "judged on fewer than no images"),
    ("precision.trials.0.size", -1, "a trial of the precision with a negative number"),
    ("precision.trials.0.flips", 1.5, "a share outside 0..1"),
    ("precision.trials.0.flips_bound", -0.5, "a share outside 0..1"),
    ("calibration.n", 5, "4 calibration scores where n is 5"),
    ("calibration.k", 0, "k 0 where n is 4"),
    ("calibration.k", 5, "k 5 where n is 4"),
    ("calibration.scores", "", "0 calibration scores"),
    ("calibration.alpha", 0.0, "alpha 0.0"),
    ("calibration.alpha", 1.0, "alpha 1.0"),
    ("calibration.delta", 1.5, "delta 1.5"),
    ("calibration.delta", None, "delta None with guarantee conformal"),
    ("calibration.provenance", "seen-in-training", "guarantee conformal"),
    ("calibration.method", "cross-fitted", "guarantee conformal for cross-fitted"),
    ("calibration.guarantee", "none", "guarantee none"),
    ("calibration.guarantee", "marginal", "delta 0.25 with guarantee marginal"),
    ("calibration.class_sizes", [2, 1], "4 calibration scores in groups of 3"),
    ("calibration.class_sizes", [4, 0], "4 calibration scores in groups of 4"),
    ("calibration.class_sizes", [5, -1], "4 calibration scores in groups of 4"),
    ("calibration.class_sizes", [4], "not finite and ascending"),
    ("calibration.class_sizes", [2, 1, 1], "3 class sizes and 2 class ranks"),
    ("calibration.class_ranks", [1], "2 class sizes and 1 class ranks"),
    ("calibration.class_ranks", [1, 0], "a class rank outside"),
    ("calibration.class_ranks", [3, 1], "a class rank outside"),
    ("fit.sketch", "", "a sketch of the fit images"),
    ("classes", ["one"], "a class that does not exist|1 classes"),
    ("classes", ["a", "b", "c"], "probes with other class counts|class sizes for 3 classes"),
    ("ood_prototypes", [], "0 OOD prototypes"),
    ("ood_prototypes", 9 * [json.loads(GOLDEN)["ood_prototypes"][0]], "9 OOD prototypes"),
    ("scale.value", 0.0, "scale 0.0"),
    ("scale.value", -1.0, "scale -1.0"),
    ("scale.value", 9e-7, "scale 9e-07"),
    ("scale.value", 1000001.0, "scale 1000001.0"),
    ("scale.trials", (MAX_TRIALS + 1) * [json.loads(GOLDEN)["scale"]["trials"][0]], "65 trials of the scale"),
    ("scale.trials.0.scale", 0.0, "trial of the scale at 0 or below"),
    ("scale.trials.1.auroc", -0.1, "trial of the scale at 0 or below, or with an AUROC"),
    ("selection.candidates", (MAX_TRIALS + 1) * [json.loads(GOLDEN)["selection"]["candidates"][0]], "65 candidates"),
    ("selection.images", -1, "selection from -1 images"),
    ("selection.classes", -1, "selection from 4 images of -1 classes"),
    ("selection.candidates.0.auroc", 1.5, "AUROC"),
    ("selection.candidates.1.standard_error", -0.5, "AUROC"),
    ("bank.rows", 0, "0 rows in a bank of choice kmeans"),
    ("bank.rows", -1, "-1 bank rows"),
    ("bank.rows", 6, "6 bank rows of 5 candidates"),
    ("bank.rows", 3, "classes of 2 bank rows of 3"),
    ("bank.choice", "none", "2 rows in a bank of choice none"),
    ("bank.classes", "", "classes of 0 bank rows"),
    ("bank.classes", encode_array(np.array([0, 2], "<i4")), "a class that does not exist"),
    ("bank.classes", encode_array(np.array([0, -1], "<i4")), "a class that does not exist"),
    ("bank.classes", "AQAAAAAA", "classes of the bank rows cannot be decoded"),
    ("bank.paths", ["a.png"], "paths of 1 bank rows of 2"),
    ("bank.trials", (MAX_TRIALS + 1) * [json.loads(GOLDEN)["bank"]["trials"][0]], "65 trials"),
    ("bank.trials.0.rows", -1, "trial of the bank's size"),
    ("bank.trials.0.changed", 1.5, "trial of the bank's size"),
    ("fit.sketch", encode_array(np.array([2, 1], "<u8")), "a sketch of the fit images that is not ascending"),
    ("fit.sketch", encode_array(np.array([1, 1], "<u8")), "a sketch of the fit images that is not ascending"),
    ("fit.sketch", encode_array(np.arange(MAX_SKETCH + 1, dtype="<u8")), "or too long"),
    ("fit.sketch", "AQAAAA==", "sketch of the fit images cannot be decoded"),
    ("classifier.dimension", 0, "feature dimension 0"),
    ("probes.0.logits", [1.0], "probes with other class counts"),
]


@pytest.mark.parametrize(("path", "value", "message"), CONTRADICTIONS)
def test_contradictions(document: dict[str, Any], path: str, value: Any, message: str) -> None:
    with pytest.raises(ArtifactError, match=message):
        read(changed(document, path, value))


def test_a_number_of_scores_that_are_not_there_costs_no_time(document: dict[str, Any]) -> None:
    document["calibration"] |= {
        "n": (1 << 31) - 1,
        "scores": encode_array(np.arange(4, dtype="<f4")),
        "class_sizes": [],
        "class_ranks": [],
    }
    with pytest.raises(ArtifactError, match=f"4 calibration scores where n is {(1 << 31) - 1}"):
        read(document)


@pytest.mark.parametrize(
    ("path", "value"),
    [("height", 0), ("width", 10**6), ("channels", 2), ("std", [0.0]), ("mean", []), ("short_side", 5)],
)
def test_preprocessing_that_cannot_be_is_the_artifacts_fault_not_the_users(
    document: dict[str, Any], path: str, value: Any
) -> None:
    """The same rules refuse a user's options as UsageError, exit code 2; here the file is wrong."""
    with pytest.raises(ArtifactError, match="preprocessing cannot use"):
        read(changed(document, f"preprocessing.{path}", value))


@pytest.mark.parametrize(
    "scores",
    [
        np.array([1.0, 0.5, 2.0]),
        np.array([0.0, np.nan, 1.0]),
        np.array([0.0, 1.0, np.inf]),
        np.array([-np.inf, 0.0, 1.0]),
    ],
    ids=["not sorted", "nan", "inf", "-inf"],
)
def test_scores_that_no_decision_can_use(document: dict[str, Any], scores: np.ndarray) -> None:
    padded = np.append(scores, 3.0)  # four, in two groups
    with pytest.raises(ArtifactError, match="not finite and ascending"):
        read(changed(document, "calibration.scores", encode_array(padded.astype("<f4"))))
    with pytest.raises(ArtifactError, match="not finite and ascending"):
        decode_scores(encode_array(scores.astype("<f4")))


@pytest.mark.parametrize("text", ["AAAgwAAAgL8AAIA", "AAAgwAAAgL8AAIA+AA==", "****", "AAAg wAAA", "жжжж"])
def test_scores_that_are_not_base64_of_floats(text: str) -> None:
    with pytest.raises(ArtifactError, match="calibration scores"):
        decode_scores(text)


def test_scores_round_trip_sorted() -> None:
    scores = np.random.default_rng(0).normal(size=101).astype(np.float32)
    (alone,) = decode_scores(encode_scores((scores,)))
    np.testing.assert_array_equal(alone, np.sort(scores))
    first, second = decode_scores(encode_scores((scores[:40], scores[40:])), (40, 61))
    np.testing.assert_array_equal(first, np.sort(scores[:40]))
    np.testing.assert_array_equal(second, np.sort(scores[40:]))
    assert base64.b64decode(encode_scores((np.array([1.0], np.float32),))) == b"\x00\x00\x80\x3f"


def test_groups_are_ascending_each_for_itself(document: dict[str, Any]) -> None:
    """Class by class the scores ascend; as one group they do not, and are refused."""
    assert read(document) == HAND_MADE
    ungrouped = changed(changed(document, "calibration.class_sizes", []), "calibration.class_ranks", [])
    with pytest.raises(ArtifactError, match="not finite and ascending"):
        read(ungrouped)


class TestRule:
    def test_one_group_for_all_classes(self, real: Contract) -> None:
        rule = real.calibration.rule(len(real.classes))
        assert rule.ranks == (real.calibration.k,)
        assert rule.group_of_class.tolist() == [0] * len(real.classes)
        np.testing.assert_array_equal(rule.scores[0], real.calibration.sorted_scores())

    def test_one_group_a_class(self) -> None:
        rule = HAND_MADE.calibration.rule(2)
        assert rule.ranks == (1, 1)
        assert rule.group_of_class.tolist() == [0, 1]
        assert (rule.threshold(0), rule.threshold(1)) == (0.25, 0.5)

    def test_another_alpha_ranks_every_group_anew_and_the_own_one_is_not_computed_again(self, real: Contract) -> None:
        calibration = dataclasses.replace(real.calibration, k=3)  # not what alpha and delta give
        assert calibration.rule(7).ranks == calibration.rule(7, calibration.alpha).ranks == (3,)
        assert calibration.rule(7, 0.2).ranks == (rank_for(0.2, calibration.delta, calibration.n),)
        assert HAND_MADE.calibration.rule(2, 0.9).ranks == (rank_for(0.9, 0.25, 2),) * 2

    def test_alpha_that_one_group_cannot_carry(self) -> None:
        with pytest.raises(CalibrationError, match="2 calibration images cannot carry alpha"):
            HAND_MADE.calibration.rule(2, 0.1)


@pytest.mark.parametrize(
    "text",
    ["", "null", "[]", '"grood-edge.contract"', "{", GOLDEN[:-1], GOLDEN + "}", "[" * 100_000, '{"a":' * 100_000, "\0"],
)
def test_text_that_is_no_contract(text: str) -> None:
    with pytest.raises(ArtifactError, match=r"not valid JSON|schema is not|values"):
        contract_from_json(text)


def test_truncated_text() -> None:
    for end in range(0, len(GOLDEN), 7):
        with pytest.raises(ArtifactError, match="not valid JSON"):
            contract_from_json(GOLDEN[:end])


def test_huge_text() -> None:
    with pytest.raises(ArtifactError, match="at most 16,777,216"):
        contract_from_json(GOLDEN + " " * MAX_CONTRACT_BYTES)


def test_a_key_twice(document: dict[str, Any]) -> None:
    """Readers differ in which one counts."""
    assert document["bank"]["rows"] == 2
    with pytest.raises(ArtifactError, match="twice"):
        contract_from_json(GOLDEN.replace('"candidates":5', '"candidates":5,"candidates":4'))


def test_half_a_surrogate_pair(document: dict[str, Any]) -> None:
    """JSON can escape it, UTF-8 cannot hold it, so that no digest could be computed."""
    with pytest.raises(ArtifactError):
        read(changed(document, "classes.0", "\ud800"))


def test_messages_stay_short(document: dict[str, Any]) -> None:
    with pytest.raises(ArtifactError) as error:
        read(changed(document, "bank.rows", ["x" * 1000] * 1000))
    assert len(str(error.value)) < 500
