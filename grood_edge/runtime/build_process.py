"""Building in a process of its own: the same bytes each time, and a crash inside TensorRT is only an error here.

TensorRT-RTX orders what it builds by memory addresses, so two builds in one process differ in names and order. A fresh
process whose addresses are not randomised gives the same engine again: the same installation of Python and Linux, that
is. Elsewhere engines may differ in names, and with TensorRT, which chooses by timing, in more than that.
"""

import contextlib
import ctypes
import dataclasses
import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from types import FrameType
from typing import IO, Any

from grood_edge import errors
from grood_edge.artifact import Artifact, read_artifact
from grood_edge.errors import BackendError, GroodEdgeError
from grood_edge.progress import Progress
from grood_edge.runtime.build import BuildSettings, Built, build_engine, held_interrupts
from grood_edge.runtime.engine_spec import BuildSpec
from grood_edge.runtime.trt_api import TrtApi, load_api

__all__ = ["build_apart"]

_ADDR_NO_RANDOMIZE = 0x0040000  # of linux/personality.h
_AGAIN = "GROOD_EDGE_BUILD_STARTED_AGAIN"
# "" is the current folder, where anything may lie
_CODE = "import sys; sys.path[:] = filter(None, sys.path); from grood_edge.runtime.build_process import _main; _main()"
# What libraries, drivers and Python look at; the rest of a shell's variables would change addresses for nothing
_ENVIRONMENT = (
    "CUDA", "HOME", "LANG", "LC_", "LD_", "NVIDIA", "OMP_", "PATH", "PYTHON", "SYSTEMROOT", "TEMP", "TMP", "TRT",
    "USER", "XDG_",
)  # fmt: skip
_PATIENCE = 20.0  # seconds that a cancelled build has for ending well
_STDERR_BYTES = 2000


def build_apart(api: TrtApi, artifact: Artifact, spec: BuildSpec, progress: Progress) -> Built:
    """Build an engine as `build_engine` does, in another process.

    Raises:
        BackendError: as `build_engine`, or TensorRT took its process down.
        KeyboardInterrupt: Ctrl-C or SIGTERM came; the other process was ended.
    """
    if not sys.executable:  # embedded: there is no Python to start
        return build_engine(api, artifact, spec, progress)
    path = os.pathsep.join(dict.fromkeys(folder or os.getcwd() for folder in sys.path))
    passed = {name: value for name, value in os.environ.items() if name.startswith(_ENVIRONMENT)}
    environment = passed | {"PYTHONHASHSEED": "0", "PYTHONPATH": path}
    with tempfile.TemporaryFile() as said:
        process: subprocess.Popen[bytes] | None = None
        try:
            with held_interrupts():  # inside Popen one would leave a process behind that nobody knows
                process = subprocess.Popen(  # noqa: S603 - our own interpreter and code
                    [sys.executable, "-c", _CODE],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=said,
                    env=environment,
                )
            assert process.stdin is not None
            assert process.stdout is not None
            _send(process.stdin, api, artifact, spec)
            built = _receive(process.stdout, progress)
            code = process.wait()
        except BaseException:
            if process is not None:
                _end(process)
            raise
        finally:
            for pipe in () if process is None else (process.stdin, process.stdout):
                with contextlib.suppress(OSError):  # what was not sent is not wanted any more
                    assert pipe is not None
                    pipe.close()
        if built is None:
            raise BackendError(_crashed(code, said, api))
        return built


def _send(pipe: IO[bytes], api: TrtApi, artifact: Artifact, spec: BuildSpec) -> None:
    request = {
        "family": api.family,
        "batch": spec.batch,
        "targets": spec.targets,
        "timing_cache": None if spec.timing_cache is None else str(spec.timing_cache),
        "bytes": len(artifact.model),
    }
    try:
        pipe.write(json.dumps(request).encode() + b"\n")
        pipe.write(artifact.model)
        pipe.close()
    except BrokenPipeError:  # it ended already: its answer says why
        return


def _receive(pipe: IO[bytes], progress: Progress) -> Built | None:
    """Follow the build to its end; None when the process ended without an answer."""
    for line in pipe:
        answer: dict[str, Any] = json.loads(line)
        if "progress" in answer:
            progress(*answer["progress"])
        elif "error" in answer:
            kind = getattr(errors, answer["kind"], None)
            if kind is None or kind is errors.MissingExtraError:  # which makes its own sentence
                raise BackendError(answer["error"])
            raise kind(answer["error"])
        elif "interrupted" in answer:
            raise KeyboardInterrupt
        else:
            found = answer["built"]
            size = found.pop("bytes")
            plan = pipe.read(size)
            if len(plan) < size:
                return None
            settings = BuildSettings(**found.pop("settings"))
            return Built(plan, settings, warnings=tuple(found.pop("warnings")), **found)
    return None


def _end(process: "subprocess.Popen[bytes]") -> None:
    """Let TensorRT end in an orderly way; a second Ctrl-C does not wait for that."""
    try:
        process.terminate()
        process.wait(_PATIENCE)
    except (subprocess.TimeoutExpired, KeyboardInterrupt):
        process.kill()
        process.wait()


def _crashed(code: int, said: IO[bytes], api: TrtApi) -> str:
    said.seek(max(0, said.seek(0, os.SEEK_END) - _STDERR_BYTES))
    lines = said.read().decode(errors="replace").strip().splitlines()
    try:
        how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
    except ValueError:
        how = f"was ended by signal {-code}"
    memory = " (out of memory, most likely)" if code == -9 else ""
    return (
        f"{api.family} {api.version} took its process down: it {how}{memory}"
        f"{': ' + lines[-1].rstrip('.') if lines else ''}. Run grood-edge compile --check, or run the artifact with "
        "--backend onnxruntime"
    )


def _main() -> None:
    """Be the other process: request and model on stdin; progress, then the answer on stdout."""
    _start_without_randomised_addresses()
    signal.signal(signal.SIGTERM, _interrupt)
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what TensorRT prints is not an answer

    def answer(document: dict[str, Any]) -> None:
        answers.write(json.dumps(document).encode() + b"\n")
        answers.flush()

    try:
        built = _built(answer)
    except GroodEdgeError as error:
        answer({"error": str(error), "kind": type(error).__name__})
    except KeyboardInterrupt:
        answer({"interrupted": True})
    else:
        fields = {field.name: getattr(built, field.name) for field in dataclasses.fields(built) if field.name != "plan"}
        settings = dataclasses.asdict(built.settings)
        answer({"built": {**fields, "settings": settings, "bytes": len(built.plan)}})
        answers.write(built.plan)
        answers.flush()


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _built(answer: Any) -> Built:
    line = sys.stdin.buffer.readline()
    if not line:  # who asked is gone
        raise KeyboardInterrupt
    request = json.loads(line)
    artifact = read_artifact(sys.stdin.buffer.read(request["bytes"]))  # in one piece, however it arrives
    cache = request["timing_cache"]
    spec = BuildSpec(tuple(request["batch"]), tuple(request["targets"]), None if cache is None else Path(cache))
    return build_engine(load_api(request["family"]), artifact, spec, lambda *step: answer({"progress": step}))


def _start_without_randomised_addresses() -> None:
    """Start this process again without address randomisation, where Linux lets it; else go on as it is."""
    if sys.platform != "linux" or _AGAIN in os.environ:
        return
    personality = ctypes.CDLL(None).personality
    personality.argtypes, personality.restype = [ctypes.c_ulong], ctypes.c_int
    now = personality(0xFFFFFFFF)
    if now != -1 and not now & _ADDR_NO_RANDOMIZE and personality(now | _ADDR_NO_RANDOMIZE) != -1:
        os.execve(sys.executable, sys.orig_argv, {**os.environ, _AGAIN: "1"})  # noqa: S606
