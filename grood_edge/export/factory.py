"""`package.module:factory`: the user's own code, for classifiers and for data sets alike."""

import importlib
import os
import sys
from typing import Any

from grood_edge.errors import InputError

__all__ = ["call_factory", "import_attribute"]


def import_attribute(text: str, error_type: type[InputError], expected: str) -> Any:
    """Import what `package.module:name` names, with the working folder on the path, as `python -m` does.

    Raises:
        error_type: it cannot be imported.
    """
    module_name, _, attribute = text.partition(":")
    folder = os.getcwd()
    sys.path.insert(0, folder)
    try:
        return getattr(importlib.import_module(module_name), attribute)
    except Exception as error:  # importing runs the user's own code; anything can come out of it
        raise error_type(f"cannot import {text!r}: {error}; expected {expected}") from error
    finally:
        sys.path.remove(folder)


def call_factory(factory: Any, text: str, error_type: type[InputError]) -> Any:
    """Call the user's factory.

    Raises:
        error_type: it failed; the message carries its own error.
    """
    try:
        return factory()
    except Exception as error:  # the user's own code; anything can come out of it
        raise error_type(f"{text} failed with {type(error).__name__}: {error}") from error
