"""Wrong dtypes and shapes must reach our own error messages; under test jaxtyping would raise before them."""

import contextlib
from collections.abc import Iterator

import jaxtyping


@contextlib.contextmanager
def without_hook() -> Iterator[None]:
    """Within the block nothing checks array annotations, as in production."""
    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        yield
    finally:
        jaxtyping.config.update("jaxtyping_disable", False)
