"""`--metrics :9464`: what a Prometheus server asks for."""

import errno
import threading
from collections.abc import Sequence
from typing import Any, get_args

from grood_edge.errors import MissingExtraError, OutputError, UsageError
from grood_edge.runtime.decision import StateName, Status
from grood_edge.runtime.stream import StreamVerdict

__all__ = ["Metrics", "open_metrics", "parse_address"]

LOCAL = "127.0.0.1"
MOST_CLASSES = 100  # with a label of their own; Prometheus keeps every label value for ever
OTHER = "(other)"
SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.015, 0.02, 0.025, 0.033, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0, 2.5, 5.0)
_STATES: tuple[StateName, ...] = get_args(StateName)
_STATUSES: tuple[Status, ...] = get_args(Status)


def parse_address(text: str) -> tuple[str, int]:
    """Return host and port of `HOST:PORT`, `[IPV6]:PORT` or `:PORT`, which is this machine alone.

    Raises:
        UsageError: something else.
    """
    host, colon, port = text.rpartition(":")
    if not (colon and port.isascii() and port.isdigit() and int(port) <= 65535) or (":" in host and host[0] != "["):
        raise UsageError(f"--metrics got {text!r}; expected HOST:PORT, or :PORT for this machine alone, such as :9464")
    return host.strip("[]") or LOCAL, int(port)


def open_metrics(address: str, classes: Sequence[str]) -> "Metrics":
    """Serve metrics over HTTP at `address`, for which see `parse_address`; port 0 is any that is free.

    `classes`: of the contract, the only class names that become labels; the first `MOST_CLASSES` of them.

    Raises:
        MissingExtraError: the package prometheus_client is not installed.
        UsageError: no address.
        OutputError: the port is in use, or may not be opened.
    """
    host, port = parse_address(address)
    try:
        import prometheus_client
    except ImportError as error:
        raise MissingExtraError("prometheus-client", "metrics", "Serving metrics (--metrics)") from error
    metrics = Metrics(prometheus_client, classes)
    metrics.serve(host, port)
    return metrics


class Metrics:
    """Counters, histograms and gauges in a registry of their own, and the server that shows them.

    address: `host:port` that is served.
    """

    def __init__(self, module: Any, classes: Sequence[str]) -> None:
        self.address = ""
        self._module = module
        self._server: Any = None
        self._thread: threading.Thread | None = None
        self._labelled = frozenset(classes[:MOST_CLASSES])
        self._dropped = 0
        self._registry = module.CollectorRegistry()
        counter, gauge = self._counter, self._gauge
        self._frames = counter("frames", "Frames looked at, by status (OK: scored)", "status")
        self._verdicts = counter("verdicts", "Scored frames, by the network's class and is_ood", "class_name", "is_ood")
        self._drops = counter("dropped_frames", "Frames captured and never looked at")
        self._transitions = counter("transitions", "Changes of the state, by the new one", "state")
        self._state = gauge("state", "1 for the state that is held, 0 for the others", "state")
        self._age = self._histogram("age_seconds", "From capture to the end of the decision")
        self._latency = self._histogram("latency_seconds", "What the session took for a scored frame")
        self._drift = gauge("drift_statistic", "Kolmogorov-Smirnov distance of the newest window to calibration")
        self._drift_p = gauge("drift_p_value", "Of that distance")
        self._drifted = gauge("drifted", "1: the scores no longer look like calibration")
        for status in _STATUSES:  # a rate over a counter that appears late misses its first count
            self._frames.labels(status)
        for state in _STATES:
            self._transitions.labels(state)
            self._state.labels(state)
        for drift in (self._drift, self._drift_p):
            drift.set(float("nan"))  # Prometheus's own word for "no value yet"

    def serve(self, host: str, port: int) -> None:
        """Start the server.

        Raises:
            OutputError: the address cannot be opened.
        """
        try:
            self._server, self._thread = self._module.start_http_server(port, addr=host, registry=self._registry)
        except (OSError, UnicodeError) as error:
            where = f"http://{host}:{port}/metrics"
            used = isinstance(error, OSError) and error.errno == errno.EADDRINUSE
            reason = "the port is in use" if used else getattr(error, "strerror", None) or str(error)
            raise OutputError(f"cannot serve {where}: {reason}; choose another --metrics HOST:PORT") from error
        found = self._server.server_address
        self.address = f"[{found[0]}]:{found[1]}" if ":" in found[0] else f"{found[0]}:{found[1]}"

    def write(self, verdict: StreamVerdict) -> None:
        """Count a frame."""
        self._frames.labels(verdict.status).inc()
        self._drops.inc(max(0, verdict.dropped - self._dropped))
        self._dropped = verdict.dropped
        self._age.observe(verdict.age)
        if verdict.verdict is not None:
            name = verdict.verdict.class_name
            label = name if name in self._labelled else OTHER
            self._verdicts.labels(label, str(verdict.verdict.is_ood).lower()).inc()
            self._latency.observe(verdict.latency)
        for state in _STATES:
            self._state.labels(state).set(state == verdict.state.name)
        if verdict.changed:
            self._transitions.labels(verdict.state.name).inc()
        if verdict.drift is not None:
            self._drift.set(verdict.drift.statistic)
            self._drift_p.set(verdict.drift.p_value)
            self._drifted.set(verdict.drift.drifted)

    def close(self) -> None:
        """Stop the server and free the port."""
        if self._server is None:
            return
        server, self._server = self._server, None
        server.shutdown()
        server.server_close()
        if self._thread is not None:
            self._thread.join()

    def _counter(self, name: str, text: str, *labels: str) -> Any:
        return self._module.Counter(f"grood_edge_{name}", text, labels, registry=self._registry)

    def _gauge(self, name: str, text: str, *labels: str) -> Any:
        return self._module.Gauge(f"grood_edge_{name}", text, labels, registry=self._registry)

    def _histogram(self, name: str, text: str) -> Any:
        return self._module.Histogram(f"grood_edge_{name}", text, registry=self._registry, buckets=SECONDS)
