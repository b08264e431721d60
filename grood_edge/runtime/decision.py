"""What a planner wants: known, unknown, unsure, or no valid view; pure functions over verdicts in order of time."""

from dataclasses import dataclass, replace

from grood_edge.contract import Contract
from grood_edge.errors import CalibrationError, UsageError
from grood_edge.runtime.e_cusum_rule import e_cusum_for
from grood_edge.runtime.states import (
    HOLD,
    NO_VIEW,
    Decision,
    Memory,
    Observation,
    State,
    StateName,
    Status,
    moved,
    require_seconds,
    scored_p_value,
    unseen,
)
from grood_edge.runtime.votes import Votes, at_most

__all__ = [
    "Decision",
    "Hysteresis",
    "Memory",
    "Observation",
    "PerFrame",
    "State",
    "StateName",
    "Status",
    "parse_decision",
]


@dataclass(frozen=True)
class _Frames:
    """The state, when the stream began, and the p_values of the newest scored frames."""

    state: State
    begun: float
    recent: tuple[float, ...] = ()

    @classmethod
    def before(cls, time: float) -> "_Frames":
        """Return the memory before the first frame."""
        return cls(State("UNSURE", time, "no frame yet"), time)


@dataclass(frozen=True)
class PerFrame:
    """Each frame decides for itself, at the session's alpha.

    no_view: seconds without a valid frame after which the state is NO-VIEW; 0 is at once.
    """

    no_view: float = 0.0
    name = "per-frame"

    def __post_init__(self) -> None:
        require_seconds("no-view", self.no_view)

    def start(self, time: float) -> _Frames:
        """Return the memory before the first frame."""
        return _Frames.before(time)

    def step(self, memory: Memory, seen: Observation) -> _Frames:
        """Return the memory after a frame."""
        assert isinstance(memory, _Frames)
        if seen.status != "OK":
            return replace(memory, state=unseen(memory.state, memory.begun, seen, self.no_view))
        name: StateName = "UNKNOWN" if seen.is_ood else "KNOWN"
        reason = f"a frame with p_value {scored_p_value(seen):.2g}"
        return replace(memory, state=moved(memory.state, name, reason, seen, float(seen.is_ood)))


@dataclass(frozen=True)
class Hysteresis:
    """UNKNOWN when k of the last n frames have p_value <= enter; KNOWN again when k of them have p_value > leave.

    UNKNOWN lasts at least `hold` seconds. KNOWN becomes UNSURE when none of the last n frames is above `leave`. What
    comes after NO-VIEW begins anew. Promises nothing about false alarms.
    """

    enter: float
    votes: Votes
    hold: float = HOLD
    no_view: float = NO_VIEW
    name = "hysteresis"

    def __post_init__(self) -> None:
        if not 0 < self.enter <= self.votes.leave:
            raise UsageError(
                f"hysteresis enters at p_value {self.enter:g} and leaves at {self.votes.leave:g}; expected "
                "0 < enter <= leave < 1: what has become UNKNOWN needs a larger p_value to be KNOWN again"
            )
        require_seconds("hold", self.hold)
        require_seconds("no-view", self.no_view)

    def start(self, time: float) -> _Frames:
        """Return the memory before the first frame."""
        return _Frames.before(time)

    def step(self, memory: Memory, seen: Observation) -> _Frames:
        """Return the memory after a frame."""
        assert isinstance(memory, _Frames)
        if seen.status != "OK":
            state = unseen(memory.state, memory.begun, seen, self.no_view)
            return replace(memory, state=state, recent=() if state.name == "NO-VIEW" else memory.recent)
        recent = self.votes.with_newest(memory.recent, scored_p_value(seen))
        against = sum(at_most(p, self.enter) for p in recent)
        name, reason = self._next(memory.state, seen.time, against, recent)
        return replace(memory, state=moved(memory.state, name, reason, seen, float(against)), recent=recent)

    def _next(self, state: State, time: float, against: int, recent: tuple[float, ...]) -> tuple[StateName, str]:
        if against >= self.votes.k:
            return "UNKNOWN", f"{against} of the last {len(recent)} frames have p_value <= {self.enter:g}"
        known = self.votes.known(recent)
        if state.name == "UNKNOWN" and (known < self.votes.k or time - state.since < self.hold):
            return "UNKNOWN", state.reason
        if known >= self.votes.k:
            return "KNOWN", self.votes.sentence(recent)
        if state.name == "KNOWN" and known > 0:
            return "KNOWN", state.reason
        return "UNSURE", self.votes.sentence(recent)


def parse_decision(text: str, contract: Contract, fps: float | None = None, alpha: float | None = None) -> Decision:
    """Return the decision that a text such as `hysteresis:enter=0.02,k=4` names.

    Args:
        text: `per-frame`; `hysteresis` with enter, leave, k, n, hold; `e-cusum` with hours, leave, k, n, hold. All take
            no-view. Values follow a colon, separated by commas; hours has no default.
        contract: of the artifact whose p_values are decided upon.
        fps: frames a second that will come, for `e-cusum`; None takes those of the contract's episodes.
        alpha: the session's, None for the artifact's own; hysteresis enters there unless told otherwise.

    Raises:
        UsageError: an unknown name, a value that cannot be read or is out of bounds, or no fps where it is needed.
        CalibrationError: the calibration scores, or the episodes, cannot carry what is asked for.
    """
    name, _, rest = text.partition(":")
    accepted = _SETTINGS.get(name)
    if accepted is None:
        raise UsageError(f"--decision {text!r}; expected {', '.join(_SETTINGS)}, or with settings: hysteresis:k=4,n=6")
    given = _settings(text, rest, accepted)
    no_view = given.get("no-view", 0.0 if name == "per-frame" else NO_VIEW)
    if name == "per-frame":
        return PerFrame(no_view)
    own = contract.calibration.alpha if alpha is None else alpha
    hold = given.get("hold", HOLD)
    if name == "hysteresis":
        enter = given.get("enter", own)
        _require_reachable(enter, contract)
        leave = given.get("leave", max(enter, min(0.5, 4 * own)))
        return Hysteresis(enter, Votes(leave, int(given.get("k", 5)), int(given.get("n", 7))), hold, no_view)
    if "hours" not in given:
        raise UsageError(
            f"--decision {text}: say how many hours there should be between false alarms, as in e-cusum:hours=8"
        )
    votes = Votes(given.get("leave", min(0.5, 4 * own)), int(given.get("k", 3)), int(given.get("n", 5)))
    return replace(e_cusum_for(contract, given["hours"], fps, votes), hold=hold, no_view=no_view)


_SETTINGS = {
    "per-frame": ("no-view",),
    "hysteresis": ("enter", "leave", "k", "n", "hold", "no-view"),
    "e-cusum": ("hours", "leave", "k", "n", "hold", "no-view"),
}


def _settings(text: str, rest: str, accepted: tuple[str, ...]) -> dict[str, float]:
    found: dict[str, float] = {}
    for part in rest.split(",") if rest else ():
        key, _, value = part.partition("=")
        if key not in accepted or key in found:
            raise UsageError(f"--decision {text!r}: {part!r}; expected each of {', '.join(accepted)} once at most")
        try:
            found[key] = float(int(value)) if key in ("k", "n") else float(value)
        except (ValueError, OverflowError) as error:
            kind = "a whole number" if key in ("k", "n") else "a number"
            raise UsageError(f"--decision {text!r}: {part!r}; expected {key}= and {kind}") from error
    return found


def _require_reachable(enter: float, contract: Contract) -> None:
    """Refuse a p_value that no frame can have: the decision would never become UNKNOWN."""
    if not 0 < enter < 1:
        raise UsageError(f"hysteresis enters at p_value {enter:g}; expected 0 < enter < 1, such as 0.05")
    n = min(contract.calibration.class_sizes or (contract.calibration.n,))
    if not at_most(1 / (n + 1), enter):
        of = " of one class" if contract.calibration.class_sizes else ""
        raise CalibrationError(
            f"hysteresis enters at p_value {enter:g}, but with {n} calibration scores{of} no p_value is below "
            f"{1 / (n + 1):.6g}; enter there or above, or calibrate with more images"
        )
