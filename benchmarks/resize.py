"""Resize and crop of a 720p frame to 224x224: the host, Pillow's two ways, and the graph's own part.

    OMP_NUM_THREADS=1 python benchmarks/resize.py [--rounds N] [--json FILE]

Everything runs in turn, one frame at a time on one thread, from a NumPy array to a NumPy array. `whole` is Pillow's
resize of the whole frame and a crop (or a paste), `box` its one call with `box=`; `host` is `preprocess_frame`;
`camera part` the nodes of --camera-size alone. `host + graph` and `camera graph` run a small network of three
convolutions after it: any larger one brings their ratio nearer to 1. `blocks` changes the number of output rows that
share a product: 1 is a banded gather, 224 one product with the whole matrix. A ratio is the median of the rounds' own
ratios: what runs beside it slows down both.
"""

import argparse
import json
import os
import platform
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import numpy as np
import onnx
import skimage
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from grood_edge.camera_part import PREPARED
from grood_edge.export import camera as camera_module
from grood_edge.export.camera import attach_camera, camera_model
from grood_edge.export.classifier import ClassifierOptions, load_classifier
from grood_edge.export.graph import base_model
from grood_edge.ort import OrtModel, open_ort
from grood_edge.preprocessing import (
    Camera,
    Preprocessing,
    PreprocessingOptions,
    placement_of,
    preprocess_frame,
    resolve_preprocessing,
)

CROPS: tuple[Literal["center", "letterbox", "stretch"], ...] = ("center", "letterbox", "stretch")
BLOCKS = (1, 2, 4, 6, 8, 12, 16, 32, 64, 224)
HEIGHT, WIDTH, SIDE = 720, 1280, 224
PHOTOS = ("coffee.png", "chelsea.png", "astronaut.png", "rocket.jpg")
Way = Callable[[], Any]


def settings(crop: Any) -> Preprocessing:
    """Return the imagenet preset with that crop, for a camera of 720p."""
    options = PreprocessingOptions(crop=crop, camera=Camera(HEIGHT, WIDTH, "rgb"))
    return resolve_preprocessing(options, 3, (SIDE, SIDE))


def network(folder: Path) -> Path:
    """Write three convolutions of stride 2, pooled, and a linear layer: 23 million multiplications."""
    rng = np.random.default_rng(0)
    widths = (3, 16, 32, 64)
    nodes, weights, tensor = [], [], "x"
    for index, (inside, outside) in enumerate(pairwise(widths)):
        weights.append(
            numpy_helper.from_array(rng.normal(0, 0.1, (outside, inside, 3, 3)).astype(np.float32), f"w{index}")
        )
        attributes: dict[str, Any] = {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [1, 1, 1, 1]}
        nodes.append(helper.make_node("Conv", [tensor, f"w{index}"], [f"c{index}"], **attributes))
        nodes.append(helper.make_node("Relu", [f"c{index}"], [tensor := f"r{index}"]))
    weights.append(numpy_helper.from_array(rng.normal(0, 1, (64, 10)).astype(np.float32), "last"))
    nodes += [
        helper.make_node("GlobalAveragePool", [tensor], ["pooled"]),
        helper.make_node("Flatten", ["pooled"], ["features"]),
        helper.make_node("Gemm", ["features", "last"], ["logits"]),
    ]
    image = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 3, SIDE, SIDE])
    logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["N", 10])
    graph = helper.make_graph(nodes, "small", [image], [logits], weights)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), folder / "net.onnx")
    return folder / "net.onnx"


def pillow_whole(frame: np.ndarray, p: Preprocessing) -> np.ndarray:
    """Resize the whole frame in one call, then crop or pad."""
    placement, image = placement_of(HEIGHT, WIDTH, p), Image.fromarray(frame)
    size = (placement.columns.out, placement.rows.out)
    if p.short_side is not None:
        w, h = (p.short_side * side // min(HEIGHT, WIDTH) for side in (WIDTH, HEIGHT))
        left, top = round((w - SIDE) / 2), round((h - SIDE) / 2)
        box = (left, top, left + SIDE, top + SIDE)
        return np.asarray(image.resize((w, h), Image.Resampling.BILINEAR).crop(box))
    return padded(image.resize(size, Image.Resampling.BILINEAR), p)


def pillow_box(frame: np.ndarray, p: Preprocessing) -> np.ndarray:
    """Resize what is kept in one call."""
    placement = placement_of(HEIGHT, WIDTH, p)
    rows, columns = placement.rows, placement.columns
    box = (columns.low, rows.low, columns.high, rows.high)
    size = (columns.out, rows.out)
    return padded(Image.fromarray(frame).resize(size, Image.Resampling.BILINEAR, box=box), p)


def padded(image: Image.Image, p: Preprocessing) -> np.ndarray:
    """Paste a letterbox into its page."""
    if image.size == (SIDE, SIDE):
        return np.asarray(image)
    page = Image.new("RGB", (SIDE, SIDE), p.padding)
    page.paste(image, ((SIDE - image.width) // 2, (SIDE - image.height) // 2))
    return np.asarray(page)


def timed(ways: Mapping[str, Way], rounds: int) -> dict[str, np.ndarray]:
    """Return milliseconds of each way, one a round; the ways take turns, in random order."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    rng = np.random.default_rng(0)
    for index in range(rounds + 3):
        for name in rng.permutation(list(ways)):
            way = ways[name]
            start = time.perf_counter()
            way()
            if index >= 3:
                times[name].append(1000 * (time.perf_counter() - start))
    return {name: np.array(values) for name, values in times.items()}


def summary(times: Mapping[str, np.ndarray]) -> dict[str, dict[str, float]]:
    """Return the least and the median time of each way."""
    return {name: {"least": round(t.min(), 2), "median": round(float(np.median(t)), 2)} for name, t in times.items()}


def ratio(times: Mapping[str, np.ndarray], name: str, *others: str) -> float:
    """Return the median of the rounds' ratios to the best (by median) of the others."""
    best = min(others, key=lambda other: float(np.median(times[other])))
    return round(float(np.median(times[name] / times[best])), 3)


def open_part(p: Preprocessing, block: int) -> OrtModel:
    """Open the camera part with that many rows a block, on one thread."""
    usual, camera_module.BLOCK = camera_module.BLOCK, block
    try:
        return open_ort(camera_model(p).SerializeToString(), threads=1)
    finally:
        camera_module.BLOCK = usual


def of_crop(crop: str, photos: list[np.ndarray], classifier: Path, rounds: int) -> dict[str, Any]:
    """Measure one crop."""
    p = settings(crop)
    graph = load_classifier(classifier, ClassifierOptions())
    base = base_model(graph, replace(p, camera=None))
    small = open_ort(base.SerializeToString(), threads=1)
    whole = open_ort(attach_camera(base, p).SerializeToString(), threads=1)
    part, frame = open_part(p, camera_module.BLOCK), photos[0]
    ways: dict[str, Way] = {
        "whole": lambda: pillow_whole(frame, p),
        "box": lambda: pillow_box(frame, p),
        "host": lambda: preprocess_frame(frame, p),
        "camera part": lambda: part.run({"image": frame[None]}),
        "host + graph": lambda: small.run({"image": preprocess_frame(frame, p)[None]}),
        "camera graph": lambda: whole.run({"image": frame[None]}),
    }
    times = timed(ways, rounds)
    differences = np.stack(
        [part.run({"image": photo[None]})[PREPARED][0] - preprocess_frame(photo, p) for photo in photos]
    )
    blocks = {block: open_part(p, block) for block in BLOCKS}
    of_blocks = {str(block): (lambda model=model: model.run({"image": frame[None]})) for block, model in blocks.items()}
    return {
        "milliseconds": summary(times),
        "host_over_pillow": ratio(times, "host", "whole", "box"),
        "camera_graph_over_host_and_graph": ratio(times, "camera graph", "host + graph"),
        "largest_difference": float(np.abs(differences).max()),
        "share_of_values_one_level_off": round(float((differences != 0).mean()), 4),
        "blocks": summary(timed(of_blocks, max(10, rounds // 5))),
    }


def main() -> None:
    """Measure, print, and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    folder = Path(skimage.__file__).parent / "data"
    photos = [np.asarray(Image.open(folder / name).convert("RGB").resize((WIDTH, HEIGHT))).copy() for name in PHOTOS]
    found: dict[str, Any] = {
        "machine": {"cpu": platform.processor() or platform.machine(), "cores": os.cpu_count(), "threads": 1},
        "frame": [HEIGHT, WIDTH, 3],
        "input": [SIDE, SIDE, 3],
        "rounds": arguments.rounds,
    }
    with TemporaryDirectory() as work:
        classifier = network(Path(work))
        for crop in CROPS:
            found[crop] = of_crop(crop, photos, classifier, arguments.rounds)
    text = json.dumps(found, indent=2)
    print(text)
    if arguments.json is not None:
        arguments.json.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
