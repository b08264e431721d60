"""Frames of any origin, into the graph's input: which are taken, which are refused and how, and with what pixels."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from grood_edge.errors import FrameError
from grood_edge.preprocessing import Camera, Preprocessing, preprocess_frame
from grood_edge.runtime import open_session
from grood_edge.runtime.frames import array_view, write_frame
from grood_edge.runtime.selftest import MODEL
from tests.without_hook import without_hook

COLOUR = Preprocessing("imagenet", 24, 32, 3, "bilinear", "stretch", None, (0.0,) * 3, (255.0,) * 3)
CENTER = replace(COLOUR, height=24, width=24, crop="center", short_side=27)
GREY = replace(COLOUR, channels=1, mean=(0.0,), std=(255.0,))
LETTERBOX = replace(COLOUR, crop="letterbox", mean=(10.0, 100.0, 200.0))


def noise(*shape: int) -> np.ndarray:
    found: np.ndarray = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    return found


def written(frame: object, preprocessing: Preprocessing, color: Any = "rgb") -> np.ndarray:
    target = np.full(preprocessing.input_shape, 77, np.uint8)
    write_frame(frame, preprocessing, color, target)
    return target


class DlpackOnly:
    """What CuPy, JAX and others have in common: it is no array, and gives one away."""

    def __init__(self, array: np.ndarray) -> None:
        self.array = array

    def __dlpack__(self, **options: Any) -> Any:
        return self.array.__dlpack__(**options)

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.array.__dlpack_device__()


class OlderDlpack(DlpackOnly):
    """As before the standard of 2023: no keywords."""

    def __dlpack__(self) -> Any:  # type: ignore[override]
        return self.array.__dlpack__()


class InterfaceOnly:
    def __init__(self, array: np.ndarray) -> None:
        self.array = array
        self.__array_interface__ = array.__array_interface__


class ArrayOnly:
    def __init__(self, array: np.ndarray) -> None:
        self.array = array

    def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
        return self.array


class OnDevice:
    """Memory that the CPU must not touch."""

    def __init__(self, device: int) -> None:
        self.device = device

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.device, 1

    def __dlpack__(self, **options: Any) -> Any:
        raise AssertionError("asked for the memory of a device")


FORMS: dict[str, Callable[[np.ndarray], Any]] = {
    "array": lambda a: a,
    "columns apart": lambda a: np.repeat(a, 2, axis=1)[:, ::2],
    "upside down twice": lambda a: np.ascontiguousarray(a[::-1])[::-1],
    "columns first in memory": np.asfortranarray,
    "subclass": lambda a: a.view(np.recarray),
    "dlpack": DlpackOnly,
    "dlpack without keywords": OlderDlpack,
    "array interface": InterfaceOnly,
    "array protocol": ArrayOnly,
    "torch": torch.from_numpy,
    "torch, channels first in memory": lambda a: torch.from_numpy(np.moveaxis(a, 2, 0).copy()).permute(1, 2, 0),
    "pillow": Image.fromarray,
    "memoryview": lambda a: a.data,
}


class TestTaken:
    @pytest.mark.parametrize("form", FORMS)
    @pytest.mark.parametrize("size", [(24, 32), (37, 51)])
    def test_forms_of_one_frame(self, form: str, size: tuple[int, int]) -> None:
        frame = noise(*size, 3)
        kept = frame.copy()
        np.testing.assert_array_equal(written(FORMS[form](frame), COLOUR), preprocess_frame(frame, COLOUR))
        np.testing.assert_array_equal(frame, kept)

    @pytest.mark.parametrize("wrapper", [lambda a: a, DlpackOnly, InterfaceOnly])
    def test_read_only(self, wrapper: Callable[[np.ndarray], object]) -> None:
        frame = noise(24, 32, 3)
        frame.setflags(write=False)
        np.testing.assert_array_equal(written(wrapper(frame), COLOUR), frame)

    def test_nothing_is_copied_on_the_way(self) -> None:
        frame = noise(24, 32, 3)
        for form in ("array", "dlpack", "array interface", "torch", "memoryview"):
            assert np.shares_memory(array_view(FORMS[form](frame)), frame), form

    def test_in_a_session(self) -> None:
        frame = noise(32, 32)
        with open_session(MODEL, threads=1) as session:
            expected = session.predict(frame)
            assert session.predict(torch.from_numpy(frame)) == expected
            assert session.predict(DlpackOnly(frame)) == expected
            assert session.predict_batch([DlpackOnly(frame), frame[:, :, np.newaxis]])[1] == expected
            assert session.predict_batch([DlpackOnly(frame)]) == [expected]


class TestPixels:
    @pytest.mark.parametrize("preprocessing", [COLOUR, CENTER, GREY, LETTERBOX, replace(CENTER, short_side=24)])
    @pytest.mark.parametrize("shape", [(24, 32, 3), (24, 24, 3), (24, 32), (24, 24, 1), (60, 40, 3), (27, 90)])
    @pytest.mark.parametrize("filter_", ["nearest", "bilinear", "bicubic", "lanczos"])
    def test_equal_preprocess_frame(self, preprocessing: Preprocessing, shape: tuple[int, ...], filter_: Any) -> None:
        preprocessing, frame = replace(preprocessing, filter=filter_), noise(*shape)
        expected = preprocess_frame(frame, preprocessing)
        np.testing.assert_array_equal(written(frame, preprocessing), expected)
        swapped = np.ascontiguousarray(frame[..., ::-1]) if len(shape) == 3 else frame
        np.testing.assert_array_equal(written(swapped, preprocessing, "bgr"), expected)

    def test_pillow_is_asked_only_where_something_changes(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def unwanted(*_: object) -> np.ndarray:
            raise AssertionError("resized")

        monkeypatch.setattr("grood_edge.runtime.frames.preprocess_frame", unwanted)
        square = replace(CENTER, short_side=24)
        for preprocessing, shape in (
            (COLOUR, (24, 32, 3)),
            (COLOUR, (24, 32)),
            (GREY, (24, 32, 1)),
            (square, (24, 24)),
        ):
            written(noise(*shape), preprocessing, "bgr")
        for preprocessing, shape in ((COLOUR, (32, 24, 3)), (GREY, (24, 32, 3)), (CENTER, (24, 24, 3))):
            with pytest.raises(AssertionError, match="resized"):
                written(noise(*shape), preprocessing)


class TestCamera:
    @pytest.mark.parametrize("layout", ["rgb", "bgr"])
    @pytest.mark.parametrize("color", ["rgb", "bgr"])
    def test_raw_frames_in_the_cameras_order(self, layout: Any, color: Any) -> None:
        frame, preprocessing = noise(48, 64, 3), replace(COLOUR, camera=Camera(48, 64, layout))
        expected = frame if layout == color else frame[..., ::-1]
        np.testing.assert_array_equal(written(frame, preprocessing, color), expected)

    def test_grey(self) -> None:
        frame, preprocessing = noise(48, 64), replace(COLOUR, camera=Camera(48, 64, "gray"))
        np.testing.assert_array_equal(written(frame, preprocessing)[..., 0], frame)
        np.testing.assert_array_equal(written(frame[..., np.newaxis], preprocessing)[..., 0], frame)

    @pytest.mark.parametrize(
        ("layout", "shape"), [("rgb", (64, 48, 3)), ("rgb", (24, 32, 3)), ("rgb", (48, 64)), ("gray", (48, 64, 3))]
    )
    def test_other_frames_are_refused(self, layout: Any, shape: tuple[int, ...]) -> None:
        camera = Camera(48, 64, layout)
        with pytest.raises(FrameError) as found:
            written(noise(*shape), replace(COLOUR, camera=camera))
        assert str(list(shape)) in str(found.value)
        assert f"expected uint8 {list(camera.shape)}, of the camera" in str(found.value)
        advised = "go through onnxruntime alone: --backend onnxruntime for folders" in str(found.value)
        assert advised == (shape[:2] != (48, 64))


class TestRefused:
    @pytest.mark.parametrize(
        ("frame", "found", "advice"),
        [
            (np.zeros((8, 9, 4), np.uint8), "uint8 and shape [8, 9, 4]", "frame[..., :3]"),
            (np.zeros((8, 9, 3), bool), "bool and shape [8, 9, 3]", "frame.astype(np.uint8) * 255"),
            (np.zeros((8, 9, 3), np.float32), "float32 and shape [8, 9, 3]", "(255 * frame).round().astype(np.uint8)"),
            (np.zeros((8, 9), np.uint16), "uint16 and shape [8, 9]", "Scale it to 0..255"),
            (torch.zeros((3, 8, 9), dtype=torch.uint8), "uint8 and shape [3, 8, 9]", "frame.permute(1, 2, 0)"),
            (torch.zeros((3, 8, 9)), "float32 and shape [3, 8, 9]", "(255 * frame)"),
            (np.zeros((2, 8, 9, 3), np.uint8), "uint8 and shape [2, 8, 9, 3]", "predict_batch"),
            (np.zeros((8, 0, 3), np.uint8), "uint8 and shape [8, 0, 3]", "not empty"),
            (np.zeros((0, 8), np.uint8), "uint8 and shape [0, 8]", "not empty"),
            (np.zeros(8, np.uint8), "uint8 and shape [8]", "not empty"),
            (np.zeros((8, 9, 2), np.uint8), "uint8 and shape [8, 9, 2]", "not empty"),
            ([[0, 1], [2, 3]], "int64 and shape [2, 2]", "Scale it"),
            (None, "object and shape []", "not empty"),
            (object(), "object and shape []", "not empty"),
            ("frame.png", "<U9 and shape []", "not empty"),
        ],
    )
    def test_both_forms_and_what_to_do(self, frame: object, found: str, advice: str) -> None:
        with open_session(MODEL, threads=1) as session, without_hook():
            for call in (session.predict, lambda f: session.predict_batch([f]), lambda f: session.infer([f])):
                with pytest.raises(FrameError) as error:
                    call(frame)
                assert f"the frame has dtype {found}; expected uint8 [height, width, 3]" in str(error.value)
                assert advice in str(error.value)
            assert session.predict(np.zeros((8, 9), np.uint8)).class_name

    @pytest.mark.parametrize(("device", "name"), [(2, "CUDA"), (13, "CUDA (managed memory)"), (8, "Metal"), (99, "99")])
    def test_memory_of_a_device(self, device: int, name: str) -> None:
        with pytest.raises(FrameError) as error:
            written(OnDevice(device), COLOUR)
        assert f"{name} device 1; expected host memory" in str(error.value)
        assert "frame.cpu()" in str(error.value)

    @pytest.mark.parametrize(
        "frame",
        [[[0, 1], [2]], torch.zeros((8, 9, 3), dtype=torch.bfloat16), torch.zeros((8, 9, 3), device="meta")],
    )
    def test_what_cannot_be_read(self, frame: object) -> None:
        with pytest.raises(FrameError, match="cannot be read as an array"):
            written(frame, COLOUR)

    @pytest.mark.parametrize("mode", ["RGBA", "P", "HSV", "1", "I"])
    def test_pillow_images_whose_numbers_are_no_colours(self, mode: str) -> None:
        image = Image.fromarray(noise(24, 32, 3))
        image = image.convert("L").convert(mode) if mode == "I" else image.convert(mode)
        with pytest.raises(FrameError, match=rf"Pillow image of mode {mode}; expected RGB or L"):
            written(image, COLOUR)
