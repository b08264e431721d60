"""The report file: written whole or not at all, with what is needed to do it again."""

import shlex
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from grood_edge.artifact import read_artifact
from grood_edge.cli import app
from grood_edge.errors import OutputError, UsageError
from grood_edge.evaluate.evaluation import EvaluateOptions
from grood_edge.evaluate.results import Evaluation
from grood_edge.evaluate.settings import check_report, command_line, next_command, settings, write_report
from grood_edge.runtime.session import Session, open_session


def test_settings_name_file_images_and_versions(
    evaluation: Evaluation, options: EvaluateOptions, session: Session
) -> None:
    facts = dict(settings(evaluation, options, session))
    assert facts["graph digest"] == read_artifact(options.model).graph_digest
    assert evaluation.id_set.digest in facts["images of ID"]
    assert all(one.digest in facts[f"images of {one.name}"] for one in evaluation.ood_sets)
    assert "onnxruntime" in facts["made with"]
    assert f"k = {session.rule.ranks[0]}" in facts["decision"]


def test_the_command_line_does_the_same_again(options: EvaluateOptions, tmp_path: Path) -> None:
    strange = replace(options, ood=(("my set", tmp_path / "it's; here"),), allow_unreadable=True)
    with open_session(options.model, alpha=0.1) as session:
        command = shlex.split(command_line(strange, session))
    assert command[:3] == ["grood-edge", "evaluate", str(options.model)]
    assert f"my set={tmp_path}/it's; here" in command
    assert command[command.index("--alpha") + 1] == "0.1"
    assert {"--corrupt", "--baselines", "--fit", "--allow-unreadable"} <= set(command)
    result = CliRunner().invoke(app, command[1:])
    assert f"{tmp_path}/it's; here is no folder" in result.output, "every option was understood"


def test_reports_are_published_whole(
    evaluation: Evaluation, options: EvaluateOptions, session: Session, tmp_path: Path
) -> None:
    path = tmp_path / "r.html"
    write_report(path, False, evaluation, options, session, [("bank", "all")])
    assert path.read_text(encoding="utf-8").rstrip().endswith("</html>")
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(OutputError, match="--force"):
        check_report(path, force=False)
    check_report(path, force=True)
    check_report(None, force=False)
    with pytest.raises(UsageError, match=r"ending in \.html"):
        check_report(tmp_path / "r.pdf", force=False)


def test_the_next_command_depends_on_the_promise(evaluation: Evaluation, options: EvaluateOptions) -> None:
    broken = replace(evaluation, promise=replace(evaluation.promise, outcome="broken"))
    assert next_command(broken, options, None).startswith(f"grood-edge calibrate {options.model}")
    untested = replace(evaluation, promise=replace(evaluation.promise, outcome="untested"))
    assert "--id FRESH" in next_command(untested, options, None)
    assert "--report report.html" in next_command(evaluation, options, None)
    assert next_command(evaluation, options, Path("r.html")).startswith(f"grood-edge score {options.model}")
