"""Frames as callers have them -> the graph's input, written into an array that is used again.

Pillow resizes, and allocates what it needs for that. A frame that needs no resizing is copied; nothing is allocated.
"""

from dataclasses import replace
from typing import Any

import numpy as np
from PIL import Image

from grood_edge.arrays import InputFrame
from grood_edge.errors import FrameError
from grood_edge.preprocessing import Camera, Color, Preprocessing, preprocess_frame

__all__ = ["array_view", "write_frame"]

# https://dmlc.github.io/dlpack/latest/c_api.html: DLDeviceType
_HOST_DEVICES = (1, 3, 11)  # memory of the CPU, also where it is pinned for CUDA or ROCm
_DEVICE_NAMES = {2: "CUDA", 8: "Metal", 10: "ROCm", 13: "CUDA (managed memory)"}


def array_view(frame: object) -> np.ndarray:
    """Return a NumPy view of anything with `__dlpack__`, `__array_interface__` or `__array__`, in host memory.

    Raises:
        FrameError: memory of a device, a Pillow image that is neither RGB nor grey, or nothing that holds an array.
    """
    if isinstance(frame, np.ndarray):
        return np.asarray(frame)
    if isinstance(frame, Image.Image) and frame.mode not in ("RGB", "L"):
        raise FrameError(f"the frame is a Pillow image of mode {frame.mode}; expected RGB or L: use .convert('RGB')")
    source: Any = frame
    try:
        if hasattr(source, "__dlpack__") and hasattr(source, "__dlpack_device__"):
            device, index = source.__dlpack_device__()
            if device in _HOST_DEVICES:
                return np.from_dlpack(source)
        else:
            return np.asarray(source)
    except (BufferError, RuntimeError, TypeError, ValueError) as error:  # whatever the other library raises
        raise FrameError(
            f"the frame, of type {type(frame).__name__}, cannot be read as an array ({error}); expected uint8 "
            "[height, width, 3] from NumPy, or anything with __dlpack__ or __array_interface__"
        ) from error
    raise FrameError(
        f"the frame lies on {_DEVICE_NAMES.get(int(device), f'DLPack device type {int(device)}')} device {int(index)}; "
        "expected host memory: copy it first (torch: frame.cpu(); CuPy: frame.get())"
    )


def write_frame(frame: object, preprocessing: Preprocessing, color: Color, target: InputFrame) -> None:
    """Write a frame into `target`, uint8 `[height, width, channels]` of the graph's input.

    `frame` is uint8 `[h, w, 3]`, `[h, w, 1]` or `[h, w]`, also read-only or not contiguous; `color` tells the order of
    its channels. It is resized and cropped here, unless it has the right size already or the graph resizes: then it
    must be a frame of the contract's camera.

    Raises:
        FrameError: another dtype or shape, or not readable from here.
    """
    array, camera = array_view(frame), preprocessing.camera
    _require_frame(array, camera)
    three = array.shape[2:] == (3,)
    reverse = three and color != ("rgb" if camera is None else camera.layout)
    if array.shape[:2] == target.shape[:2] and _keeps_all(preprocessing) and (not three or target.shape[2] == 3):
        _copy(array if array.ndim == 3 else array[..., np.newaxis], target, reverse)
        return
    if reverse and preprocessing.channels == 1:  # grey must know the order
        np.copyto(target, preprocess_frame(array, preprocessing, "bgr"))
        return
    # Resizing treats channels alike, so the small result is reversed, its padding with it: less work.
    if reverse and preprocessing.crop == "letterbox":
        preprocessing = replace(preprocessing, mean=preprocessing.mean[::-1])
    _copy(preprocess_frame(array, preprocessing), target, reverse)


def _copy(array: np.ndarray, target: np.ndarray, reverse: bool) -> None:
    """Copy; one channel is repeated to three. Reversed plane by plane: NumPy would copy three bytes at a time."""
    if not reverse:
        np.copyto(target, array)
        return
    for channel in range(3):
        np.copyto(target[..., channel], array[..., 2 - channel])


def _keeps_all(preprocessing: Preprocessing) -> bool:
    """Tell whether a frame of the graph's size would come out of resize and crop as it is."""
    p = preprocessing
    return p.camera is not None or p.short_side is None or p.short_side == p.height == p.width


def _require_frame(array: np.ndarray, camera: Camera | None) -> None:
    shape = array.shape if array.ndim != 2 else (*array.shape, 1)
    form = len(shape) == 3 and shape[2] in (1, 3) and 0 not in shape
    if array.dtype == np.uint8 and form and (camera is None or shape == camera.shape):
        return
    expected = "uint8 [height, width, 3], [height, width, 1] or [height, width], not empty"
    if camera is not None:
        expected = f"uint8 {list(camera.shape)}, of the camera that the artifact was exported for"
    found = f"the frame has dtype {array.dtype} and shape {list(array.shape)}; expected {expected}"
    if array.dtype == np.uint8 and form and camera is not None and shape[:2] != camera.shape[:2]:
        raise FrameError(
            f"{found}. Images of other sizes go through onnxruntime alone: --backend onnxruntime for folders, "
            'open_session(..., backend="onnxruntime", any_size=True) in Python'
        )
    raise FrameError(f"{found}{_advice(array)}")


def _advice(array: np.ndarray) -> str:
    """Return what to do about a refused frame, where that is known."""
    shape, three = array.shape, array.ndim == 3
    cases = (
        (array.dtype == np.bool_, "Convert it to 0 and 255: frame.astype(np.uint8) * 255"),
        (
            array.dtype.kind == "f",
            "Convert it to 0..255: (255 * frame).round().astype(np.uint8) where its values lie in 0..1",
        ),
        (array.dtype.kind in "iu" and array.dtype != np.uint8, "Scale it to 0..255 and convert it to uint8"),
        (three and shape[2] == 4, "Drop its alpha channel: frame[..., :3]"),
        (
            three and shape[0] in (1, 3, 4) and shape[2] not in (1, 3),
            "Put the channels last: frame.transpose(1, 2, 0), or frame.permute(1, 2, 0) in torch",
        ),
        (array.ndim == 4, "Several frames go to predict_batch"),
    )
    return next((f". {advice}" for applies, advice in cases if applies), "")
