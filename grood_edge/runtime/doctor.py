"""What is installed here, what it can do, which path `auto` would take, and what would give a better one.

Every probe reports a line; none raises, and nothing is ever installed. torch and onnx are not imported.
"""

import contextlib
import os
import platform
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from grood_edge import __version__
from grood_edge.errors import GroodEdgeError
from grood_edge.ort import PROVIDERS, open_ort
from grood_edge.runtime.build import require_usable
from grood_edge.runtime.choose import AUTO_ORDER
from grood_edge.runtime.cuda import device_info, load_cudart
from grood_edge.runtime.engine import runs_on
from grood_edge.runtime.gpu import DeviceInfo
from grood_edge.runtime.machine import cpu_clocks, first_line, gpu_power, program_lines
from grood_edge.runtime.selftest import MODEL
from grood_edge.runtime.trt_api import Family, load_api

__all__ = ["Diagnosis", "Gpu", "Way", "diagnose"]

PACKAGES = (
    "numpy", "pillow", "onnxruntime", "onnxruntime-gpu", "tensorrt", "tensorrt-rtx", "cuda-bindings", "onnx",
    "scikit-learn", "torch",
)  # fmt: skip
_JETPACK = Path("/etc/nv_tegra_release")
_MODEL = Path("/proc/device-tree/model")
_DRIVER = Path("/proc/driver/nvidia/version")


@dataclass(frozen=True)
class Way:
    """One way to run an artifact: whether it works here, why or why not, and what to do for it to work."""

    name: str
    works: bool
    reason: str
    advice: str
    capabilities: tuple[str, ...] = ()


@dataclass(frozen=True)
class Gpu:
    """The GPU, as far as it can be read without root; empty texts for what cannot.

    driver: the newest CUDA that the driver supports, or its version where nvidia-smi alone tells. reason: why CUDA's
    Python bindings see no GPU.
    """

    name: str = ""
    compute_capability: str = ""
    driver: str = ""
    memory_bytes: int = 0
    integrated: bool = False
    power: str = ""
    reason: str = ""


@dataclass(frozen=True)
class Diagnosis:
    """All of it. `auto`: the way that `auto` takes. `better`: what to do for the next better one; empty at the best."""

    grood_edge: str
    python: str
    system: str
    device: str
    packages: dict[str, str]
    gpu: Gpu
    cpu_clocks: str
    ways: tuple[Way, ...]
    auto: str
    better: str
    warnings: tuple[str, ...]


def diagnose() -> Diagnosis:
    """Look at this machine."""
    packages = _packages()
    gpu = _gpu()
    probes: dict[str, Callable[[], Way]] = {
        AUTO_ORDER[0]: lambda: _tensorrt("tensorrt", gpu),
        AUTO_ORDER[1]: lambda: _tensorrt("tensorrt-rtx", gpu),
        AUTO_ORDER[2]: lambda: _onnxruntime("cuda", gpu),
        AUTO_ORDER[3]: lambda: _onnxruntime("cpu", gpu),
    }
    ways = tuple(_safely(name, probes[name]) for name in AUTO_ORDER)
    first = next((index for index, way in enumerate(ways) if way.works), None)
    better = [way for way in (ways if first is None else ways[:first]) if way.advice]
    return Diagnosis(
        grood_edge=__version__,
        python=f"{platform.python_version()} ({sys.executable})",
        system=f"{platform.system()} {platform.release()} {platform.machine()}",
        device=_jetson(),
        packages=packages,
        gpu=gpu,
        cpu_clocks=cpu_clocks(),
        ways=ways,
        auto=ways[first].name if first is not None else "nothing: onnxruntime is not installed",
        better=f"for {better[-1].name}: {better[-1].advice}" if better else "",
        warnings=_warnings(packages),
    )


def _safely(name: str, probe: Callable[[], Way]) -> Way:
    try:
        return probe()
    except Exception as error:  # a broken installation must not end the report about it
        return Way(name, False, f"{type(error).__name__}: {_line(error)}", "install it again")


def _packages() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = _version(name)
    return found


def _version(name: str) -> str:
    try:
        version: str | None = metadata.version(name)
    except metadata.PackageNotFoundError:
        raise
    except Exception as error:  # a half-removed package has metadata that breaks in many ways
        return f"unreadable ({type(error).__name__})"
    return version or "unreadable"


def _warnings(packages: dict[str, str]) -> tuple[str, ...]:
    found = []
    if {"onnxruntime", "onnxruntime-gpu"} <= set(packages):
        found.append(
            "onnxruntime and onnxruntime-gpu are both installed and overwrite each other; uninstall both, and install "
            "one of them"
        )
    variables = sorted(name for name in os.environ if name.startswith("ORT_TENSORRT_"))
    if variables:
        found.append(f"the environment sets {', '.join(variables)}, which changes engines that onnxruntime builds")
    return tuple(found)


def _gpu() -> Gpu:
    try:
        info: DeviceInfo = device_info(load_cudart())
    except Exception as error:  # bindings and driver of different versions fail in many ways
        reason = str(error) if isinstance(error, GroodEdgeError) else f"{type(error).__name__}: {_line(error)}"
        fields = "name,compute_cap,driver_version,memory.total"
        known = program_lines(["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader,nounits"])
        if known:
            name, capability, driver, mebibytes = ([part.strip() for part in known[0].split(",")] + [""] * 3)[:4]
            memory = int(mebibytes) << 20 if mebibytes.isdecimal() else 0  # [N/A] where CPU and GPU share it
            return Gpu(name, capability, driver, memory, power=gpu_power(), reason=reason)
        driver = first_line(_DRIVER)
        reason = f"{reason}. There is a driver, though: {driver}" if driver else reason
        return Gpu(reason=reason, power=gpu_power())
    return Gpu(
        name=info.name,
        compute_capability=".".join(map(str, info.compute_capability)),
        driver=".".join(map(str, info.driver)),
        memory_bytes=info.memory,
        integrated=info.integrated,
        power=gpu_power(),
    )


def _tensorrt(family: Family, gpu: Gpu) -> Way:
    try:
        api = load_api(family)
        require_usable(api)
    except GroodEdgeError as error:
        advice = {
            "tensorrt": "on a Jetson: apt install python3-libnvinfer, in a virtual environment with "
            "--system-site-packages; elsewhere see docs/tensorrt.md",
            "tensorrt-rtx": "pip install 'grood-edge[rtx]'",
        }[family]
        return Way(family, False, str(error), advice if gpu.name else f"an NVIDIA GPU with its driver, then: {advice}")
    can = tuple(name for name, value in vars(api.capabilities).items() if value is True)
    if not gpu.name:
        builds = "; it builds engines for other machines" if family == "tensorrt-rtx" else ""
        return Way(family, False, f"{api.version} is installed, but {gpu.reason}{builds}", "an NVIDIA GPU", can)
    numbers = tuple(int(part) for part in gpu.compute_capability.split(".") if part.isdigit())
    if family == "tensorrt-rtx" and len(numbers) == 2 and not runs_on((), (numbers[0], numbers[1])):
        return Way(
            family, False, f"{api.version} builds no engine for compute capability {gpu.compute_capability}", "", can
        )
    if gpu.reason:  # the driver's tools see it, and CUDA's Python bindings do not
        return Way(
            family, False, f"{api.version} is installed, but {gpu.reason}", "pip install 'grood-edge[cuda]'", can
        )
    return Way(family, True, api.version, "", can)


def _onnxruntime(provider: str, gpu: Gpu) -> Way:
    name = f"onnxruntime on {provider}"
    try:
        import onnxruntime
    except ImportError as error:
        extra = "cpu" if provider == "cpu" else "gpu"
        return Way(name, False, f"onnxruntime cannot be imported ({error})", f"pip install 'grood-edge[{extra}]'")
    available = onnxruntime.get_available_providers()
    can = tuple(key for key, value in PROVIDERS.items() if value in available)
    if PROVIDERS[provider] not in available:
        advice = "pip uninstall onnxruntime; pip install 'grood-edge[gpu]'"
        advice = advice if gpu.name else f"an NVIDIA GPU with its driver, then: {advice}"
        return Way(name, False, f"onnxruntime {onnxruntime.__version__} has no {PROVIDERS[provider]}", advice, can)
    try:  # as `auto` does, whatever is known of the GPU: onnxruntime needs neither cuda-bindings nor nvidia-smi
        open_ort(MODEL.read_bytes(), provider)  # a listed provider may lack its libraries
    except GroodEdgeError as error:
        advice = "the CUDA and cuDNN that this onnxruntime was built for"
        return Way(name, False, str(error), advice if gpu.name else f"an NVIDIA GPU with its driver, and {advice}", can)
    return Way(name, True, onnxruntime.__version__, "", can)


def _jetson() -> str:
    """Return the board and its L4T release on a Jetson, else the CPU."""
    board, release = first_line(_MODEL), re.search(r"R(\d+).*?REVISION: ([\d.]+)", first_line(_JETPACK))
    if release:
        return f"{board or 'Jetson'}, L4T {release[1]}.{release[2]}"
    return board or platform.processor() or platform.machine()


def _line(error: Exception) -> str:
    return str(error).strip().splitlines()[0][:200] if str(error).strip() else "no reason given"
