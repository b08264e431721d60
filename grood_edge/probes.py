"""Probes: small lossless frames with the outputs they gave at export, so that any machine can check itself.

They are synthetic by default, because real frames may be private.
"""

import base64
import io
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from grood_edge.arrays import Frames, InputFrame
from grood_edge.contract import Contract, Probe
from grood_edge.contract_rules import MAX_PROBE_CHARACTERS, MAX_PROBES
from grood_edge.errors import ArtifactError, UsageError, VerificationError
from grood_edge.outputs import Outputs
from grood_edge.preprocessing import Preprocessing
from grood_edge.scoring import Head, nearest_gap

__all__ = [
    "ProbeReport",
    "ProbeRow",
    "decode_png",
    "left_out",
    "make_probes",
    "replay_probes",
    "score_tolerance",
    "synthetic_frames",
]

# A probe lies at least this far from the threshold and from another class, so that no device flips it: several times
# what two correct devices differ by (below).
MARGIN = {"fp32": 0.01, "fp16": 0.05, "int8": 0.3}
_ROOM = f"Probes may take {MAX_PROBE_CHARACTERS >> 10} KB in all, as base64 of PNG"
MIN_GAP = 1e-3  # nearer to a bank row float32 carries no score: 5 in log S between two correct CPU kernels

# Largest accepted |ood_score - expected| by provider. cpu: other kernels sum in another order, 1e-5 seen, times ten
# for features that lie near a bank row. cuda: convolutions may use TF32, which keeps 10 bits of mantissa.
# tensorrt-ep: TensorRT inside onnxruntime, likewise. tensorrt, tensorrt-rtx: our engines clear TF32, and sum in yet
# another order, with convolutions of several algorithms.
SCORE_TOLERANCE = {
    "cpu": 1e-3, "cuda": 2e-2, "tensorrt-ep": 2e-2, "tensorrt": 5e-3, "tensorrt-rtx": 5e-3, "replay": 0.0,
}  # fmt: skip
# Of graphs of lower precision at least this: fp16 is really rounded on GPUs and on ARM, and not on x86 (7e-4 seen on
# EfficientNet-Lite0, times thirty); int8 values fall on the other side of a step when sums differ in their last digit
# (1e-2 seen between two orders of summation, times five).
LOWER_TOLERANCE = {"fp32": 0.0, "fp16": 2e-2, "int8": 5e-2}


@dataclass(frozen=True)
class ProbeRow:
    """One probe on this machine: expected and actual score, and whether class, decision or validity differ."""

    name: str
    expected_score: float
    ood_score: float
    flipped: bool

    @property
    def error(self) -> float:
        """Absolute difference of the scores; infinite where this machine gives NaN."""
        difference = abs(self.ood_score - self.expected_score)
        return float("inf") if math.isnan(difference) else difference


@dataclass(frozen=True)
class ProbeReport:
    """All probes on one provider."""

    provider: str
    tolerance: float
    rows: tuple[ProbeRow, ...]

    @property
    def largest_error(self) -> float:
        """Largest score error over all probes."""
        return max((row.error for row in self.rows), default=float("inf"))

    @property
    def flips(self) -> int:
        """Number of probes whose class, decision or validity differs."""
        return sum(row.flipped for row in self.rows)

    @property
    def passed(self) -> bool:
        """True when there are probes, none flipped, and every score is within the tolerance."""
        return bool(self.rows) and self.flips == 0 and self.largest_error <= self.tolerance


def replay_probes(contract: Contract, run: Callable[[Frames], Outputs], provider: str) -> ProbeReport:
    """Run every probe, alone and (where the batch is open) in pairs, and compare with the contract.

    Raises:
        ArtifactError: a probe's picture is damaged or has another size than the graph's input.
        UsageError: a provider that has no tolerance.
    """
    tolerance = score_tolerance(contract, provider)
    frames = [decode_png(probe.png, contract.preprocessing) for probe in contract.probes]
    singles = [run(frame[None]) for frame in frames]
    rows = [_row(probe, outputs, 0) for probe, outputs in zip(contract.probes, singles, strict=True)]
    if contract.classifier.batch == "dynamic" and len(frames) > 1:
        for index in range(len(frames) - 1):
            outputs = run(np.stack(frames[index : index + 2]))
            rows += [_row(contract.probes[index + i], outputs, i) for i in range(2)]
    return ProbeReport(provider, tolerance, tuple(rows))


def score_tolerance(contract: Contract, provider: str) -> float:
    """Return the largest |ood_score - expected| between two correct runs of this artifact, one of them on `provider`.

    Raises:
        UsageError: a provider that has no tolerance.
    """
    if provider not in SCORE_TOLERANCE:
        raise UsageError(f"no tolerance is known for provider {provider!r}; expected {', '.join(SCORE_TOLERANCE)}")
    if provider == "replay":
        return 0.0
    # Distances are rounded, and the score has a times the distances.
    base = max(SCORE_TOLERANCE[provider], LOWER_TOLERANCE[contract.precision.name])
    return base * max(1.0, contract.scale.value) * _narrowness(contract)


def make_probes(
    frames: Iterable[tuple[str, InputFrame]],
    run: Callable[[Frames], Outputs],
    contract: Contract,
    head: Head | None = None,
) -> tuple[Probe, ...]:
    """Record probes from frames of the graph's input size, up to 512 KB and 16 of them.

    Frames that lie within rounding of the threshold of the contract's calibration, or of another class, or (with
    `head`) of a bank row, or that are not valid, are left out: a correct device may answer something else for them.

    Raises:
        VerificationError: no frame is left.
    """
    rule = contract.calibration.rule(len(contract.classes))
    apart = MARGIN[contract.precision.name]
    margin = apart * _narrowness(contract)
    probes: list[Probe] = []
    budget = MAX_PROBE_CHARACTERS
    sizes: list[tuple[str, int]] = []
    for name, frame in frames:
        png = encode_png(frame)
        sizes.append((name, len(png)))
        outputs = run(frame[None])
        best, second = np.sort(outputs.logits[0])[[-1, -2]]
        threshold = rule.threshold(int(outputs.class_id[0]))
        close = abs(float(outputs.ood_score[0]) - threshold) < margin or best - second < apart
        if len(png) > budget or len(probes) == MAX_PROBES or close or not outputs.valid[0]:
            continue
        if head is not None and nearest_gap(_head_input(outputs, contract), head)[0] < MIN_GAP:
            continue
        budget -= len(png)
        probes.append(
            Probe(
                name=name,
                png=png,
                logits=tuple(float(v) for v in outputs.logits[0]),
                class_id=int(outputs.class_id[0]),
                ood_score=float(outputs.ood_score[0]),
                p_value=float(outputs.p_value[0]),
                is_ood=bool(outputs.is_ood[0]),
                valid=True,
            )
        )
    if not probes and min((size for _, size in sizes), default=0) > MAX_PROBE_CHARACTERS:
        raise VerificationError(
            f"none of the {len(sizes)} probe frames fits in the file: {_sized(sizes)}. {_ROOM}; give frames that "
            "compress better (plain, without noise), or leave --probes out for synthetic ones"
        )
    if not probes:
        raise VerificationError(
            "no probe frame is decided clearly enough to be a test vector; give some clear images with --probes DIR"
        )
    return tuple(probes)


def left_out(frames: Iterable[tuple[str, InputFrame]], probes: tuple[Probe, ...]) -> str | None:
    """Say which of the given frames did not become probes, with their sizes; None where all did."""
    kept = {probe.png for probe in probes}
    pictures = [(name, encode_png(frame)) for name, frame in frames]
    others = [(name, len(png)) for name, png in pictures if png not in kept]
    if not others:
        return None
    return (
        f"{len(pictures) - len(others)} of {len(pictures)} probe images are in the file; left out, because they do not "
        f"fit or are not decided clearly enough: {_sized(others)}. {_ROOM}, and all of them take "
        f"{sum(len(png) for _, png in pictures) / 1024:,.0f} KB"
    )


def _sized(sizes: list[tuple[str, int]]) -> str:
    return ", ".join(f"{name} {size / 1024:,.0f} KB" for name, size in sizes)


def synthetic_frames(preprocessing: Preprocessing) -> list[tuple[str, InputFrame]]:
    """Return ten patterns of the graph's input size, uint8 `[h, w, c]`, that compress well as PNG."""
    h, w, c = preprocessing.input_shape
    y, x = np.mgrid[0:h, 0:w].astype(np.float64)
    y, x = y / max(1, h - 1), x / max(1, w - 1)
    patterns: dict[str, Any] = {
        "black": (0 * x, 0 * x, 0 * x),
        "white": (1 + 0 * x, 1 + 0 * x, 1 + 0 * x),
        "grey": (0.5 + 0 * x, 0.5 + 0 * x, 0.5 + 0 * x),
        "horizontal ramp": (x, x, x),
        "vertical ramp": (1 - y, y, 0.5 + 0 * x),
        "checkerboard": (((x * 8 // 1) + (y * 8 // 1)) % 2,) * 3,
        "stripes": ((x * 16 // 1) % 2, 1 - (x * 16 // 1) % 2, 0.3 + 0 * x),
        "disc": ((np.hypot(x - 0.5, y - 0.5) < 0.3) * 0.9, 0.2 + 0 * x, 0.6 + 0 * x),
        "ring": ((np.abs(np.hypot(x - 0.5, y - 0.5) - 0.3) < 0.08) * 1.0,) * 3,
        "coarse blocks": _blocks(h, w),
    }
    return [
        (name, np.rint(255 * np.stack(channels[:c], axis=-1)).astype(np.uint8)) for name, channels in patterns.items()
    ]


def encode_png(frame: InputFrame) -> str:
    """Return a uint8 frame `[h, w, c]` as a base64 PNG."""
    buffer = io.BytesIO()
    Image.fromarray(frame[..., 0] if frame.shape[2] == 1 else frame).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode("ascii")


def decode_png(text: str, preprocessing: Preprocessing) -> InputFrame:
    """Inverse of `encode_png`.

    Raises:
        ArtifactError: not a PNG of exactly the graph's input size.
    """
    height, width, channels = preprocessing.input_shape
    expected = (width, height)
    try:
        with Image.open(io.BytesIO(base64.b64decode(text, validate=True)), formats=["PNG"]) as image:
            if image.size != expected or image.mode != ("L" if channels == 1 else "RGB"):
                raise ArtifactError(f"a probe is {image.mode} {image.size}; expected {expected}. Export again")
            pixels = np.asarray(image, dtype=np.uint8)
    except ArtifactError:
        raise
    except Exception as error:  # decoders raise anything on damaged files: IndexError, struct.error, SyntaxError
        raise ArtifactError(f"a probe's picture cannot be decoded ({error}); the artifact is damaged") from error
    return pixels.reshape(height, width, channels)


def _narrowness(contract: Contract) -> float:
    """Return the range of the calibration scores (5 % to 95 %), at most 1: a small scale leaves a narrow one."""
    quantiles = contract.calibration.quantiles
    return min(1.0, quantiles[5] - quantiles[1])


def _head_input(outputs: Outputs, contract: Contract) -> np.ndarray:
    rows: np.ndarray = getattr(outputs, contract.space).astype(np.float64)
    return rows


def _row(probe: Probe, outputs: Outputs, index: int) -> ProbeRow:
    actual = (int(outputs.class_id[index]), bool(outputs.is_ood[index]), bool(outputs.valid[index]))
    expected = (probe.class_id, probe.is_ood, probe.valid)
    return ProbeRow(probe.name, probe.ood_score, float(outputs.ood_score[index]), actual != expected)


def _blocks(h: int, w: int) -> tuple[np.ndarray, ...]:
    coarse = np.random.default_rng(0).random((3, 8, 8))
    rows, columns = np.arange(h) * 8 // h, np.arange(w) * 8 // w
    return tuple(channel[np.ix_(rows, columns)] for channel in coarse)
