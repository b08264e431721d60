"""What Ray workers run in tests: the package's own functions, after a worker was killed once. Imports nothing heavy."""

import os
import signal
from pathlib import Path
from typing import Any

from grood_edge.export import shards as export_shards
from grood_edge.runtime import shards as runtime_shards

DEATHS = "GROOD_EDGE_TEST_DEATHS"  # names a folder, in the environment of the workers


def read(network: Any, shard: Any) -> Any:
    _die_once("read", shard.start > 0)
    return export_shards._read(network, shard)


def rows(session: Any, shard: Any) -> Any:
    _die_once("rows", True)
    return runtime_shards._rows(session, shard)


def infer(session: Any, shard: Any) -> Any:
    _die_once("infer", True)
    return runtime_shards._infer(session, shard)


def always_die(opened: Any, shard: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def opened(job: Any) -> Any:
    return job


def half(opened: Any, shard: tuple[int, int]) -> Any:
    start, stop = shard
    return opened, sum(range(start, stop))


def _die_once(name: str, now: bool) -> None:
    """Kill this process in the middle of a shard, the first time that it is asked to."""
    if not now:
        return
    try:
        (Path(os.environ[DEATHS]) / name).touch(exist_ok=False)
    except FileExistsError:
        return
    os.kill(os.getpid(), signal.SIGKILL)
