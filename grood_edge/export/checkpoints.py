"""Checkpoint files are untrusted input: inspect them first, and never unpickle."""

import io
import json
import pickle
import zipfile
from pathlib import Path

from grood_edge.errors import ClassifierError, MissingExtraError

try:
    import torch
except ImportError as error:
    raise MissingExtraError("torch", "torch", "Loading a checkpoint") from error

__all__ = ["MAX_PT2_BYTES", "checked_pt2", "state_dict"]

MAX_PT2_BYTES = 4 << 30


def checked_pt2(data: bytes, name: str) -> bytes:
    """Return a .pt2 archive rebuilt from the members that were inspected, all of them free of pickled objects.

    `torch.export.load` falls back to full unpickling for sample inputs, weights and constants, so the archive is
    inspected first; and it is rebuilt, so that another zip reader cannot find other members in the same bytes.

    Raises:
        ClassifierError: not a .pt2, or it hides a pickle; names the member.
    """
    clean = io.BytesIO()
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive, zipfile.ZipFile(clean, "w", zipfile.ZIP_STORED) as rebuilt:
            names = [info.filename for info in archive.infolist()]
            if len(set(names)) != len(names) or sum(i.file_size for i in archive.infolist()) > MAX_PT2_BYTES:
                raise ClassifierError(
                    f"{name} has duplicate members or more than {MAX_PT2_BYTES:,} bytes; it is refused"
                )
            for info in archive.infolist():
                content = archive.read(info)
                _check_member(info.filename, content, name)
                rebuilt.writestr(info.filename, content)
    except (zipfile.BadZipFile, NotImplementedError, EOFError, RuntimeError) as error:
        raise ClassifierError(f"{name} is not a .pt2 archive of torch.export.save: {error}") from error
    return clean.getvalue()


def _check_member(member: str, content: bytes, archive: str) -> None:
    _, _, inner = member.partition("/")  # the first part is the archive's own name
    refusal = ClassifierError(
        f"{archive} hides pickled objects in {member}: loading it would run code from the file, so it was refused. "
        "Export the network again with torch.export.save, example inputs being plain tensors"
    )
    if inner.startswith("data/sample_inputs/") and inner.endswith(".pt"):
        try:
            if content:
                torch.load(io.BytesIO(content), weights_only=True)
        except Exception as error:  # weights_only raises many kinds; each means "more than tensors"
            raise refusal from error
    elif inner in ("data/weights/model_weights_config.json", "data/constants/model_constants_config.json"):
        for entry in json.loads(content)["config"].values():
            if entry["use_pickle"] or not str(entry["path_name"]).startswith(("weight_", "tensor_")):
                raise refusal
    elif inner.startswith(("data/weights/weight_", "data/constants/tensor_")):
        pass  # raw bytes of one tensor, as the config checked above says
    elif inner not in ("archive_format", "archive_version", "byteorder", "models/model.json") and not inner.startswith(
        (".data/", "extra/")
    ):
        raise ClassifierError(f"{archive} has the unexpected member {member}; expected an archive of torch.export.save")


def state_dict(path: Path) -> dict[str, torch.Tensor]:
    """Load a state dict without running code from the file.

    Raises:
        ClassifierError: unreadable, or it holds anything but tensors.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ClassifierError(
            f"{path} holds more than tensors, and loading it would run code from the file; it was refused. "
            "Save the state dict alone: torch.save(model.state_dict(), FILE)"
        ) from error
    except (OSError, RuntimeError, EOFError, ValueError) as error:
        raise ClassifierError(f"{path} cannot be read as a state dict: {str(error).splitlines()[0]}") from error
    state = state.get("state_dict", state) if isinstance(state, dict) else state
    if not isinstance(state, dict) or not all(isinstance(v, torch.Tensor) for v in state.values()):
        raise ClassifierError(f"{path} holds {type(state).__name__}; expected a state dict of tensors")
    return state
