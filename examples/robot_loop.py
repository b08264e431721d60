"""Camera, session, decision; the robot stops while the view is not known.

python robot_loop.py model.onnx 0
"""

import sys

from grood_edge.runtime import open_session
from grood_edge.runtime.capture.mailbox import Capture, parse_policy
from grood_edge.runtime.capture.sources import open_source
from grood_edge.runtime.stream import StreamVerdict, stream_rules, verdicts


def drive(change: StreamVerdict) -> None:
    """Replace this by your robot: called when the state changes, never in between."""
    go = change.state.name == "KNOWN"
    print(f"{change.time:8.2f} s  {'go' if go else 'STOP'}: {change.state.name}, {change.state.reason}")


source = open_source(sys.argv[2])
with open_session(sys.argv[1], color=source.color) as session:
    rules = stream_rules(session.contract, source)
    with Capture(source, parse_policy(None, source.live), rules.health.max_age) as capture:
        for seen in verdicts(session, capture, rules, on_change=drive):
            if seen.state.name == "KNOWN" and seen.verdict is not None:
                pass  # pick up seen.verdict.class_name
print("the source has ended")
