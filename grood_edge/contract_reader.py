"""Read a contract: untrusted input, so every key, type and bound is checked before anything else is done with it."""

import dataclasses
import json
import re
import reprlib
import sys
import types
from collections.abc import Callable
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from grood_edge.contract import (
    CONTRACT_VERSION,
    SCHEMA_NAME,
    Contract,
)
from grood_edge.contract_rules import require_consistent
from grood_edge.errors import ArtifactError, UsageError

__all__ = [
    "MAX_CONTRACT_BYTES",
    "MAX_TEXT",
    "contract_from_json",
    "is_plain_name",
    "read_value",
    "strict_json",
]

MAX_CONTRACT_BYTES = 16 << 20
MAX_VALUES = 1_000_000  # in the whole document, counted before parsing: bounds time and memory
MAX_TEXT = 1024  # characters of a name; scores and pictures are bounded by the document
MAX_INTEGER = (1 << 53) - 1  # every JSON reader keeps integers up to here

_LARGEST = sys.float_info.max
_LONGEST_NUMBER = 32  # characters; the shortest text of a float64 has at most 24
_LONG_TEXTS = (".scores", ".png", ".classes", ".sketch")
# Control characters, line separators, marks that turn the writing direction, lone surrogates: names are printed.
_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")

_T = TypeVar("_T")


def contract_from_json(text: str) -> tuple[Contract, dict[str, str]]:
    """Read a contract and its digests.

    Raises:
        ArtifactError: not JSON, another schema, a newer version, or any field that is not as specified.
    """
    if len(text) > MAX_CONTRACT_BYTES or sum(map(text.count, ",[{")) > MAX_VALUES:
        raise ArtifactError(
            f"the contract has {len(text):,} characters; at most {MAX_CONTRACT_BYTES:,} are read, "
            f"with at most {MAX_VALUES:,} values"
        )
    try:
        document = strict_json(text)
    except ValueError as error:
        raise ArtifactError(f"the contract is not valid JSON ({error}); export the artifact again") from error
    if not isinstance(document, dict) or document.pop("schema", None) != SCHEMA_NAME:
        raise ArtifactError(f"the contract's schema is not {SCHEMA_NAME!r}: another tool wrote this file")
    version = document.pop("version", None)
    if type(version) is not int or version != CONTRACT_VERSION:
        raise ArtifactError(
            f"the contract has version {_short(version)} and this grood-edge reads version {CONTRACT_VERSION}; "
            "upgrade grood-edge, or export the artifact again"
        )
    digests = _read(dict[str, str], document.pop("digests", {}), "digests")
    contract = _read(Contract, document, "contract")
    require_consistent(contract)
    return contract, digests


def strict_json(text: str) -> Any:
    """Read JSON as all readers would: no key twice, no NaN, no endless numbers; the caller bounds its length.

    Raises:
        ValueError: anything else.
    """
    try:
        document = json.loads(
            text,
            parse_constant=_refuse_constant,
            parse_int=_number(int),
            parse_float=_number(float),
            object_pairs_hook=_unique_keys,
        )
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    json.dumps(document, ensure_ascii=False).encode()  # an escaped lone surrogate is text that no file can hold
    return document


def read_value(kind: type[_T], value: Any, where: str) -> _T:
    """Read parsed JSON as the dataclass `kind`: every key and type as annotated.

    Raises:
        ArtifactError: a key is missing or unknown, or a value has another type; names it.
    """
    read: _T = _read(kind, value, where)
    return read


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    document: dict[str, Any] = {}
    for key, value in pairs:
        if key in document:
            raise ValueError(f"an object has the key {_short(key)} twice")
        document[key] = value
    return document


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not a JSON number")


def _number(kind: Callable[[str], Any]) -> Callable[[str], Any]:
    def read(text: str) -> Any:
        if len(text) > _LONGEST_NUMBER:
            raise ValueError(f"a number has {len(text):,} characters")
        return kind(text)

    return read


def _read(kind: Any, value: Any, where: str) -> Any:  # noqa: PLR0911 - one return a kind
    """Read `value` as the annotated type `kind`: dataclass, tuple, dict, Literal, optional or scalar."""
    origin, arguments = get_origin(kind), get_args(kind)
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        return _read_dataclass(kind, value, where)
    if origin is Literal:
        if value in arguments:
            return value
        raise ArtifactError(f"{where} is {_short(value)}; expected one of {', '.join(map(repr, arguments))}")
    if origin in (Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        (inner,) = (a for a in arguments if a is not type(None))
        return _read(inner, value, where)
    if origin is tuple and isinstance(value, list):
        return tuple(_read(arguments[0], item, f"{where}[{i}]") for i, item in enumerate(value))
    if origin is dict and isinstance(value, dict):
        return {
            _read(str, key, f"a key of {where}"): _read(arguments[1], item, f"{where}.{key}")
            for key, item in value.items()
        }
    return _read_scalar(kind, value, where)


def _read_scalar(kind: Any, value: Any, where: str) -> Any:
    if kind is float and isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= _LARGEST:
        return float(value)
    if kind is str and isinstance(value, str):
        return _read_text(value, where)
    if kind is int and type(value) is int and abs(value) <= MAX_INTEGER:
        return value
    if kind is bool and isinstance(value, bool):
        return value
    raise ArtifactError(f"{where} is {_short(value)}; expected {getattr(kind, '__name__', kind)}")


def _read_text(value: str, where: str) -> str:
    if len(value) > MAX_TEXT and not where.endswith(_LONG_TEXTS):
        raise ArtifactError(f"{where} has {len(value):,} characters; expected at most {MAX_TEXT:,}")
    if _UNPRINTABLE.search(value):
        raise ArtifactError(f"{where} is {_short(value)}; expected text without control characters")
    return value


def is_plain_name(value: str) -> bool:
    """Tell whether a name may stand in a contract: not empty, at most 1,024 characters, no control characters."""
    return 0 < len(value) <= MAX_TEXT and not _UNPRINTABLE.search(value)


def _read_dataclass(kind: type[_T], value: Any, where: str) -> _T:
    hints = get_type_hints(kind)
    if not isinstance(value, dict):
        raise ArtifactError(f"{where} is {_short(value)}; expected an object")
    if set(value) != set(hints):
        missing, unknown = sorted(set(hints) - set(value)), sorted(set(value) - set(hints))
        raise ArtifactError(f"{where}: missing keys {missing}, unknown keys {_short(unknown)}")
    fields = {name: _read(hint, value[name], f"{where}.{name}") for name, hint in hints.items()}
    try:
        return kind(**fields)
    except UsageError as error:  # what a user's options must not say, a contract must not say either
        raise ArtifactError(f"{where}: {error}") from error


def _short(value: Any) -> str:
    return reprlib.repr(value)  # bounded in length and depth
