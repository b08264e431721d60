"""What the fields of a contract must be together: bounds, counts that agree, pictures of the right size.

`contract_reader` has read every key and type before; `docs/format.md` is the normative text.
"""

import base64
import re
import reprlib
import struct

import numpy as np

from grood_edge.conformal import largest_rank
from grood_edge.contract import (
    MAX_SKETCH,
    Calibration,
    Contract,
    GradientBank,
    Precision,
    Scale,
    Selection,
    StreamCalibration,
)
from grood_edge.errors import ArtifactError
from grood_edge.preprocessing import Preprocessing

__all__ = [
    "MAX_EPISODES",
    "MAX_FPS",
    "MAX_OOD_PROTOTYPES",
    "MAX_PROBES",
    "MAX_PROBE_CHARACTERS",
    "MAX_SCALE",
    "MAX_TRIALS",
    "MIN_SCALE",
    "require_consistent",
]

MAX_CLASSES = 100_000
MAX_PROBES = 16
MAX_TOOLS = 64
MAX_OOD_PROTOTYPES = 8
MAX_TRIALS = 64  # candidates, scales, bank sizes and precisions in the tables of what was tried
MAX_FLOAT_LAYERS = 10_000
MAX_EPISODES = 10_000
MAX_FPS = 10_000.0
MIN_SCALE, MAX_SCALE = 1e-6, 1e6  # of distances
MAX_PROBE_CHARACTERS = 512 << 10  # of base64, for all probes together

_SHA256 = re.compile("[0-9a-f]{64}")


def require_consistent(contract: Contract) -> None:
    """Check every bound, and that the fields agree with each other.

    Raises:
        ArtifactError: says what the contract has.
    """
    sizes = contract.calibration.class_sizes
    grouped = (
        len(sizes) in (0, len(contract.classes)),
        f"{len(sizes)} class sizes for {len(contract.classes)} classes",
    )
    calibration_rules = [*_calibration_rules(contract.calibration), grouped]
    if contract.stream is not None:
        calibration_rules += _stream_rules(contract.stream)
    for holds, found in (*_network_rules(contract), *calibration_rules, *_probe_rules(contract)):
        if not holds:
            raise ArtifactError(f"the contract contradicts itself: it has {found}; export the artifact again")


def _network_rules(contract: Contract) -> list[tuple[bool, str]]:
    bank, fit, count = contract.bank, contract.fit, len(contract.ood_prototypes)
    return [
        *_bank_rules(bank, len(contract.classes)),
        (2 <= len(contract.classes) <= MAX_CLASSES, f"{len(contract.classes)} classes"),
        (all(contract.classes), "a class without a name"),
        (contract.classifier.dimension >= 1, f"feature dimension {contract.classifier.dimension}"),
        (1 <= count <= MAX_OOD_PROTOTYPES, f"{count} OOD prototypes"),
        (all(p.images >= 0 for p in contract.ood_prototypes), "an OOD prototype with a negative number of images"),
        *_precision_rules(contract.precision),
        *_scale_rules(contract.scale),
        *_selection_rules(contract.selection),
        (fit.images >= 1 and fit.unreadable >= 0, f"{fit.images} images, {fit.unreadable} unreadable"),
        (fit.accuracy is None or 0 <= fit.accuracy <= 1, f"accuracy {fit.accuracy}"),
        (fit.seed >= 0, f"seed {fit.seed}"),
        (_is_sketch(fit.sketch_hashes()), "a sketch of the fit images that is not ascending, or too long"),
        (set(fit.classes_without_prototype) <= set(contract.classes), "a class without prototype that is no class"),
        (
            all(contract.classes.count(name) == 1 for name in fit.classes_without_prototype)
            and len(set(fit.classes_without_prototype)) == len(fit.classes_without_prototype),
            "a class without prototype whose name is not its own",
        ),
        (_SHA256.fullmatch(fit.data_digest) is not None, f"data digest {reprlib.repr(fit.data_digest)}"),
        (len(contract.tools) <= MAX_TOOLS, f"{len(contract.tools)} tools"),
    ]


def _bank_rules(bank: GradientBank, classes: int) -> list[tuple[bool, str]]:
    rows = bank.row_classes()
    return [
        (0 <= bank.rows <= bank.candidates, f"{bank.rows} bank rows of {bank.candidates} candidates"),
        (bank.candidates >= 1, f"{bank.candidates} candidates for the bank"),
        ((bank.rows == 0) == (bank.choice == "none"), f"{bank.rows} rows in a bank of choice {bank.choice}"),
        (rows.size == bank.rows, f"classes of {rows.size} bank rows of {bank.rows}"),
        (bool(((rows >= 0) & (rows < classes)).all()), "a bank row of a class that does not exist"),
        (len(bank.paths) in (0, bank.rows), f"paths of {len(bank.paths)} bank rows of {bank.rows}"),
        (len(bank.trials) <= MAX_TRIALS, f"{len(bank.trials)} trials of the bank's size"),
        (
            all(t.rows >= 0 and 0 <= t.auroc <= 1 and 0 <= t.changed <= 1 for t in bank.trials),
            "a trial of the bank's size with negative rows, or a share outside 0..1",
        ),
    ]


def _precision_rules(precision: Precision) -> list[tuple[bool, str]]:
    layers, trials = precision.float_layers, precision.trials
    shares = [share for t in trials for share in (t.flips, t.flips_bound)]
    return [
        (len(layers) <= MAX_FLOAT_LAYERS, f"{len(layers)} layers kept in float32"),
        (not layers or precision.name != "fp32", "layers kept in float32 in a graph that is float32"),
        (precision.ranges is None or precision.name == "int8", f"ranges of activations in {precision.name}"),
        (min(precision.images, precision.float32_size) >= 0, "a precision judged on fewer than no images"),
        (len(trials) <= MAX_TRIALS, f"{len(trials)} trials of the precision"),
        (
            all(min(t.float_layers, t.size, t.feature_error or 0) >= 0 for t in trials)
            and all(0 <= share <= 1 for share in shares),
            "a trial of the precision with a negative number, or a share outside 0..1",
        ),
    ]


def _scale_rules(scale: Scale) -> list[tuple[bool, str]]:
    return [
        (MIN_SCALE <= scale.value <= MAX_SCALE, f"scale {scale.value}"),
        (len(scale.trials) <= MAX_TRIALS, f"{len(scale.trials)} trials of the scale"),
        (
            all(t.scale > 0 and 0 <= t.auroc <= 1 for t in scale.trials),
            "a trial of the scale at 0 or below, or with an AUROC outside 0..1",
        ),
    ]


def _selection_rules(selection: Selection) -> list[tuple[bool, str]]:
    candidates, counts = selection.candidates, (selection.classes, selection.images)
    return [
        (len(candidates) <= MAX_TRIALS, f"{len(candidates)} candidates"),
        (min(counts) >= 0, f"a selection from {selection.images} images of {selection.classes} classes"),
        (
            all(0 <= c.auroc <= 1 and (c.standard_error or 0) >= 0 for c in candidates),
            "a candidate with an AUROC outside 0..1, or a negative standard error",
        ),
    ]


def _is_sketch(hashes: np.ndarray) -> bool:
    return 1 <= hashes.size <= MAX_SKETCH and bool((hashes[1:] > hashes[:-1]).all())


def _calibration_rules(calibration: Calibration) -> list[tuple[bool, str]]:
    n_scores, quantiles = calibration.sorted_scores().size, calibration.quantiles
    sizes, ranks = calibration.class_sizes, calibration.class_ranks
    return [
        (n_scores == calibration.n, f"{n_scores} calibration scores where n is {calibration.n}"),
        (1 <= calibration.k <= calibration.n, f"k {calibration.k} where n is {calibration.n}"),
        (0 < calibration.alpha < 1, f"alpha {calibration.alpha}"),
        (calibration.delta is None or 0 < calibration.delta < 1, f"delta {calibration.delta}"),
        (
            (calibration.guarantee == "none") == (calibration.provenance == "seen-in-training")
            and (calibration.guarantee in ("approximate", "none") or calibration.method != "cross-fitted"),
            f"guarantee {calibration.guarantee} for {calibration.method} scores of {calibration.provenance} images",
        ),
        (
            {"conformal": calibration.delta is not None, "approximate": True}.get(
                calibration.guarantee, calibration.delta is None
            ),
            f"delta {calibration.delta} with guarantee {calibration.guarantee}",
        ),
        (len(sizes) == len(ranks), f"{len(sizes)} class sizes and {len(ranks)} class ranks"),
        (all(1 <= k <= n for k, n in zip(ranks, sizes, strict=False)), "a class rank outside 1..its class size"),
        (calibration.guarantee == "none" or _is_carried(calibration), f"a k of {calibration.k} that n does not carry"),
        (list(quantiles) == sorted(quantiles) and len(quantiles) == 7, "other than 7 ascending quantiles"),
        (
            _SHA256.fullmatch(calibration.data_digest) is not None,
            f"data digest {reprlib.repr(calibration.data_digest)}",
        ),
    ]


def _stream_rules(stream: StreamCalibration) -> list[tuple[bool, str]]:
    maxima, times = stream.maxima, [t for t in (stream.correlation, stream.interval) if t is not None]
    return [
        (0 < stream.fps <= MAX_FPS, f"episodes at {stream.fps} frames a second"),
        (1 <= stream.episodes <= MAX_EPISODES, f"{stream.episodes} episodes"),
        (stream.frames >= stream.episodes, f"{stream.frames} frames in {stream.episodes} episodes"),
        (all(t >= 0 for t in times), "a negative time between frames of a stream"),
        (len(maxima) in (0, stream.episodes), f"{len(maxima)} maxima of {stream.episodes} episodes"),
        (list(maxima) == sorted(maxima, reverse=True), "maxima of the episodes that are not descending"),
        (_SHA256.fullmatch(stream.data_digest) is not None, f"data digest {reprlib.repr(stream.data_digest)}"),
    ]


def _is_carried(calibration: Calibration) -> bool:
    """Tell whether k keeps what alpha and delta say. One more is let pass: the last digit of a tail may differ."""
    alpha, delta = calibration.alpha, calibration.delta
    ranks = calibration.class_ranks or (calibration.k,)
    sizes = calibration.class_sizes or (calibration.n,)
    if not 0 < alpha < 1 or not (delta is None or 0 < delta < 1) or len(ranks) != len(sizes):
        return True  # said by another rule
    if calibration.sorted_scores().size != calibration.n:
        return True  # as well, and the time that the rank takes grows with n: it may have no other bound
    return all(k <= largest_rank(alpha, delta, n) + 1 for k, n in zip(ranks, sizes, strict=True))


def _probe_rules(contract: Contract) -> list[tuple[bool, str]]:
    probes, classes = contract.probes, len(contract.classes)
    size = sum(len(p.png) for p in probes)
    header = _png_header(contract.preprocessing)
    pictures = [_decoded(p.png) for p in probes]
    return [
        (len(probes) <= MAX_PROBES, f"{len(probes)} probes"),
        (size <= MAX_PROBE_CHARACTERS, f"probes of {size:,} characters"),
        (all(len(p.logits) == classes for p in probes), "probes with other class counts"),
        (all(0 <= p.class_id < classes for p in probes), "a probe of a class that does not exist"),
        (all(0 <= p.p_value <= 1 for p in probes), "a probe with a p_value outside 0..1"),
        (all(raw.startswith(header) for raw in pictures), "a probe that is no 8-bit PNG of the input's size"),
        (all(_is_plain_png(raw) for raw in pictures), "a probe whose PNG has other parts than IHDR, IDAT and IEND"),
    ]


def _png_header(preprocessing: Preprocessing) -> bytes:
    """Return how every 8-bit PNG of the graph's input size begins: a decoder then never meets a larger one."""
    height, width, channels = preprocessing.input_shape
    size = struct.pack(">II", width, height)
    color = 0 if channels == 1 else 2
    return b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + size + bytes([8, color, 0, 0, 0])


def _is_plain_png(raw: bytes) -> bool:
    kinds, position = [], 8
    while position + 12 <= len(raw):
        kinds.append(raw[position + 4 : position + 8])
        position += 12 + int.from_bytes(raw[position : position + 4], "big")
    whole = position == len(raw) and kinds[:1] == [b"IHDR"] and kinds[-1:] == [b"IEND"]
    return whole and set(kinds[1:-1]) == {b"IDAT"}


def _decoded(text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except ValueError as error:
        raise ArtifactError(f"a probe's picture is not base64 ({error}); export the artifact again") from error
