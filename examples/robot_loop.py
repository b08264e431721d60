"""Camera, session, decision; the robot stops while the view is not known.

python robot_loop.py model.onnx 0
"""

import sys

from grood_edge.runtime import open_session
from grood_edge.runtime.decision import parse_decision
from grood_edge.runtime.health import HealthRules
from grood_edge.runtime.mailbox import Capture, parse_policy
from grood_edge.runtime.sources import open_source
from grood_edge.runtime.stream import StreamRules, StreamVerdict, verdicts

PATIENCE = 0.5  # seconds without a frame after which the camera stands still


def drive(change: StreamVerdict) -> None:
    """Replace this by your robot: called when the state changes, never in between."""
    go = change.state.name == "KNOWN"
    print(f"{change.time:8.2f} s  {'go' if go else 'STOP'}: {change.state.name}, {change.state.reason}")


source = open_source(sys.argv[2])
with (
    open_session(sys.argv[1], color=source.color) as session,
    Capture(source, parse_policy(None, source.live), PATIENCE if source.live else None) as capture,
):
    rules = StreamRules(
        parse_decision("hysteresis", session.contract), HealthRules(max_age=PATIENCE if source.live else None)
    )
    for seen in verdicts(session, capture, rules, on_change=drive):
        if seen.state.name == "KNOWN" and seen.verdict is not None:
            pass  # pick up seen.verdict.class_name
print("the source has ended")
