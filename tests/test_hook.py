"""The annotations are checked in every function of the package, with arrays and without."""

import dataclasses
import sys
from collections.abc import Callable
from types import FunctionType, ModuleType

import numpy as np
import pytest
from beartype.roar import BeartypeCallHintViolation
from jaxtyping import Float32

from grood_edge.scoring import nearest_gap
from grood_edge.wire import Field, encode_varint, read_varint
from tests import hook
from tests.hook import checked
from tests.without_hook import without_hook

Row = Float32[np.ndarray, "d"]


def strict(function: Callable[..., object]) -> Callable[..., object]:
    from beartype import beartype

    decorated: Callable[..., object] = checked(function, typechecker=beartype)
    return decorated


def test_arguments_of_a_function_without_arrays() -> None:
    with pytest.raises(BeartypeCallHintViolation, match="position"):
        read_varint(b"\x01", "0")  # type: ignore[arg-type]
    with pytest.raises(BeartypeCallHintViolation, match="value"):
        encode_varint(None)  # type: ignore[arg-type]


def test_results_of_a_function_without_arrays() -> None:
    def wrong(text: str) -> int:
        return text  # type: ignore[return-value]

    with pytest.raises(BeartypeCallHintViolation, match="return"):
        strict(wrong)("1")


def test_fields_of_a_dataclass() -> None:
    with pytest.raises(BeartypeCallHintViolation, match="wire_type"):
        Field(1, "2", b"", b"")  # type: ignore[arg-type]
    with pytest.raises(BeartypeCallHintViolation, match="features"):
        nearest_gap(np.zeros((2, 3), np.float32), None)  # type: ignore[arg-type]


def test_sizes_of_the_same_name_agree() -> None:
    def both(a: Row, more: dict[str, tuple[Row, ...] | None]) -> Row:
        return np.zeros(len(a) + (more["b"] is None), np.float32)

    row, other = np.zeros(3, np.float32), np.zeros(4, np.float32)
    strict(both)(row, {"b": (row,)})
    with pytest.raises(BeartypeCallHintViolation, match="parameter more"):
        strict(both)(row, {"b": (other,)})
    with pytest.raises(BeartypeCallHintViolation, match="return"):
        strict(both)(row, {"b": None})


def test_nothing_is_checked_where_a_test_says_so() -> None:
    with without_hook(), pytest.raises(TypeError, match="'>=' not supported"):
        read_varint(b"\x01", "0")  # type: ignore[arg-type]


def functions_of(module: ModuleType) -> list[FunctionType]:
    """Return the module's annotated functions and methods."""
    own = [value for value in vars(module).values() if getattr(value, "__module__", None) == module.__name__]
    methods = [value for part in own if isinstance(part, type) for value in vars(part).values()]
    found = [getattr(value, "__func__", getattr(value, "fget", value)) for value in (*own, *methods)]
    return [value for value in found if isinstance(value, FunctionType) and value.__annotations__]


@pytest.mark.parametrize("name", ["scoring", "wire", "contract", "artifact", "conformal", "preprocessing"])
def test_no_function_of_a_module_goes_unchecked(name: str) -> None:
    functions = functions_of(sys.modules[f"grood_edge.{name}"])
    bare = [function.__qualname__ for function in functions if not hasattr(function, "__wrapped__")]
    generated = {"__eq__", "__init__", "__repr__", "__hash__", "__setattr__", "__delattr__"}
    assert len(functions) > 3
    assert [name for name in bare if name.split(".")[-1] not in generated] == []


def test_dataclasses_are_left_as_they_are_but_for_what_is_checked() -> None:
    assert dataclasses.is_dataclass(Field)
    assert hasattr(Field.__init__, "__wrapped__")
    assert hook._jaxtyped is not checked
