"""The report opens offline in a browser: no console error, every image loads, names of others stay text."""

import base64
import io
import re
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from grood_edge.evaluate.evaluation import EvaluateOptions
from grood_edge.evaluate.report import report_html
from grood_edge.evaluate.results import Evaluation
from grood_edge.evaluate.settings import settings
from grood_edge.evaluate.summary import headline
from grood_edge.runtime.session import open_session

VOID = {"meta", "img", "br", "line", "rect", "circle", "polyline"}
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
EVIL = '"><img src=x onerror=alert(1)><script>console.error("owned")</script>'


class Page(HTMLParser):
    """Collects text, images and links, and checks that every element is closed."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.images: list[str] = []
        self.addresses: list[str] = []
        self.tags: set[str] = set()
        self.text: list[str] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        for name, value in attrs:
            assert not name.startswith("on"), "no element runs code"
            if name in ("src", "href", "xlink:href"):
                (self.images if tag == "img" else self.addresses).append(value or "")
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


@pytest.fixture(scope="module")
def html(evaluation: Evaluation, options: EvaluateOptions) -> str:
    with open_session(options.model) as session:
        return report_html(
            evaluation, "model.onnx", [("gradient bank", "64 rows")], settings(evaluation, options, session)
        )


def test_everything_asked_for_is_on_the_page(html: str, evaluation: Evaluation) -> None:
    page = Page(html)
    assert page.open == []
    text = " ".join(page.text)
    for expected in (headline(evaluation), evaluation.promise.sentence, "64 rows", "graph digest", "KNN", "low light"):
        assert expected in text
    assert text.index(headline(evaluation)) < text.index("OOD sets") < text.index("most confident mistakes")
    mistakes = evaluation.id.false_alarms + sum(min(12, r.images - r.found) for r in evaluation.ood)
    assert len(page.images) == mistakes > 0


def test_one_file_and_no_network(html: str) -> None:
    page = Page(html)
    assert page.addresses == []
    assert not {"script", "link", "iframe", "object"} & page.tags
    assert "default-src 'none'" in html
    assert not re.search(r"url\(|@import|https?://(?!www\.w3\.org/2000/svg)", html)


def test_every_image_decodes(html: str) -> None:
    for address in Page(html).images:
        kind, _, data = address.partition(",")
        assert kind == "data:image/jpeg;base64"
        with Image.open(io.BytesIO(base64.b64decode(data, validate=True))) as image:
            image.load()
            assert min(image.size) > 0


def test_the_box_is_green_only_when_nothing_is_wrong(evaluation: Evaluation) -> None:
    def kind(changed: Evaluation) -> str:
        found = re.search(r'class="verdict (\w+)"', report_html(changed, "m", [], []))
        assert found is not None
        return found[1]

    assert kind(evaluation) == "good"
    assert kind(replace(evaluation, ood=(replace(evaluation.ood[0], found=0), evaluation.ood[1]))) == "doubtful"
    for outcome, expected in (("broken", "broken"), ("none", "doubtful"), ("untested", "doubtful")):
        promise = replace(evaluation.promise, outcome=outcome)  # type: ignore[arg-type]
        assert kind(replace(evaluation, promise=promise)) == expected


def evil(evaluation: Evaluation) -> Evaluation:
    return replace(
        evaluation,
        classes=tuple(f"{EVIL}{name}" for name in evaluation.classes),
        ood=tuple(replace(result, name=EVIL) for result in evaluation.ood),
        ood_sets=tuple(replace(one, name=EVIL) for one in evaluation.ood_sets),
        id=replace(evaluation.id, classes=tuple(replace(c, name=EVIL) for c in evaluation.id.classes)),
        warnings=(EVIL,),
        missed_most=EVIL,
        left_out=((EVIL, EVIL),),
    )


def test_names_of_others_stay_text(evaluation: Evaluation) -> None:
    page = Page(report_html(evil(evaluation), EVIL, [(EVIL, EVIL)], [(EVIL, EVIL)]))
    assert "script" not in page.tags
    assert all(address.startswith("data:") for address in page.images)


@pytest.mark.parametrize("case", ["usual", "evil"])
def test_a_browser_shows_it_without_complaint(case: str, html: str, evaluation: Evaluation, tmp_path: Path) -> None:
    browser = next((found for name in BROWSERS if (found := shutil.which(name))), None)
    if browser is None:
        pytest.skip(f"none of {', '.join(BROWSERS)} is installed")
    if case == "evil":
        html = report_html(evil(evaluation), EVIL, [(EVIL, EVIL)], [(EVIL, EVIL)])
    # Only this copy may run a script: it asks the browser what it made of every image.
    count = (
        "<script>addEventListener('load', () => { const all = [...document.images]; document.title = "
        "`${all.length} images, ${all.filter(i => i.naturalWidth > 0).length} loaded, "
        "${document.documentElement.scrollWidth} wide`; });</script></body>"
    )
    asked = html.replace("style-src", "script-src 'unsafe-inline'; style-src").replace("</body>", count)
    for name, page in (("product", html), ("asked", asked)):
        (tmp_path / f"{name}.html").write_text(page, encoding="utf-8")
    options = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    options += ["--enable-logging=stderr", "--v=0", "--window-size=800,1200", "--dump-dom"]
    done = {
        name: subprocess.run(
            [browser, *options, (tmp_path / f"{name}.html").as_uri()],
            capture_output=True, text=True, timeout=120, check=True,
        )
        for name in ("product", "asked")
    }  # fmt: skip
    assert ":CONSOLE" not in done["product"].stderr, done["product"].stderr
    assert "Content Security Policy" not in done["product"].stderr
    images = len(Page(html).images)
    title = re.search(r"<title>(.*)</title>", done["asked"].stdout)
    assert title is not None
    seen = re.fullmatch(r"(\d+) images, (\d+) loaded, (\d+) wide", title[1])
    assert seen is not None, title[1]
    assert (int(seen[1]), int(seen[2])) == (images, images)
    if case == "usual":
        assert int(seen[3]) <= 800, "readable at a width of 800 pixels"
