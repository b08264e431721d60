"""Ten minutes of a 60 fps camera against a session that takes 25 ms: memory, age of the scored frame, drops.

    python benchmarks/soak.py [--minutes M] [--json FILE]

The camera is a thread that makes 720p frames on an absolute schedule; the network is a recording that answers after
25 ms. Everything between them is the real thing: mailbox, frame health, decision, drift, log.
"""

import argparse
import json
import platform
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from grood_edge.arrays import Frames
from grood_edge.artifact import read_artifact
from grood_edge.outputs import Outputs
from grood_edge.preprocessing import Color
from grood_edge.runtime import open_session
from grood_edge.runtime.capture.mailbox import Capture, FramePolicy
from grood_edge.runtime.capture.sources import CapturedFrame
from grood_edge.runtime.onnxrt import OnnxRuntimeBackend
from grood_edge.runtime.selftest import MODEL
from grood_edge.runtime.stream import StreamVerdict, stream_rules, verdicts
from grood_edge.telemetry.jsonl import open_json_lines
from grood_edge.telemetry.watching import Tally, watch

FPS = 60.0
INFERENCE = 0.025  # seconds


class Camera:
    """60 frames a second on an absolute schedule, one of 50 noisy 720p pictures each."""

    name, live = "synthetic camera", True
    fps: float | None = FPS
    color: Color = "rgb"

    def __init__(self, seconds: float) -> None:
        rng = np.random.default_rng(0)
        self._pictures = rng.integers(0, 256, (50, 720, 1280, 3), dtype=np.uint8)
        self._count = round(seconds * FPS)
        self._index = 0
        self._start: float | None = None

    def read(self) -> CapturedFrame | None:
        """Sleep until the next frame is due."""
        self._start = time.monotonic() if self._start is None else self._start
        if self._index == self._count:
            return None
        due = self._start + self._index / FPS
        time.sleep(max(0.0, due - time.monotonic()))
        frame = CapturedFrame(self._pictures[self._index % 50], self._index, time.monotonic(), None, self.name)
        self._index += 1
        return frame

    def close(self) -> None:
        """Nothing is held."""


class Slow:
    """The artifact's answer to one frame, after 25 ms."""

    provider = "recorded, 25 ms"

    def __init__(self, outputs: Outputs) -> None:
        self._outputs = outputs

    def run(self, frames: Frames) -> Outputs:
        """Answer after 25 ms, whatever the frame."""
        time.sleep(INFERENCE)
        return self._outputs

    def close(self) -> None:
        """Nothing is held."""


def resident() -> int:
    """Return the resident memory of this process in bytes (Linux)."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


def measured(stream: Iterator[StreamVerdict], ages: list[float], memory: list[tuple[float, int]]) -> Any:
    """Pass a stream on; note each age, and the memory once a second."""
    for found in stream:
        ages.append(found.age)
        now = time.monotonic()
        if not memory or now - memory[-1][0] >= 1:
            memory.append((now, resident()))
        yield found


def run(minutes: float) -> dict[str, Any]:
    """Run the camera for so long, and return what was measured."""
    artifact = read_artifact(MODEL)
    p = artifact.contract.preprocessing
    frame = np.zeros((1, p.height, p.width, p.channels), np.uint8)
    outputs = OnnxRuntimeBackend(artifact).run(frame)
    camera, tally = Camera(60 * minutes), Tally()
    ages: list[float] = []
    memory: list[tuple[float, int]] = []
    rules = stream_rules(artifact.contract, camera)
    with (
        tempfile.TemporaryDirectory() as folder,
        open_session(MODEL, backend=Slow(outputs)) as session,
        Capture(camera, FramePolicy("newest")) as capture,
    ):
        stream = measured(verdicts(session, capture, rules), ages, memory)
        watch(stream, [open_json_lines(Path(folder) / "log.jsonl", force=False)], tally, lambda _: None)
        captured = capture.captured
    after = [size for moment, size in memory if moment - memory[0][0] >= 60]
    return {
        "minutes": minutes,
        "captured": captured,
        "scored": tally.frames,
        "dropped": tally.dropped,
        "drops_exact": captured == tally.frames + tally.dropped,
        "age_ms": {str(q): round(1000 * float(np.percentile(ages, q)), 2) for q in (50, 99, 99.9, 100)},
        "bound_ms": round(1000 * (INFERENCE + 1 / FPS), 2),
        "growth_after_first_minute_MB": round((max(after) - after[0]) / 1e6, 2) if after else None,
        "machine": platform.processor() or platform.machine(),
    }


def main() -> None:
    """Run, print, and write the JSON where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    result = run(options.minutes)
    text = json.dumps(result, indent=2)
    print(text)
    if options.json is not None:
        options.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
