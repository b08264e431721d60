"""What a backend may hand back."""

from typing import Any

import numpy as np
import pytest

from grood_edge.errors import BackendError
from grood_edge.outputs import OUTPUT_NAMES, Outputs, outputs_from_arrays


def arrays(n: int = 2) -> dict[str, np.ndarray]:
    return {
        "logits": np.zeros((n, 3), np.float32),
        "features": np.zeros((n, 5), np.float32),
        "class_id": np.zeros(n, np.int32),
        "ood_score": np.zeros(n, np.float32),
        "p_value": np.ones(n, np.float32),
        "is_ood": np.zeros(n, bool),
        "valid": np.ones(n, bool),
    }


def test_good_arrays_are_handed_through() -> None:
    given = arrays()
    outputs = outputs_from_arrays(given)
    assert len(outputs) == 2
    assert set(OUTPUT_NAMES) == set(given) == set(vars(outputs))
    for name in OUTPUT_NAMES:
        assert getattr(outputs, name) is given[name]


def test_further_arrays_are_ignored() -> None:
    assert len(outputs_from_arrays(arrays() | {"debug": np.zeros(7)})) == 2


def test_outputs_cannot_be_reassigned() -> None:
    outputs: Any = outputs_from_arrays(arrays())
    with pytest.raises(AttributeError):
        outputs.valid = np.ones(2, bool)


@pytest.mark.parametrize("name", OUTPUT_NAMES)
def test_missing_output(name: str) -> None:
    given = arrays()
    del given[name]
    with pytest.raises(BackendError, match=f"'{name}' is missing; expected"):
        outputs_from_arrays(given)


@pytest.mark.parametrize(
    ("name", "dtype", "expected"),
    [
        ("logits", np.float64, "float32"),
        ("features", np.float16, "float32"),
        ("class_id", np.int64, "int32"),
        ("ood_score", np.float16, "float32"),
        ("p_value", np.float64, "float32"),
        ("is_ood", np.int32, "bool"),
        ("valid", np.uint8, "bool"),
    ],
)
def test_wrong_dtype(name: str, dtype: Any, expected: str) -> None:
    """TensorRT engines and foreign backends widen types silently."""
    given = arrays()
    given[name] = given[name].astype(dtype)
    with pytest.raises(BackendError, match=f"'{name}' is {np.dtype(dtype)}; expected {expected}"):
        outputs_from_arrays(given)


@pytest.mark.parametrize("name", OUTPUT_NAMES)
def test_different_batch_sizes(name: str) -> None:
    given = arrays()
    given[name] = given[name][:1]
    with pytest.raises(BackendError, match=rf"different batch sizes: .*'{name}': 1"):
        outputs_from_arrays(given)


def test_length_is_the_number_of_images() -> None:
    assert [len(outputs_from_arrays(arrays(n))) for n in (0, 1, 5)] == [0, 1, 5]
    assert isinstance(outputs_from_arrays(arrays()), Outputs)
