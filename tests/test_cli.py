"""The command line as a person meets it: exit codes, sentences, --json, Ctrl-C."""

import itertools
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import onnxruntime
import pytest
import typer
from typer.testing import CliRunner, Result

from grood_edge import __version__
from grood_edge.cli import app
from grood_edge.cli_version import version_lines
from grood_edge.demo.images import DemoImages
from grood_edge.demo.network import DigitNetwork
from grood_edge.export.torch_classifier import onnx_from_torch
from grood_edge.runtime.selftest import MODEL

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200"}


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(a) for a in arguments], env={"COLUMNS": "200"})


@pytest.fixture(scope="module")
def classifier_onnx(tmp_path_factory: pytest.TempPathFactory, network: DigitNetwork) -> Path:
    path = tmp_path_factory.mktemp("classifier") / "classifier.onnx"
    model, _ = onnx_from_torch(network, None, (32, 32))
    path.write_bytes(model.SerializeToString())
    return path


@pytest.fixture(scope="module")
def exported(
    tmp_path_factory: pytest.TempPathFactory, classifier_onnx: Path, digits: DemoImages
) -> tuple[Path, Result]:
    out = tmp_path_factory.mktemp("exported") / "model.onnx"
    result = run(
        "export", classifier_onnx, "--data", digits.train, "--calibration-data", digits.calibration, "--out", out
    )
    return out, result


def test_export_prints_what_it_promises_and_the_next_command(exported: tuple[Path, Result]) -> None:
    out, result = exported
    assert result.exit_code == 0, result.output
    assert "accuracy 100.0%" in result.output
    assert "with 95% confidence" in result.output
    assert f"grood-edge score {out}" in result.output


def test_inspect_verify_score_json(exported: tuple[Path, Result], digits: DemoImages, tmp_path: Path) -> None:
    artifact, _ = exported
    inspected = json.loads(run("inspect", artifact, "--json").stdout)
    assert inspected["opset"] == 19
    assert inspected["ir_version"] <= 10
    assert inspected["contract"]["calibration"]["guarantee"] == "conformal"
    verified = run("verify", artifact, "--json")
    assert verified.exit_code == 0
    assert json.loads(verified.stdout)["passed"] is True
    out = tmp_path / "scores.jsonl"
    scored = json.loads(run("score", artifact, digits.near, "--out", out, "--json").stdout)
    assert scored["images"] == len(out.read_text().splitlines()) == 533
    assert scored["flagged"] > 0.7 * 533
    printed = json.loads(run("score", artifact, digits.near, "--json").stdout)
    assert len(printed["rows"]) == 533
    assert (printed["guarantee"], printed["provenance"], printed["n"]) == ("conformal", "unseen", 314)
    strict = json.loads(run("score", artifact, digits.near, "--alpha", "0.01", "--json").stdout)
    assert strict["flagged"] < scored["flagged"]


def test_tables_for_people(exported: tuple[Path, Result], digits: DemoImages) -> None:
    artifact, _ = exported
    for command in (("inspect", artifact), ("verify", artifact), ("score", artifact, digits.far_noise)):
        result = run(*command)
        assert result.exit_code == 0
        assert "Traceback" not in result.output
    assert "PASS" in run("verify", artifact).output
    assert "\x1b[" not in run("inspect", artifact).output, "no colours or bars when the output is no terminal"


def test_verify_fails_with_exit_code_1_when_the_machine_decides_differently(
    exported: tuple[Path, Result], tmp_path: Path
) -> None:
    from dataclasses import replace

    from grood_edge.artifact import artifact_bytes, read_artifact

    artifact = read_artifact(exported[0])
    first, *rest = artifact.contract.probes
    changed = replace(artifact.contract, probes=(replace(first, ood_score=first.ood_score + 0.5), *rest))
    path = tmp_path / "other.onnx"
    path.write_bytes(artifact_bytes(artifact.model, changed))
    result = run("verify", path)
    assert result.exit_code == 1
    assert "FAIL" in result.output


def test_without_calibration_data_nothing_is_promised_and_it_says_so(
    classifier_onnx: Path, digits: DemoImages, tmp_path: Path
) -> None:
    out = tmp_path / "model.onnx"
    result = run("export", classifier_onnx, "--data", digits.train, "--out", out)
    assert result.exit_code == 0, result.output
    sentence = "seen-in-training, guarantee: none"
    assert sentence in result.output
    assert sentence in run("inspect", out).output
    assert sentence in run("score", out, digits.far_noise).output
    refused = run("export", classifier_onnx, "--data", digits.train, "--out", tmp_path / "x.onnx", "--delta", "0.05")
    assert refused.exit_code == 2
    assert "--calibration-data" in refused.output
    remedy = run("calibrate", out, "--data", digits.calibration, "--threshold-only")
    assert remedy.exit_code == 0, remedy.output
    assert "with 95% confidence" in run("inspect", out).output


Arguments = list[str | Path]


def refusals(
    digits: DemoImages, classifier: Path, artifact: Path, tmp: Path
) -> list[tuple[int, str, list[str | Path]]]:
    """Exit code, a part of the sentence, and the arguments."""
    out = tmp / "never.onnx"
    data: Arguments = ["--data", digits.train, "--calibration-data", digits.calibration]
    export: Arguments = ["export", classifier, "--out", out]
    (tmp / "empty").mkdir()
    existing = tmp / "existing.onnx"
    existing.write_text("mine")
    return [
        (2, "Missing option", ["export", classifier]),
        (1, "does not exist", [*export, "--data", tmp / "nowhere"]),
        (1, "no class folders", [*export, "--data", tmp / "empty"]),
        (1, "3 class folders, but the classifier has 7", [*export, "--data", digits.near]),
        (1, "at least 2,995 are needed", [*export, *data, "--alpha", "0.001"]),
        (2, "expected a number above 0", [*export, *data, "--alpha", "1.5"]),
        (2, "--bank 'few'", [*export, *data, "--bank", "few"]),
        (2, "--input-size", [*export, *data, "--input-size", "axb"]),
        (2, "preset 'caffe' is unknown", [*export, *data, "--preprocess", "caffe"]),
        (
            2,
            "is unknown; expected auto, or some of mean, mixup, noise, origin and images:DIR",
            [*export, *data, "--ood-prototype", "magic"],
        ),
        (1, "no tensor 'nothing'", [*export, *data, "--features", "nothing"]),
        (1, "exists", ["export", classifier, *data, "--out", existing]),
        (1, "does not exist; create it", ["export", classifier, *data, "--out", tmp / "no" / "model.onnx"]),
        (1, "is the classifier itself", ["export", classifier, *data, "--out", classifier, "--force"]),
        (2, "--seed -1; expected a number from 0", [*export, *data, "--seed", "-1"]),
        (2, "--seed -1; expected a number from 0", ["demo", "--out", tmp / "demo", "--seed", "-1"]),
        (1, "cannot write the demo", ["demo", "--out", "/proc/demo"]),
        (2, "alpha is 2.0", ["score", artifact, digits.far_noise, "--alpha", "2"]),
        (1, "630 of 630 images are among those", ["calibrate", artifact, "--data", digits.train, "--threshold-only"]),
        (1, "is a folder", ["export", classifier, *data, "--out", tmp]),
        (1, "unpickling runs", ["export", tmp / "network.pth", *data, "--out", out]),
        (1, "cannot import", ["export", "no_such_module:factory", *data, "--out", out]),
        (1, "cannot read", ["export", tmp / "missing.onnx", *data, "--out", out]),
        (1, "without a grood-edge contract", ["inspect", classifier]),
        (1, "cannot read", ["verify", tmp / "missing.onnx"]),
        (1, "no CUDAExecutionProvider", ["verify", artifact, "--provider", "cuda"]),
        (1, "matches no image file", ["score", artifact, tmp / "nowhere"]),
        (2, "expected a name ending in", ["score", artifact, digits.far_noise, "--out", tmp / "x.txt"]),
        (1, "are needed", ["score", artifact, digits.far_noise, "--alpha", "0.0001"]),
        (1, "are needed", ["calibrate", artifact, "--data", digits.near / "7", "--threshold-only", "--alpha", "0.001"]),
        (1, "is no earlier demo", ["demo", "--out", tmp]),
    ]


def test_bad_input_gets_a_sentence_an_exit_code_and_loses_nothing(
    classifier_onnx: Path, exported: tuple[Path, Result], digits: DemoImages, tmp_path: Path
) -> None:
    artifact = tmp_path / "artifact.onnx"
    shutil.copy(exported[0], artifact)
    before = artifact.read_bytes()
    cases = refusals(digits, classifier_onnx, artifact, tmp_path)
    names = sorted(path.name for path in tmp_path.iterdir())
    for code, part, arguments in cases:
        result = run(*arguments)
        assert (result.exit_code, part in result.output) == (code, True), (arguments, result.exit_code, result.output)
        assert "Traceback" not in result.output
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    assert artifact.read_bytes() == before
    assert (tmp_path / "existing.onnx").read_text() == "mine"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupt_leaves_nothing_behind(
    number: int, classifier_onnx: Path, digits: DemoImages, tmp_path: Path
) -> None:
    """The data never end, so the export is certainly at work when the signal comes."""
    out, marker = tmp_path / "out" / "model.onnx", tmp_path / "marker"
    out.parent.mkdir()
    (tmp_path / "endless.py").write_text(
        "import os, pathlib, numpy as np\n"
        "def batches():\n"
        "    i, parent = 0, os.getppid()\n"
        "    while os.getppid() == parent:  # a suite that is killed leaves no export behind that never ends\n"
        "        i += 1\n"
        f"        pathlib.Path({str(marker)!r}).touch()\n"
        "        yield np.full((8, 32, 32, 1), i % 256, np.uint8), np.arange(8) % 7\n"
    )
    command = [sys.executable, "-m", "grood_edge", "export", str(classifier_onnx), "--data", "endless:batches"]
    with subprocess.Popen(
        [*command, "--out", str(out)], env=ENVIRONMENT, cwd=tmp_path, stderr=subprocess.PIPE, text=True
    ) as process:
        while not marker.exists() and process.poll() is None:
            time.sleep(0.05)
        process.send_signal(number)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert errors.strip().endswith("interrupted; nothing was written")
    assert list(out.parent.iterdir()) == []


@pytest.mark.skipif(os.name != "posix", reason="terminals")
def test_a_lost_terminal_hangs_up_twice_and_the_closing_goes_on(tmp_path: Path) -> None:
    """Shells send more than one SIGHUP; a command that is closing its outputs can still print, to nowhere."""
    code = (
        "import os, signal, sys, time, grood_edge.cli as cli\n"
        "def app():\n"
        "    try:\n"
        "        print('at work', flush=True)\n"
        "        time.sleep(60)\n"
        "    except KeyboardInterrupt as error:\n"
        "        os.kill(os.getpid(), signal.SIGHUP)\n"
        "        os.kill(os.getpid(), signal.SIGTERM)\n"
        "        print('closing', flush=True)\n"
        "        open('closed', 'w').write(str(error.number))\n"
        "cli.app = app\n"
        "cli.main()\n"
    )
    ours, theirs = os.openpty()
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=theirs, stdout=theirs, stderr=theirs, env=ENVIRONMENT, cwd=tmp_path
    ) as process:
        os.close(theirs)
        assert b"at work" in os.read(ours, 1000)
        os.close(ours)
        process.send_signal(signal.SIGHUP)
        assert process.wait(timeout=60) == 0
    assert (tmp_path / "closed").read_text() == str(int(signal.SIGHUP))


@pytest.mark.skipif(os.name != "posix", reason="named pipes")
def test_interrupt_with_a_spool_says_that_the_same_command_goes_on(
    classifier_onnx: Path, digits: DemoImages, tmp_path: Path
) -> None:
    """One of the images is a pipe that nobody writes to, so the export certainly waits there when the signal comes."""
    data, spool, out = tmp_path / "data", tmp_path / "spool", tmp_path / "model.onnx"
    shutil.copytree(digits.train, data)
    options = ["--data", str(data), "--calibration-data", str(digits.calibration), "--spool", str(spool)]
    command = [sys.executable, "-m", "grood_edge", "export", str(classifier_onnx), *options, "--out", str(out)]
    pipe = _read_late(data)
    picture = pipe.read_bytes()
    pipe.unlink()
    os.mkfifo(pipe)
    with subprocess.Popen(command, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True) as process:
        writer = _opened_when_read(pipe, process)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    os.close(writer)
    assert process.returncode == 130, errors
    assert f"no artifact was written. What was read is kept in {spool}: the same command goes on" in errors
    assert not out.exists()
    kept = (spool / "fit.spool").stat().st_size
    assert kept > 192 * 64 * 4  # six batches of features
    with subprocess.Popen(command, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True) as process:
        writer = _opened_when_read(pipe, process)
        assert (spool / "fit.spool").stat().st_size == kept  # the first six batches were not read again
        os.write(writer, picture)
        os.close(writer)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert "of other images" not in errors
    assert "unreadable" not in errors
    assert list(spool.iterdir()) == []


def _opened_when_read(pipe: Path, process: "subprocess.Popen[str]") -> int:
    while process.poll() is None:
        try:
            return os.open(pipe, os.O_WRONLY | os.O_NONBLOCK)
        except OSError:  # nobody reads it yet
            time.sleep(0.05)
    raise AssertionError(process.communicate())


def _read_late(data: Path) -> Path:
    """Return the image that an export reads after 200 others."""
    from grood_edge.export.dataset import open_dataset

    samples = open_dataset(data, "folder").samples(lambda *_: None)
    return data / next(itertools.islice(samples, 200, None)).name


def test_names_cannot_drive_the_terminal(exported: tuple[Path, Result], tmp_path: Path) -> None:
    (tmp_path / "\x1b[31mred.png").write_bytes(b"no picture")
    result = run("score", exported[0], tmp_path)
    assert result.exit_code == 1
    assert "\x1b" not in result.output
    assert "\\x1b[31mred.png" in result.output


def test_odd_names_of_scored_images_are_shown(
    exported: tuple[Path, Result], digits: DemoImages, tmp_path: Path
) -> None:
    picture = next((digits.test / "3").iterdir())
    for name in (
        b"\x1b[31mred.png",
        b"caf\xe9.png",
        "turned\u202egnp\x9b\u200f.png".encode(),
        b"[bold].png",
        b"a[/b].png",
    ):
        target = tmp_path / os.fsdecode(name)
        target.parent.mkdir(exist_ok=True)
        shutil.copy(picture, target)
    shown = run("score", exported[0], tmp_path)
    assert shown.exit_code == 0, shown.output
    assert all(
        text in shown.output for text in (r"\x1b[31mred", r"caf\udce9.png", r"turned\u202egnp\x9b\u200f", "[bold].png")
    )
    text = run("score", exported[0], tmp_path, "--json").output
    assert not set("\x1b\u202e\x9b\u200f") & set(shown.output + text)
    document = json.loads(text)
    assert os.path.exists(next(row["path"] for row in document["rows"] if "caf" in row["path"]))


def test_calibration_images_of_classes_without_prototype_are_pointed_out(
    classifier_onnx: Path, digits: DemoImages, tmp_path: Path
) -> None:
    (tmp_path / "names.txt").write_text("\n".join("0123456"))
    for name in ("0", "3"):
        shutil.copytree(digits.train / name, tmp_path / "data" / name)
    data = ("--data", tmp_path / "data", "--classes", tmp_path / "names.txt")
    result = run(
        "export", classifier_onnx, *data, "--calibration-data", digits.calibration, "--out", tmp_path / "m.onnx"
    )
    assert result.exit_code == 0, result.output
    assert "calibration images look like classes that have no images in --data (1, 2, 4, 5, 6)" in result.output


def test_shells_complete_commands() -> None:
    asked = {"_GROOD_EDGE_COMPLETE": "complete_bash", "COMP_WORDS": "grood-edge ver", "COMP_CWORD": "1"}
    result = CliRunner().invoke(app, [], env=asked, prog_name="grood-edge")
    assert result.stdout.split() == ["verify"]


def test_version_says_what_is_installed_and_help() -> None:
    version = run("--version").stdout.splitlines()
    assert version[0].startswith(f"grood-edge {__version__}")
    assert f"Python {platform.python_version()}" in version[1]
    assert f"cpu: onnxruntime {onnxruntime.__version__}" in version
    assert not any(line.startswith(("gpu:", "dev:")) for line in version)
    assert len([line for line in version if " pillow " in line]) == 1
    help_text = run("--help").output
    for command in ("export", "calibrate", "score", "evaluate", "inspect", "verify", "demo"):
        assert command in help_text
        assert run(command, "--help").exit_code == 0


def test_version_lists_half_an_extra_and_what_it_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    installed = {"torch": "2.13.0", "pillow": "13.0.0"}
    asked = ["pillow>=10", "torch>=2.9; extra == 'torch'", "onnxscript>=0.5; extra == 'torch'",
             "opencv-python-headless; extra == 'video'", "pillow>=10.1; extra == 'video'"]  # fmt: skip
    monkeypatch.setattr("grood_edge.cli_version._requirements", lambda: asked)
    monkeypatch.setattr("grood_edge.cli_version._version", lambda name: installed.get(name, ""))
    assert version_lines()[2:] == ["always: pillow 13.0.0", "torch: torch 2.13.0, onnxscript missing"]


def test_version_of_a_clone_has_its_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("grood_edge.cli_version.COMMIT", tmp_path / "commit.txt")
    monkeypatch.setattr("grood_edge.cli_version.CLONE", tmp_path)
    assert "commit" not in version_lines()[0]
    identity = ("-c", "user.name=a", "-c", "user.email=a@example.org")
    (tmp_path / "file").write_text("1")
    for words in (("init", "-q"), ("add", "file"), (*identity, "commit", "-q", "-m", "first")):
        subprocess.run(["git", "-C", tmp_path, *words], check=True, timeout=60)
    commit = subprocess.check_output(["git", "-C", tmp_path, "rev-parse", "HEAD"], text=True).strip()
    assert version_lines()[0].endswith(f", commit {commit}")
    (tmp_path / "file").write_text("2")
    assert version_lines()[0].endswith(f", commit {commit}-dirty")
    monkeypatch.setenv("PATH", "")
    assert "commit" not in version_lines()[0]


@pytest.mark.parametrize("command", sorted(typer.main.get_command(app).commands))  # type: ignore[attr-defined]
def test_help_says_every_default(command: str) -> None:
    """Square brackets would be markup to rich, and swallowed."""
    parameters = typer.main.get_command(app).commands[command].params  # type: ignore[attr-defined]
    said = CliRunner().invoke(app, [command, "--help"], env={"COLUMNS": "400", "TERMINAL_WIDTH": "400"}).output
    for parameter in parameters:
        for text in re.findall(r"[(\[]default: [^)\]]*[)\]]", getattr(parameter, "help", None) or ""):
            assert text in said, parameter.name


def test_an_empty_source_is_not_the_current_folder() -> None:
    for command in ("watch", "score"):
        result = run(command, MODEL, "")
        assert (result.exit_code != 0, "is empty; expected" in result.output) == (True, True), result.output


@pytest.mark.parametrize(
    "command",
    [
        ("score", "images"),
        ("evaluate", "--id", "images", "--ood", "near=images"),
        ("watch", "images"),
        ("calibrate", "--data", "images"),
        ("export", "--data", "images", "--out", "out.onnx"),
    ],
    ids=lambda command: command[0],
)
def test_a_number_of_threads_out_of_range_is_refused_before_any_work(command: tuple[str, ...]) -> None:
    result = run(command[0], "model.onnx", *command[1:], "--threads", "0")
    assert result.exit_code == 2
    assert "--threads 0; expected a number from 1" in result.stderr
