"""docs/format.md: golden bytes, its tables against real and hand-made artifacts, and a reader written from it."""

import ast
import base64
import hashlib
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from grood_edge.artifact import artifact_bytes, read_artifact
from grood_edge.contract import Contract
from grood_edge.contract_reader import contract_from_json
from grood_edge.demo.images import DemoImages
from grood_edge.images import find_images, load_image
from grood_edge.ort import open_ort
from grood_edge.outputs import outputs_from_arrays
from grood_edge.preprocessing import Preprocessing, preprocess_frame
from grood_edge.probes import replay_probes
from tests.golden import (
    GOLDEN_TEXT,
    KEY,
    SCHEMA,
    VALIDATOR,
    camera_golden,
    canonical,
    golden,
    golden_contract,
    golden_model,
    other_golden,
    table,
    top_level,
)

# --- A reader written from docs/format.md alone -----------------------------------------------------------------------


def read_by_the_book(data: bytes) -> tuple[dict[str, Any], np.ndarray]:
    """Return the contract and its n calibration scores, with both digests checked."""
    (text,) = (entry.value for entry in onnx.load_model_from_string(data).metadata_props if entry.key == KEY)
    contract: dict[str, Any] = json.loads(text)
    start = text.index('"digests":{')
    bare = text[:start] + text[text.index("},", start) + 2 :]
    graph = b"".join(raw for number, raw in top_level(data) if number in (7, 8, 25))
    assert contract["schema"] == "grood-edge.contract"
    assert contract["version"] == 1
    assert contract["digests"]["contract"] == hashlib.sha256(bare.encode()).hexdigest()
    assert contract["digests"]["graph"] == hashlib.sha256(graph).hexdigest()
    return contract, np.frombuffer(base64.b64decode(contract["calibration"]["scores"]), "<f4")


def names_by_the_book(classes: list[str]) -> str:
    """Section 6: the value of the metadata key `names`."""

    def character(c: str, quote: str) -> str:
        code = ord(c)
        if c in (quote, "\\"):
            return "\\" + c
        if code <= 0x7E:
            return c
        return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"

    def literal(name: str) -> str:
        quote = '"' if "'" in name and '"' not in name else "'"
        return quote + "".join(character(c, quote) for c in name) + quote

    return "{" + ", ".join(f"{index}: {literal(name)}" for index, name in enumerate(classes)) + "}"


def weight(kind: str, x: float) -> float:
    """Section 5: the filters."""
    x = abs(x)
    if kind == "bilinear":
        return max(0.0, 1 - x)
    if kind == "bicubic":
        return 1.5 * x**3 - 2.5 * x**2 + 1 if x < 1 else -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2 if x < 2 else 0.0
    return float(np.sinc(x) * np.sinc(x / 3)) if x < 3 else 0.0


def resampled(pixels: np.ndarray, lo: float, hi: float, out: int, kind: str) -> np.ndarray:
    """Section 5: one axis, the first, from the box `lo..hi` to `out` pixels."""
    scale = float(np.float32(hi) - np.float32(lo)) / out
    start, size = float(np.float32(lo)), len(pixels)
    rows = []
    for index in range(out):
        centre = start + (index + 0.5) * scale
        if kind == "nearest":
            rows.append(pixels[math.floor(centre)])
            continue
        f = max(1.0, scale)
        r = {"bilinear": 1, "bicubic": 2, "lanczos": 3}[kind] * f
        used = range(max(0, int(centre - r + 0.5)), min(size, int(centre + r + 0.5)))
        weights = np.array([weight(kind, (j - centre + 0.5) / f) for j in used])
        weights = weights / weights.sum() * 2**22
        q = np.trunc(weights + np.where(weights < 0, -0.5, 0.5)).astype(np.int64)
        total = np.tensordot(q, pixels[used.start : used.stop].astype(np.int64), 1).astype(np.int64)
        rows.append(np.clip((total + 2**21) >> 22, 0, 255))
    return np.array(rows, np.uint8)


def preprocessed_by_the_book(frame: np.ndarray, p: dict[str, Any]) -> np.ndarray:
    """Section 5, on the host: uint8 `[H, W, C]`."""
    pixels = frame if frame.ndim == 3 else frame[..., None]
    if p["channels"] == 1 and pixels.shape[2] == 3:
        pixels = ((pixels @ np.array([19595, 38470, 7471], np.int64) + 32768) >> 16).astype(np.uint8)[..., None]
    pixels = np.repeat(pixels, p["channels"] // pixels.shape[2], axis=2)
    h, w = pixels.shape[:2]
    top, bottom, left, right = 0.0, float(h), 0.0, float(w)
    out_h, out_w = p["height"], p["width"]
    if p["crop"] == "center":
        h2, w2 = p["short_side"] * h // min(h, w), p["short_side"] * w // min(h, w)
        y, x = round((h2 - p["height"]) / 2), round((w2 - p["width"]) / 2)
        top, bottom = y * (h / h2), min(h, (y + p["height"]) * (h / h2))
        left, right = x * (w / w2), min(w, (x + p["width"]) * (w / w2))
    if p["crop"] == "letterbox" and h * out_w > w * out_h:
        out_w = max(1, math.floor((2 * w * out_h + h) / (2 * h)))
    elif p["crop"] == "letterbox":
        out_h = max(1, math.floor((2 * h * out_w + w) / (2 * w)))
    columns_last = bottom - top > 100 * (right - left)
    for axis in (0, 1) if columns_last else (1, 0):
        lo, hi, out = ((top, bottom, out_h), (left, right, out_w))[axis]
        pixels = resampled(pixels.swapaxes(0, axis), lo, hi, out, p["filter"]).swapaxes(0, axis)
    page = np.zeros((p["height"], p["width"], p["channels"]), np.uint8)
    page[:] = [min(255, max(0, math.floor(value + 0.5))) for value in p["mean"]]
    y, x = (p["height"] - out_h) // 2, (p["width"] - out_w) // 2
    page[y : y + out_h, x : x + out_w] = pixels
    return page


def decided_by_the_book(
    calibration: dict[str, Any], scores: np.ndarray, found: dict[str, np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    """Section 4: p_value and is_ood of each row, from class_id, ood_score and valid."""
    sizes, ranks = calibration["class_sizes"], calibration["class_ranks"]
    starts = np.concatenate([[0], np.cumsum(sizes)])
    p_value, is_ood = [], []
    for class_id, score, valid in zip(found["class_id"], found["ood_score"], found["valid"], strict=True):
        group = scores[starts[class_id] : starts[class_id + 1]] if sizes else scores
        count = (group >= score).sum()
        p_value.append(np.float32(count + 1) / np.float32(len(group) + 1) if valid else np.float32(0))
        is_ood.append(not valid or count < (ranks[class_id] if ranks else calibration["k"]))
    return np.array(p_value), np.array(is_ood)


def scored_by_the_book(contract: dict[str, Any], t: dict[str, np.ndarray], values: np.ndarray) -> np.ndarray:
    """Section 3: the score from the stored tensors, in float64, one row at a time."""
    t = {name.removeprefix("grood/"): array.astype(np.float64) for name, array in t.items()}
    rows = t.get("bank", np.zeros((0, values.shape[1]))) * t.get("bank_scale", np.ones(1))[:, None]
    count, a, result = len(contract["ood_prototypes"]), contract["scale"]["value"], []
    for h in values - t["center"]:
        class_distance = np.linalg.norm(h[:, None] - t["prototypes_t"], axis=0)
        total = 0.0
        for k in range(count):
            p = t[f"ood_prototype.{k}"]
            d_k = np.linalg.norm(h - p)
            x = -a * d_k - np.log(np.exp(-a * d_k) + np.exp(-a * class_distance).sum())
            if len(rows):
                l_i = t[f"bank_log_s.{k}"]
                product = rows @ h - h @ p + t[f"bank_offset.{k}"]
                cosine = product / max(d_k, t[f"least_distance.{k}"]) * t[f"bank_inverse_length.{k}"]
                r = np.exp(-np.abs(x - l_i))
                gap = np.maximum((1 - r) ** 2 + 2 * r * np.maximum(1 - cosine, 0), 1e-12)
                x = (np.maximum(x, l_i) + 0.5 * np.log(gap)).min()
            if count > 1:
                bend = (t[f"map_weights.{k}"] * np.maximum(x - t[f"map_knots.{k}"], 0)).sum()
                x = t[f"map_bias.{k}"] + t[f"map_slope.{k}"] * x + bend
            total += x
        result.append(total)
    return np.array(result)


def test_reader_by_the_book_on_real_digits(artifact_path: Path, digits: DemoImages) -> None:
    contract, scores = read_by_the_book(artifact_path.read_bytes())
    calibration = contract["calibration"]
    folders = (digits.test, digits.near, digits.far_photos)
    frames = [load_image(path) for folder in folders for path in find_images(folder)[::4]]
    images = np.stack([preprocessed_by_the_book(frame, contract["preprocessing"]) for frame in frames])
    found = open_ort(artifact_path.read_bytes()).run({"image": images})
    p_value, is_ood = decided_by_the_book(calibration, scores, found)
    np.testing.assert_array_equal(found["p_value"], p_value)
    np.testing.assert_array_equal(found["is_ood"], is_ood)
    expected = scored_by_the_book(contract, stored_of(artifact_path.read_bytes()), found[contract["space"]])
    np.testing.assert_allclose(found["ood_score"], expected, atol=1e-3)
    assert len(scores) == calibration["n"]
    assert len(contract["ood_prototypes"]) > 1
    assert 0.2 < is_ood.mean() < 0.9


@pytest.mark.parametrize("which", ["golden", "float32-bank", "no-bank"])
def test_scores_and_decisions_by_the_book(which: str) -> None:
    """Per-class groups and maps, one prototype over float32 rows, and the logits alone: random pictures."""
    data = HAND_MADE[which]()
    contract, scores = read_by_the_book(data)
    assert contract["scale"]["value"] == {"golden": 2.0, "float32-bank": 0.3, "no-bank": 1.0}[which]
    images = np.random.default_rng(0).integers(0, 256, (200, 2, 2, 1), np.uint8)
    images[:2] = np.array([[[127, 128], [128, 127]], [[191, 64], [191, 64]]], np.uint8)[
        ..., None
    ]  # near the prototypes
    found = open_ort(data).run({"image": images})
    expected = scored_by_the_book(contract, stored_of(data), found[contract["space"]])
    np.testing.assert_allclose(found["ood_score"], expected, atol=2e-4)
    p_value, is_ood = decided_by_the_book(contract["calibration"], scores, found)
    np.testing.assert_array_equal(found["p_value"], p_value)
    np.testing.assert_array_equal(found["is_ood"], is_ood)
    assert len(np.unique(p_value)) > 1


@pytest.mark.parametrize("kind", ["nearest", "bilinear", "bicubic", "lanczos"])
def test_preprocessing_by_the_book(kind: str) -> None:
    rng = np.random.default_rng(0)
    for crop, short_side in (("stretch", None), ("center", 37), ("letterbox", None)):
        for channels, shape in ((1, (333, 211, 3)), (3, (47, 61)), (3, (19, 200, 3)), (1, (700, 5, 1)), (3, (1, 1, 3))):
            p = Preprocessing("custom", 32, 24, channels, kind, crop, short_side, (9.5,) * channels, (1.0,) * channels)  # type: ignore[arg-type]
            frame = rng.integers(0, 256, shape, dtype=np.uint8)
            expected = preprocessed_by_the_book(frame, vars(p)).astype(int)
            difference = np.abs(preprocess_frame(frame, p) - expected).max()
            assert difference <= (0 if kind == "nearest" else 1), (crop, channels, shape)


# --- The hand-made artifact -------------------------------------------------------------------------------------------

GOLDEN_SHA256 = "b860a914971d63976d3be9bfc84988d3c1abad0e6c2fce98ef4235dc6e181977"


def test_golden_bytes() -> None:
    """A change here is a change of the format: `version` must grow, or artifacts in the field are misunderstood."""
    model = onnx.load_model_from_string(golden())
    assert model.metadata_props[-1].value == GOLDEN_TEXT
    assert hashlib.sha256(golden()).hexdigest() == GOLDEN_SHA256
    assert read_artifact(golden()).contract == golden_contract()
    onnx.checker.check_model(model)


def test_golden_artifact_runs() -> None:
    session = open_ort(golden())
    report = replay_probes(golden_contract(), lambda frames: outputs_from_arrays(session.run({"image": frames})), "cpu")
    assert report.passed
    assert report.largest_error < 1e-5


# --- The page's tables ------------------------------------------------------------------------------------------------


def shape_of(text: str, symbols: dict[str, Any]) -> list[Any]:
    names = [name for name in text.strip("[]").split(", ") if name]
    return [symbols.get(name, int(name) if name.isdigit() else name) for name in names]


def symbols_of(contract: Contract) -> dict[str, Any]:
    p, calibration, classes = contract.preprocessing, contract.calibration, len(contract.classes)
    sizes = {"H": p.height, "W": p.width, "C": p.channels, "K": classes, "n": calibration.n}
    sizes |= dict(zip(("Hi", "Wi", "Ci"), p.input_shape, strict=True))
    sizes |= {"P": contract.prototype_count, "g": len(calibration.class_sizes) or 1}
    sizes["e"] = contract.classifier.dimension if contract.space == "features" else classes
    return {"N": "N", **sizes, "d": contract.classifier.dimension, "m": contract.bank.rows}


HAND_MADE: dict[str, Callable[[], bytes]] = {
    "golden": golden,
    "float32-bank": lambda: other_golden(3),
    "no-bank": lambda: other_golden(0),
    "camera": camera_golden,
}


@pytest.fixture(scope="module", params=["real", *HAND_MADE])
def artifact(request: pytest.FixtureRequest, artifact_path: Path) -> bytes:
    return artifact_path.read_bytes() if request.param == "real" else HAND_MADE[request.param]()


def stored_of(data: bytes) -> dict[str, np.ndarray]:
    graph = onnx.load_model_from_string(data).graph
    return {t.name: numpy_helper.to_array(t) for t in graph.initializer if t.name.startswith("grood/")}


def test_inputs_and_outputs_are_those_of_the_page(artifact: bytes) -> None:
    model, symbols = onnx.load_model_from_string(artifact), symbols_of(read_artifact(artifact).contract)
    found = []
    for direction, values in (("input", model.graph.input), ("output", model.graph.output)):
        for value in values:
            kind = value.type.tensor_type
            dims = [dim.dim_param or dim.dim_value for dim in kind.shape.dim]
            found.append((direction, value.name, helper.tensor_dtype_to_np_dtype(kind.elem_type).name, dims))
    rows = table("direction", "name", "dtype", "shape")
    assert found == [(r[0], r[1], r[2], shape_of(r[3], symbols)) for r in rows]


def expected_tensors(contract: Contract, found: dict[str, np.ndarray]) -> dict[str, tuple[str, list[Any]]]:
    """Section 3: dtype and shape of every stored tensor; `.k` stands for one an OOD prototype."""
    symbols, count = symbols_of(contract), len(contract.ood_prototypes)
    there = {"always": True, "m > 0": contract.bank.rows > 0, "several": count > 1}
    there["int8"] = there["m > 0"] and contract.bank.dtype == "int8"
    expected = {}
    for name, dtype, shape, when, _ in table("initializer", "dtype", "shape", "there"):
        for k in range(count if name.endswith(".k") else 1) if there[when] else ():
            q = found[f"grood/map_knots.{k}"].size if count > 1 else 0
            kind = contract.bank.dtype if dtype == "bank.dtype" else dtype
            expected[name.replace(".k", f".{k}")] = (kind, shape_of(shape, symbols | {"q": q}))
    return expected


def test_stored_tensors_are_those_of_the_page(artifact: bytes) -> None:
    contract, tensors = read_artifact(artifact).contract, stored_of(artifact)
    fitted = expected_tensors(contract, tensors)
    constant = table("initializer", "dtype", "shape", "value")
    expected = fitted | {row[0]: (row[1], shape_of(row[2], {})) for row in constant}
    assert {name: (array.dtype.name, list(array.shape)) for name, array in tensors.items()} == expected
    for name, dtype, _, value in constant:
        np.testing.assert_array_equal(tensors[name], np.dtype(dtype).type(float(value)))
    model = onnx.load_model_from_string(artifact)
    assert all(t.HasField("raw_data") for t in model.graph.initializer if t.name in fitted)


def test_what_the_page_says_of_the_banks_own_tensors(artifact: bytes) -> None:
    """Section 3: offset, inverse length and least distance follow from the rows as they are stored."""
    t = {name.removeprefix("grood/"): array.astype(np.float64) for name, array in stored_of(artifact).items()}
    rows = t["bank"] * t.get("bank_scale", np.ones(1))[:, None] if "bank" in t else np.zeros((0, 0))
    for k in range(len(read_artifact(artifact).contract.ood_prototypes) if len(rows) else 0):
        p = t[f"ood_prototype.{k}"]
        lengths = np.linalg.norm(rows - p, axis=1)
        least = max(1e-3 * float(np.median(lengths)), 1e-30)
        np.testing.assert_allclose(t[f"least_distance.{k}"], least, rtol=1e-6)
        np.testing.assert_allclose(t[f"bank_inverse_length.{k}"], 1 / np.maximum(lengths, least), rtol=1e-6)
        np.testing.assert_allclose(t[f"bank_offset.{k}"], p @ p - rows @ p, rtol=1e-5, atol=1e-5)


def test_names_are_those_of_the_page(artifact: bytes) -> None:
    graph = onnx.load_model_from_string(artifact).graph
    prefixes = tuple(row[0] for row in table("prefix"))
    inner = {name for node in graph.node for name in node.output} | {t.name for t in graph.initializer}
    assert all(node.name.startswith(prefixes) for node in graph.node)
    assert all(name.startswith(prefixes) for name in inner - {value.name for value in graph.output})
    head = [node for node in graph.node if node.name.startswith("grood/")]
    assert all(node.name == "grood/" + node.output[0].removeprefix("grood/") for node in head)
    public = {value.name for value in graph.output}
    assert all(name.startswith("grood/") or name in public for node in head for name in node.input)


def test_metadata_is_that_of_the_page(artifact: bytes) -> None:
    model, contract = onnx.load_model_from_string(artifact), read_artifact(artifact).contract
    found = {entry.key: entry.value for entry in model.metadata_props}
    assert set(found) == {row[0] for row in table("key", "value")}
    assert list(found)[-1] == KEY
    assert [number for number, _ in top_level(artifact)][-len(found) :] == [14] * len(found)
    assert found["names"] == names_by_the_book(list(contract.classes))
    assert found["imgsz"] == str(list(contract.preprocessing.input_shape[:2]))
    assert found["description"] == dict(row[0:3:2] for row in table("key", "value"))["description"]


def test_names_for_other_tools_are_python_and_ascii() -> None:
    classes = ["größe", "it's", '"q"', "both '\"", "back\\slash", "日本", "🦆", "~"]
    document = json.loads(GOLDEN_TEXT) | {"classes": classes[:2]}
    for pair in zip(classes[::2], classes[1::2], strict=True):
        contract = contract_from_json(canonical(document | {"classes": list(pair)}))[0]
        data = artifact_bytes(golden_model(), contract)
        names = {e.key: e.value for e in onnx.load_model_from_string(data).metadata_props}["names"]
        assert names == names_by_the_book(list(pair))
        assert names.isascii()
        assert ast.literal_eval(names) == dict(enumerate(pair))
        assert read_artifact(data).contract.classes == pair


def leaves(schema: dict[str, Any], path: str = "") -> Iterator[str]:
    """List the fields of a schema as the page writes them: `a.b[]`, `tools.*`."""
    if (optional := schema.get("anyOf", [{}])[0]).get("$ref") in ("#/$defs/camera", "#/$defs/stream"):
        yield path  # an object, or null
        schema = optional
    target = SCHEMA["$defs"][schema["$ref"].rsplit("/", 1)[1]] if "$ref" in schema else schema
    if "properties" in target:
        for name, part in target["properties"].items():
            yield from leaves(part, f"{path}.{name}".lstrip("."))
    elif "items" in target:
        yield from leaves(target["items"], path + "[]")
    else:
        yield path + ".*" if "additionalProperties" in target else path


def test_contract_fields_are_those_of_the_schema() -> None:
    assert [row[0] for row in table("field", "type")] == sorted(
        leaves(SCHEMA), key=[r[0] for r in table("field")].index
    )
    objects = [SCHEMA, SCHEMA["properties"]["digests"], *SCHEMA["$defs"].values()]
    objects = [part for part in objects if "properties" in part and part.get("type") == "object"]
    assert len(objects) == 18
    assert all(part["additionalProperties"] is False for part in objects)
    assert all(set(part["required"]) == set(part["properties"]) for part in objects)


def test_schema_accepts_real_contracts(artifact: bytes) -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    contract, _ = read_by_the_book(artifact)
    VALIDATOR.validate(contract)
