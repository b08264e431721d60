"""Building in a process of its own: the same bytes twice, and whatever happens there is an error with words here."""

import os
import signal
from pathlib import Path
from typing import Any

import pytest

from grood_edge.artifact import Artifact
from grood_edge.errors import BackendError, UsageError
from grood_edge.progress import silent
from grood_edge.runtime import build_process
from grood_edge.runtime.build_process import build_apart
from grood_edge.runtime.engine_spec import BuildSpec
from grood_edge.runtime.trt_api import TrtApi
from tests.rtx import require_fixed_addresses
from tests.runtime.engines import Name, with_precision

SPEC = BuildSpec((1, 2, 4), ("SM86", "SM120"))


def children() -> set[int]:
    listed = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text()
    return {int(number) for number in listed.split()}


def replaced(monkeypatch: pytest.MonkeyPatch, code: str) -> None:
    monkeypatch.setattr(build_process, "_CODE", code)


@pytest.mark.parametrize("name", ["fp32", "fp16", "int8"])
def test_two_builds_are_byte_identical(
    rtx: TrtApi, digit_artifact: Artifact, name: Name, monkeypatch: pytest.MonkeyPatch
) -> None:
    require_fixed_addresses()
    artifact = digit_artifact if name == "fp32" else with_precision(digit_artifact, name)
    first = build_apart(rtx, artifact, SPEC, silent)
    monkeypatch.setenv("SOMETHING_ELSE", "x" * 3000)
    second = build_apart(rtx, artifact, SPEC, lambda *step: None)
    assert first.plan == second.plan
    assert first.settings == second.settings
    assert first.layer_types == second.layer_types


def test_progress_and_results_come_over(rtx: TrtApi, digit_artifact: Artifact) -> None:
    seen = []
    built = build_apart(rtx, digit_artifact, SPEC, lambda *step: seen.append(step))
    assert ("reading the graph", 0, None) in seen
    assert ("Building engine", 0, seen[-1][2]) in seen
    assert built.plan[:4] == b"vtrt"
    assert built.layer_types["FLOAT"] > 100
    assert built.settings.strict_nans
    assert built.seconds > 0


def test_errors_come_over(rtx: TrtApi, digit_artifact: Artifact) -> None:
    with pytest.raises(BackendError, match="the contract says int8, but TensorRT would build something else"):
        build_apart(rtx, with_precision(digit_artifact, "fp32", says="int8"), SPEC, silent)


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("import os; os.abort()", "was ended by SIGABRT. Run"),
        ("import os; os.kill(os.getpid(), 9)", r"was ended by SIGKILL \(out of memory, most likely\)"),
        ("import sys; print('no more blocks', file=sys.stderr); sys.exit(3)", "ended with exit code 3: no more blocks"),
        ("import os; os._exit(0)", "ended with exit code 0. Run"),
    ],
)
def test_a_process_that_dies_is_an_error(
    rtx: TrtApi, digit_artifact: Artifact, monkeypatch: pytest.MonkeyPatch, code: str, message: str
) -> None:
    replaced(monkeypatch, code)
    with pytest.raises(BackendError, match=f"took its process down: it {message}"):
        build_apart(rtx, digit_artifact, SPEC, silent)


def test_half_an_engine_is_none(rtx: TrtApi, digit_artifact: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    built = "{'plan': '', 'settings': {}, 'bytes': 9, 'warnings': [], 'layer_types': {}, 'seconds': 1}".replace(
        "'", '"'
    )
    code = f"import sys; sys.stdin.buffer.read(); print('{{\"built\": ' + {built!r} + '}}'); print('half')"
    replaced(monkeypatch, code)
    with pytest.raises(BackendError, match="took its process down"):
        build_apart(rtx, digit_artifact, SPEC, silent)


def test_an_interruption_ends_the_other_process(rtx: TrtApi, digit_artifact: Artifact) -> None:
    before, during = children(), set()

    def progress(label: str, done: int, total: int | None) -> None:
        if label == "Building engine":
            during.update(children() - before)
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        build_apart(rtx, digit_artifact, SPEC, progress)
    assert during
    assert not during & children()


def test_a_failing_progress_ends_the_other_process(rtx: TrtApi, digit_artifact: Artifact) -> None:
    before = children()

    def progress(*step: Any) -> None:
        raise UsageError("the terminal is gone")

    with pytest.raises(UsageError, match="the terminal is gone"):
        build_apart(rtx, digit_artifact, SPEC, progress)
    assert children() == before


def test_the_current_folder_is_not_searched_for_modules(
    rtx: TrtApi, digit_artifact: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tensorrt_rtx.py").write_text("raise SystemExit('taken from the current folder')")
    (tmp_path / "json.py").write_text("raise SystemExit('taken from the current folder')")
    monkeypatch.chdir(tmp_path)
    assert build_apart(rtx, digit_artifact, SPEC, silent).plan[:4] == b"vtrt"
