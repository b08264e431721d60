"""Every error that grood-edge raises on purpose.

    GroodEdgeError
    ├── UsageError            the call contradicts itself                     exit code 2
    ├── InputError            something that was handed in cannot be used     exit code 1
    │   ├── DatasetError      images, folders, labels, class names
    │   ├── ClassifierError   the network: format, opset, feature point, outputs
    │   ├── CalibrationError  an alpha, delta or image count that carries no decision
    │   ├── ArtifactError     an .onnx that is not a whole, current grood-edge artifact
    │   ├── FrameError        a frame of the wrong dtype or shape
    │   └── SourceError       a camera, video or recording that cannot be opened, or vanished    exit code 3
    ├── OutputError           a result that cannot be written
    ├── VerificationError     a result that was computed, checked and found wrong
    ├── BackendError          a provider or device that does not do what was asked
    └── MissingExtraError     an optional dependency that is not installed

A message says what was received, what was expected, and what to do next.
"""

import signal

__all__ = [
    "ArtifactError",
    "BackendError",
    "CalibrationError",
    "ClassifierError",
    "DatasetError",
    "FrameError",
    "GroodEdgeError",
    "InputError",
    "MissingExtraError",
    "OutputError",
    "SourceError",
    "Terminated",
    "UsageError",
    "VerificationError",
    "reason_of",
]


MOST_CHARACTERS = 4000  # of a message
MOST_OF_A_REASON = 600  # characters of another library's own


class GroodEdgeError(Exception):
    """Base of all errors raised on purpose; `str()` is a sentence for the user."""

    exit_code = 1

    def __init__(self, message: str = "") -> None:
        super().__init__(_shortened(message, MOST_CHARACTERS))


class UsageError(GroodEdgeError):
    """Options that contradict each other or cannot be read."""

    exit_code = 2


class InputError(GroodEdgeError):
    """Something that was handed in cannot be used."""


class DatasetError(InputError):
    """Images, folders, labels or class names that cannot be used."""


class ClassifierError(InputError):
    """A classifier that cannot be turned into a classifier graph."""


class CalibrationError(InputError):
    """An alpha, delta or number of calibration images that carries no decision."""


class ArtifactError(InputError):
    """A file that is not a whole, current grood-edge artifact."""


class FrameError(InputError):
    """A frame with the wrong dtype or shape."""


class SourceError(InputError):
    """A camera, video or recording that cannot be opened, or that vanished."""

    exit_code = 3


class OutputError(GroodEdgeError):
    """A result that cannot be written where it was asked for."""


class VerificationError(GroodEdgeError):
    """A result that was computed, checked against its reference, and found wrong."""


class BackendError(GroodEdgeError):
    """A provider or device that does not do what was asked of it."""


class MissingExtraError(GroodEdgeError):
    """An optional dependency is missing; the message names the extra to install."""

    def __init__(self, package: str, extra: str, purpose: str) -> None:
        super().__init__(
            f"{purpose} needs the package {package}, which is not installed. "
            f"Install it with: pip install 'grood-edge[{extra}]' (in a clone: pip install '.[{extra}]')"
        )
        self._made_of = package, extra, purpose

    def __reduce__(self) -> tuple[type, tuple[str, str, str]]:
        """Pass it between processes: pickle would call it with its sentence."""
        return type(self), self._made_of


class Terminated(KeyboardInterrupt):
    """SIGTERM or SIGHUP: everything is closed as after Ctrl-C; exit codes tell them apart where a command says so."""

    def __init__(self, number: int = signal.SIGTERM) -> None:
        super().__init__()
        self.number = number


def reason_of(error: BaseException) -> str:
    """Return what another library's exception says in its first line, or its type where it says nothing."""
    said = str(error).strip()
    return _shortened(said.splitlines()[0], MOST_OF_A_REASON) if said else type(error).__name__


def _shortened(text: str, most: int) -> str:
    """Leave out the middle: names in a file may have any length, and what matters stands on either side of them."""
    return text if len(text) <= most else f"{text[: most // 2]} ... {text[-most // 2 :]}"
