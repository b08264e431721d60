"""Start and memory of the runtime beside bare onnxruntime with the same artifact: fresh processes, in turn, one thread.

    python benchmarks/start_up.py [--quick] [--work DIR] [--json FILE]

Each process imports, opens the artifact (EfficientNet-Lite0 with three OOD prototypes) and runs 50 frames that need no
resizing. Resident is VmRSS at the end, peak VmHWM, so this needs Linux.
"""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
from ratios import Found, Line, Target, Times, ratio_of, run_as_script
from setting import prepared

TURNS = 9
RESIDENT = Target("at most", 1.15)
COMMON = """
import json, sys, time
began = time.perf_counter()
{imports}
imported = time.perf_counter()
import numpy as np
frame = np.random.default_rng(0).integers(0, 256, (224, 224, 3), np.uint8)
{opening}
answer(frame)
answered = time.perf_counter()
for _ in range(50):
    answer(frame)
status = dict(line.split(":", 1) for line in open("/proc/self/status") if line.startswith("Vm"))
kilobytes = [int(status[name].split()[0]) for name in ("VmRSS", "VmHWM")]
print(json.dumps([imported - began, answered - began, kilobytes[0] / 1024, kilobytes[1] / 1024]))
"""
BARE = COMMON.format(
    imports="import onnxruntime",
    opening="""
options = onnxruntime.SessionOptions()
options.intra_op_num_threads, options.log_severity_level = 1, 3
session = onnxruntime.InferenceSession(sys.argv[1], options, providers=["CPUExecutionProvider"])
answer = lambda frame: session.run(None, {"image": frame[None]})
""",
)
OURS = COMMON.format(
    imports="from grood_edge.runtime import open_session",
    opening="""
session = open_session(sys.argv[1], threads=1)
answer = session.predict
""",
)
QUANTITIES = (
    ("`import grood_edge.runtime`", "`import onnxruntime`", "s", None),
    ("import, open, first verdict", "the same with onnxruntime", "s", None),
    ("resident memory after 51 frames", "onnxruntime", "MB", RESIDENT),
    ("peak memory", "onnxruntime", "MB", None),
)


def measured(work: Path, quick: bool) -> Found:
    """Start both kinds of process in turn."""
    if not Path("/proc/self/status").exists():
        return Found((), (("start and memory", "no /proc/self/status on this system"),))
    artifact = prepared(work).three
    turns = []
    for turn in range(2 if quick else TURNS):
        order = (BARE, OURS) if turn % 2 else (OURS, BARE)
        found = {code: in_process(code, artifact) for code in order}
        turns.append([found[OURS], found[BARE]])
    values = np.array(turns)  # [turns, sides, quantities]
    lines = []
    for index, (what, against, unit, target) in enumerate(QUANTITIES):
        rounds: list[Times] = [values[:, :, index]]
        lines.append(Line("Start and memory, batch 1, 1 thread", what, against, ratio_of(rounds, 0, 1), unit, target))
    return Found(tuple(lines))


def in_process(code: str, artifact: Path) -> list[float]:
    """Run the code in a fresh interpreter; return seconds to import, seconds to the first answer, and megabytes."""
    command = [sys.executable, "-c", code, str(artifact)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    found: list[float] = json.loads(done.stdout)
    return found


if __name__ == "__main__":
    run_as_script(__doc__, measured)
