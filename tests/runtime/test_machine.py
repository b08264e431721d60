"""What a machine tells about itself, on files that stand for /sys and /proc."""

import mmap
import platform
from pathlib import Path

import pytest

from grood_edge.runtime import machine
from grood_edge.runtime.machine import machine_state, memory, return_free_memory


def test_clocks_temperatures_and_throttling(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for core, clock in enumerate((800_000, 2_400_000)):
        for folder, name, text in (
            ("cpufreq", "scaling_governor", "schedutil"),
            ("cpufreq", "scaling_cur_freq", str(clock)),
            ("thermal_throttle", "core_throttle_count", "3"),
        ):
            (tmp_path / f"cpu{core}" / folder).mkdir(parents=True, exist_ok=True)
            (tmp_path / f"cpu{core}" / folder / name).write_text(text + "\n")
    for zone, kind, temperature in ((0, "cpu-thermal", "45100"), (1, "cpu-thermal", "61900"), (2, "gpu", "nonsense")):
        (tmp_path / f"thermal_zone{zone}").mkdir()
        (tmp_path / f"thermal_zone{zone}" / "type").write_text(kind)
        (tmp_path / f"thermal_zone{zone}" / "temp").write_text(temperature)
    monkeypatch.setattr(machine, "_CPUS", tmp_path)
    monkeypatch.setattr(machine, "_THERMAL", tmp_path)
    found = machine_state()
    assert found.cpu_clocks == "schedutil; 800 to 2400 MHz"
    assert found.temperatures == "cpu-thermal 62 C"
    assert found.throttled == 6


def test_a_system_that_tells_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(machine, "_CPUS", tmp_path)
    monkeypatch.setattr(machine, "_THERMAL", tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    found = machine_state()
    assert (found.cpu_clocks, found.temperatures, found.throttled, found.power) == ("", "", None, "")


def test_memory_grows_with_what_is_held() -> None:
    before = memory()
    # Mapped afresh: an allocator may hand out pages that an earlier test gave back and that are still resident.
    with mmap.mmap(-1, 64 << 20) as held:
        for page in range(0, len(held), mmap.PAGESIZE):
            held[page] = 1
        after = memory()
    assert before.resident is not None
    assert after.resident is not None
    assert after.peak is not None
    assert after.resident - before.resident > 0.9 * (64 << 20)
    assert after.peak >= after.resident


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries keep little")
def test_free_memory_is_returned() -> None:
    blocks = [bytearray(b"x" * 100_000) for _ in range(640)]  # each below what glibc maps by itself
    last = bytearray(b"x" * 100_000)  # holds the end of the heap, which glibc would give back without being asked
    held = memory().resident
    blocks.clear()
    return_free_memory()
    kept = memory().resident
    assert held is not None
    assert kept is not None
    assert held - kept > 0.9 * 640 * len(last)


@pytest.mark.parametrize("text", ["", "VmRSS: many kB\nVmHWM: 1 kB\n", "VmRSS:\nVmHWM:\n"])
def test_without_proc_the_peak_comes_from_the_system(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, text: str
) -> None:
    whole = memory()
    (tmp_path / "status").write_text(text)
    monkeypatch.setattr(machine, "_STATUS", tmp_path / "status")
    found = memory()
    assert found.resident is None
    assert found.peak is not None
    assert whole.peak is not None
    assert found.peak == pytest.approx(whole.peak, rel=0.2)
    monkeypatch.setattr(machine, "_STATUS", tmp_path / "nothing")
    assert memory().resident is None
