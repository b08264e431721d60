"""What `auto` chooses, by which rule, from which images; and that the table says so."""

from dataclasses import replace

import numpy as np
import pytest

from grood_edge.contract import BankTrial, Candidate
from grood_edge.export import selection as module
from grood_edge.export.bank import BankRows, HeadPlan
from grood_edge.export.features import FeaturePass, FeatureTable, rows_of
from grood_edge.export.leave_class_out import LeaveOut, class_aurocs
from grood_edge.export.ood_prototype import OodSource, plain_source
from grood_edge.export.selection import choose_bank, choose_sources
from grood_edge.scoring import Head
from tests.export.gaussians import Gaussians, centers

MEAN, ORIGIN = plain_source("mean"), plain_source("origin")
NOISE = OodSource(replace(MEAN.entry, source="noise"), np.full(64, 0.5))
SOURCES = (MEAN, NOISE, ORIGIN)
PLAN = HeadPlan(SOURCES, None, "int8", 0)


def test_combination_is_kept_where_nothing_is_clearly_better(digit_pass: FeaturePass) -> None:
    found = choose_sources(digit_pass.fit, SOURCES, PLAN)
    chosen, entry = found.sources, found.selection
    assert chosen == SOURCES
    assert entry.reason == "no single OOD prototype is clearly better than the combination"
    assert (entry.asked, entry.classes) == ("auto", 7)
    assert 0 < entry.images <= digit_pass.fit.images // 2
    assert [candidate.name for candidate in entry.candidates] == ["combination", "mean", "noise", "origin"]
    together = entry.candidates[0]
    assert (together.difference, together.standard_error) == (None, None)
    for candidate in entry.candidates[1:]:
        assert candidate.difference == pytest.approx(candidate.auroc - together.auroc, abs=2e-6)
        assert candidate.standard_error is not None
        assert candidate.standard_error >= 0
    assert all(0.5 < candidate.auroc <= 1 for candidate in entry.candidates)


def test_selection_follows_the_seed_alone(digit_pass: FeaturePass) -> None:
    first, again, other = (
        choose_sources(digit_pass.fit, SOURCES, replace(PLAN, seed=seed)).selection for seed in (0, 0, 1)
    )
    assert first == again
    assert first.candidates != other.candidates


@pytest.mark.parametrize(
    ("gains", "chosen"),
    [
        ([0.05, 0.06, 0.04, 0.05], "origin"),  # 5 points, standard error 0.4
        ([0.021, 0.021, 0.021, 0.021], "origin"),
        ([0.019, 0.019, 0.019, 0.019], "combination"),  # sure, but too little
        ([0.20, -0.10, 0.20, -0.10], "combination"),  # 5 points, standard error 8.7
        ([-0.05, -0.05, -0.05, -0.05], "combination"),
    ],
)
def test_one_source_must_gain_two_points_and_two_standard_errors(
    gains: list[float], chosen: str, digit_pass: FeaturePass, monkeypatch: pytest.MonkeyPatch
) -> None:
    together = np.array([0.80, 0.85, 0.75, 0.78])
    aurocs = {"mean": together - 0.1, "noise": together + 0.001, "origin": together + gains, "combination": together}
    monkeypatch.setattr(module, "class_aurocs", lambda half, plan, fitted: dict(aurocs))
    choice = choose_sources(digit_pass.fit, SOURCES, PLAN)
    found, entry = choice.sources, choice.selection
    assert found == ((ORIGIN,) if chosen == "origin" else SOURCES)
    if chosen == "origin":
        assert entry.reason.startswith("origin alone is better than the combination by ")
        assert "standard error" in entry.reason
    origin = next(candidate for candidate in entry.candidates if candidate.name == "origin")
    assert origin.difference == pytest.approx(np.mean(gains), abs=1e-6)
    assert origin.standard_error == pytest.approx(np.std(gains, ddof=1) / 2, abs=1e-6)


def test_rule_itself() -> None:
    def candidates(difference: float, error: float) -> list[Candidate]:
        return [
            Candidate("combination", 0.8, None, None),
            Candidate("mean", 0.8 + difference, difference, error),
            Candidate("noise", 0.7, -0.1, 0.0),
            Candidate("origin", 0.7, -0.1, 0.0),
        ]

    assert module._decided(SOURCES, candidates(0.03, 0.014))[0] == (MEAN,)
    assert module._decided(SOURCES, candidates(0.03, 0.016))[0] == SOURCES
    assert module._decided(SOURCES, candidates(0.0199, 0.0))[0] == SOURCES
    assert module._decided(SOURCES, candidates(0.5, float("inf")))[0] == SOURCES  # one class says nothing


def with_classes(table: FeatureTable, labels: list[int]) -> FeatureTable:
    return rows_of(table, np.isin(table.labels, labels))


def test_two_classes_cannot_choose_and_take_the_mean(digit_pass: FeaturePass) -> None:
    table = with_classes(digit_pass.fit, [2, 5])
    choice = choose_sources(table, SOURCES, PLAN)
    chosen, entry = choice.sources, choice.selection
    assert chosen == (MEAN,)
    assert entry.reason == "with 2 classes none can be left out, so nothing was chosen: mean is the default"
    assert (entry.classes, entry.images, entry.candidates) == (2, 0, ())
    bank = choose_bank(table, replace(PLAN, sources=chosen), 0.05)
    assert bank.rows is None
    assert bank.trials == ()
    assert bank.reason == "with 2 classes none can be left out, so no smaller bank was tried"


def test_three_classes_can_choose(digit_pass: FeaturePass) -> None:
    entry = choose_sources(with_classes(digit_pass.fit, [0, 2, 5]), SOURCES, PLAN).selection
    assert entry.classes == 3
    assert len(entry.candidates) == 4


def test_classes_of_single_images_cannot_be_left_out(digit_pass: FeaturePass) -> None:
    """Predicted labels may name a class once: there are three classes, and only one of them can be halved."""
    fit = digit_pass.fit
    keep = (fit.labels == 1) | (np.arange(len(fit.labels)) == np.flatnonzero(fit.labels == 2)[0])
    keep |= np.arange(len(fit.labels)) == np.flatnonzero(fit.labels == 5)[0]
    table = rows_of(fit, keep)
    choice = choose_sources(table, SOURCES, PLAN)
    chosen, entry = choice.sources, choice.selection
    assert chosen == (MEAN,)
    assert entry.candidates == ()
    assert choose_bank(table, replace(PLAN, sources=chosen), 0.05).trials == ()


def test_log_s_alone_is_chosen_where_it_ranks_like_the_bank() -> None:
    """At large norms log s spans many orders of magnitude, and says the same as the distance to the bank."""
    rng = np.random.default_rng(0)
    table = Gaussians(centers(rng, 5, 12, 300.0), 8.0).table(rng, np.arange(1500) % 5)
    found = choose_bank(table, replace(PLAN, sources=(MEAN,)), 0.05)
    assert found.rows == 0
    assert found.reason.startswith("log s alone: the smallest that loses nothing against")


def test_all_rows_are_kept_where_every_smaller_bank_decides_otherwise() -> None:
    rng = np.random.default_rng(0)
    table = Gaussians(centers(rng, 5, 24, 1.0), 0.5).table(rng, np.arange(700) % 5)
    found = choose_bank(table, replace(PLAN, sources=(MEAN,)), 0.05)
    assert found.rows is None
    assert found.reason == f"no smaller bank decides like {found.trials[0].rows:,} rows"
    assert len(found.trials) > 1
    assert all(trial.changed > 0.0025 or trial.auroc < found.trials[0].auroc - 0.001 for trial in found.trials[1:])


@pytest.mark.parametrize("good_from", [0, 64, 128, 256, 512])
def test_smallest_good_size_is_found(good_from: int, digit_pass: FeaturePass, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a table that says from which size on a bank is good enough, also at the limits of the rule."""
    auroc = {True: 0.951 + 1e-9, False: 0.9509}

    def measured(trial: module._SizeTrial, rows: int) -> BankTrial:
        return BankTrial(rows, auroc[rows >= good_from], 0.0)

    monkeypatch.setattr(module, "_auroc_and_flags", lambda few, many, plan, alpha: (0.952, np.zeros(1, bool)))
    monkeypatch.setattr(module._SizeTrial, "measured", measured)
    found = choose_bank(digit_pass.fit, PLAN, 0.05)
    if good_from < found.trials[0].rows:
        assert found.rows == good_from
        check_trials(found)
    else:
        assert found.rows is None


def test_decisions_that_change_are_no_good_size_either(
    digit_pass: FeaturePass, monkeypatch: pytest.MonkeyPatch
) -> None:
    def measured(trial: module._SizeTrial, rows: int) -> BankTrial:
        return BankTrial(rows, 1.0, 0.0 if rows >= 128 else 2 * module.CHANGED + 0.001)

    monkeypatch.setattr(module._SizeTrial, "measured", measured)
    assert choose_bank(digit_pass.fit, PLAN, 0.05).rows == 128


def check_trials(found: module.BankChoice) -> None:
    """The chosen size was measured and is good; a smaller measured one is not."""
    full, *others = found.trials
    assert full.changed == 0
    for trial in others:
        good = trial.auroc >= full.auroc - 0.001 and trial.changed <= 0.0025
        if found.rows is not None:
            assert good == (trial.rows >= found.rows)
    assert found.rows in [trial.rows for trial in others]


def test_bank_of_the_combination_is_chosen_on_real_digits(digit_pass: FeaturePass) -> None:
    found = choose_bank(digit_pass.fit, PLAN, 0.05)
    again = choose_bank(digit_pass.fit, PLAN, 0.05)
    assert found == again
    assert found.trials[0].rows <= digit_pass.fit.images
    assert found.rows is not None
    what = "log s alone" if found.rows == 0 else f"{found.rows} rows"
    assert found.reason == f"{what}: the smallest that loses nothing against {found.trials[0].rows:,}"
    check_trials(found)


def test_what_choosing_sources_measured_is_not_measured_again(
    digit_pass: FeaturePass, monkeypatch: pytest.MonkeyPatch
) -> None:
    choice = choose_sources(digit_pass.fit, SOURCES, PLAN)
    assert choice.full_auroc is not None
    expected = choose_bank(digit_pass.fit, PLAN, 0.05)
    measured, calls = class_aurocs, list[int | None]()

    def counted(half: LeaveOut, plan: HeadPlan, fitted: tuple[Head, BankRows]) -> dict[str, np.ndarray]:
        calls.append(plan.rows)
        return measured(half, plan, fitted)

    monkeypatch.setattr(module, "class_aurocs", counted)
    assert choose_bank(digit_pass.fit, PLAN, 0.05, full_auroc=choice.full_auroc) == expected
    assert calls == [trial.rows for trial in expected.trials[1:]]


def test_limits_hold_for_many_images(monkeypatch: pytest.MonkeyPatch) -> None:
    """12,000 images and 40 classes: what is fitted and scored stays bounded, and a full bank has 4,096 rows at most."""
    seen: list[tuple[int, int]] = []
    measured = class_aurocs

    def recorded(half: LeaveOut, plan: HeadPlan, fitted: tuple[Head, BankRows]) -> dict[str, np.ndarray]:
        seen.append((len(half.scored), len(half.bank.labels)))
        assert len(half.classes) <= 20
        return measured(half, plan, fitted)

    monkeypatch.setattr(module, "class_aurocs", recorded)
    monkeypatch.setattr(module, "SIZES", (64,))
    monkeypatch.setattr(module, "CHANGED", -1.0)  # so that no size is good enough
    rng = np.random.default_rng(0)
    table = Gaussians(centers(rng, 40, 6, 9.0)).table(rng, np.arange(12_000) % 40)
    plan = replace(PLAN, sources=(MEAN,))
    choose_sources(table, (MEAN, ORIGIN), replace(plan, sources=(MEAN, ORIGIN)))
    found = choose_bank(table, plan, 0.05)
    assert seen
    assert all(scored <= 1000 and bank <= 2048 for scored, bank in seen)
    assert (table.labels == table.predictions).sum() > module.MOST_ROWS
    assert found.rows == module.MOST_ROWS
    assert "no smaller bank decides like" in found.reason
    assert found.trials[0].rows <= module.MANY_IMAGES


def test_progress_is_reported(digit_pass: FeaturePass) -> None:
    labels: set[str] = set()
    choose_sources(digit_pass.fit, SOURCES, PLAN, lambda label, done, total: labels.add(label))
    choose_bank(digit_pass.fit, PLAN, 0.05, lambda label, done, total: labels.add(label))
    assert labels == {"choosing the OOD prototype", "choosing the bank's size"}
