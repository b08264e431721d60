"""benchmarks/head_cost.py: its networks are those they are called after, and its sides take turns."""

from dataclasses import asdict
from typing import Any

import numpy as np
import pytest
from onnx import checker


# Published numbers of parameters for 1,000 classes, less one of the two of every batch norm's channels: it is folded.
@pytest.mark.parametrize(
    ("name", "parameters"),
    [("efficientnet-lite0", 4_652_008 - 21_008), ("resnet-18", 11_689_512 - 4_800), ("resnet-50", 25_557_032 - 26_560)],
)
def test_networks_have_the_published_number_of_parameters(benchmark_script: Any, name: str, parameters: int) -> None:
    model = benchmark_script("classifier_graphs").classifier_model(name, 1000)
    checker.check_model(model)
    assert sum(int(np.prod(tensor.dims)) for tensor in model.graph.initializer if tensor.dims) == parameters


def test_sides_take_turns_and_the_call_that_counts_follows_one_of_its_own(benchmark_script: Any) -> None:
    calls: list[str] = []
    head_cost = benchmark_script("head_cost")
    times = head_cost.times_of([lambda: calls.append("a"), lambda: calls.append("b")], 0.0, threads=1, least=4)
    assert times.shape == (4, 2)
    assert "".join(calls[2 * head_cost.WARM_UP :]) == "bbaaaabb" * 2


def test_every_value_and_every_target_is_measured(benchmark_script: Any) -> None:
    head_cost = benchmark_script("head_cost")
    found = [(case, kind) for case in head_cost.CASES for kind in case.kinds]
    assert {case.network for case, _ in found} == {"efficientnet-lite0", "resnet-18", "resnet-50"}
    assert {case.classes for case, _ in found} == {10, 100, 1000}
    assert {case.batch for case, _ in found} == {1, 8}
    assert {case.threads for case, _ in found} == {1, 2}
    assert {kind.rows for _, kind in found} == {0, 1000, 2000}
    assert {kind.ood_prototypes for _, kind in found} == {1, 3}
    assert {kind.bank_dtype for _, kind in found} == {"int8", "float32"}
    aimed = [(case, kind) for case, kind in found if kind.target]
    assert {(case.network, case.batch, case.threads) for case, _ in aimed} == {("efficientnet-lite0", 1, 1)}
    assert {(case.classes, kind.ood_prototypes, kind.rows, kind.space, kind.target) for case, kind in aimed} == {
        *((classes, 1, 1000, "features", 1.03) for classes in (10, 100)),
        *((classes, 3, 1000, "features", 1.05) for classes in (10, 100)),
        *((classes, 1, 1000, "logits", 1.01) for classes in (10, 100)),
        *((1000, count, 2000, "features", 1.10) for count in (1, 3)),
    }  # fmt: skip
    assert all(case.rounds >= benchmark_script("ratios").FEW for case, _ in aimed)


def test_targets_are_held_against_network_and_classifier_alike(
    benchmark_script: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    head_cost = benchmark_script("head_cost")
    monkeypatch.setattr(head_cost, "sides_of", lambda models, case: [lambda: None] * (2 + len(case.kinds)))
    lines = head_cost.measured_case(head_cost.CASES[0], None, quick=True)
    assert [(line.against, line.target and line.target.value) for line in lines] == [
        ("classifier", None),
        *((against, target) for target in (None, 1.03, 1.05, 1.01) for against in ("network", "classifier")),
    ]


def test_a_file_grows_by_its_prototypes(benchmark_script: Any) -> None:
    line = benchmark_script("head_cost").file_line(1000)
    assert line.target.value == 1.02
    grown = line.ratio.over - line.ratio.under
    assert 1000 * 1280 * 4 / 1e6 < grown < 1000 * 1280 * 4 / 1e6 + 0.2
    assert line.target.met(line.ratio) == "no"


def test_a_threads_spinning_is_waited_for(benchmark_script: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    head_cost, ratios = benchmark_script("head_cost"), benchmark_script("ratios")
    done: list[str] = []
    monkeypatch.setattr(ratios.time, "sleep", lambda seconds: done.append(f"{seconds:g} s"))
    head_cost.times_of([lambda: done.append("a")], 0.0, threads=2, least=2)
    assert done[head_cost.WARM_UP :] == ["0.1 s", "a", "a"] * 2


def test_each_head_with_a_target_is_profiled(benchmark_script: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    head_cost, head_profile = benchmark_script("head_cost"), benchmark_script("head_profile")
    kinds = [head_cost.Kind(1, 0), head_cost.Kind(3, 200, target=1.05), head_cost.Kind(1, 200, "logits", 1.01)]
    case = head_cost.Case("efficientnet-lite0", 10, 1, 1, tuple(kinds))
    models = head_cost.models_of(case)
    monkeypatch.setattr(head_cost, "sides_of", lambda models, case: [lambda: None] * (2 + len(case.kinds)))
    found = head_cost.profiles_of(case, models, head_cost.measured_case(case, models, quick=True), quick=True)
    assert [(one.head, one.target) for one in found] == [(f"10 classes, {k.text()}", k.target) for k in kinds[1:]]
    for one in found:
        assert set(one.group_us) == set(head_profile.GROUPS)
        assert 50 < one.other_nodes < 150
        assert one.group_us[head_profile.OTHERS] > one.other_nodes / 2  # none of them is free


def test_a_profile_without_the_products_is_refused(benchmark_script: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    head_profile = benchmark_script("head_profile")
    monkeypatch.setattr(head_profile, "_node_times", lambda model, image, runs: {"grood/h_dot_b": [1] * runs})
    with pytest.raises(ValueError, match=r"one node of each of grood/h_dot_b, grood/class_sq_of_h .* found bank"):
        head_profile.group_times(b"", np.zeros(0, np.uint8))


def test_profiles_come_on_the_page(benchmark_script: Any) -> None:
    head_profile, bench = benchmark_script("head_profile"), benchmark_script("bench")
    groups = dict(zip(head_profile.GROUPS, (217.0, 32.0, 306.0), strict=True))
    profile = asdict(head_profile.Profile("10 classes, a head", 1.03, 270.6, 530.2, groups, 87))
    results = {"head_cost": {"lines": [], "details": {"profile": [profile]}, "took seconds": 1.0}}
    text = bench.page_parts(results, "2026-01-31")["profile"]
    assert text.splitlines()[-1] == "| 10 classes, a head | 1.03 | 271 | 530 | 217 | 32 | 87: 306 us, 3.5 each |"
    assert text in bench.replaced(bench.PAGE.read_text(), "profile", text)
