"""Every command and Python block of README and docs is executed, in the order of the page, on what the demo writes.

A block whose first line says what it needs (`title="needs a Jetson"`) is only parsed.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from grood_edge.export.head import head_nodes
from tests.conftest import Demo

ROOT = Path(__file__).parent.parent
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md")), ROOT / "benchmarks" / "README.md"]
BLOCK = re.compile(r"^```([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
NEEDS = re.compile(r'(bash|python) title="needs [^"]+"')
LINK = re.compile(r"\]\(([^)\s]+)\)")


def environment() -> dict[str, str]:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return {**os.environ, "PATH": path, "OMP_NUM_THREADS": "1"}


def blocks_of(page: Path, *languages: str) -> list[tuple[str, str]]:
    """Return the page's blocks in these languages, as (language, text)."""
    return [(info, text) for info, text in BLOCK.findall(page.read_text()) if info in languages]


@pytest.mark.parametrize("page", [p for p in PAGES if blocks_of(p, "bash", "python")], ids=lambda p: p.name)
def test_every_block_of_the_page_runs(page: Path, demo: Demo, tmp_path: Path) -> None:
    shutil.copytree(demo.folder, tmp_path / "grood-demo")
    if page.name == "runtime.md":  # the page starts from an exported model
        shutil.copy(demo.folder / "model.onnx", tmp_path / "model.onnx")
    for language, block in blocks_of(page, "bash", "python"):
        # this very environment is what `make` installed
        code = re.sub(r"^(pip install |\. \.venv/bin/activate).*$", "", block, flags=re.MULTILINE)
        command = ["bash", "-euo", "pipefail", "-c", code] if language == "bash" else [sys.executable, "-c", code]
        done = subprocess.run(
            command, cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=300, check=False
        )
        assert done.returncode == 0, f"{page.name}:\n{block}\n{done.stdout}\n{done.stderr}"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_other_blocks_say_what_they_need_or_are_text(page: Path) -> None:
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for info, block in BLOCK.findall(page.read_text()):
        if info in ("bash", "python", "text"):
            continue
        marked = NEEDS.fullmatch(info)
        assert marked, (
            f"{page.name} has a block {info!r}; expected bash, python, text, or a title that says what it needs"
        )
        if marked[1] == "python":
            compile(block, page.name, "exec")
        else:
            subprocess.run(["bash", "-n", "-c", block], check=True, timeout=60)
        assert set(re.findall(r"^make ([a-z-]+)", block, re.MULTILINE)) <= set(targets)


def anchors_of(page: Path) -> set[str]:
    """Return the anchors of the headings, as GitHub and MkDocs make them."""
    headings = re.findall(r"^#+ (.+)$", re.sub(BLOCK, "", page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", text.lower()).strip().replace(" ", "-") for text in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page: Path) -> None:
    """Links to other sites are parsed, not followed."""
    for target in LINK.findall(re.sub(BLOCK, "", page.read_text())):
        url = urlsplit(target)
        if url.scheme:
            assert url.scheme == "https", f"{page.name} links to {target}"
            assert "." in url.netloc, f"{page.name} links to {target}"
            continue
        other = page.parent / url.path if url.path else page
        assert other.exists(), f"{page.name} links to {target}, which does not exist"
        assert not url.fragment or url.fragment in anchors_of(other), f"{page.name} links to {target}: no such heading"


def test_threats_name_tests_that_are_there() -> None:
    found = re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", (ROOT / "SECURITY.md").read_text())
    assert len(found) > 20
    for path, name in found:
        expected = f"def {name}(" if name else "def "
        assert expected in (ROOT / path).read_text(), f"{path} has no {name or 'function'}"


def test_readme_names_every_module() -> None:
    """The code map is complete: a module that is not in it has no place yet."""
    text = (ROOT / "README.md").read_text()
    missing = [
        path.relative_to(ROOT / "grood_edge").as_posix()
        for path in (ROOT / "grood_edge").rglob("*.py")
        if path.name not in ("__init__.py", "__main__.py", "errors.py", "arrays.py", "progress.py")
        and "demo/" not in path.as_posix()
        and path.name not in text
    ]
    assert missing == []


def test_architecture_counts_the_nodes_of_the_head() -> None:
    several, one = (len(head_nodes(count, "int8", "features")) for count in (3, 1))
    text = (ROOT / "docs" / "architecture.md").read_text()
    assert f"{several} nodes with the default's three OOD prototypes and an int8 bank, {one} with" in text
