"""The commands `grood-edge doctor` and `grood-edge selftest`."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from grood_edge.cli_options import Json
from grood_edge.errors import UsageError

if TYPE_CHECKING:
    from grood_edge.runtime.doctor import Diagnosis
    from grood_edge.runtime.selftest import SelfTest

__all__ = ["doctor_command", "selftest_command"]


def doctor_command(as_json: Json = False) -> None:
    """Show what is installed and works here, which backend `auto` takes, and how to get a better one."""
    from grood_edge.runtime.doctor import diagnose
    from grood_edge.terminal import print_json, show, tell, tell_notes

    found = diagnose()
    if as_json:
        print_json(asdict(found))
        return
    for table in _diagnosis_tables(found):
        show(table)
    tell_notes(found.warnings)
    show(f"--backend auto takes {found.auto}")
    if found.better:
        tell(f"Better, {found.better}")
    tell("Next: grood-edge selftest")


def selftest_command(
    model: Annotated[Path | None, typer.Argument(help="An artifact. (default: a small one that is built in)")] = None,
    backend: Annotated[
        list[str] | None, typer.Option(help="Test this one alone; may be repeated. (default: all)")
    ] = None,
    as_json: Json = False,
) -> None:
    """Build, verify and time a small artifact on every backend; exit code 1 when one that is here fails."""
    from grood_edge.runtime.selftest import BACKENDS, MODEL, selftest
    from grood_edge.terminal import print_json, progress_bars, show

    unknown = [name for name in backend or () if name not in BACKENDS]
    if unknown:
        raise UsageError(f"--backend {unknown[0]!r} is unknown; expected one of {', '.join(BACKENDS)}")
    with progress_bars() as progress:
        results = selftest(model or MODEL, tuple(backend or BACKENDS), progress)
    failed = [r.backend for r in results if r.status == "FAILED" or (backend and r.status == "not here")]
    if as_json:
        print_json({"passed": not failed, "model": str(model or MODEL.name), "backends": [asdict(r) for r in results]})
    else:
        show(_selftest_table(results))
        show(f"FAIL: {', '.join(failed)}" if failed else "PASS: every backend that is here answers as it should")
    raise typer.Exit(1 if failed else 0)


def _diagnosis_tables(found: "Diagnosis") -> list[Any]:
    import rich.box
    from rich.table import Table

    from grood_edge.tables import key_values

    gpu = found.gpu
    facts = {
        "grood-edge": found.grood_edge,
        "Python": found.python,
        "system": found.system,
        "device": found.device,
        "packages": ", ".join(f"{name} {version}" for name, version in found.packages.items()),
        "GPU": f"{gpu.name}, compute capability {gpu.compute_capability}" if gpu.name else f"none: {gpu.reason}",
        "driver": gpu.driver,
        "GPU memory": f"{gpu.memory_bytes:,} bytes{', shared with the CPU' if gpu.integrated else ''}"
        if gpu.memory_bytes
        else "",
        "power, clocks": "; ".join(text for text in (gpu.power, found.cpu_clocks) if text),
    }
    ways = Table(title="backends", box=rich.box.SIMPLE_HEAD, title_justify="left")
    for name in ("backend", "works", "why", "can"):
        ways.add_column(name, overflow="fold")
    for way in found.ways:
        ways.add_row(way.name, "yes" if way.works else "no", way.reason, ", ".join(way.capabilities))
    return [key_values("this machine", [(name, value) for name, value in facts.items() if value]), ways]


def _selftest_table(results: "tuple[SelfTest, ...]") -> Any:
    import rich.box
    from rich.table import Table

    table = Table(title="selftest", box=rich.box.SIMPLE_HEAD, title_justify="left")
    for name in ("backend", "result", "error", "one image", "batch", "to cpu", "what"):
        table.add_column(name, justify="left" if name in ("backend", "result", "what") else "right", overflow="fold")
    for r in results:
        times = [f"{value:.2f} ms" for value in r.milliseconds] + ["", ""]
        error = "" if r.largest_error is None else f"{r.largest_error:.1e} of {r.tolerance:.0e}"
        table.add_row(
            r.backend, r.status, error, times[0], times[1], "" if r.ratio is None else f"{r.ratio:.2f}x", r.reason
        )
    return table
