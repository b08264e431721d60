"""A serialised engine, opened: its tensors checked against the contract before anything runs."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from grood_edge.contract import Contract
from grood_edge.errors import BackendError
from grood_edge.outputs import OUTPUT_NAMES, outputs_from_arrays
from grood_edge.runtime.trt_api import TrtApi

__all__ = ["EngineTensor", "LoadedEngine", "load_engine", "logged_reason", "open_plan"]

_REBUILD = "build the engine again from this artifact: grood-edge compile ARTIFACT.onnx"


@dataclass(frozen=True)
class EngineTensor:
    """An input or output: `row` is its shape without the batch."""

    name: str
    dtype: np.dtype
    row: tuple[int, ...]
    is_input: bool

    @property
    def row_bytes(self) -> int:
        """Bytes of one image's part."""
        return math.prod(self.row) * self.dtype.itemsize


@dataclass(frozen=True, eq=False)
class LoadedEngine:
    """An engine and the runtime that it needs as long as it lives; `least` to `most` images a run."""

    engine: Any  # before the runtime: attributes are released in this order
    runtime: Any
    logger: Any
    tensors: tuple[EngineTensor, ...]
    least: int
    most: int

    def new_context(self) -> Any:
        """Return a new execution context, with device memory of its own.

        Raises:
            BackendError: TensorRT made none.
        """
        said = self.logger.count
        context = self.engine.create_execution_context()
        if context is None:
            reason = logged_reason(self.logger, said)
            raise BackendError(
                f"TensorRT made no execution context: {reason}. Free GPU memory, or build the engine for a smaller "
                "batch with grood-edge compile --batch"
            )
        return context


def logged_reason(logger: Any, said: int) -> str:
    """Return the last thing that TensorRT logged since it had logged `said` messages."""
    messages = logger.since(said)
    return str(messages[-1]).strip().rstrip(".") if messages else "it gave no reason"


def load_engine(api: TrtApi, plan: bytes, contract: Contract, logger: Any) -> LoadedEngine:
    """Deserialise a plan and check its tensors against the contract. A plan is native code: only a trusted one.

    Raises:
        BackendError: TensorRT refuses it, or it is not an engine of this artifact.
    """
    runtime, engine = open_plan(api, plan, logger)
    tensors = tuple(_tensor(api, engine, engine.get_tensor_name(i)) for i in range(engine.num_io_tensors))
    _require_agreement(tensors, contract)
    least, most = _batch_range(engine)
    return LoadedEngine(engine, runtime, logger, tensors, least, most)


def open_plan(api: TrtApi, plan: bytes, logger: Any) -> tuple[Any, Any]:
    """Deserialise a plan without code of its host; returns the runtime, which must outlive it, and the engine.

    Raises:
        BackendError: TensorRT cannot start, or refuses the plan.
    """
    said = logger.count
    try:
        runtime = api.module.Runtime(logger)
    except TypeError as error:  # pybind11's word for a factory that returned nothing
        raise BackendError(
            f"{api.family} {api.version} cannot start ({logged_reason(logger, said)}): is a GPU with a driver there? "
            "Run grood-edge doctor"
        ) from error
    if hasattr(runtime, "engine_host_code_allowed"):
        runtime.engine_host_code_allowed = False
    engine = runtime.deserialize_cuda_engine(plan)
    if engine is None:
        reason = logged_reason(logger, said)
        raise BackendError(f"{api.family} {api.version} cannot read the engine: {reason}; {_REBUILD}")
    return runtime, engine


def _tensor(api: TrtApi, engine: Any, name: str) -> EngineTensor:
    trt = api.module
    dtypes = {
        trt.DataType.FLOAT: np.float32,
        trt.DataType.HALF: np.float16,
        trt.DataType.INT32: np.int32,
        trt.DataType.INT64: np.int64,
        trt.DataType.BOOL: np.bool_,
        trt.DataType.UINT8: np.uint8,
    }
    dtype = engine.get_tensor_dtype(name)
    if dtype not in dtypes:
        raise BackendError(f"the engine's tensor {name!r} is {dtype}, which no artifact has; {_REBUILD}")
    is_input = engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT
    return EngineTensor(name, np.dtype(dtypes[dtype]), tuple(engine.get_tensor_shape(name))[1:], is_input)


def _require_agreement(tensors: tuple[EngineTensor, ...], contract: Contract) -> None:
    shape = contract.preprocessing.input_shape
    rows: dict[str, tuple[int, ...]] = dict.fromkeys(OUTPUT_NAMES, ())
    rows |= {"logits": (len(contract.classes),), "features": (contract.classifier.dimension,)}
    found = {t.name: t.row for t in tensors if not t.is_input}
    inputs = [(t.name, t.dtype, t.row) for t in tensors if t.is_input]
    if inputs != [("image", np.dtype(np.uint8), shape)] or found != rows:
        raise BackendError(
            f"the engine is not one of this artifact: inputs {[(n, str(d), r) for n, d, r in inputs]}, outputs "
            f"{found}; expected uint8 'image' {shape} and {rows}; {_REBUILD}"
        )
    outputs_from_arrays({t.name: np.empty((0, *t.row), t.dtype) for t in tensors if not t.is_input})


def _batch_range(engine: Any) -> tuple[int, int]:
    size = engine.get_tensor_shape("image")[0]
    if size != -1:
        return int(size), int(size)
    shapes = engine.get_tensor_profile_shape("image", 0)
    return int(shapes[0][0]), int(shapes[2][0])
