"""The clock of a recording whose messages have a stamp of their own and a time at which they were logged."""

__all__ = ["StampClock"]

# Seconds by which stamp and log may differ in how much time has passed since the picture before: more than a network
# delays a message by, and little enough that NO-VIEW does not come much too early.
_APART = 1.0


class StampClock:
    """The time of each picture: its stamp, as long as stamps and log agree on how much time has passed.

    One wild stamp would hold a decision's clock until the recording catches up with it. Since the picture before, stamp
    and log may differ by `_APART` seconds; beyond that the smaller of the two steps that do not go back counts. A stamp
    that goes back is never believed: the log's step counts, so the clock neither turns nor stands still. Stamps may be
    of another clock than the log, and either may jump: only steps are compared.
    """

    def __init__(self) -> None:
        self._time: float | None = None
        self._logged: float | None = None

    def time_of(self, stamp: float | None, logged: float | None) -> float | None:
        """Return the time of the next picture; without stamps that of the log, None where there is neither."""
        found = logged if stamp is None else stamp
        if self._time is not None and found is not None:
            passed = None if logged is None or self._logged is None else logged - self._logged
            step = found - self._time
            if step < 0 or (passed is not None and abs(step - passed) > _APART):
                found = self._time + min((s for s in (step, passed) if s is not None and s >= 0), default=0.0)
        self._time = self._time if found is None else found
        self._logged = self._logged if logged is None else logged
        return found
