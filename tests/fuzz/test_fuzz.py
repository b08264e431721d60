"""A short pass over every target, the same in every run; `python -m tests.fuzz` is the long one (SECURITY.md)."""

from pathlib import Path
from random import Random

import pytest

from tests.fuzz.guard import Target, execute, mutated
from tests.fuzz.targets import TARGETS
from tests.without_hook import without_hook


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("target", [target for target in TARGETS if target.quick], ids=lambda target: target.name)
def test_changed_files_are_read_or_refused(target: Target, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("XDG_DATA_HOME", "XDG_CACHE_HOME", "XDG_CONFIG_HOME"):
        monkeypatch.setenv(name, str(tmp_path / "home"))
    (tmp_path / "work").mkdir()
    seeds, random = target.seeds(tmp_path), Random(1)
    monkeypatch.chdir(tmp_path / "work")
    for index in range(target.quick):
        data = seeds[index] if index < len(seeds) else mutated(target, seeds, random)
        with without_hook():
            assert execute(target, data, tmp_path) is None, data


def test_the_guard_sees_what_it_is_there_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    outside = tmp_path.parent / f"{tmp_path.name}-outside"

    def found(run: object) -> str | None:
        return execute(Target("x", lambda _: [], lambda _, data: data, run, 50, 1.0), b"", tmp_path)  # type: ignore[arg-type]

    assert found(lambda _: Path("inside").write_bytes(b"x")) is None
    assert found(lambda data: data[0]) == "IndexError from test_fuzz.py:<lambda>"
    assert "writes" in str(found(lambda _: outside.write_bytes(b"x")))
    assert "os.remove" in str(found(lambda _: outside.unlink()))
    assert "too much memory" in str(found(lambda _: bytearray(200 << 20)))
    assert found(lambda _: [None for _ in iter(int, 1)]) is not None  # never ends, and takes memory on the way
