"""What a machine tells about itself without root: clocks, power, temperatures, load, memory."""

import ctypes
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

__all__ = [
    "MachineState",
    "Memory",
    "cpu_clocks",
    "first_line",
    "gpu_power",
    "machine_state",
    "memory",
    "program_lines",
    "return_free_memory",
]

_CPUS = Path("/sys/devices/system/cpu")
_THERMAL = Path("/sys/class/thermal")
_STATUS = Path("/proc/self/status")
_SMI_FIELDS = "pstate,clocks.sm,clocks.max.sm,power.limit,temperature.gpu"
_SECONDS = 5  # that another program may take


@dataclass(frozen=True)
class MachineState:
    """At one moment. Texts are empty, and the load is None, where the system does not tell.

    cpu_clocks: governors and range of clocks. temperatures: of the hottest sensor of each kind. throttled: how often
    cores were slowed for their heat since the machine started. power: mode and clocks of the GPU. load: processes that
    want to run, mean over one minute.
    """

    cpu_clocks: str
    temperatures: str
    throttled: int | None
    power: str
    load: float | None


@dataclass(frozen=True)
class Memory:
    """Resident memory of this process in bytes: now, and the most so far; None where the system does not tell."""

    resident: int | None
    peak: int | None


def machine_state() -> MachineState:
    """Read what can be read; takes up to a second where NVIDIA's tools are asked."""
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    return MachineState(cpu_clocks(), temperatures(), _throttled(), gpu_power(), load)


def memory() -> Memory:
    """Read the resident memory of this process: from /proc, else its peak from `resource`."""
    try:
        lines = dict(line.split(":", 1) for line in _STATUS.read_text().splitlines() if ":" in line)
        resident, peak = (int(lines[name].split()[0]) << 10 for name in ("VmRSS", "VmHWM"))
    except (OSError, KeyError, ValueError, IndexError):
        return Memory(None, _peak_of_resource())
    return Memory(resident, peak)


def return_free_memory() -> None:
    """Give heap that nothing uses back to the system. Only glibc keeps so much of it that it matters; only there."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def _peak_of_resource() -> int | None:
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if os.uname().sysname == "Darwin" else peak << 10  # bytes on macOS, KiB elsewhere


def gpu_power() -> str:
    """Return power mode and clocks of the GPU as nvpmodel (Jetson) or nvidia-smi tell them without root."""
    for command in (
        ["nvpmodel", "-q"],
        ["nvidia-smi", f"--query-gpu={_SMI_FIELDS}", "--format=csv,noheader"],
    ):
        lines = program_lines(command)
        if lines:
            return ", ".join(lines)[:200]
    return ""


def cpu_clocks() -> str:
    """Return the governors and the range of clocks of the CPU cores that tell them."""
    governors = {first_line(path) for path in _CPUS.glob("cpu[0-9]*/cpufreq/scaling_governor")} - {""}
    clocks = [first_line(path) for path in _CPUS.glob("cpu[0-9]*/cpufreq/scaling_cur_freq")]
    numbers = [int(text) // 1000 for text in clocks if text.isdigit()]
    parts = [", ".join(sorted(governors))] if governors else []
    if numbers:
        parts.append(f"{min(numbers)} to {max(numbers)} MHz")
    return "; ".join(parts)


def temperatures() -> str:
    """Return the temperature of the hottest sensor of each kind, in degrees Celsius."""
    hottest: dict[str, float] = {}
    for zone in sorted(_THERMAL.glob("thermal_zone*")):
        kind, text = first_line(zone / "type")[:40], first_line(zone / "temp")
        if kind and text.lstrip("-").isdigit():
            hottest[kind] = max(hottest.get(kind, -273.0), int(text) / 1000)
    return ", ".join(f"{kind} {degrees:.0f} C" for kind, degrees in sorted(hottest.items()))


def _throttled() -> int | None:
    counts = [first_line(path) for path in _CPUS.glob("cpu[0-9]*/thermal_throttle/core_throttle_count")]
    numbers = [int(text) for text in counts if text.isdigit()]
    return sum(numbers) if numbers else None


def program_lines(command: list[str]) -> list[str]:
    """Return the lines that a program prints; none where it is missing, fails or takes too long."""
    program = shutil.which(command[0])
    if program is None:
        return []
    try:
        done = subprocess.run(  # noqa: S603 - fixed words
            [program, *command[1:]], capture_output=True, timeout=_SECONDS, check=False
        )
    except (OSError, subprocess.SubprocessError):
        return []
    text = done.stdout.decode(errors="replace") if done.returncode == 0 else ""
    return [line.strip() for line in text.splitlines() if line.strip()]


def first_line(path: Path) -> str:
    """Return the first line of a small file of the system; empty where it cannot be read."""
    try:
        with path.open("rb") as file:
            text = file.read(4096).decode(errors="replace").replace("\0", "").strip()
    except OSError:
        return ""
    return text.splitlines()[0] if text else ""
