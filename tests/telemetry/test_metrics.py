"""Metrics as a Prometheus server gets them: over HTTP, through the reference parser."""

import socket
import urllib.error
import urllib.request
from collections.abc import Iterator

import pytest

from grood_edge.errors import MissingExtraError, OutputError, UsageError
from grood_edge.runtime.drift import Drift
from grood_edge.telemetry.metrics import MOST_CLASSES, OTHER, Metrics, open_metrics, parse_address
from tests.telemetry.conftest import verdict_of

parser = pytest.importorskip("prometheus_client.parser", reason="prometheus-client (extra metrics) is not installed")


@pytest.fixture
def metrics() -> Iterator[Metrics]:
    served = open_metrics(":0", ("cup", "bottle"))
    yield served
    served.close()


Samples = dict[tuple[str, tuple[str, ...]], float]


def scraped(metrics: Metrics) -> Samples:
    with urllib.request.urlopen(f"http://{metrics.address}/metrics", timeout=10) as answer:
        text = answer.read().decode()
    return {
        (sample.name.removeprefix("grood_edge_"), tuple(sample.labels.values())): sample.value
        for family in parser.text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_what_is_served(metrics: Metrics) -> None:
    first = scraped(metrics)
    assert first["frames_total", ("BLACK",)] == 0  # there before the first frame
    assert first["drift_p_value", ()] != first["drift_p_value", ()]  # NaN: no window yet
    drift = Drift(statistic=0.31, p_value=0.0004, level=0.001, window=200, time=7.5)
    metrics.write(verdict_of(0, state="UNSURE", changed=False, dropped=2))
    metrics.write(verdict_of(1, state="KNOWN", changed=True, dropped=2))
    metrics.write(verdict_of(2, state="NO-VIEW", status="BLACK", changed=True, dropped=5))
    metrics.write(verdict_of(3, state="UNKNOWN", changed=True, p_value=0.01, dropped=5, drift=drift))
    found = scraped(metrics)
    expected = {
        ("frames_total", ("OK",)): 3,
        ("frames_total", ("BLACK",)): 1,
        ("frames_total", ("STALE",)): 0,
        ("dropped_frames_total", ()): 5,
        ("verdicts_total", ("cup", "false")): 2,
        ("verdicts_total", ("cup", "true")): 1,
        ("transitions_total", ("UNKNOWN",)): 1,
        ("transitions_total", ("UNSURE",)): 0,
        ("state", ("UNKNOWN",)): 1,
        ("state", ("KNOWN",)): 0,
        ("state", ("UNSURE",)): 0,
        ("state", ("NO-VIEW",)): 0,
        ("age_seconds_count", ()): 4,
        ("age_seconds_bucket", ("0.025",)): 0,
        ("age_seconds_bucket", ("0.033",)): 4,
        ("latency_seconds_count", ()): 3,
        ("latency_seconds_bucket", ("0.015",)): 3,
        ("drift_statistic", ()): 0.31,
        ("drift_p_value", ()): 0.0004,
        ("drifted", ()): 1,
    }
    assert {key: found[key] for key in expected} == expected


def test_labels_are_bounded() -> None:
    classes = [f"class {index}" for index in range(3 * MOST_CLASSES)]
    with_many = open_metrics(":0", classes)
    for index, name in enumerate([*classes, "never heard of", 'quote " and \n']):
        with_many.write(verdict_of(index, name=name))
    found = scraped(with_many)
    with_many.close()
    names = {labels[0] for metric, labels in found if metric == "verdicts_total"}
    assert names == {*classes[:MOST_CLASSES], OTHER}
    assert found["verdicts_total", (OTHER, "false")] == 2 * MOST_CLASSES + 2


def test_two_at_once_do_not_mix(metrics: Metrics) -> None:
    other = open_metrics(":0", ("cup",))
    other.write(verdict_of(0))
    assert scraped(metrics)["frames_total", ("OK",)] == 0
    other.close()


def test_close_frees_the_port(metrics: Metrics) -> None:
    address = metrics.address
    assert address.startswith("127.0.0.1:")
    metrics.close()
    metrics.close()
    with pytest.raises(urllib.error.URLError):
        scraped(metrics)
    again = open_metrics(address, ())
    assert again.address == address
    again.close()


def test_port_in_use(metrics: Metrics) -> None:
    with pytest.raises(OutputError, match="the port is in use; choose another --metrics"):
        open_metrics(metrics.address, ())


@pytest.mark.parametrize("address", ["203.0.113.7:0", "no such host:0", f"{'a' * 70}.example:0"])
def test_address_of_another_machine(address: str) -> None:
    with pytest.raises(OutputError, match="cannot serve"):
        open_metrics(address, ())


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (":9464", ("127.0.0.1", 9464)),
        ("0.0.0.0:9464", ("0.0.0.0", 9464)),
        ("[::1]:9464", ("::1", 9464)),
        ("localhost:0", ("localhost", 0)),
    ],
)
def test_addresses(text: str, expected: tuple[str, int]) -> None:
    assert parse_address(text) == expected


@pytest.mark.parametrize(
    "text", ["", ":", "9464", "host", ":http", ":-1", ":65536", "::1:9464", ":９４６４", "http://a:1/"]
)
def test_no_addresses(text: str) -> None:
    with pytest.raises(UsageError, match="expected HOST:PORT"):
        parse_address(text)


def test_ipv6() -> None:
    try:
        with socket.socket(socket.AF_INET6) as trial:
            trial.bind(("::1", 0))
    except OSError:
        pytest.skip("no IPv6 here")
    served = open_metrics("[::1]:0", ())
    assert scraped(served)["frames_total", ("OK",)] == 0
    served.close()


def test_without_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "prometheus_client", None)
    with pytest.raises(MissingExtraError, match=r"grood-edge\[metrics\]"):
        open_metrics(":0", ())
