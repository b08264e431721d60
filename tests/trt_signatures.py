"""Reads the signatures that pybind11 writes into docstrings."""

import re

__all__ = ["accepts", "signatures"]

_PAIRS = {"(": ")", "[": "]", "{": "}", "<": ">"}


def signatures(doc: str, name: str) -> list[list[tuple[str, bool]]]:
    """Return the overloads of a function: (parameter, has a default) each, without `self`."""
    found = []
    for line in doc.splitlines():
        match = re.match(rf"(?:\d+\. )?{re.escape(name)}\((.*)\) -> ", line.strip())
        if match and match[1] != "*args, **kwargs":
            parameters = [p.strip() for p in _split(match[1])]
            found.append(
                [(p.split(":")[0].strip(), _has_default(p)) for p in parameters if p and not p.startswith("self")]
            )
    return found


def accepts(doc: str, name: str, positional: int, keywords: set[str]) -> bool:
    """Tell whether one of the overloads takes so many positional arguments and these keywords."""
    for parameters in signatures(doc, name):
        rest = parameters[positional:]
        names = {parameter for parameter, _ in rest}
        missing = {parameter for parameter, default in rest if not default} - keywords
        if positional <= len(parameters) and keywords <= names and not missing:
            return True
    return False


def _split(text: str) -> list[str]:
    """Split at commas outside brackets."""
    parts, depth, start = [], 0, 0
    for index, letter in enumerate(text):
        if letter in _PAIRS:
            depth += 1
        elif letter in _PAIRS.values() and text[index - 1] != "-":
            depth -= 1
        elif letter == "," and depth == 0:
            parts.append(text[start:index])
            start = index + 1
    return [*parts, text[start:]]


def _has_default(parameter: str) -> bool:
    return " = " in parameter
