"""The bare classifier that an artifact is measured against: a file of the user's, or the artifact without its head."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast

import numpy as np

from grood_edge.arrays import Frames, Logits
from grood_edge.artifact import Artifact, read_model_file
from grood_edge.camera_part import open_camera, prepared_frame
from grood_edge.contract import Contract
from grood_edge.errors import ArtifactError, BackendError, ClassifierError
from grood_edge.graph_check import refuse_external_data
from grood_edge.ort import OrtModel, open_ort
from grood_edge.preprocessing import normalised_frames
from grood_edge.stored_head import without_head

__all__ = ["Bare", "cut_classifier", "open_classifier"]

Layout = Literal["NCHW", "NHWC"]
_SAME = 0.01
_TYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16}


@dataclass(frozen=True)
class Bare:
    """An open classifier without a head.

    tensor: from frames uint8 `[n, h, w, c]` as the session's `prepare` makes them to the classifier's input.
    has_preprocessing: its graph does what the artifact's does with these frames.
    """

    name: str
    model: OrtModel
    tensor: Callable[[Frames], np.ndarray]
    has_preprocessing: bool

    @property
    def single(self) -> bool:
        """True where it takes one image at a time."""
        return self.model.batch(2) == 1

    def outputs(self, tensor: np.ndarray) -> dict[str, np.ndarray]:
        """Run it once; new arrays by name.

        Raises:
            ClassifierError: it does not run on that tensor, or gives something else than tensors of numbers.
        """
        try:
            found = self.model.run({next(iter(self.model.inputs)): tensor})
        except BackendError as error:
            raise ClassifierError(f"{self.name} does not run on {list(tensor.shape)}: {error}") from error
        if any(not isinstance(value, np.ndarray) or value.dtype.hasobject for value in found.values()):
            raise ClassifierError(f"{self.name} gives something else than tensors of numbers; expected logits")
        return found

    def runner(self, tensors: list[np.ndarray], provider: str) -> Callable[[int], Callable[[], object]]:
        """Return what puts tensor `i` into place and hands out the run: on the CPU with bound arrays, as a session.

        Raises:
            ClassifierError: as `outputs`.
        """
        name, buffer = next(iter(self.model.inputs)), tensors[0].copy()
        outputs = {key: np.empty_like(value, order="C") for key, value in self.outputs(buffer).items()}
        if provider != "cpu":
            return lambda number: lambda: self.model.run({name: tensors[number % len(tensors)]})
        run = self.model.bind({name: buffer}, outputs)

        def placed(number: int) -> Callable[[], object]:
            buffer[...] = tensors[number % len(tensors)]
            return run

        return placed

    def gives(self, tensor: np.ndarray, logits: Logits) -> bool:
        """Say whether one of its outputs is these logits, within 1 % of their largest: is it the same classifier?

        Raises:
            ClassifierError: as `outputs`.
        """
        bound = _SAME * float(np.abs(logits).max(initial=0.0))
        return any(
            value.size == logits.size
            and np.issubdtype(value.dtype, np.floating)
            and float(np.abs(value.reshape(logits.shape) - logits).max()) <= bound
            for value in self.outputs(tensor).values()
        )


def cut_classifier(artifact: Artifact, provider: str, threads: int | None) -> Bare:
    """Return the artifact without its head: the same frames, the same preprocessing in the graph.

    Raises:
        ArtifactError: the head cannot be cut off.
        BackendError: onnxruntime refuses what is left.
    """
    model = open_ort(without_head(artifact.model), provider, threads)
    return Bare("the artifact without its head", model, lambda frames: frames, True)


def open_classifier(path: Path, artifact: Artifact, provider: str, threads: int | None) -> Bare:
    """Open a classifier file that takes the artifact's images after the same preprocessing.

    Raises:
        ClassifierError: it cannot be read or opened, or its input does not take those images.
    """
    try:
        data = read_model_file(path)
        refuse_external_data(data)
    except ArtifactError as error:
        raise ClassifierError(
            f"--baseline {path}: {error}. Expected a classifier as one .onnx file, such as the one that was exported"
        ) from error
    try:
        model = open_ort(data, provider, threads)
    except BackendError as error:
        raise ClassifierError(f"--baseline {path}: {error}") from error
    layout, dtype = _input_kind(path, model, artifact.contract)
    preprocessing = artifact.contract.preprocessing
    camera = open_camera(artifact.model, preprocessing, threads)

    def tensor(frames: Frames) -> np.ndarray:
        ready = frames if camera is None else np.stack([prepared_frame(f, preprocessing, camera) for f in frames])
        return normalised_frames(ready, preprocessing, layout, artifact.contract.classifier.bgr).astype(dtype)

    return Bare(str(path), model, tensor, False)


def _input_kind(path: Path, model: OrtModel, contract: Contract) -> tuple[Layout, type]:
    p, own = contract.preprocessing, contract.classifier.layout
    sides = {"NCHW": (p.channels, p.height, p.width), "NHWC": (p.height, p.width, p.channels)}
    found = [(name, model.input_types[name], shape) for name, shape in model.inputs.items()]
    if len(found) == 1 and found[0][1] in _TYPES:
        for layout in sorted(sides, key=lambda name: name != own):
            if _fits(found[0][2], (None, *sides[layout])):
                return cast(Layout, layout), _TYPES[found[0][1]]
    told = ", ".join(f"{name!r} {kind} {list(shape)}" for name, kind, shape in found[:5])
    raise ClassifierError(
        f"--baseline {path} takes {told or 'nothing'}; the artifact's classifier takes one float32 or float16 image "
        f"['N', {', '.join(map(str, sides[own]))}]. Name the classifier that the artifact was exported from"
    )


def _fits(found: tuple[int | str | None, ...], sides: tuple[int | None, ...]) -> bool:
    """Names and None stand for any number."""
    return len(found) == len(sides) and all(
        side is None or not isinstance(size, int) or size == side for size, side in zip(found, sides, strict=True)
    )
