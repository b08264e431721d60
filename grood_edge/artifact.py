"""The artifact: one ONNX file with its contract and digests; reading and making it needs neither torch nor onnx.

The digests find damage and mix-ups. They do not stop an attacker, who can write new ones.
"""

import hashlib
import stat
from dataclasses import dataclass
from pathlib import Path

from grood_edge import wire
from grood_edge.contract import Contract
from grood_edge.contract_reader import MAX_CONTRACT_BYTES, contract_from_json
from grood_edge.errors import ArtifactError
from grood_edge.graph_check import STANDARD_DOMAINS, refuse_external_data, require_agreement
from grood_edge.onnx_proto import OPSET

__all__ = [
    "CONTRACT_KEY",
    "Artifact",
    "artifact_bytes",
    "graph_digest",
    "read_artifact",
    "read_model_file",
]

CONTRACT_KEY = "grood_edge.contract"
MAX_ARTIFACT_BYTES = (2 << 30) - 1  # protobuf's own limit

MAX_MODEL_FIELDS = 1000  # beside the graph: metadata, and in foreign files opsets and functions
MAX_IR_VERSION = 10

# Field numbers of onnx.proto3's ModelProto
_IR_VERSION, _GRAPH, _OPSET, _METADATA, _FUNCTIONS = 1, 7, 8, 14, 25
_ONCE = {1: 0, 2: 2, 3: 2, 4: 2, 5: 0, 6: 2, _GRAPH: 2, _OPSET: 2}  # number: wire type
_FOREIGN = {20: "training information", _FUNCTIONS: "local functions", 26: "device configurations"}
_DIGESTED = (_GRAPH, _OPSET, _FUNCTIONS)


@dataclass(frozen=True)
class Artifact:
    """A whole, checked artifact: the file's bytes and its contract."""

    model: bytes
    contract: Contract
    graph_digest: str
    contract_digest: str
    opset: int
    ir_version: int


def read_artifact(source: Path | str | bytes) -> Artifact:
    """Read and check an artifact from a path or from bytes.

    Raises:
        ArtifactError: missing, truncated, foreign or tampered file, newer contract, data outside the file.
    """
    model = source if isinstance(source, bytes) else read_model_file(Path(source))
    header = _read_header(model)
    text = header.metadata.get(CONTRACT_KEY)
    if text is None:
        raise ArtifactError(
            "the file is an ONNX model without a grood-edge contract; make an artifact of it with: "
            "grood-edge export MODEL.onnx --data IMAGES --out artifact.onnx"
        )
    contract, digests = contract_from_json(text)
    found = {"graph": graph_digest(model), "contract": contract.digest()}
    for name, digest in found.items():
        if digests.get(name) != digest:
            raise ArtifactError(
                f"the {name} digest does not match: stored {str(digests.get(name))[:12]}, computed {digest[:12]}. "
                "The file was damaged or edited after export; fetch it again, or export again"
            )
    if text != contract.to_json(found):
        raise ArtifactError("the contract is not in canonical form: it was edited after export; export again")
    for key, value in _other_keys(contract).items():
        if header.metadata.get(key) != value:
            raise ArtifactError(f"metadata {key!r} is not what the contract says: it was edited; export again")
    refuse_external_data(model)
    header.require_current(contract)
    require_agreement(model, contract)
    return Artifact(model, contract, found["graph"], found["contract"], header.opset, header.ir_version)


@dataclass(frozen=True)
class _Header:
    """What stands beside the graph; `foreign`: ONNX parts that an artifact does not have."""

    ir_version: int
    opset: int
    metadata: dict[str, str]
    foreign: tuple[str, ...]

    def require_current(self, contract: Contract) -> None:
        if self.foreign:
            raise ArtifactError(f"the file has {', '.join(self.foreign)}; an artifact has none. Export again")
        if not self.opset == contract.classifier.opset == OPSET or not 3 <= self.ir_version <= MAX_IR_VERSION:
            raise ArtifactError(
                f"the file has opset {self.opset} and IR version {self.ir_version}, and the contract says opset "
                f"{contract.classifier.opset}; expected opset {OPSET} and an IR version up to {MAX_IR_VERSION}"
            )


def _read_header(model: bytes) -> _Header:
    """Read all fields of the model but the graph. What parsers could understand in two ways is refused."""
    if model[4:8] == b"ORTM":  # onnxruntime would take the file for one in its own format, and run that
        raise ArtifactError("the file is a model in onnxruntime's own format; expected ONNX")
    numbers = {_IR_VERSION: 0, _OPSET: 0}
    metadata: dict[str, str] = {}
    seen: set[int] = set()
    foreign: set[str] = set()
    for field in wire.read_fields(model, MAX_MODEL_FIELDS):
        if field.number in _FOREIGN or (field.number == _OPSET and _OPSET in seen):
            foreign.add(_FOREIGN.get(field.number, "operators outside the standard"))
        elif field.number == _METADATA:
            key, value = _entry(field.message())
            if key in metadata:
                raise ArtifactError(f"the file has metadata {key[:40]!r} twice; fetch it again, or export again")
            metadata[key] = value
        elif _ONCE.get(field.number) == field.wire_type and field.number not in seen:
            numbers[field.number] = _opset(field.message()) if field.number == _OPSET else _integer(field)
        else:
            raise ArtifactError(
                f"the file is no ONNX model, or it is damaged: it has field {field.number} where none is expected"
            )
        seen.add(field.number)
    if _GRAPH not in seen:
        raise ArtifactError("the file has no ONNX graph: it is not an ONNX model, or it was truncated")
    return _Header(numbers[_IR_VERSION], numbers[_OPSET], metadata, tuple(sorted(foreign)))


def _entry(message: memoryview | bytes) -> tuple[str, str]:
    key, value = (wire.only_bytes(message, number, limit=2) or b"" for number in (1, 2))
    if len(value) > MAX_CONTRACT_BYTES:
        raise ArtifactError(f"a metadata entry has {len(value):,} bytes; at most {MAX_CONTRACT_BYTES:,} are read")
    try:
        return bytes(key).decode(), bytes(value).decode()
    except UnicodeDecodeError as error:
        raise ArtifactError(f"the file's metadata is not UTF-8 ({error.reason}); it is damaged") from error


def _integer(field: wire.Field) -> int:
    return field.value if isinstance(field.value, int) else 0


def _opset(message: memoryview | bytes) -> int:
    """Return the version of the standard operators; 0 for another domain."""
    if (wire.only_bytes(message, 1, limit=2) or b"") not in STANDARD_DOMAINS:
        return 0
    versions = [field.value for field in wire.read_fields(message, limit=2) if field.number == 2]
    return versions[0] if len(versions) == 1 and isinstance(versions[0], int) else 0


def artifact_bytes(model: bytes, contract: Contract) -> bytes:
    """Return the model's bytes with the contract, its digests and the keys that other tools read."""
    digests = {"graph": graph_digest(model), "contract": contract.digest()}
    metadata = _other_keys(contract)
    metadata[CONTRACT_KEY] = contract.to_json(digests)  # last: a file cut off anywhere has no contract
    kept = [bytes(field.raw) for field in wire.read_fields(model) if field.number != _METADATA]
    entries = [
        wire.encode_field(_METADATA, wire.encode_field(1, key.encode()) + wire.encode_field(2, value.encode()))
        for key, value in metadata.items()
    ]
    return b"".join(kept + entries)


def _other_keys(contract: Contract) -> dict[str, str]:
    """Return the metadata that other tools read. `ascii`: what is printable differs between Python versions."""
    height, width, channels = contract.preprocessing.input_shape
    return {
        "names": ascii(dict(enumerate(contract.classes))),
        "imgsz": str([height, width]),
        "channels": str(channels),
        "task": "classify",
        "description": "image classifier with GROOD out-of-distribution score, made by grood-edge",
    }


def graph_digest(model: bytes) -> str:
    """Return the SHA-256 (hex) over the raw graph, opset and function fields, in file order."""
    digest = hashlib.sha256()
    for field in wire.read_fields(model):
        if field.number in _DIGESTED:
            digest.update(field.raw)
    return digest.hexdigest()


def read_model_file(path: Path) -> bytes:
    """Read an ONNX file of at most 2 GiB, the format's own limit.

    Raises:
        ArtifactError: it cannot be read, is no regular file, or is larger.
    """
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):  # a pipe or device may have no end
            raise ArtifactError(f"cannot read {path}: it is not a regular file")
        if status.st_size > MAX_ARTIFACT_BYTES:
            raise ArtifactError(f"{path} has {status.st_size:,} bytes; an ONNX file has at most {MAX_ARTIFACT_BYTES:,}")
        return path.read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        reason = error.strerror if isinstance(error, OSError) else None
        raise ArtifactError(f"cannot read {path}: {reason or error}") from error
