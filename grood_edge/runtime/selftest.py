"""Build, verify and time a small artifact on every backend that is here."""

import time
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

import numpy as np

from grood_edge.artifact import Artifact, read_artifact
from grood_edge.errors import GroodEdgeError, MissingExtraError
from grood_edge.ort import PROVIDERS
from grood_edge.progress import Progress, silent
from grood_edge.runtime.backend import Backend
from grood_edge.runtime.compile import CompileOptions, choose_api, compile_artifact, present_device
from grood_edge.runtime.cuda import open_device
from grood_edge.runtime.engine import open_engine
from grood_edge.runtime.engine_spec import BuildSpec
from grood_edge.runtime.onnxrt import OnnxRuntimeBackend
from grood_edge.runtime.parity import require_parity
from grood_edge.runtime.trt import TrtBackend
from grood_edge.runtime.trt_api import Family, load_api, process_logger

__all__ = ["BACKENDS", "MODEL", "SelfTest", "selftest"]

MODEL = Path(__file__).with_name("selftest.onnx")
BACKENDS = ("onnxruntime-cpu", "onnxruntime-cuda", "onnxruntime-tensorrt-ep", "tensorrt", "tensorrt-rtx")
Status = Literal["passed", "built, not run", "not here", "FAILED"]
WARM_UP, RUNS = 5, 30
BATCH = BuildSpec.batch[2]  # the largest that is tested: what engines are built for


@dataclass(frozen=True)
class SelfTest:
    """One backend: what came of it and why; where it ran, its largest error and its times.

    milliseconds: median of one image, of a batch; ratio: of one image to onnxruntime's on the CPU, in the same run.
    """

    backend: str
    status: Status
    reason: str
    largest_error: float | None = None
    tolerance: float | None = None
    build_seconds: float | None = None
    milliseconds: tuple[float, ...] = ()
    ratio: float | None = None


def selftest(
    model: Path = MODEL, backends: tuple[str, ...] = BACKENDS, progress: Progress = silent
) -> tuple[SelfTest, ...]:
    """Test the backends one after the other.

    Raises:
        ArtifactError: `model` is no artifact.
        MissingExtraError: there is no onnxruntime at all to compare with.
    """
    artifact = read_artifact(model)
    reference = OnnxRuntimeBackend(artifact)
    baseline = _milliseconds(reference, artifact)
    found = []
    for index, name in enumerate(backends):
        progress("testing backends", index, len(backends))
        try:
            result = _tested(name, model, artifact, reference)
        except MissingExtraError as error:
            result = SelfTest(name, "not here", str(error))
        except GroodEdgeError as error:
            result = SelfTest(name, _status_of(name), str(error))
        except Exception as error:  # one backend that breaks must not take the report of the others with it
            result = SelfTest(name, "FAILED", f"{type(error).__name__}: {error}")
        if result.milliseconds:
            result = replace(result, ratio=round(result.milliseconds[0] / baseline[0], 3))
        found.append(result)
    progress("testing backends", len(backends), len(backends))
    reference.close()
    return tuple(found)


def _status_of(name: str) -> Status:
    """Tell a backend that is installed and fails from one that is not here."""
    has_gpu = present_device().compute_capability is not None
    if name.startswith("onnxruntime"):
        import onnxruntime

        provider = name.removeprefix("onnxruntime-")
        listed = PROVIDERS[provider] in onnxruntime.get_available_providers()
        # the GPU package lists all of its providers on any machine
        return "FAILED" if listed and (provider == "cpu" or has_gpu) else "not here"
    try:
        load_api("tensorrt" if name == "tensorrt" else "tensorrt-rtx")
    except GroodEdgeError:
        return "not here"
    return "FAILED" if has_gpu or name == "tensorrt-rtx" else "not here"  # RTX builds without a GPU


def _tested(name: str, model: Path, artifact: Artifact, reference: Backend) -> SelfTest:
    if name.startswith("onnxruntime"):
        with closing(OnnxRuntimeBackend(artifact, name.removeprefix("onnxruntime-"))) as backend:
            return _verified(name, backend, artifact, reference)
    family: Family = "tensorrt" if name == "tensorrt" else "tensorrt-rtx"
    with TemporaryDirectory() as folder:
        Path(folder).chmod(0o700)
        device = present_device()
        api = choose_api(family, device)
        compiled = compile_artifact(model, api, device, CompileOptions(out=Path(folder)))
        if device.compute_capability is None:
            reason = f"{api.family} {api.version} built an engine, and there is no GPU to run it"
            return SelfTest(name, "built, not run", reason, build_seconds=round(compiled.seconds, 2))
        plan = open_engine(compiled.path, artifact, api, device).plan
        with closing(TrtBackend(api, plan, artifact.contract, open_device(), process_logger(api))) as engine:
            found = _verified(name, engine, artifact, reference)
        return replace(found, build_seconds=round(compiled.seconds, 2))


def _verified(name: str, backend: Backend, artifact: Artifact, reference: Backend) -> SelfTest:
    report = require_parity(backend, artifact.contract, reference, BATCH)
    what = f"{report.rows} rows of {report.frames} frames, batches of {', '.join(map(str, report.batches))}"
    times = _milliseconds(backend, artifact)
    return SelfTest(name, "passed", what, report.largest_error, report.tolerance, None, times)


def _milliseconds(backend: Backend, artifact: Artifact) -> tuple[float, ...]:
    shape = artifact.contract.preprocessing.input_shape
    sizes = (1,) if artifact.contract.classifier.batch == "1" else (1, BATCH)
    medians = []
    for size in sizes:
        frames = np.random.default_rng(0).integers(0, 256, (size, *shape)).astype(np.uint8)
        times = []
        for _ in range(WARM_UP + RUNS):
            start = time.perf_counter()
            backend.run(frames)
            times.append(time.perf_counter() - start)
        medians.append(round(1000 * float(np.median(times[WARM_UP:])), 4))
    return tuple(medians)
