"""onnxruntime, opened strictly: the provider that was asked for is the provider that runs, or an error.

onnxruntime itself falls back to the CPU with no more than a line on stderr. GPU providers run with bound inputs and
outputs, and TensorRT's engines are kept apart by the digest of the model: onnxruntime's own names for them do not tell
two networks of one architecture apart (microsoft/onnxruntime#6455).
"""

import hashlib
import logging
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from grood_edge.errors import BackendError, MissingExtraError, reason_of
from grood_edge.threads import thread_limit
from grood_edge.user_folders import cache_folder

if TYPE_CHECKING:
    import onnxruntime

__all__ = ["PROFILE", "PROVIDERS", "OrtModel", "open_ort", "tensorrt_options"]

PROVIDERS = {
    "cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider", "tensorrt-ep": "TensorrtExecutionProvider",
}  # fmt: skip
PROFILE = (1, 1, 8)  # smallest, most usual and largest batch that TensorRT's provider builds for
_OTHERWISE = "; grood-edge doctor shows what is there. Or use --provider cpu"
_ADVICE = {
    "cuda": ". Where its libraries are missing, install the CUDA and cuDNN that this onnxruntime was built for "
    "(pip install 'onnxruntime-gpu[cuda,cudnn]')" + _OTHERWISE,
    "tensorrt-ep": ". Where its libraries are missing, install CUDA, cuDNN and the TensorRT that this onnxruntime was "
    "built for" + _OTHERWISE,
}
_LOG = logging.getLogger("grood_edge")


class OrtModel:
    """An open onnxruntime session: named arrays in, named arrays out."""

    _bound = False  # run with bound inputs and outputs: for GPU providers

    def __init__(self, session: "onnxruntime.InferenceSession", bound: bool = False) -> None:
        self._session = session
        self._bound = bound
        self.inputs = {i.name: tuple(i.shape) for i in session.get_inputs()}
        self.input_types = {i.name: str(i.type) for i in session.get_inputs()}  # such as tensor(float)
        self.outputs = [o.name for o in session.get_outputs()]

    def batch(self, most: int) -> int:
        """Return how many images to run at a time: `most`, or 1 where the model takes no other batch."""
        return 1 if next(iter(self.inputs.values()))[0] == 1 else most

    def run(self, feeds: Mapping[str, np.ndarray], outputs: list[str] | None = None) -> dict[str, np.ndarray]:
        """Run the model; returns the named outputs, or all.

        Raises:
            BackendError: onnxruntime refused the inputs or failed.
        """
        names = self.outputs if outputs is None else outputs
        try:
            values = self._run_bound(names, feeds) if self._bound else self._session.run(names, dict(feeds))
        except Exception as error:  # the only base class that onnxruntime's exceptions share
            raise BackendError(f"onnxruntime failed: {reason_of(error)}") from error
        return dict(zip(names, values, strict=True))

    def bind(self, inputs: Mapping[str, np.ndarray], outputs: Mapping[str, np.ndarray]) -> Callable[[], None]:
        """Return a run that reads and writes the same arrays each time; all outputs that are wanted have to be there.

        For the CPU provider, which uses the arrays' own memory. They are C-contiguous, and kept alive by what is
        returned. It is for one thread at a time, and raises `BackendError` when onnxruntime fails.
        """
        binding, session = self._session.io_binding(), self._session
        for bind, arrays in ((binding.bind_input, inputs), (binding.bind_output, outputs)):
            for name, array in arrays.items():
                bind(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)
        kept = (dict(inputs), dict(outputs))  # onnxruntime has their addresses only

        def run(_alive: object = kept) -> None:
            try:
                session.run_with_iobinding(binding)
            except Exception as error:  # the only base class that onnxruntime's exceptions share
                raise BackendError(f"onnxruntime failed: {reason_of(error)}") from error

        return run

    def end_profiling(self) -> Path:
        """End the profile that was asked for when the model was opened; return its JSON file."""
        return Path(self._session.end_profiling())

    def _run_bound(self, names: list[str], feeds: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        """Hand over all inputs at once and fetch all outputs at once: one copy each way, none for what stays inside."""
        binding = self._session.io_binding()
        for name, value in feeds.items():
            binding.bind_cpu_input(name, np.ascontiguousarray(value))
        for name in names:
            binding.bind_output(name)
        self._session.run_with_iobinding(binding)
        values: list[np.ndarray] = binding.copy_outputs_to_cpu()
        return values


def open_ort(model: bytes, provider: str = "cpu", threads: int | None = None, profile: Path | None = None) -> OrtModel:
    """Open a model from its bytes.

    Args:
        model: the ONNX file's bytes.
        provider: `cpu`, `cuda` or `tensorrt-ep`.
        threads: threads within an operator; None takes the limit of the block (see `threads.limited_threads`), and
            without one leaves it to onnxruntime.
        profile: onnxruntime writes the time of every node to a file whose name begins so; slower.

    Raises:
        MissingExtraError: onnxruntime is not installed.
        BackendError: unknown or unavailable provider, or a model that onnxruntime refuses.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise MissingExtraError("onnxruntime", "cpu", "Running a model") from error
    if provider not in PROVIDERS:
        raise BackendError(f"provider {provider!r} is unknown; expected one of {', '.join(PROVIDERS)}")
    name = PROVIDERS[provider]
    if name not in onnxruntime.get_available_providers():
        raise BackendError(
            f"provider {provider!r} was asked for, but this onnxruntime {onnxruntime.__version__} has no {name}. "
            "Install onnxruntime-gpu in its place (pip install 'grood-edge[gpu]'), or use --provider cpu"
        )
    limit = thread_limit() if threads is None else threads
    options, providers = _session_options(provider, limit, model), _providers(provider, model)
    if profile is not None:
        options.enable_profiling, options.profile_file_prefix = True, str(profile)
    try:
        # Its Python part would print to stdout, and open or run the model again on the CPU.
        session = onnxruntime.InferenceSession(model, options, providers=providers, enable_fallback=0)
        session.disable_fallback()  # older releases do not know the argument, and a run has a fallback of its own
        session._model_bytes = None  # kept to open the model again for a fallback, for as long as the session lives
    except Exception as error:  # the only base class that onnxruntime's exceptions share
        reason = reason_of(error).rstrip(".") + _ADVICE.get(provider, "")
        raise BackendError(f"onnxruntime cannot open the model on {provider}: {reason}") from error
    if session.get_providers()[0] != name:
        raise BackendError(
            f"provider {provider!r} was asked for, but onnxruntime fell back to {session.get_providers()[0]}: "
            f"its libraries could not be loaded{_ADVICE.get(provider, '')}"
        )
    return OrtModel(session, bound=provider != "cpu")


def _session_options(provider: str, threads: int | None, model: bytes) -> Any:
    import onnxruntime

    options: Any = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # errors arrive as exceptions
    # Its own format is recognised by four bytes in the middle of a file; only what was checked may be loaded.
    options.add_session_config_entry("session.load_model_format", "ONNX")
    if threads is not None:
        options.intra_op_num_threads = threads
    if provider == "cpu" and b"QuantizeLinear" not in model:
        # Nothing is computed in int8, so int8 rows of a bank may be dequantised once, on loading. Else every run writes
        # them to memory as float32 and reads them again: a quarter of the head's time with 2,000 rows of 1,280.
        options.add_session_config_entry("session.disable_quant_qdq", "1")
    if provider != "cpu":
        options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    return options


def _providers(provider: str, model: bytes) -> list[Any]:
    """Return the provider with its options. TensorRT's may leave nodes to CUDA's, never to the CPU."""
    if provider != "tensorrt-ep":
        return [PROVIDERS[provider]]
    return [(PROVIDERS[provider], tensorrt_options(model)), PROVIDERS["cuda"]]


def tensorrt_options(model: bytes) -> dict[str, str]:
    """Return the options of TensorRT's provider for a model: a folder and a prefix of its own for engines and timings.

    Raises:
        BackendError: no folder can be made that only this user can write.
    """
    variables = sorted(name for name in os.environ if name.startswith("ORT_TENSORRT_"))
    if variables:
        _LOG.warning(
            "the environment sets %s, which changes how onnxruntime builds TensorRT engines without a word; unset what "
            "you did not mean",
            ", ".join(variables),
        )
    digest = hashlib.sha256(model).hexdigest()
    folder = str(cache_folder(f"onnxruntime-{digest[:16]}"))
    return {
        "trt_engine_cache_enable": "1",
        "trt_engine_cache_path": folder,
        "trt_engine_cache_prefix": f"grood-edge-{digest[:16]}",
        "trt_timing_cache_enable": "1",
        "trt_timing_cache_path": folder,
        **_profile(model),
    }


def _profile(model: bytes) -> dict[str, str]:
    """Return the range of batches to build for, so that no engine is built anew for a larger one."""
    import onnxruntime

    options = _session_options("cpu", 1, model)
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(model, options, providers=[PROVIDERS["cpu"]])
    image = session.get_inputs()[0]
    if isinstance(image.shape[0], int):
        return {}
    sides = "x".join(str(side) for side in image.shape[1:])
    names = ("trt_profile_min_shapes", "trt_profile_opt_shapes", "trt_profile_max_shapes")
    return {name: f"{image.name}:{size}x{sides}" for name, size in zip(names, PROFILE, strict=True)}
