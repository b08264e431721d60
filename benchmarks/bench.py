"""All comparisons on a CPU, one after the other: `make bench`. Under 15 minutes on 2 cores.

    python benchmarks/bench.py [--quick] [--only NAME ...] [--write]

Each benchmark runs in a process of its own, so that one's threads and memory are not the next one's, and has a time
limit. With `--write` the results go to `benchmarks/results/DATE.json`, each as soon as it is there; at the end the
table, the profile, the phases and the exponents between the markers of docs/performance.md, and the plots to
docs/growth.svg. A benchmark that fails is said in the table and in the exit code, and takes nothing from the others.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from importlib import metadata
from pathlib import Path
from typing import Any

import growth
import head_profile
from plots import growth_plots
from ratios import Line, Ratio, Target, machine, table_text

HERE = Path(__file__).parent
PAGE = HERE.parent / "docs" / "performance.md"
PACKAGES = ("onnxruntime", "torch", "faiss-cpu", "pytorch-ood", "scikit-learn", "pillow")


@dataclass(frozen=True)
class Benchmark:
    """A script beside this one, and after how many seconds it is stopped. `shared`: it takes `--work`."""

    name: str
    limit: float = 240
    shared: bool = True


BENCHMARKS = (
    Benchmark("head_cost", limit=480),
    Benchmark("head_speed", limit=360),  # the first that needs images and artifacts makes them
    Benchmark("end_to_end"),
    Benchmark("export_cost"),
    Benchmark("score_folder"),
    Benchmark("start_up"),
    Benchmark("growth", shared=False),
)


def run_benchmark(benchmark: Benchmark, work: Path, quick: bool) -> dict[str, Any]:
    """Run one script; return its JSON, or what went wrong under `failed`; both with `took seconds`."""
    started = time.monotonic()
    try:
        found = found_by(benchmark, work, quick)
    except subprocess.TimeoutExpired:
        found = {"failed": f"stopped after {benchmark.limit:g} s"}
    except (OSError, ValueError) as error:
        found = {"failed": f"it ended without an error, and without a result that can be read: {error}"}
    return {**found, "took seconds": round(time.monotonic() - started, 1)}


def found_by(benchmark: Benchmark, work: Path, quick: bool) -> dict[str, Any]:
    """Run one script; return its JSON, or its last words under `failed`.

    Raises:
        subprocess.TimeoutExpired: it took longer than its limit.
        OSError, ValueError: it ended well, but left no JSON object whose lines can be read.
    """
    script, part = HERE / f"{benchmark.name}.py", work / f"{benchmark.name}.json"
    command = [sys.executable, str(script), "--json", str(part), *(["--quick"] if quick else [])]
    if benchmark.shared:
        command += ["--work", str(work)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, check=False, timeout=benchmark.limit
    )
    if done.returncode:
        last = (done.stderr.strip() or done.stdout.strip() or f"exit code {done.returncode}").splitlines()[-1]
        return {"failed": last, "stderr": done.stderr[-4000:]}
    found: dict[str, Any] = json.loads(part.read_text())
    if not isinstance(found, dict):
        raise ValueError(f"{part.name} holds no object")
    return found


def line_of(entry: Mapping[str, Any]) -> Line:
    """Read a line back from JSON."""
    target = Target(**entry["target"]) if entry["target"] else None
    return Line(**{**entry, "ratio": Ratio(**entry["ratio"]), "target": target})


def page_parts(results: Mapping[str, Mapping[str, Any]], day: str) -> dict[str, str]:
    """Return what goes between each pair of markers of the page."""
    lines = [line_of(entry) for found in results.values() for entry in found.get("lines", ())]
    missing = [f"- `{name}` failed: {found['failed']}" for name, found in results.items() if "failed" in found]
    missing += [f"- {what}: {why}" for found in results.values() for what, why in found.get("skipped", ())]
    m = machine()
    packages = ", ".join(f"{name} {version}" for name, version in versions().items())
    where = f"{day}: {m['cpu']}, {m['cores']} cores, {m['system']}, Python {m['python']}; {packages}."
    failed = ["Not measured as meant:\n\n" + "\n".join(missing)] if missing else []
    table = "\n\n".join([where, table_text(lines), took_text(results), *failed])
    parts = {"table": table}
    if "growth" in results.get("growth", {}):
        parts["growth"] = growth.table_text([growth.Growth(**one) for one in results["growth"]["growth"]])
    if "details" in results.get("head_cost", {}):
        profiles = results["head_cost"]["details"]["profile"]
        parts["profile"] = head_profile.table_text([head_profile.Profile(**one) for one in profiles])
    if "details" in results.get("export_cost", {}):
        parts["phases"] = phases_text(results["export_cost"]["details"]["phases"])
    return parts


def took_text(results: Mapping[str, Mapping[str, Any]]) -> str:
    """Say how long all took, and each."""
    each = {name: found["took seconds"] for name, found in results.items()}
    parts = ", ".join(f"`{name}` {seconds:.0f} s" for name, seconds in each.items())
    return f"Took {sum(each.values()):.0f} s: {parts}."


def phases_text(phases: Mapping[str, Mapping[str, float]]) -> str:
    """Return the phases of an export as a markdown table."""
    rows = [f"| {name} | {phase['seconds']:.2f} | {phase['share']:.1%} |" for name, phase in phases.items()]
    return "\n".join(["| phase | seconds | share |", "|---|---:|---:|", *rows])


def replaced(page: str, name: str, text: str) -> str:
    """Return the page with the text between `<!-- bench:NAME -->` and `<!-- /bench:NAME -->`.

    Raises:
        ValueError: the page has not exactly one such pair.
    """
    opening, closing = f"<!-- bench:{name} -->", f"<!-- /bench:{name} -->"
    if page.count(opening) != 1 or page.count(closing) != 1 or page.index(opening) > page.index(closing):
        raise ValueError(f"expected one {opening} before one {closing}")
    before, rest = page.split(opening)
    return f"{before}{opening}\n{text}\n{closing}{rest.split(closing)[1]}"


def versions() -> dict[str, str]:
    """Return the versions of the packages that are compared, of those that are there."""
    installed = {
        distribution.metadata["Name"].lower(): distribution.version for distribution in metadata.distributions()
    }
    return {name: installed[name] for name in PACKAGES if name in installed}


def write_json(results: Mapping[str, Mapping[str, Any]], day: str) -> Path:
    """Write what there is so far; return the file."""
    path = HERE / "results" / f"{day}.json"
    took = round(sum(found["took seconds"] for found in results.values()), 1)
    document = {"date": day, "machine": machine(), "packages": versions(), "took seconds": took, **results}
    path.write_text(json.dumps(document, indent=2) + "\n")
    return path


def write_page(results: Mapping[str, Mapping[str, Any]], day: str) -> None:
    """Write page and plots."""
    page = PAGE.read_text()
    for name, text in page_parts(results, day).items():
        page = replaced(page, name, text)
    PAGE.write_text(page)
    if "growth" in results.get("growth", {}):
        (PAGE.parent / "growth.svg").write_text(growth_plots(results["growth"]["growth"]))


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the options, run, print, and write when asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [benchmark.name for benchmark in BENCHMARKS]
    parser.add_argument("--only", nargs="+", choices=names, help="benchmarks to run; all without it")
    parser.add_argument("--quick", action="store_true", help="a few calls of each: shows that it works")
    parser.add_argument("--write", action="store_true", help="write results, page and plots")
    options = parser.parse_args(arguments)
    if options.write and (options.only or options.quick):
        parser.error(
            "--write replaces the whole table, so it goes with neither --only nor --quick; leave out one or the other"
        )
    results: dict[str, dict[str, Any]] = {}
    day = date.today().isoformat()
    with tempfile.TemporaryDirectory() as work:
        for benchmark in BENCHMARKS:
            if benchmark.name in (options.only or names):
                print(f"{benchmark.name} ...", file=sys.stderr, flush=True)
                results[benchmark.name] = found = run_benchmark(benchmark, Path(work), options.quick)
                print(f"    {found.get('failed', 'done')}, {found['took seconds']:.0f} s", file=sys.stderr, flush=True)
                if options.write:
                    write_json(results, day)
    for name, text in page_parts(results, day).items():
        print(f"\n{name}\n\n{text}")
    if options.write:
        write_page(results, day)
        print(f"\nwritten: {PAGE}, {write_json(results, day)}", file=sys.stderr)
    return int(any("failed" in found for found in results.values()))


if __name__ == "__main__":
    sys.exit(main())
