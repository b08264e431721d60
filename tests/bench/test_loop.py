"""The loop on a clock of its own: turns, their order, the warm-up's rule and its cap."""

from collections.abc import Callable

import numpy as np

from grood_edge.bench.loop import MOST_RUNS, WINDOW, Side, timed, times_in_turn, warmed_up


class FakeClock:
    """Seconds that pass only when somebody works."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now

    def side(self, seconds: Callable[[int], tuple[float, ...]], calls: list[str], name: str) -> Side:
        def run(number: int) -> tuple[float, ...]:
            calls.append(name)
            stages = seconds(number)
            self.now += sum(stages)
            return stages

        return run


def test_sides_take_turns_and_the_order_alternates() -> None:
    clock, calls = FakeClock(), list[str]()
    sides = [clock.side(lambda n: (1.0, 2.0, 3.0), calls, "a"), clock.side(lambda n: (4.0,), calls, "b")]
    artifact, bare = times_in_turn(sides, 250.0, clock)
    assert calls[:6] == ["b", "a", "a", "b", "b", "a"]
    assert artifact.shape == (25, 3)  # 10 s a turn
    np.testing.assert_array_equal(artifact[3], [1.0, 2.0, 3.0])
    np.testing.assert_array_equal(bare, np.full((25, 1), 4.0))


def test_at_least_twenty_runs_and_at_most_as_many_as_are_kept() -> None:
    clock = FakeClock()
    (times,) = times_in_turn([clock.side(lambda n: (60.0,), [], "slow")], 1.0, clock)
    assert len(times) == 20
    (times,) = times_in_turn([clock.side(lambda n: (0.0,), [], "fast")], 1.0, clock)
    assert len(times) == MOST_RUNS


def test_the_warm_up_ends_when_every_side_has_settled() -> None:
    clock = FakeClock()

    def warming(number: int) -> tuple[float, ...]:
        return (2.0 if number < 15 else 1.0,)

    steady = clock.side(lambda n: (1.0,), [], "steady")
    found = warmed_up([steady, clock.side(warming, [], "warming")], 1e6, clock)
    assert found.settled
    assert found.runs == 5 * WINDOW  # medians 2, 1.5, 1, 1, 1


def test_the_warm_up_says_when_the_cap_came_first() -> None:
    clock = FakeClock()
    found = warmed_up([clock.side(lambda n: (1.0 + 0.01 * n,), [], "ever slower")], 60.0, clock)
    assert not found.settled
    assert (found.runs, found.seconds >= 60) == (50, True)
    assert warmed_up([clock.side(lambda n: (9.0,), [], "slow")], 1.0, clock).runs == WINDOW


def test_progress_is_told_between_runs_and_not_at_every_one() -> None:
    clock, told = FakeClock(), list[float]()
    times_in_turn([clock.side(lambda n: (0.1,), [], "a")], 10.0, clock, told.append)
    assert 15 <= len(told) <= 20
    assert told == sorted(told)


def test_a_timed_call_is_one_stage() -> None:
    clock = FakeClock()

    def work() -> None:
        clock.now += 3.0

    assert timed(work, clock)(0) == (3.0,)
