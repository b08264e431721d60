"""What is to be built: batch sizes, target GPUs, and the key that tells one engine from another."""

import hashlib
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from grood_edge import onnx_proto as proto
from grood_edge import wire
from grood_edge.artifact import Artifact
from grood_edge.contract import Contract, Precision
from grood_edge.errors import UsageError
from grood_edge.runtime.trt_api import TrtApi
from grood_edge.stored_head import (
    CALIBRATION_GROUPS,
    CALIBRATION_SCORES,
    GROUP_OF_CLASS,
    P_DENOMINATOR,
    RANK,
)

__all__ = [
    "CURRENT",
    "BuildSpec",
    "Device",
    "check_spec",
    "engine_key",
    "engine_name",
    "fitting_batch",
    "known_targets",
    "parse_batch",
    "parse_targets",
    "precision_of",
    "sm_name",
    "source_digest",
]

CURRENT = "CURRENT"  # the GPU that builds
MAX_BATCH = 4096
BUILD_RULES = 1  # counted up when the same spec would be built in another way
KNOTS = frozenset({CALIBRATION_SCORES, CALIBRATION_GROUPS, GROUP_OF_CLASS, RANK, P_DENOMINATOR})
_TURING = "SM75"
_TARGET = re.compile("SM[0-9]{2,3}")


@dataclass(frozen=True)
class Device:
    """The GPU of this machine; compute_capability and driver are None where there is none."""

    name: str
    compute_capability: tuple[int, int] | None
    driver: str | None


@dataclass(frozen=True)
class BuildSpec:
    """What to build.

    batch: smallest, most usual and largest number of images a run. targets: GPUs to build for, such as `SM86`, or
    `CURRENT`; TensorRT-RTX alone has a choice, and none means all that it can build for at once. timing_cache: file
    in which TensorRT keeps what it timed; never part of the engine's key.
    """

    batch: tuple[int, int, int] = (1, 1, 8)
    targets: tuple[str, ...] = ()
    timing_cache: Path | None = None

    def __post_init__(self) -> None:
        least, usual, most = self.batch
        if not 1 <= least <= usual <= most <= MAX_BATCH:
            raise UsageError(
                f"--batch is {least},{usual},{most}; expected the smallest, the most usual and the largest batch in "
                f"ascending order, from 1 to {MAX_BATCH}, such as 1,1,8"
            )
        for target in self.targets:
            if target != CURRENT and not _TARGET.fullmatch(target):
                raise UsageError(f"target {target[:20]!r} is no GPU; expected compute capabilities such as SM86")
        if len(set(self.targets)) < len(self.targets):
            raise UsageError(f"--sm names a GPU twice: {', '.join(self.targets)}; name each once")
        if CURRENT in self.targets and len(self.targets) > 1:
            raise UsageError(
                "--sm current stands for this machine's GPU alone; leave it out, or name all GPUs by number"
            )
        if _TURING in self.targets:
            raise UsageError(
                "--sm 75: TensorRT-RTX has no float32 matrix product on Turing, and the OOD head is float32. Leave 75 "
                "out; on such a card use TensorRT (--backend tensorrt) or onnxruntime"
            )


def parse_batch(text: str) -> tuple[int, int, int]:
    """Read `1,1,8`.

    Raises:
        UsageError: other than three whole numbers.
    """
    parts = text.split(",")
    if (
        len(text) > 40
        or len(parts) != 3
        or not all(part.strip().isascii() and part.strip().isdigit() for part in parts)
    ):
        raise UsageError(f"--batch {text[:40]!r}; expected three numbers: smallest, most usual, largest, such as 1,1,8")
    least, usual, most = (int(part) for part in parts)
    return least, usual, most


def parse_targets(text: str) -> tuple[str, ...]:
    """Read `86,89,120` or `current`.

    Raises:
        UsageError: anything else.
    """
    names = []
    for part in (part.strip().upper() for part in text.split(",")):
        number = part.removeprefix("SM").replace(".", "")
        if part != CURRENT and not (number.isascii() and number.isdigit() and 2 <= len(number) <= 3):
            raise UsageError(f"--sm {text[:40]!r}; expected compute capabilities such as 86,89,120, or current")
        names.append(CURRENT if part == CURRENT else f"SM{number}")
    return tuple(sorted(names, key=lambda name: (len(name), name)))


def fitting_batch(contract: Contract) -> tuple[int, int, int]:
    """Return the batch sizes that are built when none are named."""
    return (1, 1, 1) if contract.classifier.batch == "1" else BuildSpec.batch


def check_spec(api: TrtApi, contract: Contract, spec: BuildSpec, device: Device) -> None:
    """Find contradictions before anything is built.

    Raises:
        UsageError: batch sizes that the artifact does not have, targets that the module cannot build for.
    """
    if contract.classifier.batch == "1" and spec.batch != (1, 1, 1):
        raise UsageError(
            f"--batch {','.join(map(str, spec.batch))}: this artifact runs one image at a time, because its network "
            "allows nothing else; leave --batch out"
        )
    if not spec.targets:
        return
    if not api.capabilities.compute_capabilities:
        raise UsageError(
            f"--sm {_listed(spec.targets)}: {api.family} builds for the GPU of this machine alone. Leave --sm out, or "
            "use --backend tensorrt-rtx"
        )
    if CURRENT in spec.targets and device.compute_capability is None:
        raise UsageError("--sm current: this machine has no usable GPU; name the target by number, such as --sm 86")
    known = known_targets(api)
    unknown = [target for target in spec.targets if target != CURRENT and target not in known]
    if unknown:
        raise UsageError(
            f"--sm {_listed(unknown)}: {api.family} {api.version} does not build for that GPU; it knows "
            f"{_listed(known)}. A Jetson builds its own engine, on the device, "
            "with --backend tensorrt"
        )


def known_targets(api: TrtApi) -> tuple[str, ...]:
    """Return the GPUs that a module can build this project's engines for by name; none where it has no choice."""
    if not api.capabilities.compute_capabilities:
        return ()
    names = [name for name in dir(api.module.ComputeCapability) if _TARGET.fullmatch(name) and name != _TURING]
    return tuple(sorted(names, key=lambda name: int(name[2:])))


def _listed(targets: Iterable[str]) -> str:
    return ",".join(target.removeprefix("SM").lower() for target in targets)


def sm_name(compute_capability: tuple[int, int]) -> str:
    """Return `SM87` for (8, 7)."""
    return f"SM{compute_capability[0]}{compute_capability[1]}"


def precision_of(contract: Contract) -> Precision:
    """Return the precision that an engine of this artifact must have."""
    return contract.precision


def source_digest(model: bytes) -> str:
    """Return the SHA-256 (hex) over the graph without its calibration knots, and over the opset.

    Recalibrating (`grood-edge calibrate --threshold-only`) does not change it; new prototypes or a new bank do.
    """
    digest = hashlib.sha256()
    for field in wire.read_fields(model):
        if field.number == proto.MODEL_GRAPH:
            for part in wire.read_fields(field.message()):
                is_tensor = part.number == proto.GRAPH_INITIALIZER
                if not (is_tensor and proto.name_of(part, proto.TENSOR_NAME) in KNOTS):
                    digest.update(part.raw)
        elif field.number in (proto.MODEL_OPSET, proto.MODEL_FUNCTION):
            digest.update(field.raw)
    return digest.hexdigest()


def engine_key(artifact: Artifact, api: TrtApi, device: Device, spec: BuildSpec) -> str:
    """Return the SHA-256 (hex) that tells engines apart: network and head, batch sizes, versions, and the GPU.

    The GPU counts where the engine is built for it; a TensorRT-RTX engine for named or all GPUs is the same anywhere.
    """
    here = api.family == "tensorrt" or CURRENT in spec.targets
    document = {
        "rules": BUILD_RULES,
        "source": source_digest(artifact.model),
        "backend": api.family,
        "version": api.version,
        "batch": spec.batch,
        "targets": sorted(spec.targets),
        "device": [device.name, device.compute_capability, device.driver] if here else None,
    }
    return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()


def engine_name(stem: str, artifact: Artifact, api: TrtApi, device: Device, spec: BuildSpec) -> str:
    """Return the file name `model.<backend>-<version>-<sm>-<precision>-<digest8>.engine`."""
    if spec.targets and CURRENT not in spec.targets:
        sm = "sm" + "_".join(target.removeprefix("SM") for target in spec.targets)
    elif api.family == "tensorrt-rtx" and not spec.targets:
        sm = "portable"
    else:
        sm = "sm" if device.compute_capability is None else sm_name(device.compute_capability).lower()
    key = engine_key(artifact, api, device, spec)
    return f"{stem}.{api.family}-{api.version}-{sm}-{precision_of(artifact.contract).name}-{key[:8]}.engine"
