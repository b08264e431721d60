"""The arrays that travel between the steps, named once, with dtype and shape.

n = images, r = ID reference scores, h and w = pixels, c = colour channels, d = feature dimension, k = classes,
m = bank rows.
Under test (the jaxtyping import hook is loaded) the names check dtype and shape on every call; in
production they are plain `numpy.ndarray` and jaxtyping is neither needed nor imported.
"""

import sys
from typing import TYPE_CHECKING

import numpy as np

__all__ = [
    "Bank",
    "ClassCounts",
    "Features",
    "Features64",
    "Flags",
    "Frame",
    "Frames",
    "IdScores",
    "InputFrame",
    "Labels",
    "LogScale",
    "Logits",
    "Prototypes",
    "Scores",
    "Scores64",
    "Vector64",
]

if TYPE_CHECKING or "jaxtyping" not in sys.modules:
    from numpy.typing import NDArray

    Frame = NDArray[np.uint8]  # [h, w, c], or [h, w] from a grey camera
    InputFrame = NDArray[np.uint8]  # [height, width, channels] of the graph's input
    Frames = NDArray[np.uint8]  # [n, h, w, c]
    Features = NDArray[np.float32]  # [n, d]
    Logits = NDArray[np.float32]  # [n, k]
    Labels = NDArray[np.int64]  # [n]
    ClassCounts = NDArray[np.int64]  # [k]
    Flags = NDArray[np.bool_]  # [n]
    Scores = NDArray[np.float32]  # [n]
    IdScores = NDArray[np.float32]  # [r] that other scores are compared with
    Features64 = NDArray[np.float64]  # [n, d]
    Scores64 = NDArray[np.float64]  # [n]
    Prototypes = NDArray[np.float64]  # [k, d]
    Vector64 = NDArray[np.float64]  # [d]
    Bank = NDArray[np.float64]  # [m, d] unit rows
    LogScale = NDArray[np.float64]  # [m]
else:
    from jaxtyping import Bool, Float32, Float64, Int64, UInt8

    # `_`: not bound, because the frames of one call, or its groups of scores, may have different sizes
    Frame = UInt8[np.ndarray, "_h _w _c"] | UInt8[np.ndarray, "_h _w"]
    InputFrame = UInt8[np.ndarray, "height width channels"]
    Frames = UInt8[np.ndarray, "n h w c"]
    Features = Float32[np.ndarray, "n d"]
    Logits = Float32[np.ndarray, "n k"]
    Labels = Int64[np.ndarray, " n"]
    ClassCounts = Int64[np.ndarray, " k"]
    Flags = Bool[np.ndarray, " n"]
    Scores = Float32[np.ndarray, " n"]
    IdScores = Float32[np.ndarray, "_r"]
    Features64 = Float64[np.ndarray, "n d"]
    Scores64 = Float64[np.ndarray, " n"]
    Prototypes = Float64[np.ndarray, "k d"]
    Vector64 = Float64[np.ndarray, " d"]
    Bank = Float64[np.ndarray, "m d"]
    LogScale = Float64[np.ndarray, " m"]
