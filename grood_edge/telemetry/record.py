"""The one JSON document of a stream verdict, for JSONL, MCAP and the frames around alarms."""

import datetime
import json
import math
import time
from typing import Any, get_args

from grood_edge.runtime.states import StateName, Status
from grood_edge.runtime.stream import StreamVerdict
from grood_edge.terminal import escaped_json

__all__ = ["RECORD_SCHEMA", "iso_time", "json_bytes", "record_of", "wall_time"]


def _object(required: tuple[str, ...], **properties: dict[str, Any]) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": list(required), "additionalProperties": False}


def _number(description: str, **bounds: int) -> dict[str, Any]:
    return {"type": "number", "description": description, **bounds}


def _string(description: str, *values: str) -> dict[str, Any]:
    return {"type": "string", "description": description, **({"enum": list(values)} if values else {})}


_COUNT = {"type": "integer", "minimum": 0}
_FLAG = {"type": "boolean"}
_SAID = ("class_id", "class_name", "ood_score", "p_value", "is_ood", "valid")
_DRIFT = ("statistic", "p_value", "level", "window", "time", "drifted", "measured")

# One type a field and no null anywhere: Foxglove reads neither lists of types nor null. What has no value is left out.
RECORD_SCHEMA: dict[str, Any] = {
    "$schema": "https://json-schema.org/draft/2020-12/schema",
    "title": "grood_edge.StreamVerdict",
    "description": "One frame of a stream: how it was, what the artifact says of it, and what is held to be true.",
    **_object(
        ("time", "source", "index", "status", "state", "changed", "age", "latency", "dropped"),
        time=_string("wall clock when the frame was captured, ISO 8601, UTC"),
        source=_string("name of the source"),
        index={**_COUNT, "description": "of the frame in the source"},
        source_time=_number("seconds on the source's own clock"),
        status=_string("whether it was scored, or why not", *get_args(Status)),
        problem=_string("why it was not scored, in words"),
        state=_object(
            ("name", "since", "reason", "fed"),
            name=_string("what is held to be true after this frame", *get_args(StateName)),
            since=_number("seconds on the decision's clock when it began"),
            reason=_string("why"),
            class_name=_string("in the state KNOWN"),
            evidence=_number("log of the e-CUSUM, or the frames among the last n that speak for UNKNOWN"),
            fed={**_FLAG, "description": "this frame took part in the decision"},
        ),
        changed={**_FLAG, "description": "the state has another name than before this frame"},
        class_id={**_COUNT, "description": "the network's own class"},
        class_name=_string("the network's own class"),
        ood_score=_number("higher = more OOD"),
        p_value=_number("small = OOD", minimum=0, maximum=1),
        is_ood=_FLAG,
        valid={**_FLAG, "description": "false: the network's outputs were not finite"},
        age=_number("seconds from capture to the end of the decision"),
        latency=_number("seconds that the session took"),
        dropped={**_COUNT, "description": "frames captured and never seen, up to here"},
        drift=_object(
            ("statistic", "p_value", "level", "window", "time", "drifted", "measured"),
            statistic=_number("Kolmogorov-Smirnov distance to the calibration scores", minimum=0, maximum=1),
            p_value=_number("of that distance", minimum=0, maximum=1),
            level=_number("below which it is drift"),
            window={**_COUNT, "description": "frames in it"},
            time=_number("seconds on the decision's clock when it was full"),
            drifted=_FLAG,
            measured={
                **_FLAG,
                "description": "episodes said how far apart frames are independent; else the level is not kept",
            },
        ),
    ),
}


def record_of(verdict: StreamVerdict) -> dict[str, Any]:
    """Return the document, as `RECORD_SCHEMA` says; what has no value, or none that is finite, is left out."""
    frame, state, said, drift = verdict.frame, verdict.state, verdict.verdict, verdict.drift
    document = {
        "time": iso_time(wall_time(frame.captured)),
        "source": frame.source,
        "index": frame.index,
        "source_time": frame.source_time,
        "status": verdict.status,
        "problem": frame.problem,
        "state": {
            "name": state.name,
            "since": state.since,
            "reason": state.reason,
            "class_name": state.class_name,
            "evidence": state.evidence,
            "fed": state.fed,
        },
        "changed": verdict.changed,
        "age": round(verdict.age, 6),
        "latency": round(verdict.latency, 6),
        "dropped": verdict.dropped,
    }
    if said is not None:
        document.update({name: getattr(said, name) for name in _SAID})
    if drift is not None:
        document["drift"] = {name: getattr(drift, name) for name in _DRIFT}
    return _known(document)


def json_bytes(document: dict[str, Any]) -> bytes:
    """Return one line of JSON, UTF-8, without its end. Names of files that are no text get a `?` for each odd byte.

    Control characters are escaped: people look at logs in terminals.
    """
    text = json.dumps(document, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return escaped_json(text.encode("utf-8", "replace").decode()).encode()


def wall_time(captured: float) -> float:
    """Return the time of the wall clock, seconds since 1970, at `captured` seconds of `time.monotonic()`.

    By the wall clock of now: a robot's clock is often set after the start.
    """
    return captured + (time.time() - time.monotonic())


def iso_time(seconds: float) -> str:
    """Return seconds since 1970 as ISO 8601 in UTC, with microseconds."""
    moment = datetime.datetime.fromtimestamp(seconds, datetime.timezone.utc)
    return moment.isoformat(timespec="microseconds").replace("+00:00", "Z")


def _known(document: dict[str, Any]) -> dict[str, Any]:
    kept: dict[str, Any] = {}
    for name, value in document.items():
        if value is None or (isinstance(value, float) and not math.isfinite(value)):
            continue
        kept[name] = _known(value) if isinstance(value, dict) else value
    return kept
