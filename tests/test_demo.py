import json
from pathlib import Path

import pytest
from PIL import Image

from grood_edge.demo.run import run_demo
from grood_edge.errors import OutputError
from grood_edge.images import find_images
from tests.conftest import Demo


def test_demo_writes_everything_and_separates(demo: Demo) -> None:
    out, report = demo.folder, demo.report
    assert report.accuracy > 0.95
    by_name = {row.name: row for row in report.sets}
    assert by_name["ID test: digits 0-6"].flagged_share < 0.12
    for name in ("near-OOD: digits 7-9", "far-OOD: photos", "far-OOD: noise"):
        auroc = by_name[name].auroc
        assert auroc is not None
        assert auroc > 0.9
        assert by_name[name].flagged_share > 0.5
    assert all(path.exists() for path in report.paths.values())
    with Image.open(out / "overview.png") as picture:
        assert picture.width > 500
    rows = [json.loads(line) for line in (out / "scores-near.jsonl").read_text().splitlines()]
    assert len(rows) == len(find_images(out / "images" / "near"))
    assert all(Path(row["path"]).is_file() for row in rows), "rows name the files where they lie in the end"
    assert json.loads((out / "demo.json").read_text())["accuracy"] == report.accuracy
    assert [path.name for path in out.parent.iterdir()] == [out.name]
    with pytest.raises(OutputError, match="--force"):
        run_demo(out)


def test_demo_replaces_no_foreign_folder_and_leaves_nothing_when_interrupted(tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("years of work")
    with pytest.raises(OutputError, match="is no earlier demo"):
        run_demo(mine, force=True)
    assert (mine / "thesis.txt").read_text() == "years of work"

    def interrupt(label: str, done: int, total: int | None) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_demo(tmp_path / "demo", progress=interrupt)
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
