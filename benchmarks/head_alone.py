"""The head without a network, opened in onnxruntime on one thread, as it stands in an artifact; and how it is timed."""

import time

import numpy as np
from onnx import ModelProto, TensorProto, ValueInfoProto, helper
from ratios import Timing

from grood_edge.conformal import DecisionRule
from grood_edge.export.graph import attach_head
from grood_edge.ort import OrtModel, open_ort
from grood_edge.scoring import Head
from grood_edge.stored_head import head_model

CALIBRATION = 1000  # scores
ALONE = Timing(time.process_time, after_one=True)  # beside other ways to score, which run on one thread or more


class HeadAlone:
    """From features float32 `[n, d]` to `ood_score` float32 `[n]`; the other outputs are computed as well."""

    def __init__(self, head: Head) -> None:
        classes, dimension = head.prototypes.shape
        scores = np.linspace(0, 1, CALIBRATION, dtype=np.float32)
        rule = DecisionRule((scores,), (39,), np.zeros(classes, np.int32))
        model = attach_head(_without_network(classes, dimension), head, "features", rule)
        self._model: OrtModel = open_ort(head_model(model.SerializeToString()), threads=1)
        self._classes = classes

    def __call__(self, features: np.ndarray) -> np.ndarray:
        """Return `ood_score`."""
        logits = np.zeros((len(features), self._classes), np.float32)
        scores: np.ndarray = self._model.run({"features": features, "logits": logits})["ood_score"]
        return scores


def _without_network(classes: int, dimension: int) -> ModelProto:
    def info(name: str, width: int) -> ValueInfoProto:
        return helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", width])

    widths = {"logits": classes, "features": dimension}
    nodes = [helper.make_node("Identity", [f"{name}_in"], [name], name=name) for name in widths]
    inputs = [info(f"{name}_in", width) for name, width in widths.items()]
    outputs = [info(name, width) for name, width in widths.items()]
    return helper.make_model(helper.make_graph(nodes, "none", inputs, outputs))
