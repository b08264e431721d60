"""The long run: `python -m tests.fuzz --minutes 60`. Prints executions and findings of each target.

Each target runs in a process of its own, because decoders may end it; the input at work is in a file beforehand.
"""

import argparse
import hashlib
import multiprocessing
import os
import resource
import time
import warnings
from collections import Counter
from multiprocessing.connection import Connection
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory

from tests.fuzz.guard import Target, execute, mutated
from tests.fuzz.targets import TARGETS

ADDRESS_SPACE = 12 << 30  # beyond this an allocation fails instead of taking the machine down
PATIENCE = 900  # seconds of real time that one execution may take on a machine that is busy
MOST_CRASHES = 50


def saved(out: Path, target: Target, reason: str, data: bytes) -> None:
    """Keep the first input of each finding."""
    path = out / f"{target.name}-{hashlib.sha256(reason.encode()).hexdigest()[:8]}"
    if not path.exists():
        path.write_bytes(data)
        print(f"  {target.name}: {reason} ({path})", flush=True)


def fuzz(target: Target, seconds: float, seed: int, out: Path, answers: Connection) -> None:
    """Be the process of one target: run it on changed files until the time is over."""
    warnings.simplefilter("ignore")
    os.environ |= {name: str(out / "home") for name in ("XDG_DATA_HOME", "XDG_CACHE_HOME", "XDG_CONFIG_HOME")}
    resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE, ADDRESS_SPACE))
    random, current = Random(seed), out / f"{target.name}.current"
    with TemporaryDirectory() as name:
        seeds = target.seeds(Path(name))
        os.chdir(name)
        pending, end = list(seeds), time.monotonic() + seconds
        while time.monotonic() < end:
            data = pending.pop() if pending else mutated(target, seeds, random)
            current.write_bytes(data)
            reason = execute(target, data, Path(name))
            if reason is not None:
                saved(out, target, reason, data)
            answers.send(reason)
        os.chdir(out)
    answers.send(True)


def run_target(target: Target, seconds: float, seed: int, out: Path) -> tuple[int, Counter[str], bool]:
    """Run one process to its end; return executions, findings by what they are, and whether its time was over."""
    ours, theirs = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(target=fuzz, args=(target, seconds, seed, out, theirs))
    process.start()
    theirs.close()
    count, findings = 0, Counter[str]()
    crash = None
    while crash is None:
        try:
            answer = ours.recv() if ours.poll(PATIENCE) else "hangs"
        except EOFError:
            process.join()
            answer = crash = f"the process ended with exit code {process.exitcode}"
        if answer is True:
            break
        count += 1
        if answer is not None:
            findings[answer] += 1
        crash = "hangs" if answer == "hangs" else crash
    if crash is not None:
        process.kill()
        current = out / f"{target.name}.current"
        saved(out, target, crash, current.read_bytes() if current.exists() else b"")
    process.join()
    return count, findings, crash is None


def main() -> int:
    """Read the options, run all targets in turns, print the table; return 1 when something was found."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz")
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--target", choices=[target.name for target in TARGETS], action="append")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("fuzz-findings"))
    options = parser.parse_args()
    options.out.mkdir(exist_ok=True)
    targets = [target for target in TARGETS if not options.target or target.name in options.target]
    start, share = time.monotonic(), options.minutes * 60 / len(targets)
    total = distinct = 0
    for index, target in enumerate(targets):
        executions, findings, end = 0, Counter[str](), time.monotonic() + share
        for attempt in range(MOST_CRASHES):  # again after a crash
            left = end - time.monotonic()
            if left < 1:
                break
            seed = (options.seed * 100 + index) * 100 + attempt
            count, found, over = run_target(target, left, seed, options.out.resolve())
            executions, findings = executions + count, findings + found
            if over or "the process ended with exit code 0" in found:  # it would end at its first seed again
                break
        total, distinct = total + executions, distinct + len(findings)
        print(f"{target.name:14} {executions:9,} executions, {len(findings)} findings", flush=True)
        for reason, times in findings.most_common():
            print(f"    {times} x {reason}", flush=True)
    print(f"{total:,} executions in {(time.monotonic() - start) / 60:.1f} minutes, seed {options.seed}")
    return 1 if distinct else 0


if __name__ == "__main__":
    raise SystemExit(main())
