"""Shards of images on a Ray cluster: each is a pure function of its files, and results come in the order of the shards.

Ray core and not Ray Data: what is summed later must arrive in one fixed order and in the very batches that a local run
has, and Ray Data cuts blocks and batches by itself. Tasks that are consumed in the order in which they were submitted
give both. A task whose worker dies is run again by Ray, and gives the same, because it has no state but the open model.
"""

import contextlib
import importlib
import logging
import os
import platform
import secrets
import signal
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from grood_edge import errors
from grood_edge.arrays import Frame
from grood_edge.errors import BackendError, DatasetError, GroodEdgeError, MissingExtraError, UsageError
from grood_edge.images import UnreadableImageError, load_image
from grood_edge.versions import numeric_versions

__all__ = ["SHARD_IMAGES", "Cluster", "Engine", "Work", "load_shared", "opened_engine", "require_engine", "shards_of"]

Engine = Literal["local", "ray"]

SHARD_IMAGES = 256  # a task: seconds of work, and a few megabytes of results
RETRIES = 3  # times that a shard is run again after its worker died
_AHEAD = 2  # shards in flight for each CPU, so that none waits for the driver


@dataclass(frozen=True)
class Work:
    """What workers do: `open(job)` once in a process, then `run(opened, shard)` for each shard.

    Both are functions of a module, by whose name the workers find them. `job`, shards and results are arrays, text,
    numbers and frozen dataclasses of ours; Ray moves them as pickles between its own processes.
    """

    open: Callable[[Any], Any]
    run: Callable[[Any, Any], Any]
    job: Any


@dataclass(frozen=True)
class Cluster:
    """A Ray cluster that this process has joined, with so many CPUs."""

    cpus: int

    def ordered(self, work: Work, shards: Iterable[Any]) -> Generator[Any, None, None]:
        """Run every shard once, at most two in flight for each CPU, and give the results in the order of the shards.

        Whoever may leave early closes it, so that the shards in flight are cancelled while the cluster is there.

        Raises:
            GroodEdgeError: what a worker raised, as it would be raised here.
            BackendError: a worker died again and again, or is not like this process.
        """
        import ray

        task = ray.remote(num_cpus=1, max_retries=RETRIES)(_task)
        job, versions = ray.put(work.job), numeric_versions()
        flying: deque[Any] = deque()

        def landed() -> Any:
            try:
                found = ray.get(flying[0])  # stays among those to be cancelled, should Ctrl-C come now
                flying.popleft()
                return _result(found)
            except ray.exceptions.RayError as error:
                raise BackendError(
                    f"a Ray worker failed: {_gist(error)}. A shard is run again {RETRIES} times when its worker dies; "
                    "see the logs of the cluster (/tmp/ray/session_latest/logs), or leave --engine ray out"
                ) from error

        try:
            for shard in shards:
                flying.append(task.remote(work.open, work.run, job, job.hex(), versions, shard))
                if len(flying) >= _AHEAD * self.cpus:
                    yield landed()
            while flying:
                yield landed()
        finally:  # after an error or Ctrl-C nobody wants the others
            if ray.is_initialized():  # else ray.cancel would start a cluster
                for waiting in flying:
                    with contextlib.suppress(ray.exceptions.RayError):
                        ray.cancel(waiting)


def require_engine(engine: Engine, address: str | None) -> None:
    """Find out before any work whether the engine can be used.

    Raises:
        UsageError: an address without `--engine ray`, or one of a kind that is not supported.
        MissingExtraError: Ray is not installed.
    """
    if engine == "local":
        if address is not None:
            raise UsageError(
                f"--ray-address {address} has no use without --engine ray; add it, or leave the address out"
            )
        return
    if address is not None and "://" in address:
        raise UsageError(
            f"--ray-address {address}; expected host:port of the cluster, such as 10.0.0.1:6379, or auto. Run the "
            "command on a machine of the cluster: Ray's client protocol is not supported"
        )
    try:
        import ray  # noqa: F401
    except ImportError as error:
        raise MissingExtraError("ray", "ray", "--engine ray") from error


def opened_engine(engine: Engine, address: str | None = None) -> AbstractContextManager[Cluster | None]:
    """Join or start the cluster for a `with` block; None where the work is done here.

    Without an address Ray is started on this machine alone, for this block; a program that has called `ray.init` itself
    goes on with its own cluster. The environment is left as it was found.

    Raises:
        BackendError: the cluster cannot be reached or started.
        MissingExtraError, UsageError: see `require_engine`.
    """
    require_engine(engine, address)
    return contextlib.nullcontext() if engine == "local" else _joined(address)


@contextlib.contextmanager
def _joined(address: str | None) -> Iterator[Cluster]:
    import ray

    if ray.is_initialized():
        yield _present()
        return
    with _settings(address):
        _init(address)
        try:
            yield _present()
        finally:
            ray.shutdown()


def _present() -> Cluster:
    import ray

    cpus = int(ray.cluster_resources().get("CPU", 0))
    if cpus < 1:
        raise BackendError("the Ray cluster has no CPU; start a node with one: ray start --address HEAD:6379")
    return Cluster(cpus)


@contextlib.contextmanager
def _settings(address: str | None) -> Iterator[None]:
    """For a block: Ray calls nobody, and a cluster of our own, which listens on every interface, asks for a token."""
    ours = {"RAY_USAGE_STATS_ENABLED": "0"}
    if address is None:  # a cluster that was started elsewhere has its own token
        defaults = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
        ours |= {name: os.environ.get(name, value) for name, value in defaults.items()}
    found = {name: os.environ.get(name) for name in ours}
    os.environ.update(ours)
    try:
        if address is None:
            _read_again()
        yield
    finally:
        for name, value in found.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        if address is None:
            _read_again()


def _read_again() -> None:
    """Have Ray read the environment: it does so when it is imported, and keeps the token that it has found then.

    Without this a program that imported Ray before could not be put behind a token, and its own `ray.init` later would
    fail for ours. The order is Ray's own: a thread of it that still ends may ask for a token while the mode says so.
    """
    import ray

    try:
        raylet: Any = importlib.import_module("ray._raylet")  # Ray has no public way
        raylet.Config.initialize("")
        raylet.AuthenticationTokenLoader.instance().reset_cache()
    except (ImportError, AttributeError) as error:
        raise BackendError(
            f"Ray {ray.__version__} cannot be put behind a token here ({error}); call ray.init before, or give "
            "--ray-address auto after: ray start --head"
        ) from error


def _init(address: str | None) -> None:
    import ray

    where: dict[str, Any] = {"address": address}
    if address is None:  # "local": else RAY_ADDRESS, or whatever cluster runs here, would be joined unasked
        where = {"address": "local", "include_dashboard": False}
    handler = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(**where, log_to_driver=False, logging_level=logging.ERROR)
    except Exception as error:  # ConnectionError, RuntimeError, OSError, ValueError: Ray has no common one
        ray.shutdown()
        raise BackendError(
            f"cannot {'start Ray here' if address is None else f'join the Ray cluster at {address}'}: {_gist(error)}. "
            "ray status, on a machine of the cluster, shows what runs; or leave --engine ray out"
        ) from error
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, handler or signal.SIG_DFL)  # Ray puts its own in place


def shards_of(start: int, stop: int, size: int) -> Iterator[tuple[int, int]]:
    """Cut the places from `start` to `stop` at the multiples of `size`."""
    while start < stop:
        end = min(stop, (start // size + 1) * size)
        yield start, end
        start = end


def load_shared(path: Path) -> Frame:
    """Load an image on a worker, which has to see the files that the driver listed.

    Raises:
        DatasetError: the file is not there.
        UnreadableImageError: as `images.load_image`.
    """
    try:
        return load_image(path)
    except UnreadableImageError as error:
        if isinstance(error.__cause__, FileNotFoundError):
            raise DatasetError(
                f"the Ray worker on {platform.node()} does not see {path}; expected every machine of the cluster to "
                "have the images at the same path, such as on a shared file system. Mount it there and start again"
            ) from error
        raise


_opened: tuple[str, Any] = ("", None)  # in a worker: the job that it has open


def _task(
    open_: Callable[[Any], Any],
    run: Callable[[Any, Any], Any],
    job: Any,
    key: str,
    versions: dict[str, str],
    shard: Any,
) -> tuple[str, Any]:
    """Run in a worker. An error of ours is returned as its name and text: as an exception it would be retold by Ray."""
    global _opened  # noqa: PLW0603 - the one state that a worker has
    try:
        if (own := numeric_versions()) != versions:
            raise BackendError(
                f"the Ray worker on {platform.node()} has {own}; expected {versions}, as here: other releases may "
                "decode or compute differently. Install the same on every machine of the cluster"
            )
        if _opened[0] != key:
            _opened = (key, open_(job))
        return "", run(_opened[1], shard)
    except GroodEdgeError as error:
        return type(error).__name__, str(error)


def _result(found: tuple[str, Any]) -> Any:
    kind, value = found
    if not kind:
        return value
    raised = getattr(errors, kind)
    raise raised.__new__(raised, value)  # not by its constructor: that of MissingExtraError takes other arguments


def _gist(error: Exception) -> str:
    """Return the last line that says something: Ray puts whole tracebacks and node lists into its messages."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1 if "Traceback" in str(error) else 0][:300].rstrip(".") if lines else type(error).__name__
