"""One execution of a target, watched: which exception came out, how much memory and time it took, what it touched."""

import contextlib
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from types import FrameType
from typing import Any

from grood_edge.errors import GroodEdgeError
from tests.fuzz.mutations import Mutate

ROOT = Path(__file__).resolve().parent.parent.parent
MIB = 1 << 20
_CLEAR = Path("/proc/self/clear_refs")
# The installation, and what libraries look up: /etc/passwd, ~, other people's files are not among it.
_READABLE = tuple(
    f"{os.path.realpath(folder)}/"
    for folder in (
        ROOT / "grood_edge",
        ROOT / "tests",
        sys.prefix,
        sys.base_prefix,
        "/usr/lib",
        "/usr/local/lib",
        "/usr/share/zoneinfo",
        "/usr/share/fonts",
        "/lib",
        "/proc/cpuinfo",
        "/proc/meminfo",
        "/proc/stat",
        "/proc/net/psched",
        "/sys/devices/system",
        "/sys/class/thermal",
        "/sys/devices/virtual/thermal",
        "/sys/fs/cgroup",
        "/dev/urandom",
        "/etc/mime.types",
        "/etc/localtime",
        "/etc/os-release",
    )
)
_NEVER = (
    "subprocess.Popen",
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "os.fork",
    "os.forkpty",
    "socket.connect",
    "socket.bind",
    "socket.sendto",
    "socket.sendmsg",
    "socket.getaddrinfo",
    "socket.gethostbyname",
    "pickle.find_class",
)
_CHANGES = (
    "os.remove",
    "os.rename",
    "os.rmdir",
    "os.mkdir",
    "os.link",
    "os.symlink",
    "os.truncate",
    "os.chmod",
    "os.chown",
    "os.utime",
    "os.setxattr",
    "shutil.rmtree",
)


@dataclass(frozen=True)
class Target:
    """What is fuzzed.

    seeds: makes the real files that are changed, as bytes. mutate: changes one. run: reads it, in an empty folder that
    is the current one. memory: MiB that it may take beyond what there was. seconds: of CPU. quick: executions in the
    suite; none where the seeds alone take seconds.
    """

    name: str
    seeds: Callable[[Path], Sequence[bytes]]
    mutate: Mutate
    run: Callable[[bytes], None]
    memory: int = 64
    seconds: float = 5.0
    quick: int = 100


class TooSlow(BaseException):
    """The time is over. Not an Exception, so that nobody catches it."""


class _Watch:
    """The audit hook cannot be removed, so there is one, which looks only while a target runs."""

    def __init__(self) -> None:
        self.folder: str | None = None
        self.found: list[str] = []
        sys.addaudithook(self)

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.folder is None:
            return
        if event == "open":
            path, mode, flags = arguments
            writes = (isinstance(mode, str) and set(mode) & set("wax+")) or (
                isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
            )
            self._path("writes" if writes else "reads", path)
        elif event in ("os.listdir", "os.scandir"):
            folder = arguments[0] if isinstance(arguments[0], str | bytes) else "."
            if os.fsdecode(folder) not in (*sys.path, "/dev"):  # imports look there; which cameras there are
                self._path("reads", folder)
        elif event == "ctypes.dlopen":
            if arguments[0] and os.sep in os.fsdecode(arguments[0]):  # a bare name is the system's own library
                self._path("reads", arguments[0])
        elif event in _CHANGES:
            for path in arguments:
                self._path(event, path)
        elif event in _NEVER:
            self.found.append(f"{event} {str(arguments)[:200]}")

    def _path(self, what: str, path: Any) -> None:
        if not isinstance(path, str | bytes | os.PathLike) or self.folder is None:
            return
        full = os.path.realpath(os.fsdecode(path))
        if f"{full}/".startswith(f"{self.folder}/") or full == "/dev/null":
            return
        # its own number is another one after a fork
        if what != "reads" or not f"{full}/".startswith((*_READABLE, f"/proc/{os.getpid()}/")):
            self.found.append(f"{what} {full}")


_watch: _Watch | None = None


def execute(target: Target, data: bytes, folder: Path) -> str | None:
    """Run the target once; return what is wrong, in words that are the same for the same cause, or None."""
    global _watch  # noqa: PLW0603 - an audit hook stays for the life of the process
    _watch = _watch or _Watch()
    start, before, error = time.process_time(), _reset_peak(), None
    _watch.found, _watch.folder = [], os.path.realpath(folder)
    try:
        with _limited(target.seconds):
            target.run(data)
    except GroodEdgeError as refused:
        error = _bad_message(refused)
    except (Exception, TooSlow, KeyboardInterrupt, SystemExit) as caught:
        error = _signature(caught)
    finally:
        _watch.folder = None
    took, grown = time.process_time() - start, (_peak() - before) / MIB
    if error is None and took > target.seconds:
        error = "takes too much time"
    if error is None and before and grown > target.memory:
        error = f"takes too much memory: more than {target.memory} MiB"
    if error is None and _watch.found:
        error = f"touches what it must not: {_watch.found[0]}"
    return error


def mutated(target: Target, seeds: Sequence[bytes], random: Random) -> bytes:
    """Return one seed with one change, or a few."""
    data = random.choice(seeds)
    for _ in range(random.choice((1, 1, 1, 2, 3))):
        data = target.mutate(random, data)
    return data


def _bad_message(error: GroodEdgeError) -> str | None:
    text = str(error)
    return None if 10 < len(text) < 20_000 else f"{type(error).__name__} says {len(text)} characters"


def _signature(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    ours = [f for f in frames if f"{os.sep}grood_edge{os.sep}" in f.filename] or frames[-1:]
    where = f"{Path(ours[-1].filename).name}:{ours[-1].name}" if ours else "?"
    return f"{type(error).__name__} from {where}"


@contextlib.contextmanager
def _limited(seconds: float) -> Iterator[None]:
    def stop(number: int, frame: FrameType | None) -> None:
        raise TooSlow

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, seconds)  # CPU time: other processes do not count
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def _reset_peak() -> int:
    """Begin to measure anew; return the bytes in memory now, 0 where the system cannot."""
    try:
        _CLEAR.write_text("5")
    except OSError:
        return 0
    return _peak()


def _peak() -> int:
    try:
        status = Path("/proc/self/status").read_bytes()
    except OSError:
        return 0
    return int(status[status.index(b"VmHWM:") + 6 :].split(maxsplit=1)[0]) * 1024
