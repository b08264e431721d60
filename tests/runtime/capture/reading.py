"""What tests do with a source: read it to its end, and close it while it is read."""

import threading

from grood_edge.runtime.capture.sources import CapturedFrame, Source

__all__ = ["frames_of", "require_closing_wakes"]


def frames_of(source: Source) -> list[CapturedFrame]:
    frames = []
    while (frame := source.read()) is not None:
        frames.append(frame)
    return frames


def require_closing_wakes(source: Source) -> None:
    """Close it while another thread waits in `read`, which must end."""
    waiting = threading.Thread(target=source.read)
    waiting.start()
    source.close()
    waiting.join(5)
    assert not waiting.is_alive()
