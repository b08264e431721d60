"""benchmarks/head_cost.py: its networks are those they are called after, and its sides take turns."""

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import checker

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(scope="module")
def module() -> Iterator[Any]:
    """Import benchmarks by name, as their scripts import one another."""
    before = set(sys.modules)
    sys.path.insert(0, str(BENCHMARKS))
    yield importlib.import_module
    sys.path.remove(str(BENCHMARKS))
    for name in set(sys.modules) - before:
        if Path(getattr(sys.modules[name], "__file__", None) or "").parent == BENCHMARKS:
            del sys.modules[name]


# Published numbers of parameters for 1,000 classes, less one of the two of every batch norm's channels: it is folded.
@pytest.mark.parametrize(
    ("name", "parameters"),
    [("efficientnet-lite0", 4_652_008 - 21_008), ("resnet-18", 11_689_512 - 4_800), ("resnet-50", 25_557_032 - 26_560)],
)
def test_networks_have_the_published_number_of_parameters(module: Any, name: str, parameters: int) -> None:
    model = module("classifier_graphs").classifier_model(name, 1000)
    checker.check_model(model)
    assert sum(int(np.prod(tensor.dims)) for tensor in model.graph.initializer if tensor.dims) == parameters


def test_sides_take_turns_and_the_call_that_counts_follows_one_of_its_own(module: Any) -> None:
    calls: list[str] = []
    head_cost = module("head_cost")
    times = head_cost.interleaved([lambda: calls.append("a"), lambda: calls.append("b")], 0.0, threads=1)
    assert times.shape == (head_cost.LEAST, 2)
    turns = "".join(calls[2 * head_cost.WARM_UP :])
    assert turns == "aabbbbaa" * (head_cost.LEAST // 2)


def test_quick_cases_have_every_target_of_the_small_network(module: Any) -> None:
    head_cost = module("head_cost")
    quick = {(case.network, case.classes, kind) for case in head_cost.quick_cases() for kind in case.kinds}
    aimed = {(c.network, c.classes, k) for c in head_cost.all_cases() for k in c.kinds if k.target and k.rows == 1000}
    assert {target.target for *_, target in aimed} == {1.01, 1.03, 1.05}
    assert aimed <= quick
