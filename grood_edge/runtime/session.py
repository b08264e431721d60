"""A session: frames in, verdicts out, at one alpha."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Literal

import numpy as np

from grood_edge.arrays import Flags, Frame, Scores
from grood_edge.artifact import Artifact, read_artifact
from grood_edge.conformal import count_at_least, rank_for
from grood_edge.contract import Contract
from grood_edge.errors import BackendError, FrameError, UsageError
from grood_edge.outputs import Outputs, concatenated
from grood_edge.preprocessing import preprocess_frame
from grood_edge.runtime.backend import Backend
from grood_edge.runtime.onnxrt import OnnxRuntimeBackend

__all__ = ["Session", "Verdict", "open_session"]

Color = Literal["rgb", "bgr"]


@dataclass(frozen=True)
class Verdict:
    """What the artifact says about one frame, at the session's alpha.

    `ood_score`: higher = more OOD. `p_value`: small = OOD. `valid` is False when the network's features or logits
    were not finite; `is_ood` is then True.
    """

    class_id: int
    class_name: str
    ood_score: float
    p_value: float
    is_ood: bool
    valid: bool


class Session:
    """An open artifact. Use it in a `with` block, from one thread at a time.

    `alpha` decides: the artifact's own, or another one for which the rank k is computed anew from the
    calibration scores in the contract.
    """

    def __init__(self, artifact: Artifact, backend: Backend, alpha: float | None = None, color: Color = "rgb") -> None:
        if color not in ("rgb", "bgr"):
            raise UsageError(f"color is {color!r}; expected 'rgb' or 'bgr', the channel order of the frames")
        self.contract: Contract = artifact.contract
        self.backend = backend
        calibration = artifact.contract.calibration
        self.alpha = calibration.alpha if alpha is None else alpha
        self.rank = calibration.k if alpha is None else rank_for(alpha, calibration.delta, calibration.n)
        self._scores = calibration.sorted_scores()
        self._color = color
        p = artifact.contract.preprocessing
        self._shape = (p.height, p.width, p.channels)
        self._single = artifact.contract.classifier.batch == "1"

    def predict(self, frame: Frame) -> Verdict:
        """Return the verdict for one frame, uint8 `[h, w, 3]`, `[h, w, 1]` or `[h, w]`, any size.

        Raises:
            FrameError: another dtype or shape.
            BackendError: the device failed.
        """
        return self.predict_batch([frame])[0]

    def predict_batch(self, frames: Sequence[Frame] | np.ndarray) -> list[Verdict]:
        """Return one verdict a frame; the frames may have different sizes.

        Raises:
            FrameError: no frames, or one of another dtype or shape.
            BackendError: the device failed.
        """
        return self.verdicts(self.infer(frames))

    def infer(self, frames: Sequence[Frame] | np.ndarray) -> Outputs:
        """Resize and crop the frames as the contract says, run the graph, and return its raw outputs.

        Raises:
            FrameError: no frames, or one of another dtype or shape.
            BackendError: the device failed.
        """
        shape: tuple[int, ...] = getattr(frames, "shape", ())
        if len(shape) == 2 or (len(shape) == 3 and shape[2] in (1, 3)):
            raise FrameError(f"one frame of shape {list(shape)} was given as a batch; use predict, or a list of frames")
        if len(frames) == 0:
            raise FrameError("no frames were given; expected at least one")
        batch = np.empty((len(frames), *self._shape), np.uint8)
        for index, frame in enumerate(frames):
            array = np.asarray(frame)
            if self._color == "bgr" and array.ndim == 3 and array.shape[2] == 3:
                array = array[..., ::-1]
            batch[index] = preprocess_frame(array, self.contract.preprocessing)
        if not self._single:
            return self.backend.run(batch)
        runs = [self.backend.run(batch[i : i + 1]) for i in range(len(batch))]
        return concatenated(runs)

    def is_ood(self, scores: Scores, valid: Flags) -> Flags:
        """Decide at the session's alpha: not valid, or at most k - 1 calibration scores are >= the score."""
        decision: Flags = ~valid | (count_at_least(self._scores, scores) < self.rank)
        return decision

    def verdicts(self, outputs: Outputs) -> list[Verdict]:
        """Return the verdicts for raw outputs, at the session's alpha.

        Raises:
            BackendError: the backend answers for another number of classes than the contract has.
        """
        if outputs.logits.shape[1] != len(self.contract.classes):
            found, expected = outputs.logits.shape[1], len(self.contract.classes)
            raise BackendError(f"the backend gives {found} logits, but the contract names {expected} classes")
        decisions = self.is_ood(outputs.ood_score, outputs.valid)
        return [
            Verdict(
                class_id=int(outputs.class_id[i]),
                class_name=self.contract.classes[int(outputs.class_id[i])],
                ood_score=float(outputs.ood_score[i]),
                p_value=float(outputs.p_value[i]),
                is_ood=bool(decisions[i]),
                valid=bool(outputs.valid[i]),
            )
            for i in range(len(outputs))
        ]

    def close(self) -> None:
        """Release the backend."""
        self.backend.close()

    def __enter__(self) -> "Session":
        """Return the session itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the session, whatever happened in the block."""
        self.close()


def open_session(
    path: Path | str,
    *,
    alpha: float | None = None,
    provider: str = "cpu",
    color: Color = "rgb",
    threads: int | None = None,
    backend: Backend | None = None,
) -> Session:
    """Open an artifact for scoring.

    Args:
        path: the artifact.
        alpha: accepted false-alarm rate; None takes the artifact's own.
        provider: `cpu` or `cuda`; the one asked for is the one that runs, or an error.
        color: channel order of the frames that will be given: `rgb`, or `bgr` as OpenCV delivers them.
        threads: CPU threads of onnxruntime; None leaves it to onnxruntime.
        backend: another backend, such as a `ReplayBackend`; `provider` and `threads` are then not used.

    Raises:
        ArtifactError: not a whole, current artifact.
        CalibrationError: the calibration set cannot carry `alpha`.
        BackendError: the provider is not available.
    """
    artifact = read_artifact(Path(path))
    if backend is None:
        backend = OnnxRuntimeBackend(artifact, provider, threads)
    return Session(artifact, backend, alpha, color)
