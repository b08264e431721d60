"""Camera, session, decision; the robot stops while the view is not known, and at the end, whatever ends the loop.

python robot_loop.py model.onnx 0
"""

import signal
import sys

from grood_edge.runtime import open_session
from grood_edge.runtime.capture.mailbox import Capture, parse_policy
from grood_edge.runtime.capture.sources import open_source
from grood_edge.runtime.stream import StreamVerdict, stream_rules, verdicts


def drive(go: bool, why: str) -> None:
    """Replace this by your robot."""
    print(f"{'go' if go else 'STOP'}: {why}", flush=True)


def changed(change: StreamVerdict) -> None:
    """Is called when the state changes, never in between."""
    drive(change.state.name == "KNOWN", f"{change.state.name} at {change.time:.2f} s, {change.state.reason}")


signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # or `finally` would not be reached
try:
    source = open_source(sys.argv[2])
    with open_session(sys.argv[1], color=source.color) as session:
        rules = stream_rules(session.contract, source)
        with Capture(source, parse_policy(None, source.live), rules.health.max_age) as capture:
            for seen in verdicts(session, capture, rules, on_change=changed):
                if seen.state.name == "KNOWN" and seen.verdict is not None:
                    pass  # pick up seen.verdict.class_name
finally:
    drive(False, "the loop has ended")  # with the source, Ctrl-C, SIGTERM or an error
