"""Decisions over time, on observations alone: states, when they begin, why, and what is promised."""

import math
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from grood_edge.artifact import read_artifact
from grood_edge.contract import Contract, StreamCalibration
from grood_edge.errors import CalibrationError, UsageError
from grood_edge.runtime.decision import Decision, Hysteresis, Observation, PerFrame, State, Status, parse_decision
from grood_edge.runtime.e_cusum import log_e_value
from grood_edge.runtime.e_cusum_rule import ECusum
from grood_edge.runtime.selftest import MODEL
from grood_edge.runtime.votes import Votes

RULE = Hysteresis(0.02, Votes(0.2, 3, 5), hold=1.0, no_view=0.45)
E_CUSUM = ECusum(6.0, 0.0, 0.0, 0.0, "a promise", Votes(0.2, 3, 5), hold=1.0, no_view=0.45)
FPS = 10.0


@pytest.fixture(scope="module")
def contract() -> Contract:
    return read_artifact(MODEL).contract


def with_stream(contract: Contract, interval: float | None, maxima: tuple[float, ...], fps: float = 30.0) -> Contract:
    stream = StreamCalibration(fps, len(maxima), 100 * len(maxima), interval, interval, maxima, "0" * 64)
    return replace(contract, stream=stream)


def frames(*seen: float | Status, start: float = 0.0) -> list[Observation]:
    """A number is the p_value of a frame that is OK, a word the status of one that is not."""
    return [
        Observation(start + index / FPS, what) if isinstance(what, str)
        else Observation(start + index / FPS, "OK", 1, "cup", float(what), what <= 0.05)
        for index, what in enumerate(seen)
    ]  # fmt: skip


def states(decision: Decision, observations: Iterable[Observation], start: float = 0.0) -> list[State]:
    memory = decision.start(start)
    assert memory.state.name == "UNSURE"
    assert memory.state.since == start
    found = []
    for seen in observations:
        memory = decision.step(memory, seen)
        found.append(memory.state)
    return found


def names(found: list[State]) -> list[str]:
    return [state.name for state in found]


def test_per_frame_says_what_the_frame_says() -> None:
    found = states(PerFrame(), frames(0.5, 0.01, 0.01, 0.4, "BLACK", 0.6))
    assert names(found) == ["KNOWN", "UNKNOWN", "UNKNOWN", "KNOWN", "NO-VIEW", "KNOWN"]
    assert [state.since for state in found] == [0, 0.1, 0.1, 0.3, 0.4, 0.5]
    assert [state.class_name for state in found] == ["cup", None, None, "cup", None, "cup"]
    assert "0.01" in found[1].reason
    assert [state.fed for state in found] == [True, True, True, True, False, True]


def test_hysteresis_enters_at_k_of_n_and_not_before() -> None:
    found = states(RULE, frames(0.5, 0.5, 0.5, 0.01, 0.5, 0.02, 0.01))
    assert names(found) == ["UNSURE", "UNSURE", "KNOWN", "KNOWN", "KNOWN", "KNOWN", "UNKNOWN"]
    assert found[-1].since == 0.6
    assert found[-1].reason == "3 of the last 5 frames have p_value <= 0.02"
    assert [state.evidence for state in found] == [0, 0, 0, 1, 1, 2, 3]
    scattered = states(RULE, frames(*([0.01, 0.5, 0.5] * 20)))
    assert "UNKNOWN" not in names(scattered)


def test_hysteresis_between_the_thresholds_keeps_unknown_and_leaves_known() -> None:
    between = [0.1] * 40
    assert set(names(states(RULE, frames(0.01, 0.01, 0.01, *between))[2:])) == {"UNKNOWN"}
    found = states(RULE, frames(0.5, 0.5, 0.5, *between))
    assert names(found)[2:7] == ["KNOWN"] * 5
    assert names(found)[7:] == ["UNSURE"] * 36
    assert found[-1].since == 0.7
    assert found[-1].reason == "0 of the last 5 fed frames have p_value > 0.2"


def test_unknown_is_held_for_its_minimum_and_leaves_by_k_of_n_only() -> None:
    found = states(RULE, frames(0.01, 0.01, 0.01, *[0.5] * 20))
    assert names(found)[2:12] == ["UNKNOWN"] * 10  # since 0.2, held to 1.2
    assert found[12].name == "KNOWN"
    assert found[12].since == pytest.approx(1.2)
    assert found[11].reason == found[2].reason
    short = replace(RULE, hold=0.0)
    assert names(states(short, frames(0.01, 0.01, 0.01, 0.5, 0.5, 0.1, 0.5)))[2:] == ["UNKNOWN"] * 4 + ["KNOWN"]


@pytest.mark.parametrize("decision", [RULE, E_CUSUM], ids=["hysteresis", "e-cusum"])
def test_no_view_after_a_while_with_the_time_of_the_last_valid_frame(decision: Decision) -> None:
    found = states(decision, frames(0.5, 0.5, 0.5, "STALE", "FROZEN", "BLACK", "SATURATED", "INVALID", "BLACK", 0.5))
    assert names(found) == ["UNSURE", "UNSURE", *["KNOWN"] * 5, "NO-VIEW", "NO-VIEW", "UNSURE"]
    assert found[5].class_name == "cup"
    assert not any(state.fed for state in found[3:9])
    assert (found[8].since, found[8].last_valid) == (0.7, 0.2)
    assert found[8].reason == "no valid frame for 0.50 s; the newest is INVALID"  # as it was when the state began
    assert found[9].last_valid == 0.9  # the view is back, and what was seen before it does not count


def test_a_stream_that_never_begins_is_no_view() -> None:
    found = states(RULE, [Observation(index / FPS, "BLACK") for index in range(8)])
    assert names(found) == ["UNSURE"] * 5 + ["NO-VIEW"] * 3
    assert found[-1].last_valid is None
    assert "since the start" in found[-1].reason


def test_e_cusum_adds_up_evidence_and_alarms_at_its_threshold() -> None:
    found = states(E_CUSUM, frames(*[0.5] * 5, *[0.004] * 4))
    log_e = log_e_value(0.004)
    assert 2 * log_e < 6 < 3 * log_e
    assert names(found) == ["UNSURE", "UNSURE", "KNOWN", "KNOWN", "KNOWN", "KNOWN", "UNSURE", "UNKNOWN", "UNKNOWN"]
    assert found[5].evidence == pytest.approx(log_e)  # M began at 1, whatever spoke for ID frames before
    assert found[6].evidence == pytest.approx(2 * log_e)
    assert "over half of 6.00" in found[6].reason
    assert found[7].reason.startswith(f"log evidence {3 * log_e:.2f} reached 6.00: a promise")
    assert found[8].evidence == pytest.approx(log_e)  # M = 1 after the alarm


def test_e_cusum_leaves_unknown_after_the_hold_and_k_of_n_fed_frames() -> None:
    recovered = states(E_CUSUM, frames(*[0.004] * 3, *[0.5] * 12))
    assert names(recovered)[2:12] == ["UNKNOWN"] * 10
    assert names(recovered)[12] == "KNOWN"
    stays = states(E_CUSUM, frames(*[0.004] * 40))
    assert set(names(stays)[2:]) == {"UNKNOWN"}
    assert stays[-1].since == pytest.approx(0.2)
    doubtful = states(E_CUSUM, frames(*[0.004] * 3, *[0.1] * 40))
    assert set(names(doubtful)[2:]) == {"UNKNOWN"}


def test_frames_that_are_not_scored_are_e_one_and_do_not_take_a_turn() -> None:
    """Evidence is kept over them, and the first OK frame after them is fed."""
    slow = replace(E_CUSUM, interval=0.3, slack=0.05)
    found = states(slow, frames(0.004, "INVALID", "BLACK", "BLACK", 0.004, 0.004, 0.004, 0.004))
    assert [state.fed for state in found] == [True, False, False, False, True, False, False, True]
    assert found[4].evidence == pytest.approx(2 * log_e_value(0.004))
    negative = states(E_CUSUM, frames(1.0, "BLACK", 0.004))
    assert negative[0].evidence == math.log(0.5)
    assert negative[2].evidence == pytest.approx(log_e_value(0.004))


def test_feeding_is_by_time_with_half_a_frame_of_jitter() -> None:
    rng = np.random.default_rng(0)
    rule = replace(E_CUSUM, interval=0.5, slack=0.5 / 30)
    times = np.arange(3000) / 30 + rng.uniform(-0.2, 0.2, 3000) / 30
    found = states(rule, [Observation(float(t), "OK", 0, "cup", 0.5) for t in np.sort(times)])
    fed = np.array([t for t, state in zip(np.sort(times), found, strict=True) if state.fed])
    assert len(fed) == 200
    assert np.abs(np.diff(fed) - 0.5).max() < 0.4 / 30 + 1e-9
    bare = states(replace(rule, slack=0.0), [Observation(float(t), "OK", 0, "cup", 0.5) for t in np.sort(times)])
    assert sum(state.fed for state in bare) < 197  # without it jitter costs a frame now and then


def test_e_cusum_on_id_p_values_alarms_as_rarely_as_it_says() -> None:
    """i.i.d. frames of a calibration set of 314: p are multiples of 1/315, p = 1 among them. A = 20 frames."""
    rng = np.random.default_rng(0)
    rule = replace(E_CUSUM, log_a=math.log(20), hold=0.0)
    memory, alarms, count = rule.start(0.0), 0, 12_000
    for index, rank in enumerate(rng.integers(1, 316, count)):
        seen = Observation(index / FPS, "OK", 0, "cup", float(np.float32(rank / 315)))
        memory = rule.step(memory, seen)
        alarms += memory.state.evidence >= rule.log_a
        assert memory.log_m < rule.log_a
        assert len(memory.recent) <= 5
    assert 0 < alarms < count / 20


def test_p_values_that_cannot_be_are_refused() -> None:
    for p_value in (None, 0.0, 1.5, math.nan):
        for decision in (RULE, E_CUSUM):
            with pytest.raises(UsageError, match="p_value"):
                decision.step(decision.start(0.0), Observation(0.0, "OK", 0, "cup", p_value))


def test_steps_have_no_state_so_a_recording_is_decided_again_alike(contract: Contract) -> None:
    rng = np.random.default_rng(1)
    recording = frames(*rng.choice([0.004, 0.1, 0.6, 1.0], 300).tolist())
    for text in ("per-frame", "hysteresis", "e-cusum:hours=0.01"):
        decision = parse_decision(text, contract, FPS)
        assert decision.name == text.partition(":")[0]
        assert states(decision, recording) == states(decision, recording)


def test_parsed_decisions_have_their_settings(contract: Contract) -> None:
    assert parse_decision("per-frame", contract) == PerFrame()
    assert parse_decision("hysteresis", contract) == Hysteresis(0.05, Votes(0.2, 5, 7), 1.0, 0.5)
    assert parse_decision("hysteresis", contract, alpha=0.01) == Hysteresis(0.01, Votes(0.04, 5, 7), 1.0, 0.5)
    found = parse_decision("hysteresis:enter=0.02,leave=0.3,k=2,n=3,hold=0,no-view=2", contract)
    assert found == Hysteresis(0.02, Votes(0.3, 2, 3), 0.0, 2.0)
    rule: Any = parse_decision("e-cusum:hours=2,k=4,n=9,leave=0.5,hold=3,no-view=1", contract, 10.0)
    assert (rule.votes, rule.hold, rule.no_view) == (Votes(0.5, 4, 9), 3.0, 1.0)
    assert rule.log_a == pytest.approx(math.log(72_000))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("median", "expected per-frame, hysteresis, e-cusum"),
        ("", "expected per-frame"),
        ("hysteresis:enter=0.3,leave=0.1", "enter <= leave"),
        ("hysteresis:enter=0", "0 < enter"),
        ("hysteresis:enter=2", "enters at p_value 2; expected 0 < enter < 1"),
        ("hysteresis:leave=1", "leave is"),
        ("hysteresis:k=6,n=5", "6 of 5"),
        ("hysteresis:k=0", "0 of 7"),
        ("hysteresis:n=5000", "5000"),
        ("hysteresis:k=2.5", "a whole number"),
        ("hysteresis:hold=-1", "hold is -1"),
        ("hysteresis:hold=nan", "hold is nan"),
        ("hysteresis:hold=x", "a number"),
        ("hysteresis:hours=3", "expected each of enter"),
        ("hysteresis:k=2,k=3", "once at most"),
        ("per-frame:k=2", "expected each of no-view"),
        ("per-frame:no-view=inf", "no-view is inf"),
        ("e-cusum", "how many hours"),
        ("e-cusum:hours=0", "0 hours"),
        ("e-cusum:hours=nan", "nan hours"),
        ("e-cusum:hours=8,no-view=-1", "no-view is -1"),
    ],
)
def test_decisions_that_cannot_be_are_refused(text: str, message: str, contract: Contract) -> None:
    with pytest.raises(UsageError, match=message):
        parse_decision(text, contract, 30.0)


def test_hysteresis_refuses_a_p_value_that_no_frame_can_have(contract: Contract) -> None:
    with pytest.raises(CalibrationError, match="no p_value is below"):
        parse_decision("hysteresis:enter=0.003", contract)
    assert parse_decision("hysteresis:enter=0.0032", contract).name == "hysteresis"


def test_e_cusum_without_episodes_says_that_it_is_for_independent_frames(contract: Contract) -> None:
    rule: Any = parse_decision("e-cusum:hours=8", contract, 30.0)
    assert (rule.log_a, rule.interval) == (pytest.approx(math.log(8 * 3600 * 30)), 0)
    assert "a mean of 8 h between false alarms, for independent frames only" in rule.promise
    assert rule.promise in rule.start(0.0).state.reason
    with pytest.raises(UsageError, match="frames a second"):
        parse_decision("e-cusum:hours=8", contract)


def test_e_cusum_with_a_decimation_counts_fed_frames_alone(contract: Contract) -> None:
    rule: Any = parse_decision("e-cusum:hours=8", with_stream(contract, 0.5, (3.0,) * 10))
    assert (rule.interval, rule.slack) == (0.5, 0.5 / 30)
    assert rule.log_a == pytest.approx(math.log(8 * 3600 * 2))
    assert "fed every 0.5 s" in rule.promise
    slower: Any = parse_decision("e-cusum:hours=8", with_stream(contract, 0.5, (3.0,) * 10), 1.0)
    assert slower.log_a == pytest.approx(math.log(8 * 3600))


def test_with_59_episodes_both_thresholds_hold_and_the_larger_one_decides(contract: Contract) -> None:
    low: Any = parse_decision("e-cusum:hours=8", with_stream(contract, 0.5, (5.0,) * 59))
    assert low.log_a == pytest.approx(math.log(8 * 3600 * 2))
    assert "above the threshold by episode: at most 5% of episodes" in low.promise
    high: Any = parse_decision("e-cusum:hours=8", with_stream(contract, 0.5, (25.0,) * 59))
    assert high.log_a == pytest.approx(25.0)
    assert high.promise.startswith("threshold by episode")


def test_without_a_decimation_only_the_threshold_by_episode_is_left(contract: Contract) -> None:
    with pytest.raises(CalibrationError, match="needs 59 of them"):
        parse_decision("e-cusum:hours=8", with_stream(contract, None, (5.0,) * 58))
    rule: Any = parse_decision("e-cusum:hours=8", with_stream(contract, None, (5.0,) * 59), 120.0)
    assert rule.log_a == pytest.approx(5.0)
    assert rule.interval == pytest.approx(1 / 30)  # as the episodes were scored
    assert "no mean time can be promised" in rule.promise


def test_e_cusum_says_when_the_p_values_themselves_promise_nothing(contract: Contract) -> None:
    calibration = replace(contract.calibration, provenance="seen-in-training", guarantee="none", delta=None)
    rule: Any = parse_decision("e-cusum:hours=8", replace(contract, calibration=calibration), 30.0)
    assert "seen in training" in rule.promise


def test_the_smallest_p_value_of_19_scores_reaches_unknown(contract: Contract) -> None:
    """1 / 20 as float32 lies above 0.05: without tolerance the decision would never become UNKNOWN."""
    few = replace(contract, calibration=replace(contract.calibration, n=19, class_sizes=()))
    decision = parse_decision("hysteresis:enter=0.05", few)
    smallest = float(np.float32(1) / np.float32(20))
    assert smallest > 0.05
    assert names(states(decision, frames(*[smallest] * 5)))[-1] == "UNKNOWN"
    votes = Votes(0.05, 1, 1)
    assert votes.known((smallest,)) == 0
    assert votes.known((float(np.nextafter(np.float32(smallest), np.float32(1))) + 1e-6,)) == 1


def test_a_number_of_400_digits_is_a_sentence(contract: Contract) -> None:
    with pytest.raises(UsageError, match="a whole number"):
        parse_decision(f"hysteresis:k={'9' * 400}", contract)
