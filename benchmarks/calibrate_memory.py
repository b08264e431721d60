"""What `grood-edge calibrate` takes at its peak beyond the network itself, for a device with little memory.

    python benchmarks/calibrate_memory.py [ARTIFACT.onnx] [--images N ...] [--threads N] [--json FILE]

The images are 400 JPEGs of 640x480 under N names. Without an artifact a network stands in that costs little time and
has the sizes of a real one: input 224x224, 1,280 features; what `calibrate` keeps depends on those, not on the layers.
Each figure is of a process of its own, because a peak never falls; "network" opens the artifact, runs 32 frames and
ends.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from onnx import TensorProto, helper, numpy_helper, save
from photos import NAMES, write_photos
from ratios import machine
from scale import peak_megabytes

from grood_edge.artifact import read_artifact
from grood_edge.camera_part import prepared_model
from grood_edge.export import ExportOptions, export_model
from grood_edge.export.batches import BATCH
from grood_edge.export.recalibrate import RecalibrateOptions, recalibrate
from grood_edge.ort import open_ort
from grood_edge.threads import limited_threads

PHOTOS, SIDE, DIMENSION = 400, 224, 1280


def small_network(path: Path) -> None:
    """Write a classifier with the sizes of EfficientNet-Lite0 and next to no layers."""
    rng = np.random.default_rng(0)
    shapes = {"w": (147, DIMENSION), "b": (DIMENSION,), "v": (DIMENSION, len(NAMES)), "c": (len(NAMES),)}
    weights = [numpy_helper.from_array(rng.normal(0, 0.1, s).astype(np.float32), n) for n, s in shapes.items()]
    nodes = [
        helper.make_node("AveragePool", ["image"], ["pooled"], kernel_shape=[32, 32], strides=[32, 32]),
        helper.make_node("Flatten", ["pooled"], ["flat"]),
        helper.make_node("Gemm", ["flat", "w", "b"], ["hidden"]),
        helper.make_node("Relu", ["hidden"], ["features"]),
        helper.make_node("Gemm", ["features", "v", "c"], ["logits"]),
    ]
    image = helper.make_tensor_value_info("image", TensorProto.FLOAT, ["N", 3, SIDE, SIDE])
    logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["N", len(NAMES)])
    graph = helper.make_graph(nodes, "small", [image], [logits], weights)
    save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=9), path)


def many_names(photos: Path, folder: Path, count: int) -> None:
    """Link the photographs under `count` names."""
    files = sorted(photos.rglob("*.jpg"))
    for index in range(count):
        source = files[index % len(files)]
        target = folder / source.parent.name / f"{index:06d}.jpg"
        target.parent.mkdir(parents=True, exist_ok=True)
        target.symlink_to(source)


def own_peak_megabytes() -> float:
    """Return the peak resident memory since this program began: `ru_maxrss` has that of whoever started it, too."""
    status = Path("/proc/self/status")
    if not status.exists():
        return peak_megabytes()
    (kilobytes,) = (line.split()[1] for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
    return int(kilobytes) / 1024


def measured(what: str, artifact: Path, data: Path, threads: int | None) -> dict[str, object]:
    """Do it in this process; return the peak and what it took."""
    start = time.perf_counter()
    with limited_threads(threads):
        if what == "network":
            opened = read_artifact(artifact)
            p = opened.contract.preprocessing
            model = open_ort(prepared_model(opened.model, p))
            model.run({"image": np.zeros((model.batch(BATCH), p.height, p.width, p.channels), np.uint8)})
        else:
            options = RecalibrateOptions(threshold_only=what == "threshold only", labels="predicted")
            recalibrate(artifact, data, artifact.with_suffix(".new"), options)
    return {"seconds": round(time.perf_counter() - start, 1), "peak_mb": round(own_peak_megabytes(), 1)}


def in_a_process(what: str, artifact: Path, data: Path, threads: int | None) -> dict[str, object]:
    """Measure in a process of its own."""
    out = artifact.with_suffix(".json")
    command = [sys.executable, __file__, str(artifact), "--here", what, "--data", str(data), "--json", str(out)]
    subprocess.run([*command, *(["--threads", str(threads)] if threads else [])], check=True)
    artifact.with_suffix(".new").unlink(missing_ok=True)
    found: dict[str, object] = json.loads(out.read_text())
    return found


def main() -> None:
    """Run every number of images, print the figures, and write JSON when asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact", type=Path, nargs="?")
    parser.add_argument("--images", type=int, nargs="+", default=[1_000, 10_000])
    parser.add_argument("--threads", type=int)
    parser.add_argument("--json", type=Path, help="write the result here")
    parser.add_argument("--here", help=argparse.SUPPRESS)
    parser.add_argument("--data", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.here:
        found = measured(arguments.here, arguments.artifact, arguments.data, arguments.threads)
        arguments.json.write_text(json.dumps(found))
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_photos(folder / "photos", PHOTOS)
        artifact = folder / "artifact.onnx"
        if arguments.artifact is None:
            small_network(folder / "small.onnx")
            export_model(folder / "small.onnx", folder / "photos", artifact, ExportOptions(labels="predicted"))
        else:
            artifact.write_bytes(arguments.artifact.read_bytes())
        write_photos(folder / "new", PHOTOS, seed=1)
        network = in_a_process("network", artifact, folder, arguments.threads)
        runs = []
        for images in arguments.images:
            many_names(folder / "new", folder / str(images), images)
            for what in ("threshold only", "statistics"):
                run = in_a_process(what, artifact, folder / str(images), arguments.threads)
                beyond = float(str(run["peak_mb"])) - float(str(network["peak_mb"]))
                runs.append({"images": images, "what": what, **run, "mb_beyond_network": round(beyond, 1)})
                print(runs[-1], flush=True)
    result = {"machine": machine(), "cores": len(os.sched_getaffinity(0)), "network": network, "runs": runs}
    print(json.dumps(result, indent=2))
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
