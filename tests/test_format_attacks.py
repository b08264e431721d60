"""docs/format.md, section 14: every attack on the page, and a schema that refuses what the reader refuses."""

import base64
import copy
import functools
import hashlib
import json
import os
import re
import resource
import struct
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import AttributeProto, ModelProto, SparseTensorProto, TensorProto, helper, numpy_helper

from grood_edge import artifact as artifact_module
from grood_edge import graph_check
from grood_edge.artifact import artifact_bytes, read_artifact
from grood_edge.contract import MAX_SKETCH, encode_array
from grood_edge.contract_reader import contract_from_json
from grood_edge.contract_rules import MAX_OOD_PROTOTYPES, MAX_TRIALS
from grood_edge.errors import ArtifactError
from grood_edge.graph_check import MAX_GRAPH_DEPTH, MAX_KNOTS
from grood_edge.probes import decode_png
from tests.golden import (
    GOLDEN_TEXT,
    KEY,
    VALIDATOR,
    camera_model,
    canonical,
    golden,
    golden_contract,
    golden_model,
    table,
    top_level,
)

Make = Callable[[], bytes]
ATTACKS: dict[str, tuple[Make, str]] = {}


def encoded(number: int, payload: bytes) -> bytes:
    """Encode one length-delimited field."""
    out = bytearray()
    for part in (number << 3 | 2, len(payload)):
        septets = max(1, -(-part.bit_length() // 7))
        out += bytes(part >> 7 * i & 127 | (128 if i < septets - 1 else 0) for i in range(septets))
    return bytes(out) + payload


def entry(key: str, value: str) -> bytes:
    return encoded(14, encoded(1, key.encode()) + encoded(2, value.encode("utf-8", "surrogatepass")))


def with_text(text: str, model: bytes | None = None) -> bytes:
    """Return an artifact with this contract, as it is."""
    kept = [raw for number, raw in top_level(golden()) if number == 14][:-1]
    return (golden_model() if model is None else model) + b"".join(kept) + entry(KEY, text)


def sealed(document: dict[str, Any] | None = None, model: bytes | None = None) -> bytes:
    """Return an artifact with this contract and model, and with digests that match them."""
    model = golden_model() if model is None else model
    bare = {key: value for key, value in (document or json.loads(GOLDEN_TEXT)).items() if key != "digests"}
    graph = b"".join(raw for number, raw in top_level(model) if number in (7, 8, 25))
    text = canonical(bare).encode("utf-8", "surrogatepass")
    digests = {"graph": hashlib.sha256(graph).hexdigest(), "contract": hashlib.sha256(text).hexdigest()}
    return with_text(canonical(bare | {"digests": digests}), model)


def written(document: dict[str, Any], model: bytes | None = None) -> bytes:
    """Return an artifact with this contract as grood-edge itself writes it."""
    return artifact_bytes(golden_model() if model is None else model, contract_from_json(canonical(document))[0])


def changed(path: str, value: Any) -> dict[str, Any]:
    document: dict[str, Any] = json.loads(GOLDEN_TEXT)
    *folders, last = path.split(".")
    target: Any = document
    for name in folders:
        target = target[int(name)] if name.isdigit() else target[name]
    target[int(last) if last.isdigit() else last] = value
    return document


def attack(name: str, message: str, make: Make) -> None:
    assert name not in ATTACKS
    ATTACKS[name] = make, message


def on_contract(name: str, message: str, path: str, value: Any) -> None:
    attack(name, message, lambda: sealed(changed(path, value)))


def on_text(name: str, message: str, old: str, new: str) -> None:
    assert old in GOLDEN_TEXT
    attack(name, message, lambda: with_text(GOLDEN_TEXT.replace(old, new, 1)))


def on_model(name: str, message: str, change: Callable[[ModelProto], None]) -> None:
    """Attack with a model that onnx itself writes, sealed again."""

    def make() -> bytes:
        model = onnx.load_model_from_string(golden_model())
        change(model)
        return sealed(model=bytes(model.SerializeToString()))

    attack(name, message, make)


def on_graph(name: str, message: str, raw: bytes) -> None:
    """Attack with raw bytes at the end of the graph, sealed again."""

    def make() -> bytes:
        model = onnx.load_model_from_string(golden_model())
        graph = model.graph.SerializeToString() + raw
        model.ClearField("graph")
        return sealed(model=model.SerializeToString() + encoded(7, graph))

    attack(name, message, make)


def appended(name: str, message: str, raw: bytes) -> None:
    attack(name, message, lambda: golden() + raw)


def tensor_of(model: ModelProto, name: str) -> TensorProto:
    (tensor,) = (tensor for tensor in model.graph.initializer if tensor.name == name)
    assert isinstance(tensor, TensorProto)
    return tensor


def external(name: str = "outside") -> TensorProto:
    tensor = TensorProto(name=name, dims=[1], data_type=1, data_location=TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value="/etc/passwd")
    return tensor


def constant(**value: Any) -> onnx.NodeProto:
    return helper.make_node("Constant", [], ["c"], **value)


def nested(depth: int, *nodes: onnx.NodeProto) -> onnx.NodeProto:
    graph = helper.make_graph(list(nodes), "g", [], [])
    for _ in range(depth):
        graph = helper.make_graph([helper.make_node("If", ["x"], ["y"], then_branch=graph)], "g", [], [])
    return helper.make_node("If", ["x"], ["y"], then_branch=graph)


def replaced(name: str, array: np.ndarray) -> Callable[[ModelProto], None]:
    return lambda m: tensor_of(m, name).CopyFrom(numpy_helper.from_array(array, name))


def set_dims(*dims: int) -> Callable[[ModelProto], None]:
    return lambda m: tensor_of(m, "grood/bank_log_s.0").dims.__setitem__(slice(None), dims)


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, *more: bytes, data: bytes = b"\0\0\0\0\0\0") -> str:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    parts = [b"\x89PNG\r\n\x1a\n", header, *more, chunk(b"IDAT", zlib.compress(data)), chunk(b"IEND", b"")]
    return base64.b64encode(b"".join(parts)).decode()


# The file
appended("trailing-zeros", "field number 0", b"\0\0")
appended("trailing-text", "damaged", b"and more")
appended("trailing-field", "field 100 where none is expected", encoded(100, b"x"))
attack("trailing-artifact", "where none is expected", lambda: golden() * 2)
appended("length-past-end", "reaches past", b"\x72\x7f")
appended("length-of-2-to-the-63", "reaches past", b"\x72" + b"\x80" * 9 + b"\x01")
on_graph("length-past-end-in-graph", "reaches past", b"\x0a\x7f")
appended("varint-of-a-million-bytes", "more than 64 bits", b"\xf0" + b"\xff" * 1_000_000)
appended("varint-of-70-bits", "more than 64 bits", b"\x08" + b"\xff" * 9 + b"\x7f")
appended("tag-of-33-bits", "field number", b"\xf2\x80\x80\x80\x10\x00")
appended("group", "wire type 3", b"\x73\x74")
appended("graph-as-number", "field 7 where none is expected", b"\x38\x01")
appended("graph-as-fixed-width", "field 7 where none is expected", b"\x39" + b"\0" * 8)
attack("producer-as-number", "field 2 where none is expected", lambda: b"\x10\x01" + golden())
appended("metadata-as-fixed-width", "is a number", b"\x71" + b"\0" * 8)
attack("two-graphs", "field 7 where none is expected", lambda: sealed(model=golden_model() + encoded(7, b"")))
attack("no-graph", "no ONNX graph", lambda: golden()[len(golden_model()) :])
attack("empty", "no ONNX graph", lambda: b"")
attack("no-contract", "without a grood-edge contract", golden_model)
appended("two-contracts", "'grood_edge.contract' twice", entry(KEY, "{}"))
appended("two-names", "'names' twice", entry("names", "{}"))
appended("two-values-in-an-entry", "damaged", encoded(14, encoded(1, b"a") + encoded(2, b"b") * 2))
appended("two-keys-in-an-entry", "damaged", encoded(14, encoded(1, b"a") + encoded(1, KEY.encode())))
appended("metadata-not-utf8", "not UTF-8", encoded(14, encoded(1, b"\xff")))
attack("tampered-names", "metadata 'names'", lambda: golden().replace(b"{0: 'a", b"{0: 'b"))
attack("tampered-weights", "graph digest", lambda: golden().replace(struct.pack("<f", -2.5), b"\0\0\0\0", 1))
attack("tampered-contract", "contract digest", lambda: golden().replace(b'"alpha":0.5', b'"alpha":0.4'))
attack("tampered-digest", "contract digest", lambda: golden().replace(b'{"contract":"b', b'{"contract":"f', 1))
on_text("extra-digest", "canonical", '"digests":{', '"digests":{"a":"",')

# The graph, sealed again
foreign = "an artifact has none"
on_model("second-opset", foreign, lambda m: m.opset_import.append(helper.make_opsetid("com.microsoft", 1)))
on_model("other-opset", "opset 18", lambda m: setattr(m.opset_import[0], "version", 18))
on_model("custom-opset-alone", "opset 0", lambda m: setattr(m.opset_import[0], "domain", "x"))
on_model("ort-format", "onnxruntime's own format", lambda m: setattr(m, "producer_name", "ORTM" + "x" * 20))
on_model("newer-ir", "IR version 11", lambda m: setattr(m, "ir_version", 11))
on_model("function", foreign, lambda m: m.functions.append(helper.make_function("", "Add", [], [], [], [])))
on_model("training", foreign, lambda m: m.training_info.add().algorithm.node.add())
attack("device-configuration", foreign, lambda: sealed(model=golden_model() + encoded(26, b"")))
on_model("duplicate-initializer", "'grood/rank' twice", lambda m: m.graph.initializer.append(
    numpy_helper.from_array(np.array(3, np.int32), "grood/rank")))  # fmt: skip
rank = numpy_helper.from_array(np.array(3, np.int32), "other").SerializeToString()
on_graph("initializer-with-two-names", "twice", encoded(5, rank + encoded(8, b"grood/rank")))
on_model("sparse-initializer", "sparse", lambda m: m.graph.sparse_initializer.append(
    SparseTensorProto(values=numpy_helper.from_array(np.ones(1, np.float32), "s"))))  # fmt: skip
on_model("initializer-as-input", "the graph has", lambda m: m.graph.input.append(
    helper.make_tensor_value_info("grood/rank", TensorProto.INT32, [])))  # fmt: skip
on_model("missing-output", "the graph has", lambda m: m.graph.output.pop() and None)
on_model("other-output-type", "the graph has", lambda m: setattr(m.graph.output[5].type.tensor_type, "elem_type", 1))
attack("other-input-size", "the graph has", lambda: written(changed("preprocessing.height", 3) | {"probes": []}))
raw_frames = {"height": 5, "width": 7, "layout": "bgr"}
of_camera = changed("preprocessing.camera", raw_frames) | {"probes": []}


def on_camera(name: str, message: str, *nodes: onnx.NodeProto) -> None:
    """Attack with more nodes in a graph that has a camera part, sealed again."""

    def make() -> bytes:
        model = onnx.load_model_from_string(camera_model())
        model.graph.node.extend(nodes)
        return written(of_camera, bytes(model.SerializeToString()))

    attack(name, message, make)


def without_its_part() -> bytes:
    model = onnx.load_model_from_string(golden_model())
    for dim, size in zip(model.graph.input[0].type.tensor_type.shape.dim[1:], (5, 7, 3), strict=True):
        dim.dim_value = size
    return written(of_camera, bytes(model.SerializeToString()))


attack("camera-without-its-part", "'image' crosses the edge of the camera part", without_its_part)
on_camera(
    "camera-part-that-leaks", "'camera/float' crosses", helper.make_node("Neg", ["camera/float"], ["x"], name="x")
)
on_camera("image-read-twice", "'image' crosses", helper.make_node("Identity", ["image"], ["x"], name="classifier/x"))
camera = "preprocessing.camera"
on_contract("camera-too-large", "a camera of 16384x16384", camera, raw_frames | {"height": 16384, "width": 16384})
on_contract("camera-of-no-size", "a camera of 0x7", camera, raw_frames | {"height": 0})
attack("camera-of-another-filter", "the filter is bicubic",
       lambda: sealed(of_camera | {"preprocessing": of_camera["preprocessing"] | {"filter": "bicubic"}}))  # fmt: skip
on_model("huge-dims", "does not fit", set_dims(2**40))
on_model("dims-that-overflow", "does not fit", set_dims(2**32, 2**32))
on_model("negative-dims", "does not fit", set_dims(-1))
on_model("empty-and-huge-dims", "does not fit", set_dims(0, 2**62))
on_model("thousand-dims", "does not fit", set_dims(*[1] * 1000))
on_model("other-shape", "grood/bank_log_s.0 is float32", replaced("grood/bank_log_s.0", np.zeros(4, np.float32)))
on_model(
    "too-many-prototypes", "grood/prototypes_sq is float32", replaced("grood/prototypes_sq", np.ones(3, np.float32))
)
on_model("other-dtype", "grood/bank_offset.1 is float32", replaced("grood/bank_offset.1", np.zeros(3, np.float64)))
on_model("missing-tensor", "grood/rank in the graph", lambda m: m.graph.initializer.remove(
    tensor_of(m, "grood/rank")))  # fmt: skip
on_model("data-not-raw", "grood/center is float32", lambda m: tensor_of(m, "grood/center").CopyFrom(
    helper.make_tensor("grood/center", 1, [4], [0.5] * 4)))  # fmt: skip
on_model("other-rank-in-graph", "grood/rank in the graph", replaced("grood/rank", np.array([2, 1], np.int32)))
on_model("other-scores-in-graph", "grood/calibration_scores in the graph",
         replaced("grood/calibration_scores", np.array([-2.5, 0, -1, 0.5], np.float32)))  # fmt: skip
on_model("other-denominator", "grood/p_denominator", replaced("grood/p_denominator", np.array([3, 9], np.float32)))
on_model("other-groups-of-scores", "grood/calibration_groups in the graph",
         replaced("grood/calibration_groups", np.array([0, 0, 0, 1], np.int32)))  # fmt: skip
on_model("other-group-of-a-class", "grood/group_of_class in the graph",
         replaced("grood/group_of_class", np.array([0, 0], np.int32)))  # fmt: skip
on_model("groups-out-of-range", "grood/group_of_class in the graph",
         replaced("grood/group_of_class", np.array([0, 2], np.int32)))  # fmt: skip
on_model("bank-of-another-size", r"grood/bank is int8 \[3, 4\]", replaced("grood/bank", np.zeros((4, 4), np.int8)))
on_model("bank-of-another-dtype", r"grood/bank is int8 \[3, 4\]", replaced("grood/bank", np.zeros((3, 4), np.float32)))
on_model("bank-without-scale", r"grood/bank_scale is float32 \[3\]", lambda m: m.graph.initializer.remove(
    tensor_of(m, "grood/bank_scale")))  # fmt: skip
on_contract("float32-bank-that-is-int8", "grood/bank_scale", "bank.dtype", "float32")
on_model(
    "many-knots", "grood/map_knots.0 is float32", replaced("grood/map_knots.0", np.zeros(MAX_KNOTS + 1, np.float32))
)
on_model("no-knots", "does not fit its shape", replaced("grood/map_knots.1", np.zeros(0, np.float32)))
on_model("knots-without-weights", "2 knots and 3 weights", replaced("grood/map_weights.0", np.zeros(3, np.float32)))
on_model("missing-map", "grood/map_slope.1 is float32", lambda m: m.graph.initializer.remove(
    tensor_of(m, "grood/map_slope.1")))  # fmt: skip
on_model("other-scale-in-graph", "grood/scale in the graph", replaced("grood/scale", np.array(1, np.float32)))
on_model("nan-scale-in-graph", "grood/scale in the graph", replaced("grood/scale", np.array(np.nan, np.float32)))
on_model("missing-scale", r"grood/scale is float32 \[\]", lambda m: m.graph.initializer.remove(
    tensor_of(m, "grood/scale")))  # fmt: skip
surplus = {name: numpy_helper.from_array(np.zeros(4, np.float32), f"grood/{name}")
           for name in ("ood_prototype.2", "bank_log_s.9", "bank_t.0")}  # fmt: skip
on_model("surplus-ood-prototype", "ood_prototype.2", lambda m: m.graph.initializer.append(surplus["ood_prototype.2"]))
on_model("surplus-bank-log-s", "bank_log_s.9", lambda m: m.graph.initializer.append(surplus["bank_log_s.9"]))
on_model("surplus-bank-t", "bank_t.0", lambda m: m.graph.initializer.append(surplus["bank_t.0"]))
on_model("deep-graphs", f"more than {MAX_GRAPH_DEPTH} deep", lambda m: m.graph.node.append(nested(20)))
on_graph("very-deep-graphs", f"more than {MAX_GRAPH_DEPTH} deep", functools.reduce(
    lambda inner, _: encoded(1, encoded(5, encoded(6, inner))), range(3000), b""))  # fmt: skip
custom = helper.make_node("EPContext", [], ["c"], domain="com.microsoft", ep_cache_context="/etc/passwd")
on_model("custom-operator", "domain 'com.microsoft'", lambda m: m.graph.node.append(custom))
on_model("custom-operator-in-subgraph", "domain 'com.microsoft'", lambda m: m.graph.node.append(nested(2, custom)))

# Data outside the file, sealed again
outside = "'outside' keeps its data in another file"
sparse = SparseTensorProto(values=external(), dims=[1])
tensors = AttributeProto(name="t", type=AttributeProto.TENSORS, tensors=[external()])
sparses = AttributeProto(name="t", type=AttributeProto.SPARSE_TENSORS, sparse_tensors=[sparse])
graphs = AttributeProto(name="g", type=AttributeProto.GRAPHS)
graphs.graphs.add().node.append(constant(value=external()))
on_model("external-initializer", outside, lambda m: m.graph.initializer.append(external()))
on_model("external-location-alone", outside, lambda m: m.graph.initializer.append(
    TensorProto(name="outside", data_location=TensorProto.EXTERNAL)))  # fmt: skip
on_model("external-attribute", outside, lambda m: m.graph.node.append(constant(value=external())))
on_model("external-attribute-list", outside, lambda m: m.graph.node.add().attribute.append(tensors))
on_model("external-subgraph", outside, lambda m: m.graph.node.append(nested(3, constant(value=external()))))
on_model("external-subgraph-list", outside, lambda m: m.graph.node.add().attribute.append(graphs))
on_model("external-sparse-initializer", outside, lambda m: m.graph.sparse_initializer.append(sparse))
on_model("external-sparse-attribute", outside, lambda m: m.graph.node.append(constant(sparse_value=sparse)))
on_model("external-sparse-list", outside, lambda m: m.graph.node.add().attribute.append(sparses))
on_model("external-function", outside, lambda m: m.functions.append(
    helper.make_function("f", "F", [], [], [constant(value=external())], [])))  # fmt: skip
attribute = helper.make_attribute("w", external())
on_model("external-function-default", outside, lambda m: m.functions.add().attribute_proto.append(attribute))

# The contract, sealed again where its text is JSON
on_contract("newer-version", "version 2 and this grood-edge reads version 1", "version", 2)
on_contract("version-true", "version True", "version", True)
on_contract("other-schema", "another tool", "schema", "other")
attack("not-json", "not valid JSON", lambda: with_text(GOLDEN_TEXT[:-1]))
attack("json-null", "another tool", lambda: with_text("null"))
attack("byte-order-mark", "not valid JSON", lambda: with_text("\ufeff" + GOLDEN_TEXT))
attack("not-canonical-space", "canonical", lambda: with_text(GOLDEN_TEXT.replace(":", ": ", 1)))
attack("not-canonical-number", "canonical", lambda: with_text(GOLDEN_TEXT.replace("0.5", "5e-1", 1)))
attack("not-canonical-escape", "canonical", lambda: with_text(GOLDEN_TEXT.replace('"auto"', '"\\u0061uto"', 1)))
on_text("duplicate-json-key", "'k' twice", '"k":1', '"k":3,"k":1')
on_text("duplicate-json-object", "twice", '"fit":{', '"fit":{"seed":1},"fit":{')
on_text("nan", "not a JSON number", '"alpha":0.5', '"alpha":NaN')
on_text("infinity", "not a JSON number", '"alpha":0.5', '"alpha":-Infinity')
on_text("number-too-large", "calibration.alpha is inf", '"alpha":0.5', '"alpha":1e999')
on_text("number-of-a-million-digits", "1,000,000 characters", '"alpha":0.5', '"alpha":' + "1" * 1_000_000)
on_text("fraction-of-a-million-digits", "1,000,002 characters", '"alpha":0.5', '"alpha":0.' + "1" * 1_000_000)
on_contract("integer-too-large", "fit.images is", "fit.images", 2**53)
on_contract("integer-as-number", "fit.images is 6.0", "fit.images", 6.0)
on_contract("boolean-as-integer", "fit.images is True", "fit.images", True)
on_text("deep-json", "not valid JSON", '"alpha":0.5', '"alpha":' + "[" * 500_000)
on_text("deep-json-closed", "calibration.alpha is", '"alpha":0.5', '"alpha":' + "[" * 200 + "]" * 200)
on_text("deep-json-objects", "not valid JSON", '"alpha":0.5', '"alpha":' + '{"a":' * 500_000)
on_text("many-json-values", "at most 1,000,000 values", '"alpha":0.5', '"alpha":[' + "[]," * 1_000_000 + "[]]")
attack("contract-of-17-mb", "17,000,000 bytes", lambda: with_text(" " * 17_000_000))
on_contract("unknown-key", r"unknown keys \['note'\]", "fit.note", "x")
attack("missing-key", "missing keys", lambda: sealed({**changed("fit", {})}))
on_contract("k-above-n", "k 5 where n is 4", "calibration.k", 5)
on_contract("k-zero", "k 0", "calibration.k", 0)
on_contract("other-class-rank", "grood/rank in the graph", "calibration.class_ranks", [1, 2])
on_contract("class-rank-zero", "class rank outside 1", "calibration.class_ranks", [0, 1])
on_contract("class-rank-above-its-size", "class rank outside 1", "calibration.class_ranks", [3, 1])
on_contract("class-sizes-that-do-not-add-up", "4 calibration scores in groups of 5", "calibration.class_sizes", [2, 3])
on_contract("class-size-negative", "4 calibration scores in groups of 4", "calibration.class_sizes", [5, -1])
on_contract("class-sizes-for-other-classes", "3 class sizes", "calibration.class_sizes", [2, 1, 1])
on_contract("classes-as-one-group", "not finite and ascending", "calibration", json.loads(GOLDEN_TEXT)["calibration"]
            | {"class_sizes": [], "class_ranks": []})  # fmt: skip
on_contract("other-bank-rows", "classes of 3 bank rows of 4", "bank.rows", 4)
on_contract("bank-rows-of-no-bank", "3 rows in a bank of choice none", "bank.choice", "none")
on_contract(
    "bank-class-out-of-range", "class that does not exist", "bank.classes", encode_array(np.array([0, 1, 2], "<i4"))
)
on_contract(
    "bank-class-negative", "class that does not exist", "bank.classes", encode_array(np.array([0, 1, -1], "<i4"))
)
on_contract("bank-classes-of-another-count", "classes of 2 bank rows", "bank.classes", encode_array(np.zeros(2, "<i4")))
on_contract("bank-classes-broken", "cannot be decoded", "bank.classes", "AAAAAAA=")
on_contract("bank-paths-of-another-count", "paths of 2 bank rows of 3", "bank.paths", ["a", "b"])
on_contract("other-scale", "grood/scale in the graph", "scale.value", 2.5)
on_contract("scale-zero", "scale 0.0", "scale.value", 0.0)
on_contract("scale-negative", "scale -2.0", "scale.value", -2.0)
on_contract("scale-too-large", "scale 1e\\+300", "scale.value", 1e300)
on_contract("scale-trial-zero", "trial of the scale at 0", "scale.trials.1.scale", 0.0)
on_contract("scale-trial-of-no-auroc", "AUROC outside 0..1", "scale.trials.0.auroc", 1.5)
on_contract("many-scale-trials", f"{MAX_TRIALS + 1} trials of the scale", "scale.trials",
            [{"auroc": 0.5, "scale": 1.0}] * (MAX_TRIALS + 1))  # fmt: skip
on_contract("many-bank-trials", f"{MAX_TRIALS + 1} trials", "bank.trials",
            [{"auroc": 0.5, "changed": 0.0, "rows": 1}] * (MAX_TRIALS + 1))  # fmt: skip
on_contract("many-candidates", f"{MAX_TRIALS + 1} candidates", "selection.candidates",
            [json.loads(GOLDEN_TEXT)["selection"]["candidates"][0]] * (MAX_TRIALS + 1))  # fmt: skip
on_contract("many-ood-prototypes", f"{MAX_OOD_PROTOTYPES + 1} OOD prototypes", "ood_prototypes",
            [json.loads(GOLDEN_TEXT)["ood_prototypes"][0]] * (MAX_OOD_PROTOTYPES + 1))  # fmt: skip
on_contract("fewer-ood-prototypes", "the graph has .*and the contract does not", "ood_prototypes",
            json.loads(GOLDEN_TEXT)["ood_prototypes"][:1])  # fmt: skip
on_contract("sketch-not-ascending", "not ascending", "fit.sketch", encode_array(np.array([2, 1], "<u8")))
on_contract("sketch-too-long", "too long", "fit.sketch", encode_array(np.arange(MAX_SKETCH + 1, dtype="<u8")))
on_contract("sketch-broken", "cannot be decoded", "fit.sketch", "AAAA")
on_contract("other-space", r"grood/center is float32 \[2\]", "space", "logits")
for name, values in {"unsorted": [1, 0, 0, 2], "nan": [0, np.nan, 0, 1], "infinite": [0, 1, 0, np.inf]}.items():
    text = encode_array(np.array(values, "<f4"))
    on_contract(f"{name}-scores", "finite and ascending", "calibration.scores", text)
on_contract("missing-scores", "4 calibration scores where n is 5", "calibration.n", 5)
on_contract("broken-scores", "cannot be decoded", "calibration.scores", "AAAgwAAAgL8A")
on_contract("scores-not-base64", "cannot be decoded", "calibration.scores", "AAAg*AAAgL8AAIA+")
on_contract("promise-from-training-images", "guarantee", "calibration.provenance", "seen-in-training")
control = "without control characters"
on_contract("class-name-escape-sequence", control, "classes.0", "\x1b[2J")
on_contract("class-name-line-feed", control, "classes.0", "a\nb")
on_contract("class-name-turned-round", control, "classes.0", "a\u202eb")
on_contract("class-name-empty", "without a name", "classes.0", "")
on_contract("class-name-long", "has 1,025 characters", "classes.0", "x" * 1025)
on_text("class-name-surrogate", "surrogates not allowed|control", '"classes":["a', '"classes":["\\ud800')
on_contract("tool-name-control", control, "tools", {"a\x07": "1"})
on_contract("probe-png-bomb", "no 8-bit PNG of the input's size", "probes.0.png", png(100_000, 100_000))
text_bomb = chunk(b"zTXt", b"k\0\0" + zlib.compress(b"a" * 20_000_000))
on_contract("probe-text-bomb", "other parts", "probes.0.png", png(2, 2, text_bomb))
on_contract("probe-animated", "other parts", "probes.0.png", png(2, 2, chunk(b"acTL", b"\0" * 8)))
on_contract("probe-not-png", "no 8-bit PNG", "probes.0.png", base64.b64encode(b"GIF89a" + b"\0" * 40).decode())
on_contract("probe-not-base64", "not base64", "probes.0.png", "****")
on_contract("probe-too-large", "probes of", "probes.0.png", png(2, 2, data=os.urandom(400_000)))
on_contract("probe-of-no-class", "class that does not exist", "probes.0.class_id", 2)
on_contract("many-probes", "17 probes", "probes", json.loads(GOLDEN_TEXT)["probes"] * 17)


@contextmanager
def bounded(seconds: float = 2.0, megabytes: int = 64) -> Iterator[None]:
    """Fail when the block takes longer, or when it allocates more memory than that beyond what the process has."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    start = time.process_time()  # other processes do not count
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + (megabytes << 20), before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
    assert time.process_time() - start < seconds


def test_the_bounds_are_felt() -> None:
    with pytest.raises(MemoryError), bounded():
        bytes(4_000_000_000)  # more than any heap has left over from other tests
    with pytest.raises(AssertionError), bounded(seconds=0.0):
        sum(range(1000))


@pytest.mark.parametrize("name", ATTACKS)
def test_attack(name: str) -> None:
    make, message = ATTACKS[name]
    data = make()
    assert data != golden()
    with bounded(), pytest.raises(ArtifactError, match=message) as caught:
        read_artifact(data)
    assert len(str(caught.value)) < 1000


def test_file_cut_off_anywhere(artifact_path: Path) -> None:
    """Of the small file every length that ends in the metadata, and every fifth before; of the real one the ends of
    top-level fields, and a byte beside each."""
    real, ends, at, middle = artifact_path.read_bytes(), set(), 0, len(golden_model()) - 20
    for _, raw in top_level(real):
        at += len(raw)
        ends |= {at - len(raw), at - len(raw) + 1, at - 1}
    for data, lengths in ((golden(), [*range(0, middle, 5), *range(middle, len(golden()))]), (real, sorted(ends))):
        for length in lengths:
            with pytest.raises(ArtifactError):
                read_artifact(data[:length])


def test_changed_bytes_are_found_or_change_nothing_that_is_read() -> None:
    """Only `ir_version` and the producer are outside every digest and check."""
    rng, refused, head = np.random.default_rng(0), 0, golden_model().index(b"\x3a")  # tag of the graph
    whole = read_artifact(golden())
    for index in range(120):
        changed_data = bytearray(golden())
        at = int(rng.integers(len(changed_data) if index > 30 else head))
        changed_data[at] ^= int(rng.integers(1, 256))
        try:
            found = read_artifact(bytes(changed_data))
            assert at < head
            assert (found.contract, found.graph_digest) == (whole.contract, whole.graph_digest)
        except ArtifactError:
            refused += 1
    assert refused > 80


def test_file_of_two_gigabytes(tmp_path: Path) -> None:
    path = tmp_path / "large.onnx"
    with path.open("wb") as file:
        file.truncate(2 << 30)  # a hole: it takes no space on the disk
    with bounded(), pytest.raises(ArtifactError, match="2,147,483,648 bytes; an ONNX file has at most 2,147,483,647"):
        read_artifact(path)


def test_what_is_not_a_regular_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path("/dev/zero"), tmp_path, tmp_path / "absent", Path("a\0b")):
        with bounded(), pytest.raises(ArtifactError, match="cannot read"):
            read_artifact(path)


def test_file_of_many_fields(monkeypatch: pytest.MonkeyPatch) -> None:
    """The bounds are lowered in these two tests: under test every field costs a type check."""
    monkeypatch.setattr(artifact_module, "MAX_MODEL_FIELDS", 20)
    read_artifact(golden())
    with bounded(), pytest.raises(ArtifactError, match="more fields"):
        read_artifact(golden() + b"".join(entry(f"{i}", "") for i in range(20)))


def test_graph_of_many_fields(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graph_check, "MAX_GRAPH_FIELDS", 2000)
    read_artifact(golden())
    for field in (encoded(1, b"") * 2000, encoded(1, encoded(5, b"") * 2000), encoded(5, b"\x08\x01" * 2000)):
        model = onnx.load_model_from_string(golden_model())
        graph = model.graph.SerializeToString() + field
        model.ClearField("graph")
        with bounded(), pytest.raises(ArtifactError, match="more than 2,000 fields"):
            read_artifact(sealed(model=model.SerializeToString() + encoded(7, graph)))


def test_class_names_are_never_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    classes = ("../../etc/passwd", "C:\\a")
    assert read_artifact(written(changed("classes", list(classes)))).contract.classes == classes
    assert list(tmp_path.iterdir()) == []


def test_probe_that_inflates() -> None:
    """The header is honest, the data is not: no more than the picture's own rows are decoded."""
    preprocessing = golden_contract().preprocessing
    bomb = png(2, 2, data=b"\0\x01\x02\0\x03\x04" + bytes(100_000_000))
    with bounded():
        frame = decode_png(bomb, preprocessing)
    np.testing.assert_array_equal(frame[..., 0], [[1, 2], [3, 4]])
    damaged = bytearray(base64.b64decode(png(2, 2)))
    damaged[45] ^= 0xFF
    with pytest.raises(ArtifactError, match="cannot be decoded"):
        decode_png(base64.b64encode(damaged).decode(), preprocessing)


WRONG: list[Any] = [None, True, -1, 1.5, 2**53, "AAAAAAAA", "\x1b[2J", []]


def places(value: Any, path: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    yield path
    for key in value if isinstance(value, dict) else range(len(value[:2])) if isinstance(value, list) else ():
        yield from places(value[key], (*path, key))


def mutations(document: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Replace every field by wrong values, remove it, and give it an unknown neighbour."""
    for path in places(document):
        for wrong in (*WRONG, "removed", "added"):
            mutated = {"root": copy.deepcopy(document)}
            target: Any = mutated
            last: str | int = "root"
            for key in path:
                target, last = target[last], key
            if wrong == "added" and isinstance(target[last], dict):
                target[last]["note"] = "x"
            elif wrong == "removed" and isinstance(target, dict):
                del target[last]
            elif wrong not in ("added", "removed"):
                target[last] = wrong
            if "root" in mutated and mutated["root"] != document:
                yield ".".join(part for part in path if isinstance(part, str)), mutated["root"]


def test_schema_refuses_what_the_reader_refuses() -> None:
    document = json.loads(GOLDEN_TEXT)
    refused, reader_alone, schema_alone = 0, set(), set()
    for where, mutated in mutations(document):
        valid = VALIDATOR.is_valid(mutated)
        try:
            contract_from_json(canonical(mutated))
            schema_alone |= set() if valid else {where}
        except ArtifactError:
            refused += 1
            reader_alone |= {where} if valid else set()
    assert refused > 800
    # A schema knows neither order nor counts that depend on other fields, and cannot look into base64.
    calibration = {f"calibration.{name}" for name in ("quantiles", "scores", "class_sizes", "class_ranks")}
    assert reader_alone == calibration | {"bank.classes", "fit.sketch"}
    assert schema_alone == {"classifier.opset", "digests", "digests.contract", "digests.graph"}  # read_artifact checks


def test_every_attack_is_on_the_page_and_has_a_test() -> None:
    rows = table("attack", "the reader", "test")
    named = [name for row in rows for name in re.findall(r"test_\w+(?:\[[\w-]+\])?", row[2])]
    parametrised = {f"test_attack[{name}]" for name in ATTACKS}
    plain = {name for name, value in globals().items() if name.startswith("test_") and callable(value)}
    assert set(named) <= parametrised | plain
    assert parametrised <= set(named)
    assert len(named) == len(set(named))
    assert all(row[0] and row[1] for row in rows)
