"""Everything that needs a GPU, in one go: one table, one JSON document. Run it through gpu.sh.

    python benchmarks/gpu.py [--json FILE] [ARTIFACT.onnx ...]

Without an artifact a small one is made of each precision, which needs the extra `demo`. Needs no network. Exit code: 0
when nothing failed, 1 when a check failed, 3 when there is no GPU, so that nothing was shown.
"""

import argparse
import dataclasses
import importlib.metadata
import json
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from gpu_checks import Check, Skipped, Values, backend_checks, checked, device_checks

from grood_edge.artifact import Artifact, read_artifact
from grood_edge.errors import BackendError, GroodEdgeError, MissingExtraError
from grood_edge.runtime.backend import Backend
from grood_edge.runtime.build_process import build_apart
from grood_edge.runtime.cuda import CudaDevice, device_count, load_cudart, open_device
from grood_edge.runtime.engine_spec import BuildSpec
from grood_edge.runtime.onnxrt import OnnxRuntimeBackend
from grood_edge.runtime.trt import TrtBackend
from grood_edge.runtime.trt_api import FAMILIES, Family, load_api, process_logger

NO_GPU = 3
PACKAGES = (
    "grood-edge",
    "numpy",
    "cuda-bindings",
    "tensorrt",
    "tensorrt-rtx",
    "onnxruntime",
    "onnxruntime-gpu",
    "torch",
)
PROVIDERS = ("cpu", "cuda", "tensorrt-ep")
BATCH = (1, 1, 8)


def main() -> int:
    """Run all checks and report them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifacts", nargs="*", type=Path, metavar="ARTIFACT.onnx")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the document there instead of printing it")
    options = parser.parse_args()
    device, reason = the_device()
    checks: list[Check] = []
    with tempfile.TemporaryDirectory() as folder:
        for check in all_checks(device, reason, options.artifacts, Path(folder)):
            print(line(check), file=sys.stderr, flush=True)
            checks.append(check)
    failed = [check for check in checks if check.outcome == "fail"]
    result = "failed" if failed else "passed" if device else "no GPU"
    document = {
        "result": result,
        "reason": reason,
        "environment": environment(device),
        "checks": [dataclasses.asdict(check) for check in checks],
    }
    print_table(checks, f"{result}: {reason}" if reason else result)
    text = json.dumps(document, indent=1)
    if options.json:
        options.json.write_text(text + "\n")
    else:
        print(text)
    return 1 if failed else 0 if device else NO_GPU


def the_device() -> tuple[CudaDevice | None, str]:
    """Return the GPU, or None and why there is none."""
    try:
        cudart = load_cudart()
        count, reason = device_count(cudart)
        return (open_device(cudart), "") if count else (None, reason)
    except GroodEdgeError as error:
        return None, str(error)


def environment(device: CudaDevice | None) -> dict[str, Any]:
    """Return what the machine is and what is installed."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    tegra = Path("/etc/nv_tegra_release")
    return {
        "machine": platform.platform(),
        "python": platform.python_version(),
        "packages": versions,
        "gpu": dataclasses.asdict(device.info) if device else None,
        "nvidia_smi": nvidia_smi(),
        "jetson": tegra.read_text().splitlines()[0] if tegra.exists() else None,
    }


def nvidia_smi() -> str | None:
    """Return what nvidia-smi says of the GPUs, None where it is missing."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    fields = "name,driver_version,memory.total,power.limit,clocks.sm"
    command = [program, f"--query-gpu={fields}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.SubprocessError) as error:
        return str(error)
    return (done.stdout or done.stderr).strip()


def all_checks(device: CudaDevice | None, reason: str, paths: list[Path], folder: Path) -> Iterator[Check]:
    """Yield the checks as they are done."""
    if device is None:
        yield Check("cuda", "skipped", {}, reason)
    else:
        yield from device_checks(device)
    artifacts: list[tuple[str, Artifact]] = []

    def making() -> Values:
        artifacts.extend((path.stem, read_artifact(path)) for path in paths or small_artifacts(folder))
        return {name: artifact.contract.precision.name for name, artifact in artifacts}

    yield checked("artifacts", making)
    for name, artifact in artifacts:
        for family in FAMILIES:
            yield from engine_checks(device, family, name, artifact)
        for provider in PROVIDERS:
            yield from provider_checks(device, provider, name, artifact)
    yield checked("selftest", selftest)


def small_artifacts(folder: Path) -> list[Path]:
    """Export a small network on digits, once for each precision that this version can export."""
    if importlib.util.find_spec("torch") is None or importlib.util.find_spec("sklearn") is None:
        raise Skipped("no artifact was given, and none can be made: pip install 'grood-edge[demo]', or name one")
    from grood_edge.demo.images import write_images
    from grood_edge.demo.network import trained_network
    from grood_edge.export import ExportOptions, PreprocessingOptions, export_model

    images = write_images(folder / "images")
    network = trained_network(images.train)
    preprocessing = PreprocessingOptions(input_size=(32, 32), mean=(0.0,), std=(1.0,))
    options = ExportOptions(calibration_data=images.calibration, preprocessing=preprocessing)
    precisions: tuple[Literal["fp32", "fp16", "int8"], ...] = ("fp32", "fp16", "int8")
    paths = []
    for precision in precisions:
        path = folder / f"digits-{precision}.onnx"
        export_model(network, images.train, path, dataclasses.replace(options, precision=precision))
        paths.append(path)
    return paths


def engine_checks(device: CudaDevice | None, family: Family, name: str, artifact: Artifact) -> list[Check]:
    """Build an engine with a family of TensorRT, and on a GPU run it."""
    title = f"{family} {name}"
    built: list[tuple[Any, bytes]] = []

    def building() -> Values:
        try:
            api = load_api(family)
        except (BackendError, MissingExtraError) as error:
            raise Skipped(str(error)) from error
        if family == "tensorrt" and device is None:
            raise Skipped("TensorRT builds on a GPU only")
        values, plan = built_engine(api, artifact)
        built.append((api, plan))
        return values

    rows = [checked(f"{title}: builds", building)]
    if not built or device is None:
        return rows
    api, plan = built[0]

    def opening() -> Backend:
        return TrtBackend(api, plan, artifact.contract, device, process_logger(api))

    return rows + backend_checks(title, artifact, opening)


def built_engine(api: Any, artifact: Artifact) -> tuple[Values, bytes]:
    """Build a plan; returns what is known of it."""
    made = build_apart(api, artifact, BuildSpec(batch=BATCH), lambda *_: None)
    return {"version": api.version, "bytes": len(made.plan), "seconds": made.seconds}, made.plan


def provider_checks(device: CudaDevice | None, provider: str, name: str, artifact: Artifact) -> list[Check]:
    """Run the artifact with onnxruntime."""
    title = f"onnxruntime-{provider} {name}"

    def opening() -> Backend:
        if provider != "cpu" and device is None:
            raise Skipped("no GPU")
        try:
            return OnnxRuntimeBackend(artifact, provider)
        except (BackendError, MissingExtraError) as error:
            raise Skipped(str(error)) from error

    return backend_checks(title, artifact, opening)


def selftest() -> Values:
    """Run `grood-edge selftest`."""
    command = [sys.executable, "-m", "grood_edge", "selftest", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1800, check=False)
    if done.returncode:
        raise BackendError(f"exit code {done.returncode}: {(done.stderr or done.stdout)[-500:]}")
    return {"report": done.stdout}


def line(check: Check) -> str:
    """Return a check as one line."""
    values = ", ".join(
        f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {str(value)[:60]}"
        for name, value in check.values.items()
    )
    return f"{check.outcome:8s} {check.name:40s} {check.detail or values}"


def print_table(checks: list[Check], result: str) -> None:
    """Print all checks, and the result."""
    print("\n".join(line(check)[:200] for check in checks))
    print(f"\n{result}\n")


if __name__ == "__main__":
    sys.exit(main())
