"""release/: what `make release-check` decides, without installing anything."""

import importlib
import json
import re
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def check() -> Iterator[ModuleType]:
    """Import the script by name, as it imports the one beside it."""
    sys.path.insert(0, str(ROOT / "release"))
    yield importlib.import_module("check")
    sys.path.remove(str(ROOT / "release"))
    for name in ("check", "distributions"):
        del sys.modules[name]


@pytest.fixture
def empty_wheel(check: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Everything is written below tmp_path; the wheel declares three extras and contains nothing."""
    wheel, sdist = tmp_path / "grood_edge-1-py3-none-any.whl", tmp_path / "grood_edge-1.tar.gz"
    with zipfile.ZipFile(wheel, "w") as archive:
        extras = "".join(f"Provides-Extra: {name}\n" for name in ("cpu", "dev", "demo"))
        archive.writestr("grood_edge-1.dist-info/METADATA", extras)
    tarfile.open(sdist, "w:gz").close()
    built = sys.modules["distributions"].Distributions(sdist, wheel, "c0ffee", False)
    monkeypatch.setattr(check, "build_distributions", lambda root, out: built)
    monkeypatch.setattr(check, "OUT", tmp_path)
    monkeypatch.setattr(check, "PINNED_PYTHON", sys.version_info[:2])
    return wheel


def test_every_extra_is_tried_or_left_to_another_target(check: ModuleType) -> None:
    extras = metadata.metadata("grood-edge").get_all("Provides-Extra") or []
    smoke = (ROOT / "release" / "smoke.py").read_text().partition("SMOKE: ")[2]
    assert set(extras) - set(re.findall(r'"(\w+)":', smoke)) == set(check.NOT_TRIED)


def test_what_readme_installs_is_tried(check: ModuleType) -> None:
    found = re.search(r"pip install '\.\[([\w,]+)\]'", (ROOT / "README.md").read_text())
    assert found
    assert set(found[1].split(",")) == {"torch", *check.BESIDE["torch"]}


@pytest.mark.parametrize("asked", ["cpuu", "dev"])
def test_unknown_extras_are_refused(
    check: ModuleType, empty_wheel: Path, capsys: pytest.CaptureFixture[str], asked: str
) -> None:
    assert check.main(["cpu", asked]) == 2
    assert capsys.readouterr().out == f"nothing was tried: EXTRAS has {asked}; expected some of none, cpu, demo\n"


def test_another_python_than_that_of_the_pins_is_refused(check: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check, "PINNED_PYTHON", (3, 9))
    assert check.main([]) == 2


def test_an_extra_without_its_sbom_fails(
    check: ModuleType, empty_wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(check, "wrong_contents", lambda built: [])
    monkeypatch.setattr(check, "wrong_pins", lambda environments, bench: [])
    rows = {"demo": "passed", "none": "passed", "cpu": "no such file"}
    monkeypatch.setattr(
        check, "try_extra", lambda wheel, extra: check.Tried(extra, 1, 1, rows[extra], "passed", "passed", 1)
    )
    monkeypatch.setattr(check, "DEMO", tmp_path)
    assert check.main(["none"]) == 0
    assert check.main(["cpu", "none"]) == 1
    written = json.loads((tmp_path / "check.json").read_text())["extras"]
    assert [(row["extra"], row["sbom"]) for row in written] == [("none", "passed"), ("cpu", "no such file")]


def test_a_step_says_what_went_wrong(check: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check, "MOST_SECONDS", 0.2)
    with (tmp_path / "log").open("w") as log:
        assert check.step(["true"], tmp_path, log) == "passed"
        assert check.step(["sh", "-c", "echo this >&2; exit 1"], tmp_path, log) == "this"
        assert check.step(["sleep", 60], tmp_path, log) == "no end after 0.2 s: sleep 60"


def test_pins_are_held_against_what_is_installed(
    check: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "constraints.txt").write_text("# comment\nnumpy==2.0\nfaiss-cpu==1.0 # make bench\nold==1\n")
    monkeypatch.setattr(check, "ROOT", tmp_path)
    project, bench = tmp_path / "project", tmp_path / "bench"
    assert "project: not there" in check.wrong_pins([project], bench)[0]
    installed = {project: ["numpy==2.0", "new_one==3"], bench: ["numpy==2.0", "faiss-cpu==1.1"]}
    monkeypatch.setattr(check, "freeze", lambda python: installed[python.parents[1]])
    project.mkdir()
    usual = {"constraints.txt lacks new-one==3", "constraints.txt pins old==1, which no environment has"}
    assert set(check.wrong_pins([project], bench)) == usual
    bench.mkdir()
    assert set(check.wrong_pins([project], bench)) == usual | {
        "constraints.txt lacks faiss-cpu==1.1", "constraints.txt pins faiss-cpu==1.0, which no environment has",
    }  # fmt: skip


def test_the_package_page_needs_nothing_beside_it() -> None:
    """A registry shows it without the repository: no pictures, no links to files."""
    page = (ROOT / "pyproject.toml").read_text().partition('text = """')[2].partition('"""')[0]
    assert "grood-edge" in page
    assert [target for target in re.findall(r"\]\(([^)]+)", page) if not target.startswith("https://")] == []
