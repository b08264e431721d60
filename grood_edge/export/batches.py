"""The batches of a pass, and what the network says about each.

A batch is what can be read of 32 images that follow each other in the data set: where it ends depends on places alone,
not on which images are damaged, where an interrupted pass goes on, or how the data set is cut into shards. onnxruntime
may round otherwise in batches of another size, and artifacts shall be the same to the last bit.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from grood_edge.arrays import Frames, InputFrame
from grood_edge.camera_part import prepared_frame
from grood_edge.errors import ClassifierError, DatasetError
from grood_edge.export.dataset import Sample
from grood_edge.export.reservoir import Rows
from grood_edge.frame_hashes import frame_hash
from grood_edge.ort import OrtModel
from grood_edge.preprocessing import Preprocessing

__all__ = ["BATCH", "Network", "batches_of", "frame_hashes"]

BATCH = 32


@dataclass(frozen=True)
class Network:
    """The classifier graph (`image` to `features` and `logits`), and how its images are prepared.

    space: the output that is kept as features. camera: the open camera part of the graph, where there is one.
    """

    model: OrtModel
    preprocessing: Preprocessing
    class_count: int
    space: Literal["features", "logits"]
    camera: OrtModel | None

    def prepared(self, sample: Sample) -> Sample:
        """Return the sample as the network takes it, in both of its frames: the raw one is dropped."""
        frame = prepared_frame(sample.frame, self.preprocessing, self.camera)
        return replace(sample, frame=frame, prepared=frame)

    def run(self, group: list[Sample], frames: Frames) -> tuple[Rows, np.ndarray]:
        """Return the rows of a batch, and the hashes of its frames uint64 `[n]`. Unlabelled samples take predictions.

        Raises:
            ClassifierError: features or logits that are not finite.
        """
        outputs = self.model.run({"image": frames}, ["features", "logits"])
        _require_finite(outputs["features"], outputs["logits"], group)
        predictions = outputs["logits"].argmax(axis=1).astype(np.int64)
        given = [p if s.label is None else s.label for s, p in zip(group, predictions, strict=True)]
        rows = Rows(outputs[self.space], np.array(given, np.int64), predictions, tuple(s.name for s in group))
        return rows, frame_hashes(frames)


def batches_of(
    samples: Iterable[Sample], network: Network, before: Callable[[], int]
) -> Iterator[tuple[list[Sample], Frames]]:
    """Group prepared samples into batches, with their frames; raw ones are dropped, for they are large.

    Args:
        samples: in the order of the data set.
        network: says how many images it takes at a time.
        before: how many images were left out, or are not among `samples`, up to the sample that came last.

    Raises:
        DatasetError: a label that the classifier has not.
    """
    size = network.model.batch(BATCH)
    group: list[Sample] = []
    frames: list[InputFrame] = []
    block = -1
    for count, sample in enumerate(samples):
        if sample.label is not None and not 0 <= sample.label < network.class_count:
            raise DatasetError(
                f"{sample.name} has label {sample.label}, but the classifier has {network.class_count} classes"
            )
        place = before() + count
        if group and place // size != block:
            yield group, np.stack(frames)
            group, frames = [], []
        block = place // size
        assert sample.prepared is not None
        frames.append(sample.prepared)
        group.append(replace(sample, frame=sample.prepared))
        if (place + 1) % size == 0:
            yield group, np.stack(frames)
            group, frames = [], []
    if group:
        yield group, np.stack(frames)


def frame_hashes(frames: Frames) -> np.ndarray:
    """Return the hashes of prepared frames, uint64 `[n]`."""
    return np.array([frame_hash(frame) for frame in frames], np.uint64)


def _require_finite(features: np.ndarray, logits: np.ndarray, group: list[Sample]) -> None:
    good = np.isfinite(features).all(axis=1) & np.isfinite(logits).all(axis=1)
    if not good.all():
        names = [sample.name for sample, ok in zip(group, good, strict=True) if not ok]
        raise ClassifierError(
            f"the classifier gives NaN or Inf for {len(names)} of {len(group)} images, such as {names[0]}; "
            "check its weights and the preprocessing (--preprocess, --mean, --std)"
        )
