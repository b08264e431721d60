"""From an artifact and frames to verdicts. Imports neither torch nor onnx."""

from grood_edge.runtime.backend import Backend
from grood_edge.runtime.replay import ReplayBackend, record
from grood_edge.runtime.session import Session, Verdict, open_session

__all__ = ["Backend", "ReplayBackend", "Session", "Verdict", "open_session", "record"]
