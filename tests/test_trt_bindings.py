"""Every name of TensorRT that the code touches, held against the genuine Python bindings of each supported version.

NVIDIA's wheels of the bindings come without TensorRT's libraries; they import against empty ones. Wheels are looked for
in the folder GROOD_EDGE_TRT_WHEELS, then in a cache, then fetched with pip; a wheel that cannot be had skips its test.
"""

import functools
import json
import os
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest

import grood_edge.runtime
from tests.stub_library import stub_library
from tests.trt_names import RECEIVERS, Touched, read_source
from tests.trt_signatures import accepts

WHEELS = {
    "10.3.0": "tensorrt_cu12_bindings",
    "10.13.0.35": "tensorrt_cu12_bindings",
    "10.16.1.11": "tensorrt_cu13_bindings",
    "11.4.0.106": "tensorrt_cu13_bindings",
}
RTX = "rtx"
CACHE = Path.home() / ".cache" / "grood-edge-tests"
# Used where the name beside it was asked for: each version has both or neither.
TOGETHER = {"IBuilderConfig.num_compute_capabilities": "IBuilderConfig.set_compute_capability"}
DUMP = """
import importlib, json, os, sys, warnings
warnings.simplefilter("ignore")
sys.setdlopenflags(os.RTLD_LAZY)
module = importlib.import_module(sys.argv[1])
found = {"": {name: getattr(module, name).__doc__ or "" for name in dir(module) if not name.startswith("_")}}
for name in found[""]:
    kind = getattr(module, name)
    if isinstance(kind, type):
        found[name] = {a: getattr(kind, a).__doc__ or "" for a in dir(kind) if not a.startswith("_") or a == "__init__"}
print(json.dumps(found))
"""


@dataclass(frozen=True)
class Bindings:
    """The names of a version: class by class (functions and classes of the module under ""), with docstrings."""

    version: str
    names: dict[str, dict[str, str]]

    def doc(self, path: str) -> str | None:
        """Return the docstring behind a path, None where the version does not have it."""
        owner, _, name = path.rpartition(".")
        return self.names.get(owner, {}).get(name)

    def all_names(self) -> set[str]:
        return {name for names in self.names.values() for name in names}


@functools.cache
def offline() -> list[str]:
    """Hold the reason why pip could not fetch a wheel: the others are then not tried."""
    return []


def wheel(version: str) -> Path:
    """Return the wheel of a version for this Python, or skip."""
    pattern = f"{WHEELS[version]}-{version}-cp{sys.version_info[0]}{sys.version_info[1]}-*.whl"
    folders = [Path(os.environ["GROOD_EDGE_TRT_WHEELS"])] if "GROOD_EDGE_TRT_WHEELS" in os.environ else []
    for folder in (*folders, CACHE):
        for found in folder.glob(pattern):
            return found
    if offline():
        pytest.skip(offline()[0])
    CACHE.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary", ":all:"]
    command += ["--retries", "0", "--timeout", "10", "-d", str(CACHE), f"{WHEELS[version]}=={version}"]
    try:
        subprocess.run(command, check=True, capture_output=True, timeout=60)
    except (subprocess.SubprocessError, OSError) as error:
        offline().append(f"the bindings' wheel of TensorRT {version} cannot be had: {error}")
        pytest.skip(offline()[0])
    return next(CACHE.glob(pattern))


@functools.cache
def bindings(version: str, folder: Path) -> Bindings:
    """Import the bindings of a version in another process and list what they have."""
    if version == RTX:
        pytest.importorskip("tensorrt_rtx")
        return Bindings(version, dumped("tensorrt_rtx", dict(os.environ)))
    package = folder / version
    with zipfile.ZipFile(wheel(version)) as archive:
        archive.extractall(package)
    for name in ("nvinfer", "nvonnxparser", "nvinfer_plugin"):
        soname = f"lib{name}.so.{version.split('.', maxsplit=1)[0]}"
        (package / soname).write_bytes(stub_library(soname))
    environment = {**os.environ, "LD_LIBRARY_PATH": str(package), "PYTHONPATH": str(package)}
    return Bindings(version, dumped("tensorrt_bindings", environment))


def dumped(module: str, environment: dict[str, str]) -> dict[str, dict[str, str]]:
    done = subprocess.run(
        [sys.executable, "-c", DUMP, module], capture_output=True, text=True, check=False, env=environment, timeout=60
    )
    assert done.returncode == 0, done.stderr
    names: dict[str, dict[str, str]] = json.loads(done.stdout)
    return names


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("bindings")


@pytest.fixture(scope="module")
def touched() -> Touched:
    return read_source(Path(grood_edge.runtime.__file__).parent)


def is_asked(touched: Touched, path: str) -> bool:
    """Tell whether the code asks for a name before it uses it."""
    path = TOGETHER.get(path, path)
    owner, _, name = path.rpartition(".")
    return bool({path, name, owner} & touched.asked)


def is_ours(touched: Touched, path: str, found: list[Bindings]) -> bool:
    """Tell whether an attribute is one of our own classes' and no version of TensorRT has it."""
    return path.rpartition(".")[2] in touched.own and all(version.doc(path) is None for version in found)


@pytest.mark.parametrize("version", [*WHEELS, RTX])
def test_the_version_has_all_that_the_code_touches(version: str, folder: Path, touched: Touched) -> None:
    found = bindings(version, folder)
    used = [use for use in touched.uses if not (use.receiver and is_ours(touched, use.path, [found]))]
    assert {"ICudaEngine.get_tensor_profile_shape", "IExecutionContext.execute_async_v3", "DataType.UINT8"} <= {
        use.path for use in used
    }, "the source was not understood"
    missing = [
        f"{use.where} {use.path}" for use in used if found.doc(use.path) is None and not is_asked(touched, use.path)
    ]
    assert missing == [], f"TensorRT {version} does not have these"


@pytest.mark.parametrize("version", [*WHEELS, RTX])
def test_the_version_takes_the_arguments_that_the_code_gives(version: str, folder: Path, touched: Touched) -> None:
    found = bindings(version, folder)
    checked, wrong = 0, []
    for use in touched.uses:
        doc, name = found.doc(use.path), use.path.rpartition(".")[2]
        if use.path in found.names:  # a class that is called
            doc, name = found.names[use.path].get("__init__"), "__init__"
        if use.arguments is None or doc is None or f"{name}(" not in doc:
            continue
        checked += 1
        if not accepts(doc, name, use.arguments, set(use.keywords)):
            wrong.append(f"{use.where} {use.path}: {use.arguments} arguments and {sorted(use.keywords)}")
    assert wrong == []
    assert checked >= 10, "no signature was understood"


def test_every_object_of_tensorrt_is_known_by_name(folder: Path, touched: Touched) -> None:
    """A name such as `net` for a network would slip past the tests above: it must stand in RECEIVERS."""
    found = bindings(RTX, folder)
    names = {name for name in found.all_names() if "_" in name} - touched.own
    assert [f"{where} .{name}" for name, where in touched.unknown if name in names] == []
    assert set(RECEIVERS.values()) <= set(found.names)


def test_every_name_that_the_code_asks_for_exists_somewhere(folder: Path, touched: Touched) -> None:
    versions = [bindings(version, folder) for version in (*WHEELS, RTX)]
    names = {name for version in versions for name in version.all_names()}
    ours = touched.own | {"name"}
    unknown = [
        asked
        for asked in touched.asked
        if (all(version.doc(asked) is None for version in versions) if "." in asked else asked not in names)
        and asked.rpartition(".")[2] not in ours
        and not asked.startswith("__")
    ]
    assert unknown == []
    for path, beside in TOGETHER.items():
        assert all((version.doc(path) is None) == (version.doc(beside) is None) for version in versions)


def test_the_versions_differ_as_the_code_expects(folder: Path) -> None:
    """What the code was made for: 11 has no precision flags, RTX alone tells whether a stream can be captured."""
    old, new, rtx = (bindings(version, folder) for version in ("10.3.0", "11.4.0.106", RTX))
    assert old.doc("BuilderFlag.FP16") is not None
    assert new.doc("BuilderFlag.FP16") is None
    assert new.doc("IExecutionContext.is_stream_capturable") is None
    assert rtx.doc("IExecutionContext.is_stream_capturable") is not None
