"""How the memory of `calibrate` grows with the number of images: features, not pixels."""

import subprocess
import sys
from pathlib import Path

from PIL import Image

from grood_edge.demo.images import DemoImages
from grood_edge.images import find_images

SIDE = 512  # of a raw frame: 256 KB
FEW, MANY = 500, 2_500
BOUND = 100  # megabytes; the raw frames alone would be 512 more, and what may wait to be taken is 64

SCRIPT = """
import resource, sys
from grood_edge.export.recalibrate import RecalibrateOptions, recalibrate
recalibrate(sys.argv[1], sys.argv[2], sys.argv[3], RecalibrateOptions(labels="predicted", threshold_only=True))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def peak(artifact: Path, folder: Path, out: Path) -> float:
    """Calibrate in a process of its own; return its peak in megabytes."""
    command = [sys.executable, "-c", SCRIPT, *map(str, (artifact, folder, out))]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return float(done.stdout) / (1024 if sys.platform == "linux" else 1024**2)


def test_calibrate_does_not_keep_the_images(artifact_path: Path, digits: DemoImages, tmp_path: Path) -> None:
    (tmp_path / "large").mkdir()
    for path in find_images(digits.test)[:50]:
        with Image.open(path) as image:
            image.resize((SIDE, SIDE)).save(tmp_path / "large" / f"{path.parent.name}-{path.name}")
    large = find_images(tmp_path / "large")
    peaks = []
    for count in (FEW, MANY):
        folder = tmp_path / str(count)
        folder.mkdir()
        for index in range(count):
            (folder / f"{index:05d}.png").symlink_to(large[index % len(large)])
        peaks.append(peak(artifact_path, folder, tmp_path / f"{count}.onnx"))
    assert peaks[1] - peaks[0] < BOUND
