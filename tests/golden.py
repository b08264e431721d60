"""Hand-made artifacts of two classes and 2x2 grey pixels, and docs/format.md as the format's tests read it."""

import functools
import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
from onnx import TensorProto, helper, load_model_from_string, numpy_helper

from grood_edge.artifact import artifact_bytes
from grood_edge.contract import Contract
from grood_edge.contract_reader import contract_from_json
from grood_edge.export.camera import attach_camera
from grood_edge.export.head import head_constants, head_nodes
from grood_edge.preprocessing import Camera

__all__ = [
    "GOLDEN_TEXT",
    "KEY",
    "PAGE",
    "SCHEMA",
    "VALIDATOR",
    "camera_golden",
    "camera_model",
    "canonical",
    "golden",
    "golden_contract",
    "golden_model",
    "other_golden",
    "table",
    "top_level",
]

DOCS = Path(__file__).parent.parent / "docs"
PAGE = (DOCS / "format.md").read_text(encoding="utf-8")
SCHEMA = json.loads((DOCS / "contract.schema.json").read_text(encoding="utf-8"))
VALIDATOR = jsonschema.Draft202012Validator(SCHEMA)
KEY = "grood_edge.contract"
OTHER_SCALE = {3: 0.3, 0: 1.0}  # by rows of the bank; 0.3 is no float32

# Two OOD prototypes, scale 2, an int8 bank of three rows, one group of calibration scores a class. After a change of
# the format
# `python -c "from tests.golden import remade; print(remade())"` gives the text with new digests and probe.
GOLDEN_TEXT = (
    '{"bank":{"asked":"auto","candidates":5,"choice":"kmeans","classes":"AQAAAAAAAAABAAAA","dtype":"int8",'
    '"paths":["a/1.png","b/ß.png","a/2.png"],"reason":"small enough","rows":3,"trials":[{"auroc":0.75,'
    '"changed":0.0,"rows":5},{"auroc":0.75,"changed":0.25,"rows":3}]},"calibration":{"alpha":0.5,"class_ranks":[1,'
    '1],"class_sizes":[2,2],"data_digest":"bbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbb",'
    '"delta":0.25,"guarantee":"conformal","k":1,"method":"separate","n":4,"provenance":"unseen","quantiles":[-2.5,'
    '-2.25,-1.5,-0.375,0.25,0.375,0.5],"scores":"AAAgwAAAgD4AAIC/AAAAPw=="},"classes":["a","größe"],'
    '"classifier":{"batch":"dynamic","bgr":false,"dimension":4,"features_pooled":false,"features_tensor":"f",'
    '"layout":"NHWC","logits_tensor":"l","opset":19,"source":"onnx"},'
    '"digests":{"contract":"bb91bd6d166889830e2318d86200a0ad9ac08016246d74c715cafc0478555312",'
    '"graph":"f6e57172baa884959cc6655464aecd1c6c8bb9c6d323c2cc59a2c4df42e8152a"},"fit":{"accuracy":0.5,'
    '"classes_without_prototype":[],'
    '"data_digest":"aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa","images":6,"labels":"folder",'
    '"seed":0,"sketch":"AQAAAAAAAAD//////////w==","unreadable":0},"ood_prototypes":[{"images":0,"layer":null,'
    '"source":"mean","uses_ood_data":false},{"images":4,"layer":"image","source":"mixup","uses_ood_data":false}],'
    '"precision":{"asked":"auto","float32_size":5,"float_layers":[],"images":6,"name":"fp32","ranges":null,'
    '"reason":"int8 flips too much","trials":[{"auroc_drop":null,"auroc_drop_bound":null,"feature_error":0.5,'
    '"flips":0.5,"flips_bound":0.25,"float_layers":0,"precision":"int8","size":2}]},'
    '"preprocessing":{"camera":null,"channels":1,"crop":"stretch","filter":"bilinear","height":2,"mean":[0.0],'
    '"preset":"custom","short_side":null,"std":[255.0],"width":2},"probes":[{"class_id":1,"is_ood":false,'
    '"logits":[0.25098,1.501961],"name":"dots","ood_score":-0.824244,"p_value":0.6666666865348816,'
    '"png":"iVBORw0KGgoAAAANSUhEUgAAAAIAAAACCAAAAABX3VL4AAAADklEQVR4nGNg+M/o4AAABMUBgXsDZXgAAAAASUVORK5CYII=",'
    '"valid":true}],"scale":{"asked":"auto","reason":"tells shuffled images best","trials":[{"auroc":0.5,"scale":1.0},'
    '{"auroc":0.75,"scale":2.0}],"value":2.0},"schema":"grood-edge.contract","selection":{"asked":"auto","candidates":[{"auroc":0.75,'
    '"difference":null,"name":"combination","standard_error":null},{"auroc":0.5,"difference":-0.25,"name":"mean",'
    '"standard_error":0.125}],"classes":2,"images":5,"reason":"as good as any"},"space":"features",'
    '"stream":null,"tools":{"hand":"1"},"version":1}'
)  # fmt: skip


def canonical(document: dict[str, Any]) -> str:
    """Section 8."""
    return json.dumps(document, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def table(*header: str) -> list[list[str]]:
    """Return the rows of the one table of the page whose header begins so; back-quotes are dropped."""
    found = []
    for block in re.findall(r"(?:^\|.*\|\n)+", PAGE, flags=re.MULTILINE):
        lines = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line.strip("|"))] for line in block.splitlines()]
        if tuple(lines[0][: len(header)]) == header:
            found.append([[cell.strip("`") for cell in line] for line in lines[2:]])
    (rows,) = found
    return rows


def varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while data[at] > 127:
        value, shift, at = value | (data[at] & 127) << shift, shift + 7, at + 1
    return value | data[at] << shift, at + 1


def top_level(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Section 11, step 2: number and raw bytes of each field. A ModelProto has wire types 0 and 2 only."""
    at = 0
    while at < len(data):
        start = at
        tag, at = varint(data, at)
        size, at = varint(data, at)
        at += size if tag & 7 == 2 else 0
        yield tag >> 3, data[start:at]


def _shared_tensors(scale: float) -> dict[str, np.ndarray]:
    half = np.full(4, 0.5, np.float32)
    return {
        "preprocess/std": np.array([255], np.float32),
        "classifier/w": np.array([[1, 0], [0, 1], [1, 0], [0, 1]], np.float32),
        "grood/center": half,
        "grood/prototypes_t": np.stack([-half, half], axis=1),
        "grood/prototypes_sq": np.array([1, 1], np.float32),
        "grood/scale": np.array(scale, np.float32),
    }


def _golden_tensors() -> dict[str, np.ndarray]:
    """Section 3 by hand: the rows are (1, 0, 0, 0), (0, 1, 0, 0) and (-1, 0, 0, 0)."""
    root, f = np.sqrt(np.float32(3)), np.float32
    return _shared_tensors(2.0) | {
        "grood/bank": np.array([[64, 0, 0, 0], [0, 32, 0, 0], [-127, 0, 0, 0]], np.int8),
        "grood/bank_scale": np.array([1 / 64, 1 / 32, 1 / 127], f),
        "grood/ood_prototype.0": np.zeros(4, f),
        "grood/bank_log_s.0": np.array([-1, -2, -3], f),
        "grood/bank_inverse_length.0": np.ones(3, f),
        "grood/bank_offset.0": np.zeros(3, f),
        "grood/least_distance.0": np.array(1e-3, f),
        "grood/map_bias.0": np.array(0.25, f),
        "grood/map_slope.0": np.array(0.5, f),
        "grood/map_knots.0": np.array([-2, -1], f),
        "grood/map_weights.0": np.array([0.5, -0.25], f),
        "grood/ood_prototype.1": np.array([0.5, -0.5, 0.5, -0.5], f),
        "grood/bank_log_s.1": np.array([-1.5, -1, -2], f),
        "grood/bank_inverse_length.1": np.array([1, 1 / root, 1 / root], f),
        "grood/bank_offset.1": np.array([0.5, 1.5, 1.5], f),
        "grood/least_distance.1": np.array(1e-3 * root, f),
        "grood/map_bias.1": np.array(0, f),
        "grood/map_slope.1": np.array(0.5, f),
        "grood/map_knots.1": np.array([0], f),
        "grood/map_weights.1": np.array([0], f),
        "grood/calibration_scores": np.array([-2.5, 0.25, -1, 0.5], f),
        "grood/calibration_groups": np.array([0, 0, 1, 1], np.int32),
        "grood/group_of_class": np.array([0, 1], np.int32),
        "grood/rank": np.array([1, 1], np.int32),
        "grood/p_denominator": np.array([3, 3], f),
    }


def _other_tensors(rows: int) -> dict[str, np.ndarray]:
    """One OOD prototype, one group of scores; a float32 bank, or none and the logits in the place of the features."""
    f = np.float32
    tensors = _shared_tensors(OTHER_SCALE[rows]) | {"grood/ood_prototype.0": np.zeros(4 if rows else 2, f)}
    if rows:
        tensors |= {
            "grood/bank": np.array([[1, 0, 0, 0], [0, 1, 0, 0], [-1, 0, 0, 0]], f),
            "grood/bank_log_s.0": np.array([-1, -2, -3], f),
            "grood/bank_inverse_length.0": np.ones(3, f),
            "grood/bank_offset.0": np.zeros(3, f),
            "grood/least_distance.0": np.array(1e-3, f),
        }
    else:
        ones = np.ones(2, f)
        tensors |= {"grood/center": ones, "grood/prototypes_t": np.stack([-ones, ones], axis=1)}
        tensors |= {"grood/prototypes_sq": np.array([2, 2], f)}
    return tensors | {
        "grood/calibration_scores": np.array([-2.5, -1, 0.25, 0.5], f),
        "grood/calibration_groups": np.zeros(4, np.int32),
        "grood/group_of_class": np.zeros(2, np.int32),
        "grood/rank": np.array([1], np.int32),
        "grood/p_denominator": np.array([5], f),
    }


def _model(tensors: dict[str, np.ndarray], head: list[Any]) -> bytes:
    """Section 2 by hand: features are the pixels over 255, logits their sums over the columns."""
    nodes = [
        helper.make_node("Cast", ["image"], ["preprocess/cast_0"], "preprocess/cast_0", to=TensorProto.FLOAT),
        helper.make_node("Div", ["preprocess/cast_0", "preprocess/std"], ["preprocess/div_1"], "preprocess/div_1"),
        helper.make_node("Flatten", ["preprocess/div_1"], ["features"], "output/features_0", axis=1),
        helper.make_node("MatMul", ["features", "classifier/w"], ["logits"], "output/logits_0"),
        *head,
    ]
    kinds = {"logits": (1, [2]), "features": (1, [4]), "class_id": (6, []), "ood_score": (1, []), "p_value": (1, []),
             "is_ood": (9, []), "valid": (9, [])}  # fmt: skip
    graph = helper.make_graph(
        nodes,
        "golden",
        [helper.make_tensor_value_info("image", TensorProto.UINT8, ["N", 2, 2, 1])],
        [helper.make_tensor_value_info(name, kind, ["N", *rest]) for name, (kind, rest) in kinds.items()],
        [*head_constants(), *(numpy_helper.from_array(value, name) for name, value in tensors.items())],
    )
    opset = [helper.make_opsetid("", 19)]
    return bytes(helper.make_model(graph, opset_imports=opset, ir_version=9, producer_name="hand").SerializeToString())


@functools.cache
def golden_model() -> bytes:
    return _model(_golden_tensors(), head_nodes(2, "int8", "features"))


@functools.cache
def golden_contract() -> Contract:
    return contract_from_json(GOLDEN_TEXT)[0]


@functools.cache
def golden() -> bytes:
    return artifact_bytes(golden_model(), golden_contract())


@functools.cache
def other_golden(rows: int) -> bytes:
    """Return the artifact with one OOD prototype: rows of a float32 bank (3), or none (0) and the space `logits`."""
    document = json.loads(GOLDEN_TEXT)
    document["ood_prototypes"] = document["ood_prototypes"][:1]
    document["bank"] |= {"dtype": "float32", "paths": []}
    document["calibration"] |= {"class_sizes": [], "class_ranks": [], "scores": "AAAgwAAAgL8AAIA+AAAAPw=="}
    document["probes"] = []
    document["scale"]["value"] = OTHER_SCALE[rows]
    if rows == 0:
        document["bank"] |= {"choice": "none", "rows": 0, "classes": ""}
        document["space"] = "logits"
    head = head_nodes(1, "float32" if rows else None, document["space"])
    return artifact_bytes(_model(_other_tensors(rows), head), contract_from_json(canonical(document))[0])


GOLDEN_CAMERA = Camera(5, 7, "bgr")


def camera_model() -> bytes:
    """Return the model with the camera part before it."""
    p = replace(golden_contract().preprocessing, camera=GOLDEN_CAMERA)
    return bytes(attach_camera(load_model_from_string(golden_model()), p).SerializeToString(deterministic=True))


def camera_golden() -> bytes:
    """Return the artifact as one for a camera, without probes."""
    contract = golden_contract()
    p = replace(contract.preprocessing, camera=GOLDEN_CAMERA)
    return artifact_bytes(camera_model(), replace(contract, preprocessing=p, probes=()))


def remade() -> str:
    """Return GOLDEN_TEXT with the digests and the probe's outputs that the model gives now."""
    from grood_edge.ort import open_ort
    from grood_edge.probes import decode_png

    contract = golden_contract()
    frame = decode_png(contract.probes[0].png, contract.preprocessing)
    found = {name: value[0].tolist() for name, value in open_ort(golden_model()).run({"image": frame[None]}).items()}
    outputs = {name: found[name] for name in ("class_id", "p_value", "is_ood", "valid")}
    probe = replace(
        contract.probes[0], **outputs, ood_score=round(found["ood_score"], 6),
        logits=tuple(round(value, 6) for value in found["logits"]),
    )  # fmt: skip
    data = artifact_bytes(golden_model(), replace(contract, probes=(probe,)))
    (last,) = list(top_level(data))[-1:]
    return last[1][last[1].index(b"{") :].decode()
