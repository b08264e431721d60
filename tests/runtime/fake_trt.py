"""TensorRT's runtime objects without TensorRT: a plan is an artifact, and running it runs onnxruntime.

It stands in for the modules `tensorrt` and `tensorrt_rtx`. The objects answer None or False where a test says so, as
TensorRT does, and raise `Misuse` for what TensorRT leaves undefined.
"""

import enum
import functools
import math
import threading
import weakref
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import onnxruntime

from grood_edge.ort import _session_options
from grood_edge.runtime.trt_api import Family, TrtApi
from tests.runtime.fake_cuda import FakeCudart, Misuse


class DataType(enum.Enum):
    FLOAT = np.float32
    HALF = np.float16
    INT8 = np.int8
    INT32 = np.int32
    INT64 = np.int64
    BOOL = np.bool_
    UINT8 = np.uint8


class TensorIOMode(enum.Enum):
    INPUT = 1
    OUTPUT = 2


_DATA_TYPES = {
    "tensor(float)": DataType.FLOAT,
    "tensor(int32)": DataType.INT32,
    "tensor(int64)": DataType.INT64,
    "tensor(bool)": DataType.BOOL,
    "tensor(uint8)": DataType.UINT8,
}


@functools.cache
def opened(plan: bytes) -> onnxruntime.InferenceSession:
    options = _session_options("cpu", 1, plan)  # those of `open_ort`, so that answers are the same to the last bit
    return onnxruntime.InferenceSession(plan, options, providers=["CPUExecutionProvider"])


class FakeLogger:
    def __init__(self) -> None:
        self.messages = ["an older warning, which is the reason for nothing"]

    @property
    def count(self) -> int:
        return len(self.messages)

    def since(self, count: int) -> list[str]:
        return self.messages[count:]


class FakeTrt:
    """The module. `batch`: smallest, best and largest batch of the engines' profile.

    fail: (method, n) of calls that answer None or False, n from 1; n = 0 for all. retyped: tensors that the engine
    has in another type. rtx: contexts can tell whether they can be captured. capturable: whether they can.
    """

    DataType = DataType
    TensorIOMode = TensorIOMode

    def __init__(self, cuda: FakeCudart, batch: tuple[int, int, int] = (1, 4, 8), rtx: bool = False) -> None:
        self.cuda, self.batch, self.rtx = cuda, batch, rtx
        self.fail: set[tuple[str, int]] = set()
        self.retyped: dict[str, DataType] = {}
        self.capturable = True
        self.logger = FakeLogger()
        self.counts: Counter[str] = Counter()
        self.released: list[str] = []
        self.contexts = 0
        self.replayed = 0  # runs out of a graph
        self.gate: Callable[[], None] = lambda: None  # a test may hold runs here

    def api(self) -> TrtApi:
        family: Family = "tensorrt-rtx" if self.rtx else "tensorrt"
        return TrtApi(self, family, "1.7.1" if self.rtx else "10.3.0")

    def Runtime(self, logger: Any) -> "FakeRuntime":  # noqa: N802
        if self.fails("Runtime"):
            raise TypeError("pybind11::init(): factory function returned nullptr")
        return FakeRuntime(self, logger)

    def fails(self, name: str) -> bool:
        self.counts[name] += 1
        failed = bool({(name, 0), (name, self.counts[name])} & self.fail)
        if failed:
            self.logger.messages.append(f"Error Code 1: fake failure of {name}")
        return failed

    def watch(self, thing: Any, kind: str) -> None:
        weakref.finalize(thing, self.released.append, kind).atexit = False


class FakeRuntime:
    def __init__(self, trt: FakeTrt, logger: Any) -> None:
        self._trt, self.logger = trt, logger
        self.engine_host_code_allowed = True
        trt.watch(self, "runtime")

    def deserialize_cuda_engine(self, serialized_engine: bytes) -> "FakeEngine | None":
        if self.engine_host_code_allowed:
            raise Misuse("an engine read with its host code allowed")
        return None if self._trt.fails("deserialize_cuda_engine") else FakeEngine(self._trt, self, serialized_engine)


class FakeEngine:
    def __init__(self, trt: FakeTrt, runtime: FakeRuntime, plan: bytes) -> None:
        self._trt, self._runtime = trt, weakref.ref(runtime)
        self.session = opened(plan)
        self._inputs = self.session.get_inputs()
        self._tensors = {t.name: t for t in (*self._inputs, *self.session.get_outputs())}
        trt.watch(self, "engine")

    @property
    def num_io_tensors(self) -> int:
        return len(self._tensors)

    def get_tensor_name(self, index: int) -> str:
        return [str(tensor) for tensor in self._tensors][index]

    def get_tensor_mode(self, name: str) -> TensorIOMode:
        return TensorIOMode.INPUT if name in [t.name for t in self._inputs] else TensorIOMode.OUTPUT

    def get_tensor_dtype(self, name: str) -> DataType:
        return self._trt.retyped.get(name, _DATA_TYPES[self._tensors[name].type])

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return tuple(d if isinstance(d, int) else -1 for d in self._tensors[name].shape)

    def get_tensor_profile_shape(self, name: str, profile_index: int) -> list[tuple[int, ...]]:
        if profile_index != 0:
            raise Misuse("there is one profile")
        row = self.get_tensor_shape(name)[1:]
        return [(size, *row) for size in self._trt.batch]

    def create_execution_context(self) -> "FakeContext | None":
        if self._runtime() is None:
            raise Misuse("an engine used after its runtime")
        if self._trt.fails("create_execution_context"):
            return None
        self._trt.contexts += 1
        return (RtxContext if self._trt.rtx else FakeContext)(self._trt, self)


class FakeContext:
    def __init__(self, trt: FakeTrt, engine: FakeEngine) -> None:
        self._trt, self._engine = trt, weakref.ref(engine)
        self._shape: tuple[int, ...] = ()
        self._inferred = False
        self._addresses: dict[str, int] = {}
        self._warm: tuple[Any, ...] = ()  # shape and addresses of the last run that was no capture
        self._busy = threading.Lock()
        trt.watch(self, "context")

    def engine(self) -> FakeEngine:
        engine = self._engine()
        if engine is None:
            raise Misuse("a context used after its engine")
        return engine

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        expected = self.engine().get_tensor_shape(name)
        least, _, most = self._trt.batch
        fits = shape[1:] == expected[1:] and (
            shape[0] == expected[0] or (expected[0] == -1 and least <= shape[0] <= most)
        )
        if self._trt.fails("set_input_shape") or not fits:
            return False
        self._shape, self._inferred = shape, False
        return True

    def infer_shapes(self) -> list[str]:
        self._inferred = True
        return ["image"] if self._trt.fails("infer_shapes") else []

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        if not self._inferred:
            return tuple(-1 for _ in self.engine().get_tensor_shape(name))
        size = self._shape[0] + self._trt.fails("get_tensor_shape")
        return (size, *self.engine().get_tensor_shape(name)[1:])

    def set_tensor_address(self, name: str, memory: int) -> bool:
        if self._trt.fails("set_tensor_address"):
            return False
        self._addresses[name] = memory
        return True

    def execute_async_v3(self, stream_handle: int) -> bool:
        if not self._busy.acquire(blocking=False):
            raise Misuse("one context in two threads")
        try:
            self._trt.gate()
            return self._execute(stream_handle)
        finally:
            self._busy.release()

    def _execute(self, stream: int) -> bool:
        engine, capturing = self.engine(), self._trt.cuda.is_capturing(stream)
        if not self._shape or not self._inferred:
            raise Misuse("run before the shapes are set and inferred")
        if set(self._addresses) != {engine.get_tensor_name(i) for i in range(engine.num_io_tensors)}:
            raise Misuse("run without an address for every tensor")
        state = (self._shape, tuple(sorted(self._addresses.items())))
        if self._trt.fails("execute_async_v3"):
            return False
        if capturing and self._warm != state:
            raise Misuse("captured without a run of the same shape before")
        if capturing and not self._trt.capturable:
            self._trt.cuda.spoil_capture(stream)
        self._warm = state
        itself = weakref.ref(self)

        def work() -> None:
            context = itself()
            if context is None:
                raise Misuse("work of a context that was released")
            if context._warm != state:
                raise Misuse("a graph launched after its context got other shapes or addresses")
            context._trt.replayed += capturing
            context._compute()

        self._trt.cuda.submit(stream, work)
        return True

    def _compute(self) -> None:
        engine, cuda = self.engine(), self._trt.cuda
        size = math.prod(self._shape)
        frames = cuda.at(self._addresses["image"], size, "device").reshape(self._shape).copy()
        names = [output.name for output in engine.session.get_outputs()]
        for name, value in zip(names, engine.session.run(names, {"image": frames}), strict=True):
            cuda.at(self._addresses[name], value.nbytes, "device")[:] = np.frombuffer(value.tobytes(), np.uint8)


class RtxContext(FakeContext):
    def is_stream_capturable(self, stream: int) -> bool:
        return self._trt.capturable
