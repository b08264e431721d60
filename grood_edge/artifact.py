"""The artifact: one ONNX file with its contract and digests. Read, attach, publish; needs neither torch nor onnx.

The digests find damage and mix-ups. They do not stop an attacker, who can write new ones.
"""

import contextlib
import errno
import hashlib
import os
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from grood_edge import wire
from grood_edge.contract import Contract, contract_from_json
from grood_edge.errors import ArtifactError, OutputError
from grood_edge.stored_head import refuse_external_data

__all__ = [
    "CONTRACT_KEY",
    "Artifact",
    "artifact_bytes",
    "check_output",
    "graph_digest",
    "publish",
    "published",
    "read_artifact",
]

CONTRACT_KEY = "grood_edge.contract"
MAX_ARTIFACT_BYTES = (2 << 30) - 1  # protobuf's own limit

# Field numbers of onnx.proto3's ModelProto
_IR_VERSION, _GRAPH, _OPSET, _METADATA, _FUNCTIONS = 1, 7, 8, 14, 25
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
    model = source if isinstance(source, bytes) else _read_file(Path(source))
    opset, ir_version = 0, 0
    metadata: dict[str, str] = {}
    for field in wire.read_fields(model):
        if field.number == _METADATA:
            key, value = (wire.first_bytes(field.message(), number) or b"" for number in (1, 2))
            metadata[bytes(key).decode("utf-8", "replace")] = bytes(value).decode("utf-8", "replace")
        elif field.number == _OPSET:
            opset = max(opset, *(f.value for f in wire.read_fields(field.message()) if isinstance(f.value, int)), 0)
        elif field.number == _IR_VERSION and isinstance(field.value, int):
            ir_version = field.value
    if CONTRACT_KEY not in metadata:
        raise ArtifactError(
            "the file is an ONNX model without a grood-edge contract; make an artifact of it with: "
            "grood-edge export MODEL.onnx --data IMAGES --out artifact.onnx"
        )
    contract, digests = contract_from_json(metadata[CONTRACT_KEY])
    found = {"graph": graph_digest(model), "contract": contract.digest()}
    for name, digest in found.items():
        if digests.get(name) != digest:
            raise ArtifactError(
                f"the {name} digest does not match: stored {str(digests.get(name))[:12]}, computed {digest[:12]}. "
                "The file was damaged or edited after export; fetch it again, or export again"
            )
    refuse_external_data(model)
    return Artifact(model, contract, found["graph"], found["contract"], opset, ir_version)


def artifact_bytes(model: bytes, contract: Contract) -> bytes:
    """Return the model's bytes with the contract, its digests and the keys that other tools read."""
    digests = {"graph": graph_digest(model), "contract": contract.digest()}
    preprocessing = contract.preprocessing
    metadata = {
        CONTRACT_KEY: contract.to_json(digests),
        "names": repr(dict(enumerate(contract.classes))),
        "imgsz": repr([preprocessing.height, preprocessing.width]),
        "channels": str(preprocessing.channels),
        "task": "classify",
        "description": "image classifier with GROOD out-of-distribution score, made by grood-edge",
    }
    kept = [bytes(field.raw) for field in wire.read_fields(model) if field.number != _METADATA]
    entries = [
        wire.encode_field(_METADATA, wire.encode_field(1, key.encode()) + wire.encode_field(2, value.encode()))
        for key, value in metadata.items()
    ]
    return b"".join(kept + entries)


def graph_digest(model: bytes) -> str:
    """Return the SHA-256 (hex) over the raw graph, opset and function fields, in file order."""
    digest = hashlib.sha256()
    for field in wire.read_fields(model):
        if field.number in _DIGESTED:
            digest.update(field.raw)
    return digest.hexdigest()


def check_output(path: Path, force: bool) -> None:
    """Find out before the work whether the result can be written.

    Raises:
        OutputError: the folder is missing or not writable, the path is a folder, or exists without `force`.
    """
    folder = path.resolve().parent
    if path.is_dir():
        raise OutputError(f"{path} is a folder; expected the path of a file to write, such as {path}/model.onnx")
    if not folder.is_dir():
        raise OutputError(f"the folder {folder} does not exist; create it first")
    if not os.access(folder, os.W_OK):
        raise OutputError(f"the folder {folder} is not writable; choose another output path")
    if path.exists() and not force:
        raise OutputError(f"{path} exists and was left as it is; use --force to replace it")


def publish(data: bytes, path: Path, force: bool, check: Callable[[Path], None] = lambda _: None) -> None:
    """Write to a temporary file, check that file, then rename it: all or nothing.

    `check` gets the temporary file's path and raises when the file must not be published.

    Raises:
        OutputError: the file cannot be written, or `path` exists and `force` is not set.
    """
    with published(path, force) as temporary:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        check(temporary)


@contextlib.contextmanager
def published(path: Path, force: bool) -> Iterator[Path]:
    """Hand out a temporary path beside `path`; rename it when the block ends well, remove it when it does not.

    Raises:
        OutputError: the file cannot be written, or `path` exists and `force` is not set.
    """
    check_output(path, force)
    target = path.resolve()
    temporary: Path | None = None
    try:
        handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.", suffix=target.suffix)
        temporary = Path(name)
        os.close(handle)
        yield temporary
        temporary.chmod(0o666 & ~_umask())
        if force:
            temporary.replace(target)
        else:
            _move_without_replacing(temporary, target)
    except OSError as error:
        reason = "the disk is full" if error.errno == errno.ENOSPC else error.strerror or str(error)
        raise OutputError(f"cannot write {path}: {reason}; nothing was changed") from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def _move_without_replacing(temporary: Path, target: Path) -> None:
    try:
        os.link(temporary, target)  # unlike a rename, a link never replaces a file that appeared meanwhile
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS) or target.exists():
            raise
        os.rename(temporary, target)  # the file system has no links (FAT on a memory card)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _read_file(path: Path) -> bytes:
    try:
        size = path.stat().st_size
        if size > MAX_ARTIFACT_BYTES:
            raise ArtifactError(f"{path} has {size:,} bytes; an artifact has at most {MAX_ARTIFACT_BYTES:,}")
        return path.read_bytes()
    except OSError as error:
        raise ArtifactError(f"cannot read {path}: {error.strerror or error}") from error
