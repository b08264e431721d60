"""MkDocs calls this: pages of the site that do not lie in docs/, and a check that it loads nothing from elsewhere.

README, CONTRIBUTING and the like stay where people look for them in a clone; the API pages come from docstrings alone.
"""

import re
from pathlib import Path
from typing import Any

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent
CODE_MAP = "## Code map\n"
BEHIND = "---\nsearch:\n  boost: 0.5\n---\n"  # a search finds explanations first
# What a user's own program imports, by what it is about.
API = {
    "export": ("From a network to an artifact", ["grood_edge.export"]),
    "runtime": ("From frames to verdicts", ["grood_edge.runtime", "grood_edge.images", "grood_edge.runtime.score"]),
    "stream": (
        "From a camera to states",
        [
            *(f"grood_edge.runtime.capture.{name}" for name in ("sources", "image_source", "mailbox", "health")),
            *(f"grood_edge.runtime.{name}" for name in ("stream", "decision", "episodes", "drift")),
        ],
    ),
    "telemetry": ("What a stream writes", ["grood_edge.telemetry.sink", "grood_edge.telemetry.watching"]),
    "evaluate": ("How well it works", ["grood_edge.evaluate.evaluation", "grood_edge.evaluate.results"]),
    "artifact": (
        "The file",
        [f"grood_edge.{name}" for name in ("artifact", "contract", "preprocessing", "probes", "scoring", "conformal")],
    ),
    "errors": ("Errors", ["grood_edge.errors"]),
}
_FROM_ELSEWHERE = re.compile(
    r"<(?:script|img|iframe|source)[^>]+src=[\"']?(?:https?:)?//|<link[^>]+href=[\"']?(?:https?:)?//"
)


def on_files(files: Files, config: Any) -> Files:
    """Add the pages."""
    home, _, code_map = (ROOT / "README.md").read_text().partition(CODE_MAP)
    pages = {"index.md": home, "code.md": f"# Code map\n{code_map}"}
    pages |= {path.name.lower(): path.read_text() for path in ROOT.glob("*.md") if path.name != "README.md"}
    for name, (title, modules) in API.items():
        reference = "".join(f"\n## {module}\n\n::: {module}\n" for module in modules)
        pages[f"api/{name}.md"] = f"{BEHIND}# {title}\n{reference}"
    for name, text in pages.items():
        files.append(File.generated(config, name, content=text))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Turn links to and from the repository's root into links within the site."""
    markdown = markdown.replace("](docs/", "](").replace("](../README.md", "](index.md")
    return re.sub(r"\]\((?:\.\./)?([A-Z]+\.md)", lambda found: f"]({found[1].lower()}", markdown)


def on_post_build(config: Any) -> None:
    """Refuse a site that would load a font, a script or a picture from another machine."""
    for path in Path(config["site_dir"]).rglob("*.html"):
        found = _FROM_ELSEWHERE.search(path.read_text())
        if found:
            raise PluginError(f"{path} loads something from another machine: {found.group()}")
