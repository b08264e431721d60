"""Checkpoint files are untrusted input: inspect them first, and never unpickle."""

import io
import json
import pickle
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from grood_edge.errors import ClassifierError, MissingExtraError, reason_of

try:
    import torch
except ImportError as error:
    raise MissingExtraError("torch", "torch", "Loading a checkpoint") from error

__all__ = ["MAX_PT2_BYTES", "checked_pt2", "state_dict"]

MAX_PT2_BYTES = 4 << 30
_PLAIN_CONTAINERS = (None, "builtins.tuple", "builtins.list", "builtins.dict", "collections.OrderedDict")
# torch parses expressions with sympy.sympify, which evaluates them as Python: only these words may stand in them.
_EXPRESSION_WORDS = {
    "Symbol", "Integer", "Add", "Mul", "Pow", "Max", "Min", "Mod", "FloorDiv", "CeilDiv", "CleanDiv", "PythonMod",
    "ModularIndexing", "Eq", "Ne", "Lt", "Le", "Gt", "Ge", "And", "Or", "Not", "true", "false",
    "True", "False", "positive", "integer", "nonnegative",
}  # fmt: skip


def checked_pt2(data: bytes, name: str) -> bytes:
    """Return a .pt2 archive rebuilt from the members that were inspected, all of them free of pickled objects.

    `torch.export.load` falls back to full unpickling for sample inputs, weights and constants, and evaluates text in
    the program as Python, so the archive is inspected first; and it is rebuilt, so that another zip reader cannot
    find other members in the same bytes.

    Raises:
        ClassifierError: not a .pt2, or it hides a pickle or code; names the member.
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
                rebuilt.writestr(info.filename, _inspected_member(info.filename, content, name))
    except ClassifierError:
        raise
    except zipfile.BadZipFile as error:
        raise ClassifierError(f"{name} is not a .pt2 archive of torch.export.save: {error}") from error
    except Exception as error:  # zipfile and json raise anything on damaged archives: zlib.error, LZMAError, KeyError
        raise ClassifierError(f"{name} is a damaged .pt2 archive: {type(error).__name__} {error}") from error
    return clean.getvalue()


def _inspected_member(member: str, content: bytes, archive: str) -> bytes:
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
    elif inner == "models/model.json":
        return _inspected_program(content, member, archive)
    elif inner not in ("archive_format", "archive_version", "byteorder") and not inner.startswith((".data/", "extra/")):
        raise ClassifierError(f"{archive} has the unexpected member {member}; expected an archive of torch.export.save")
    return content


def _inspected_program(content: bytes, member: str, archive: str) -> bytes:
    """Refuse a program that holds code, and drop its guards: torch compiles them, and ONNX has no use for them."""
    program = json.loads(content)
    program["guards_code"] = []
    if (found := next(_code_in(program), None)) is not None:
        raise ClassifierError(
            f"{archive} hides Python code in {member}: {found[:80]!r}. Loading it would run that, so it was refused"
        )
    return json.dumps(program).encode()


def _code_in(part: Any) -> Iterator[str]:
    """Find the texts of an exported program that torch evaluates, imports or compiles, and that are not harmless."""
    for key, value in part.items() if isinstance(part, dict) else ():
        names = value if isinstance(value, list) else [value]
        if key == "expr_str" and not _is_plain_expression(str(value)):
            yield str(value)
        elif key in ("in_spec", "out_spec") and not _is_plain_spec(value):
            yield str(value)  # other containers name a module to import
        elif key == "name" or key.endswith(("_name", "_names")):  # become variables of generated source
            yield from (name for name in names if isinstance(name, str) and not re.fullmatch(r"[\w.]*", name))
    for value in part.values() if isinstance(part, dict) else part if isinstance(part, list) else ():
        yield from _code_in(value)


def _is_plain_spec(value: Any) -> bool:
    """Allow nested tuples, lists and dicts with text keys, decoded as torch will decode them: JSON within JSON."""
    try:
        _, root = json.loads(value)
        pending = [root]
        while pending:
            node = pending.pop()
            context = json.loads(node["context"]) if isinstance(node["context"], str) else node["context"]
            keys = context if isinstance(context, list) else [] if context is None else [context]
            if node["type"] not in _PLAIN_CONTAINERS or not all(isinstance(key, str) for key in keys):
                return False
            pending += node["children_spec"]
    except (TypeError, ValueError, KeyError):
        return False
    return True


def _is_plain_expression(text: str) -> bool:
    bare = re.sub(r"Symbol\('[A-Za-z]\w*'", "Symbol(", text)
    words = re.findall(r"[A-Za-z_]\w*", bare)
    symbols = re.compile(r"[suz]\d+")
    return re.fullmatch(r"[\w\s(),=<>+*/-]*", bare, re.ASCII) is not None and all(
        word in _EXPRESSION_WORDS or symbols.fullmatch(word) for word in words
    )


def state_dict(path: Path) -> dict[str, torch.Tensor]:
    """Load a state dict without running code from the file.

    Raises:
        ClassifierError: unreadable, compressed, or it holds anything but tensors.
    """
    try:
        _refuse_packed(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ClassifierError(
            f"{path} holds more than tensors, and loading it would run code from the file; it was refused. "
            "Save the state dict alone: torch.save(model.state_dict(), FILE)"
        ) from error
    except ClassifierError:
        raise
    except Exception as error:  # torch raises anything on damaged files: AssertionError, KeyError, RuntimeError
        raise ClassifierError(f"{path} cannot be read as a state dict: {reason_of(error)}") from error
    state = state.get("state_dict", state) if isinstance(state, dict) else state
    if not isinstance(state, dict) or not all(isinstance(v, torch.Tensor) for v in state.values()):
        raise ClassifierError(f"{path} holds {type(state).__name__}; expected a state dict of tensors")
    return state


def _refuse_packed(path: Path) -> None:
    """Refuse compressed members, which torch unpacks and `torch.save` never writes: a few kB may be gigabytes."""
    with path.open("rb") as file:
        if file.read(4) != b"PK\3\4":  # the older format, which cannot be compressed
            return
        with zipfile.ZipFile(file) as archive:
            size = sum(info.file_size for info in archive.infolist())
    if size > path.stat().st_size:
        raise ClassifierError(
            f"{path} has {path.stat().st_size:,} bytes, and its members unpack to {size:,}; expected a file of "
            "torch.save, which compresses nothing. Save the state dict again"
        )
