"""An engine file and its sidecar: written together, and opened only when the engine fits and can be trusted.

Deserialising an engine is running native code, so nothing is deserialised that this user did not build, or whose
SHA-256 this user did not name. Nothing is written into the engine itself.
"""

import hashlib
import hmac
import os
import re
import shlex
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grood_edge.artifact import Artifact
from grood_edge.contract import Contract
from grood_edge.errors import ArtifactError, BackendError, UsageError
from grood_edge.runtime.engine_spec import (
    CURRENT,
    BuildSpec,
    Device,
    engine_key,
    engine_name,
    fitting_batch,
    known_targets,
    precision_of,
    sm_name,
    source_digest,
)
from grood_edge.runtime.sidecar import (
    MAX_ENGINE_BYTES,
    MAX_SIDECAR_BYTES,
    Sidecar,
    parse_sidecar,
    sidecar_path,
    signed_part,
)
from grood_edge.runtime.trt_api import TrtApi
from grood_edge.runtime.user_key import open_no_link, signature, user_key
from grood_edge.user_folders import WRITABLE_BY_OTHERS

__all__ = ["Device", "OpenedEngine", "open_engine", "rebuild_command", "require_safe_folder", "runs_on"]

_PORTABLE = ((8, 0), (8, 6), (8, 9))  # and everything from 12.0 on: what TensorRT-RTX builds for without --sm


@dataclass(frozen=True)
class OpenedEngine:
    """An engine that fits and is trusted. `contract`: of the artifact as it was when the engine was built.

    knots_match: the engine has the artifact's own calibration scores and ranks; where it has not, because the artifact
    was recalibrated since, p_value and is_ood are to be computed on the host from the contract.
    """

    path: Path
    plan: bytes
    sidecar: Sidecar
    contract: Contract
    knots_match: bool


@dataclass(frozen=True)
class _Refusals:
    """Makes the errors of one engine file: each its own sentence, and the command that builds the engine again."""

    path: Path
    artifact: Artifact
    api: TrtApi
    device: Device
    model: Path | None

    def error(self, reason: str, sidecar: Sidecar | None = None, first: str = "") -> BackendError:
        spec = None if sidecar is None else sidecar.spec
        command = rebuild_command(self.path, self.artifact, self.api, self.device, spec, self.model)
        return BackendError(f"{self.path.name} is not loaded: {reason}. Build it again: {first}{command}")


def rebuild_command(
    path: Path, artifact: Artifact, api: TrtApi, device: Device, spec: BuildSpec | None, model: Path | None
) -> str:
    """Return the command that builds an engine for this machine where `path` is.

    `spec`: of the engine that is there, None where nobody knows. `model`: path of the artifact, None to guess it from
    the engine's name.
    """
    stem = re.split(r"\.tensorrt(?:-rtx)?-|\.engine$", path.name)[0]
    model = model or path.with_name(f"{stem}.onnx")
    capability, batch = device.compute_capability, fitting_batch(artifact.contract)
    targets = spec.targets if spec is not None and api.family == "tensorrt-rtx" else ()
    if targets and capability is not None and not runs_on(targets, capability):
        targets = (*targets, sm_name(capability)) if sm_name(capability) in known_targets(api) else ()
    if spec is not None and artifact.contract.classifier.batch != "1":
        batch = spec.batch
    words = ["grood-edge", "compile", str(model), "--backend", api.family]
    if batch != fitting_batch(artifact.contract):
        words += ["--batch", ",".join(map(str, batch))]
    if targets:
        words += ["--sm", ",".join(target.removeprefix("SM").lower() for target in targets)]
    if path.parent.resolve() != model.parent.resolve():
        words += ["--out", str(path.parent)]
    name = engine_name(model.stem, artifact, api, device, BuildSpec(batch, targets))
    if os.path.lexists(path.with_name(name)) or os.path.lexists(sidecar_path(path.with_name(name))):
        words.append("--force")
    return shlex.join(words)


def require_safe_folder(folder: Path) -> None:
    """Refuse a folder for engines that others can write.

    Raises:
        BackendError: says how to close it.
    """
    mode = folder.resolve().stat().st_mode
    if os.name == "posix" and mode & WRITABLE_BY_OTHERS:
        raise BackendError(
            f"others can write the folder {folder} (mode {stat.S_IMODE(mode):04o}), and engines are native code: "
            f"choose another with --out, or close it: chmod go-w {shlex.quote(str(folder))}"
        )


def open_engine(
    path: Path,
    artifact: Artifact,
    api: TrtApi,
    device: Device,
    trusted: str | None = None,
    model: Path | None = None,
) -> OpenedEngine:
    """Read an engine and its sidecar, and refuse whatever does not fit or cannot be trusted.

    Args:
        path: the engine; its sidecar lies beside it.
        artifact: the artifact that it must have been built from; only its calibration may be newer.
        api: the loaded TensorRT module.
        device: the GPU of this machine.
        trusted: SHA-256 (hex) of an engine that is loaded although this user did not sign it.
        model: path of the artifact, for the command in the message.

    Raises:
        BackendError: says why, and with which command it is built again.
        UsageError: `trusted` is no SHA-256.
    """
    if trusted is not None and not (len(trusted) == 64 and set(trusted.lower()) <= set("0123456789abcdef")):
        raise UsageError(
            f"--i-trust-this-engine {trusted[:80]!r}; expected the engine's SHA-256, 64 hexadecimal digits, as "
            "sha256sum prints it"
        )
    refusals = _Refusals(path, artifact, api, device, model)
    _require_safe_place(refusals, path)
    sidecar, contract, document = _read_sidecar(refusals)
    plan = _read_plan(refusals, sidecar)
    if trusted is None:
        _require_signature(refusals, sidecar, document)
    elif not hmac.compare_digest(trusted.lower(), sidecar.engine_sha256):
        raise refusals.error(
            f"--i-trust-this-engine names {trusted[:12].lower()}, and this engine is {sidecar.engine_sha256[:12]}",
            sidecar,
        )
    _require_fit(refusals, sidecar)
    return OpenedEngine(path, plan, sidecar, contract, sidecar.graph_digest == artifact.graph_digest)


def _require_safe_place(refusals: _Refusals, path: Path) -> None:
    """Refuse files that others can write, and what is no file: it could be another one a moment later."""
    for item in (path, sidecar_path(path)):
        try:
            status = os.lstat(item)
        except OSError as problem:
            if item == path:
                raise refusals.error(f"it cannot be read ({problem.strerror})") from problem
            raise refusals.error(f"its sidecar {item.name} is missing, so nobody can tell what it is") from problem
        if stat.S_ISLNK(status.st_mode):
            raise refusals.error(
                f"{item.name} is a symbolic link; expected a file", first=f"rm {shlex.quote(str(item))} && "
            )
        if not stat.S_ISREG(status.st_mode):
            raise refusals.error(f"{item.name} is not a regular file")
        if os.name == "posix" and status.st_mode & WRITABLE_BY_OTHERS:
            raise refusals.error(f"others can write {item.name} (mode {stat.S_IMODE(status.st_mode):04o})")
    folder = path.resolve().parent
    if os.name == "posix" and folder.stat().st_mode & WRITABLE_BY_OTHERS:
        raise refusals.error(
            f"others can write its folder {folder} (mode {stat.S_IMODE(folder.stat().st_mode):04o})",
            first=f"chmod go-w {shlex.quote(str(folder))} && ",
        )


def _read_bounded(refusals: _Refusals, path: Path, limit: int, expected: int | None = None) -> bytes:
    """Read a file that was looked at before, and must still be one, of at most `limit` or exactly `expected` bytes."""
    try:
        with open_no_link(path) as file:
            status = os.fstat(file.fileno())
            size = status.st_size
            if not stat.S_ISREG(status.st_mode) or size > limit:
                raise refusals.error(f"{path.name} has {size:,} bytes; at most {limit:,} are read")
            if expected is not None and size != expected:
                what = "was truncated" if size < expected else "was added to"
                raise refusals.error(
                    f"it {what}, or the sidecar belongs to another engine: it has {size:,} bytes, and its sidecar "
                    f"says {expected:,}"
                )
            return file.read(size + 1)
    except OSError as problem:
        raise refusals.error(f"{path.name} cannot be read ({problem.strerror})") from problem


def _read_sidecar(refusals: _Refusals) -> tuple[Sidecar, Contract, dict[str, Any]]:
    path = sidecar_path(refusals.path)
    raw = _read_bounded(refusals, path, MAX_SIDECAR_BYTES)
    try:
        return parse_sidecar(raw)
    except (ValueError, ArtifactError, UsageError) as error:
        raise refusals.error(f"its sidecar {path.name} is malformed: {str(error).rstrip('.')}") from error


def _read_plan(refusals: _Refusals, sidecar: Sidecar) -> bytes:
    plan = _read_bounded(refusals, refusals.path, MAX_ENGINE_BYTES, sidecar.engine_bytes)
    if hashlib.sha256(plan).hexdigest() != sidecar.engine_sha256:
        raise refusals.error(
            "it is not the engine of its sidecar: it was corrupted, or the sidecar belongs to another engine"
            f"{_header_hint(plan, sidecar)}",
            sidecar,
        )
    return plan


def _header_hint(plan: bytes, sidecar: Sidecar) -> str:
    """Say what an engine's first bytes say of it. Only a hint: nobody promises that they mean this."""
    version = ".".join(map(str, plan[24:28]))
    if plan[1:4] != b"trt":
        return " (it does not begin like an engine at all)"
    if not sidecar.backend_version.startswith(version.rsplit(".", 1)[0]):
        return f" (it looks like one of version {version})"
    return ""


def _require_signature(refusals: _Refusals, sidecar: Sidecar, document: dict[str, Any]) -> None:
    found = document.get("hmac")
    otherwise = (
        ". Engines are native code and can do all that you can. If its builder told you its SHA-256: "
        "--i-trust-this-engine SHA256"
    )
    if found is None:
        raise refusals.error(f"its sidecar is not signed, so nobody vouches for it{otherwise}", sidecar)
    key = user_key(create=False)
    if key is None:
        raise refusals.error(
            f"it was built by another user or on another machine: there is no key here{otherwise}", sidecar
        )
    if not isinstance(found, str) or not hmac.compare_digest(
        found.encode(), signature(signed_part(document), key).encode()
    ):
        raise refusals.error(
            "its sidecar's signature is not yours: another user or machine built it, or the sidecar was edited"
            f"{otherwise}",
            sidecar,
        )


def _require_fit(refusals: _Refusals, sidecar: Sidecar) -> None:
    """Compare with the artifact, the module and the GPU."""
    artifact, api, device = refusals.artifact, refusals.api, refusals.device
    precision = precision_of(artifact.contract).name
    capability = device.compute_capability
    built_for = sidecar.device
    here = f"this machine's GPU, {device.name},"
    rules = [
        (sidecar.backend == api.family, f"it is one of {sidecar.backend}, and {api.family} was to run it"),
        (
            sidecar.backend_version == api.version,
            f"{sidecar.backend} {sidecar.backend_version} built it, and {api.version} is installed; engines run with "
            "the very version that built them",
        ),
        (sidecar.precision == precision, f"it computes in {sidecar.precision}, and the artifact in {precision}"),
        (
            sidecar.source_digest == source_digest(artifact.model),
            "it was built from another network, or from this one with other prototypes or another bank "
            f"(source {sidecar.source_digest[:12]})",
        ),
        (capability is not None, "this machine has no usable GPU; run the artifact with --backend onnxruntime"),
        (_has_targets(sidecar, capability), f"{here} {_sm(capability)}, is none of {_targets(sidecar)}"),
        (
            built_for is None or (built_for.name, built_for.compute_capability) == (device.name, capability),
            f"it was built for {_described(built_for)}, and {here} has {_sm(capability)}",
        ),
        (
            built_for is None or built_for.driver == device.driver,
            f"it was built with driver {built_for and built_for.driver}, and {device.driver} is installed",
        ),
        (
            sidecar.key == engine_key(artifact, api, device, sidecar.spec),
            f"grood-edge {sidecar.tools.get('grood-edge', '?')[:20]} built it, by other rules than this one's",
        ),
    ]
    for holds, reason in rules:
        if not holds:
            raise refusals.error(reason, sidecar)


def _has_targets(sidecar: Sidecar, capability: tuple[int, int] | None) -> bool:
    return sidecar.device is not None or (capability is not None and runs_on(sidecar.targets, capability))


def runs_on(targets: tuple[str, ...], capability: tuple[int, int]) -> bool:
    """Tell whether a TensorRT-RTX engine for these targets runs on a GPU."""
    if not targets:
        return capability in _PORTABLE or capability >= (12, 0)
    return CURRENT in targets or sm_name(capability) in targets


def _targets(sidecar: Sidecar) -> str:
    return f"its targets {', '.join(sidecar.targets)}" if sidecar.targets else "those that TensorRT-RTX builds for"


def _sm(capability: tuple[int, int] | None) -> str:
    return "no compute capability" if capability is None else f"compute capability {capability[0]}.{capability[1]}"


def _described(device: Device | None) -> str:
    return "no GPU" if device is None else f"{device.name} ({_sm(device.compute_capability)})"
