"""The JSON beside an engine: what it was built from, how, with what and for what; signed with the user's key."""

import dataclasses
import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from grood_edge import __version__
from grood_edge.artifact import Artifact
from grood_edge.contract import Contract
from grood_edge.contract_reader import MAX_CONTRACT_BYTES, contract_from_json, read_value, strict_json
from grood_edge.publishing import published, write_through
from grood_edge.runtime.build import BuildSettings, Built
from grood_edge.runtime.engine_spec import CURRENT, BuildSpec, Device, engine_key, precision_of, source_digest
from grood_edge.runtime.trt_api import TrtApi
from grood_edge.runtime.user_key import signature, user_key

__all__ = [
    "MAX_ENGINE_BYTES",
    "MAX_SIDECAR_BYTES",
    "Sidecar",
    "parse_sidecar",
    "publish_engine",
    "sidecar_of",
    "sidecar_path",
    "signed_part",
]

SCHEMA_NAME = "grood-edge.engine"
SIDECAR_VERSION = 1
MAX_SIDECAR_BYTES = MAX_CONTRACT_BYTES + (1 << 20)
MAX_ENGINE_BYTES = 16 << 30
MAX_SIDECAR_VALUES = 1_100_000  # a contract's, and a little more
_MODE = 0o644


@dataclass(frozen=True)
class Sidecar:
    """What stands beside an engine. `device` is None where the engine was not built for the GPU that built it.

    key: see `engine_spec.engine_key`. graph_digest: of the artifact as it was then, calibration knots included.
    inspected: types that the engine's inspector named, where a GPU was there.
    """

    backend: Literal["tensorrt", "tensorrt-rtx"]
    backend_version: str
    key: str
    source_digest: str
    graph_digest: str
    contract_digest: str
    precision: Literal["fp32", "fp16", "int8"]
    engine_sha256: str
    engine_bytes: int
    batch: tuple[int, ...]
    targets: tuple[str, ...]
    device: Device | None
    settings: BuildSettings
    layer_types: dict[str, int]
    inspected: dict[str, int] | None
    warnings: tuple[str, ...]
    tools: dict[str, str]

    @property
    def spec(self) -> BuildSpec:
        """What was asked for."""
        least, usual, most = self.batch
        return BuildSpec((least, usual, most), self.targets)


def sidecar_path(path: Path) -> Path:
    """Return the path of the sidecar of the engine at `path`."""
    return path.with_name(path.name + ".json")


def sidecar_of(
    artifact: Artifact, api: TrtApi, device: Device, spec: BuildSpec, built: Built, inspected: dict[str, int] | None
) -> Sidecar:
    """Describe a built engine."""
    here = api.family == "tensorrt" or CURRENT in spec.targets
    return Sidecar(
        backend=api.family,
        backend_version=api.version,
        key=engine_key(artifact, api, device, spec),
        source_digest=source_digest(artifact.model),
        graph_digest=artifact.graph_digest,
        contract_digest=artifact.contract_digest,
        precision=precision_of(artifact.contract).name,
        engine_sha256=hashlib.sha256(built.plan).hexdigest(),
        engine_bytes=len(built.plan),
        batch=spec.batch,
        targets=spec.targets,
        device=device if here else None,
        settings=built.settings,
        layer_types=built.layer_types,
        inspected=inspected,
        warnings=tuple(" ".join(warning.split())[:1000] for warning in built.warnings[:100]),
        tools={"grood-edge": __version__, api.family: api.version, "driver": device.driver or "none"},
    )


def publish_engine(path: Path, plan: bytes, sidecar: Sidecar, contract: Contract, force: bool) -> None:
    """Sign the sidecar with the user's key and write both files: the engine first, the sidecar last, or neither.

    The sidecar carries the contract as well, so that an engine can be looked at without its artifact.

    Raises:
        OutputError: they cannot be written, or are there and `force` is not set.
        BackendError: the user's key cannot be used.
    """
    key = user_key(create=True)
    assert key is not None
    document = _document(sidecar, contract)
    document["hmac"] = signature(signed_part(document), key)
    text = json.dumps(document, sort_keys=True, indent=1, ensure_ascii=False, allow_nan=False)
    placed = whole = False
    try:
        with published(sidecar_path(path), force, _MODE) as beside:
            write_through(beside, text.encode())
            with published(path, force, _MODE) as temporary:
                write_through(temporary, plan)
            placed = True
        whole = True
    finally:
        if placed and not whole:  # an engine without its sidecar would be in the way of the next build
            for left in (path, sidecar_path(path)):
                left.unlink(missing_ok=True)


def _document(sidecar: Sidecar, contract: Contract) -> dict[str, Any]:
    fields: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(sidecar)))  # tuples become lists, as when read
    head = {"schema": SCHEMA_NAME, "version": SIDECAR_VERSION}
    return head | fields | {"contract": json.loads(contract.to_json())}


def signed_part(document: dict[str, Any]) -> bytes:
    """Return what is signed: all but the signature, sorted keys, no spaces."""
    signed = {key: value for key, value in document.items() if key != "hmac"}
    return json.dumps(signed, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def parse_sidecar(raw: bytes) -> tuple[Sidecar, Contract, dict[str, Any]]:
    """Read a sidecar: untrusted input, at most `MAX_SIDECAR_BYTES` long. Returns the whole document as well.

    Raises:
        ValueError, ArtifactError, UsageError: anything that no compile writes.
    """
    text = raw.decode()
    if sum(map(text.count, ",[{")) > MAX_SIDECAR_VALUES:
        raise ValueError("too many values")
    document = strict_json(text)
    if not isinstance(document, dict) or document.get("schema") != SCHEMA_NAME:
        raise ValueError(f"its schema is not {SCHEMA_NAME}")
    version = document.get("version")
    if type(version) is not int or version != SIDECAR_VERSION:
        raise ValueError(f"its version is {str(version)[:20]}; this grood-edge reads version {SIDECAR_VERSION}")
    contract, _ = contract_from_json(json.dumps(document.get("contract"), ensure_ascii=False))
    fields = {key: value for key, value in document.items() if key not in ("schema", "version", "hmac", "contract")}
    sidecar = read_value(Sidecar, fields, "sidecar")
    _check_consistency(sidecar, contract)
    return sidecar, contract, document


def _check_consistency(sidecar: Sidecar, contract: Contract) -> None:
    """Refuse with ValueError what no compile writes."""
    digests = (sidecar.key, sidecar.source_digest, sidecar.graph_digest, sidecar.contract_digest, sidecar.engine_sha256)
    capability = None if sidecar.device is None else sidecar.device.compute_capability
    rules = [
        (all(re.fullmatch("[0-9a-f]{64}", digest) for digest in digests), "a digest is no SHA-256"),
        (contract.digest() == sidecar.contract_digest, "the contract is not the one of its digest"),
        (precision_of(contract).name == sidecar.precision, "the contract has another precision"),
        (0 < sidecar.engine_bytes <= MAX_ENGINE_BYTES, f"an engine of {sidecar.engine_bytes} bytes"),
        (len(sidecar.batch) == 3, f"{len(sidecar.batch)} batch sizes"),
        (capability is None or len(capability) == 2, "a compute capability of other than two numbers"),
        (
            (sidecar.device is not None) == (sidecar.backend == "tensorrt" or CURRENT in sidecar.targets),
            "a device for an engine of any GPU, or none for one of a single GPU",
        ),
    ]
    for holds, found in rules:
        if not holds:
            raise ValueError(found)
    sidecar.spec  # noqa: B018 - raises UsageError for what no user may ask for
