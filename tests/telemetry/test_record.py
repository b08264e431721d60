"""The document: what it says, that it fits its schema, and that the schema is one that Foxglove reads."""

import datetime
import json
import math
import time
from typing import Any

import jsonschema
import pytest

from grood_edge.runtime.drift import Drift
from grood_edge.telemetry.record import RECORD_SCHEMA, json_bytes, record_of
from tests.telemetry.conftest import verdict_of

DRIFT = Drift(statistic=0.31, p_value=0.0004, level=0.001, window=200, time=7.5)
VALID = jsonschema.Draft202012Validator(RECORD_SCHEMA)


def test_scored_frame() -> None:
    before = time.time()
    document = json.loads(json_bytes(record_of(verdict_of(7, changed=True, drift=DRIFT, dropped=3))))
    VALID.validate(document)
    taken = datetime.datetime.fromisoformat(document.pop("time").replace("Z", "+00:00")).timestamp()
    assert before - 0.01 <= taken <= time.time() + 0.01
    assert document == {
        "source": "bikes.mp4",
        "index": 7,
        "source_time": 0.28,
        "status": "OK",
        "state": {
            "name": "KNOWN",
            "since": 0.0,
            "reason": "p_value at least 0.05 in 5 of 8 frames",
            "class_name": "cup",
            "evidence": 0.25,
            "fed": True,
        },
        "changed": True,
        "class_id": 3,
        "class_name": "cup",
        "ood_score": 5.0,
        "p_value": 0.42,
        "is_ood": False,
        "valid": True,
        "age": 0.031,
        "latency": 0.0125,
        "dropped": 3,
        "drift": {
            "statistic": 0.31,
            "p_value": 0.0004,
            "level": 0.001,
            "window": 200,
            "time": 7.5,
            "drifted": True,
            "measured": True,
        },
    }


def test_frame_that_was_not_scored_says_nothing_of_a_class() -> None:
    document = record_of(verdict_of(7, state="NO-VIEW", status="INVALID", problem="8 bytes instead of a picture"))
    VALID.validate(document)
    assert document["problem"] == "8 bytes instead of a picture"
    assert not {"class_id", "class_name", "ood_score", "p_value", "is_ood", "valid", "drift"} & set(document)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_numbers_that_are_not_finite_are_left_out(value: float) -> None:
    drift = Drift(statistic=0.5, p_value=value, level=0.001, window=200, time=value)
    line = json_bytes(record_of(verdict_of(1, score=value, drift=drift)))

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} in {line!r}")

    document = json.loads(line, parse_constant=refuse)
    assert "ood_score" not in document
    assert set(document["drift"]) == {"statistic", "level", "window", "drifted", "measured"}


def test_names_that_are_no_text_stay_one_line_of_utf8() -> None:
    name = 'line\nbreak "猫" \udcff\u2028\x9b\x7f\u202e'
    line = json_bytes(record_of(verdict_of(1, name=name)))
    assert line.decode().isprintable()
    assert json.loads(line.decode("utf-8"))["class_name"] == name.replace("\udcff", "?")


def test_schema_refuses_what_it_does_not_name() -> None:
    document = record_of(verdict_of(1))
    for broken in ({**document, "extra": 1}, {**document, "p_value": 1.5}, {**document, "status": "GOOD"}):
        assert not VALID.is_valid(broken)
    del document["state"]
    assert not VALID.is_valid(document)


def foxglove_fields(schema: dict[str, Any], path: str = "") -> list[str]:
    """Flatten a schema by the rules of Foxglove's parser (foxglove/studio, parseJsonSchema.ts): one known type each."""
    assert schema["type"] == "object", path
    fields: list[str] = []
    for name, field in schema["properties"].items():
        assert field.get("type") in ("boolean", "string", "number", "integer", "object"), f"{path}.{name}"
        assert "oneOf" not in field
        assert "contentEncoding" not in field
        fields += foxglove_fields(field, f"{path}.{name}") if field["type"] == "object" else [f"{path}.{name}"]
    return fields


def test_schema_is_one_that_foxglove_reads() -> None:
    fields = foxglove_fields(RECORD_SCHEMA)
    assert {".ood_score", ".p_value", ".state.name", ".drift.statistic"} <= set(fields)
