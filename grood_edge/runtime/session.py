"""A session: frames in, verdicts out, at one alpha."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType

import numpy as np

from grood_edge.arrays import Flags, Frames, InputFrame
from grood_edge.artifact import Artifact, read_artifact
from grood_edge.camera_part import open_camera, prepared_frame, prepared_model
from grood_edge.conformal import DecisionRule
from grood_edge.contract import Contract
from grood_edge.errors import ArtifactError, BackendError, FrameError, UsageError
from grood_edge.ort import OrtModel
from grood_edge.outputs import Outputs, concatenated
from grood_edge.preprocessing import Color
from grood_edge.progress import Progress, silent
from grood_edge.runtime.backend import Backend, FreshLane, Lane, LendingBackend
from grood_edge.runtime.choose import BackendName, Choice, Chosen, choose_backend
from grood_edge.runtime.decisions import class_thresholds, is_alarm
from grood_edge.runtime.explain import Reason, reasons
from grood_edge.runtime.frames import array_view, write_frame
from grood_edge.runtime.machine import return_free_memory
from grood_edge.scoring import Head
from grood_edge.stored_head import head_from_model

__all__ = ["Session", "Verdict", "open_session"]


@dataclass(frozen=True)
class Verdict:
    """What the artifact says about one frame, at the session's alpha.

    `ood_score`: higher = more OOD. `p_value`: small = OOD. `valid` is False when the network's features or logits
    were not finite; `is_ood` is then True. `reason` is there when it was asked for and the frame is valid.
    """

    class_id: int
    class_name: str
    ood_score: float
    p_value: float
    is_ood: bool
    valid: bool
    reason: Reason | None = None


def require_usable(contract: Contract, alpha: float | None, color: str | None) -> None:
    """Find out what a session would refuse.

    Raises:
        UsageError: another channel order than `rgb` or `bgr`.
        CalibrationError: the calibration set cannot carry `alpha`.
    """
    if color not in (None, "rgb", "bgr"):
        raise UsageError(f"color is {color!r}; expected 'rgb' or 'bgr', the channel order of the frames")
    contract.calibration.rule(len(contract.classes), alpha)


class Session:
    """An open artifact. Use it in a `with` block, from any number of threads; close it from one.

    `alpha` decides: the artifact's own, or another one for which the rank k is computed anew from the
    calibration scores in the contract (`rule`). `load_head` reads the statistics when a reason is first asked for.
    Verdicts are plain values, and the arrays of `infer` belong to the caller; no frame is kept after a call.
    """

    def __init__(
        self,
        artifact: Artifact,
        backend: Backend,
        alpha: float | None = None,
        color: Color | None = None,
        load_head: Callable[[], Head] | None = None,
        camera: OrtModel | None = None,
    ) -> None:
        require_usable(artifact.contract, alpha, color)
        self.contract: Contract = artifact.contract
        self.backend = backend
        self.fallbacks: tuple[str, ...] = ()  # why `auto` passed over better backends
        calibration = artifact.contract.calibration
        self.alpha = calibration.alpha if alpha is None else alpha
        self.rule = calibration.rule(len(artifact.contract.classes), alpha)
        self._load_head = load_head or (lambda: head_from_model(artifact.model))
        self._head: Head | None = None
        p = artifact.contract.preprocessing
        own: Color = "bgr" if p.camera is not None and p.camera.layout == "bgr" and camera is None else "rgb"
        self._color: Color = color or own
        self._camera = camera  # there: the backend takes prepared frames, and frames may have any size
        self._shape = p.input_shape if camera is None else (p.height, p.width, p.channels)
        self._single = artifact.contract.classifier.batch == "1"
        self._lending = backend if isinstance(backend, LendingBackend) else None

    @property
    def rule(self) -> DecisionRule:
        """The calibration scores and ranks that decide; another one may be set between frames."""
        return self._rule

    @rule.setter
    def rule(self, rule: DecisionRule) -> None:
        self._rule = rule
        self._thresholds = class_thresholds(rule)

    def predict(self, frame: object, explain: bool = False) -> Verdict:
        """Return the verdict for one frame, uint8 `[h, w, 3]`, `[h, w, 1]` or `[h, w]`, any size.

        A NumPy array, also read-only or not contiguous, or anything with `__dlpack__` or `__array_interface__` in host
        memory. With `explain`, its `reason` as well.

        Raises:
            FrameError: another dtype or shape.
            BackendError: the device failed.
            ArtifactError: with `explain`, the first time: the file is gone, or another since the session was opened.
        """
        with self.lane(1) as lane:
            self.write(frame, lane.frames[0])
            return self.verdicts(lane.run(), explain)[0]

    def predict_batch(self, frames: Sequence[object] | np.ndarray, explain: bool = False) -> list[Verdict]:
        """Return one verdict a frame; the frames may have different sizes.

        Raises:
            FrameError: no frames, or one of another dtype or shape.
            BackendError: the device failed.
            ArtifactError: with `explain`, as `predict`.
        """
        _require_batch(frames)
        if self._single:
            return [self.predict(frame, explain) for frame in frames]
        with self.lane(len(frames)) as lane:
            for frame, target in zip(frames, lane.frames, strict=True):
                self.write(frame, target)
            return self.verdicts(lane.run(), explain)

    def infer(self, frames: Sequence[object] | np.ndarray) -> Outputs:
        """Resize and crop the frames as the contract says, run the graph, and return its raw outputs, new arrays.

        Raises:
            FrameError: no frames, or one of another dtype or shape.
            BackendError: the device failed.
        """
        _require_batch(frames)
        batch = np.empty((len(frames), *self._shape), np.uint8)
        for frame, target in zip(frames, batch, strict=True):
            self.write(frame, target)
        return self.infer_prepared(batch)

    def prepare(self, frame: object) -> InputFrame:
        """Return one frame as the graph takes it: resized and cropped; of a camera's artifact the raw frame itself.

        Raises:
            FrameError: another dtype or shape; of a camera's artifact another size than the camera's.
        """
        target = np.empty(self._shape, np.uint8)
        self.write(frame, target)
        return target

    def write(self, frame: object, target: InputFrame) -> None:
        """Write one frame into an array of the graph's input, as `prepare` returns it.

        Raises:
            FrameError: as `prepare`.
        """
        if self._camera is None:
            write_frame(frame, self.contract.preprocessing, self._color, target)
            return
        array = array_view(frame)
        flipped = self._color == "bgr" and array.shape[2:] == (3,)
        target[...] = prepared_frame(array[..., ::-1] if flipped else array, self.contract.preprocessing, self._camera)

    def infer_prepared(self, frames: Frames) -> Outputs:
        """Run frames that are already resized and cropped, uint8 `[n, height, width, channels]` of the graph's input.

        Raises:
            FrameError: another dtype or shape.
            BackendError: the device failed.
        """
        if frames.dtype != np.uint8 or frames.shape[1:] != self._shape or len(frames) == 0:
            raise FrameError(
                f"prepared frames are {frames.dtype} {list(frames.shape)}; expected uint8 [n, {self._shape[0]}, "
                f"{self._shape[1]}, {self._shape[2]}]. For frames of any size use infer"
            )
        if not self._single:
            return self.backend.run(frames)
        return concatenated([self.backend.run(frames[i : i + 1]) for i in range(len(frames))])

    def lane(self, count: int) -> AbstractContextManager[Lane]:
        """Return a block with buffers for `count` frames: the backend's own, where it lends them."""
        if self._lending is not None:
            return self._lending.lend(count)
        return nullcontext(FreshLane(self.backend, (count, *self._shape)))

    def is_ood(self, outputs: Outputs) -> Flags:
        """Decide at the session's alpha: not valid, or at most k - 1 calibration scores are >= the score."""
        decision: Flags = ~outputs.valid | self.rule.is_alarm(outputs.ood_score, outputs.class_id)
        return decision

    def verdicts(self, outputs: Outputs, explain: bool = False) -> list[Verdict]:
        """Return the verdicts for raw outputs, at the session's alpha.

        Raises:
            BackendError: the backend answers for another number of classes than the contract has.
            ArtifactError: with `explain`, as `predict`.
        """
        if outputs.logits.shape[1] != len(self.contract.classes):
            found, expected = outputs.logits.shape[1], len(self.contract.classes)
            raise BackendError(f"the backend gives {found} logits, but the contract names {expected} classes")
        behind = self._reasons(outputs) if explain else [None] * len(outputs)
        return [self._verdict(outputs, row, reason) for row, reason in enumerate(behind)]

    def _verdict(self, outputs: Outputs, row: int, reason: Reason | None) -> Verdict:
        """Read one row out of the arrays, without making others."""
        class_id, valid = outputs.class_id.item(row), outputs.valid.item(row)
        score: float = outputs.ood_score.item(row)
        if not 0 <= class_id < len(self._thresholds):
            last = len(self._thresholds) - 1
            raise BackendError(f"the backend gives class_id {class_id}; expected 0 to {last}: run grood-edge selftest")
        return Verdict(
            class_id=class_id,
            class_name=self.contract.classes[class_id],
            ood_score=score,
            p_value=outputs.p_value.item(row),
            is_ood=not valid or is_alarm(score, self._thresholds[class_id]),
            valid=valid,
            reason=reason,
        )

    def _reasons(self, outputs: Outputs) -> list[Reason | None]:
        if self._head is None:
            self._head = self._load_head()
        return reasons(outputs, self.contract, self._head)

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


def _require_batch(frames: Sequence[object] | np.ndarray) -> None:
    shape: tuple[int, ...] = getattr(frames, "shape", ())
    if len(shape) == 2 or (len(shape) == 3 and shape[2] in (1, 3)):
        raise FrameError(f"one frame of shape {list(shape)} was given as a batch; use predict, or a list of frames")
    if len(frames) == 0:
        raise FrameError("no frames were given; expected at least one")


def open_session(
    path: Path | str,
    *,
    alpha: float | None = None,
    backend: BackendName | Backend = "onnxruntime",
    provider: str | None = None,
    color: Color | None = None,
    threads: int | None = None,
    trusted_engine: str | None = None,
    any_size: bool = False,
    progress: Progress = silent,
) -> Session:
    """Open an artifact for scoring.

    Args:
        path: the artifact.
        alpha: accepted false-alarm rate; None takes the artifact's own.
        backend: `onnxruntime`; `tensorrt` or `tensorrt-rtx`, which build an engine on first use and never fall back;
            `auto`, the first of tensorrt, tensorrt-rtx, onnxruntime on CUDA and on the CPU that works, with the reasons
            in `session.fallbacks`; or a backend of your own, such as a `ReplayBackend`.
        provider: of onnxruntime: `cpu` (None), `cuda` or `tensorrt-ep`; the one asked for runs, or an error.
        color: channel order of the frames that will be given: `rgb`, or `bgr` as OpenCV delivers them. None is `rgb`,
            or the order that an artifact was exported for with `--layout`.
        threads: CPU threads of onnxruntime; None leaves it to onnxruntime, or to `threads.limited_threads`.
        trusted_engine: SHA-256 of an engine beside the artifact that another user or machine built.
        any_size: with `backend="onnxruntime"`, take frames of other sizes than the camera's as well, when the artifact
            was exported for a camera: they are resized on the host. For folders of images; a robot leaves it out.
        progress: called while an engine is built and verified.

    Raises:
        ArtifactError: not a whole, current artifact.
        CalibrationError: the calibration set cannot carry `alpha`.
        BackendError: the backend or provider cannot be used, or an engine is refused.
        VerificationError: an engine does not answer like onnxruntime.
        UsageError: arguments that contradict each other.
    """
    artifact = read_artifact(Path(path))
    require_usable(artifact.contract, alpha, color)  # before an engine is built
    digest = artifact.graph_digest
    camera = None
    if any_size and backend == "onnxruntime":
        camera = open_camera(artifact.model, artifact.contract.preprocessing, threads)
        artifact = replace(artifact, model=prepared_model(artifact.model, artifact.contract.preprocessing))
    if isinstance(backend, str):
        chosen = choose_backend(Path(path), artifact, Choice(backend, provider, threads, trusted_engine), progress)
    elif trusted_engine is not None:
        raise UsageError("trusted_engine has no use with a backend of your own: no engine is loaded; leave it out")
    else:
        chosen = Chosen(backend)

    whole_path = Path(path).absolute()  # the program may change its folder

    # From the file, because its bytes are let go: on a small device they are as large as the network.
    def load_head() -> Head:
        again = read_artifact(whole_path)
        if again.graph_digest != digest:
            raise ArtifactError(f"{path} was replaced since the session was opened; open the session again")
        return head_from_model(again.model)

    session = Session(artifact, chosen.backend, alpha, color, load_head, camera)
    session.fallbacks = chosen.fallbacks
    del artifact  # the file's bytes, as large as the network
    return_free_memory()  # and what opening it took
    return session
