"""A contract in sentences: the rows that `inspect`, `export` and `evaluate` show."""

from grood_edge.contract import Contract, Selection

__all__ = ["decision_rows", "guarantee_sentence", "listed", "network_rows", "states_alpha", "stream_rows"]


def guarantee_sentence(contract: Contract) -> str:
    """Say in one sentence what the calibration promises."""
    c, alarms = contract.calibration, f"false alarms{_of_class(contract)}"
    if c.guarantee == "conformal":
        assert c.delta is not None
        return (
            f"{alarms} on ID frames stay at or below {c.alpha:.3g} with {1 - c.delta:.0%} confidence, "
            f"for frames like the {c.n:,} unseen calibration images"
        )
    if c.guarantee == "marginal":
        return (
            f"{alarms} on ID frames are at or below {c.alpha:.3g} on average over calibration sets, with this one "
            f"({c.n:,} unseen images) above it about half of the time; --rule guaranteed gives a confidence"
        )
    if c.guarantee == "approximate":
        return (
            f"cross-fitted on {c.n:,} images: {alarms} near or below {c.alpha:.3g} in measurements, no theorem. "
            "For a guarantee: grood-edge calibrate MODEL --data UNSEEN --threshold-only"
        )
    if not states_alpha(contract):
        return (
            "calibration: seen-in-training, guarantee: none, and no alpha is stated: logits of training images look "
            "far more certain than those of new ones. Remedy: grood-edge calibrate MODEL --data UNSEEN --threshold-only"
        )
    return (
        "calibration: seen-in-training, guarantee: none. False alarms may be many times alpha. "
        "Remedy: grood-edge calibrate MODEL --data UNSEEN --threshold-only (59 unseen images carry alpha 0.05)"
    )


def _of_class(contract: Contract) -> str:
    return " (of each predicted class, taken by itself)" if contract.calibration.class_ranks else ""


def states_alpha(contract: Contract) -> bool:
    """Tell whether a rate may be named at all: of logits of training images none may."""
    return contract.space == "features" or contract.calibration.provenance == "unseen"


def stream_rows(contract: Contract) -> list[tuple[str, str]]:
    """Return what episodes of video showed, as name and sentence; nothing where there were none."""
    if (stream := contract.stream) is None:
        return []
    fed = "no decimation could be set" if stream.interval is None else f"a frame every {stream.interval:.3g} s is fed"
    return [("video", f"{stream.episodes:,} episodes, {stream.frames:,} frames at {stream.fps:g} a second; {fed}")]


def network_rows(contract: Contract) -> list[tuple[str, str]]:
    """Return classes, input and classifier, as names and sentences."""
    p, c = contract.preprocessing, contract.classifier
    colour = "RGB" if p.channels == 3 else "grey"
    if p.camera is not None:
        colour = f"raw frames, {p.camera.layout.upper()}; resized in the graph to {p.height}x{p.width}"
    batch = "any batch size" if c.batch == "dynamic" else "batch 1 (larger batches did not give the same rows)"
    kept = f"kept, padded with grey levels {', '.join(map(str, p.padding))}" if p.crop == "letterbox" else "not kept"
    resize = f"short side to {p.short_side}, centre crop" if p.short_side else f"whole frame, aspect ratio {kept}"
    return [
        ("classes", f"{len(contract.classes)}: {listed(contract.classes)}"),
        ("input", f"uint8 [{'N' if c.batch == 'dynamic' else 1}, {', '.join(map(str, p.input_shape))}] {colour}"),
        ("preprocessing", f"{p.preset}: {p.filter}, {resize}"),
        ("normalisation", f"(pixel - {_numbers(p.mean)}) / {_numbers(p.std)}"),
        ("classifier", f"from {c.source}, {c.layout}{', BGR' if c.bgr else ''}, {batch}, {contract.precision.name}"),
        *_precision_rows(contract),
        ("features", f"{c.features_tensor}, d = {c.dimension}{', average-pooled' if c.features_pooled else ''}"),
        ("logits", c.logits_tensor),
    ]


def _precision_rows(contract: Contract) -> list[tuple[str, str]]:
    precision = contract.precision
    if not precision.trials:
        return []
    rows = [("precision", f"{precision.name}; {precision.asked}: {precision.reason}")]
    rows.append(("", f"against fp32 ({precision.float32_size:,} bytes) on {precision.images:,} fit images:"))
    for trial in precision.trials:
        error = "not finite" if trial.feature_error is None else f"off by {trial.feature_error:.1%}"
        drop = "" if trial.auroc_drop is None else f", AUROC {-100 * trial.auroc_drop:+.2f} points"
        size = trial.size / max(1, precision.float32_size)
        what = (
            f"{trial.precision}, {trial.float_layers} layers in float32: {size:.2f} of the size, features {error}{drop}"
        )
        rows.append(("", f"{what}, {trial.flips:.2%} of decisions changed"))
    if precision.float_layers:
        rows.append(("", f"in float32: {listed(precision.float_layers, 20)}"))
    return rows


def decision_rows(contract: Contract) -> list[tuple[str, str]]:
    """Return what was fitted, chosen and promised, as names and sentences."""
    fit, calibration = contract.fit, contract.calibration
    accuracy = "unknown (labels were predicted)" if fit.accuracy is None else f"{fit.accuracy:.1%}"
    rows = [
        *_choice_rows(contract),
        ("fitted on", f"{fit.images:,} images, {fit.unreadable} unreadable, labels {fit.labels}, accuracy {accuracy}"),
        ("calibration", f"{calibration.provenance}, {calibration.method}, n = {calibration.n:,}"),
        ("decision", _decision(contract)),
        ("guarantee", guarantee_sentence(contract)),
        ("score quantiles", "0, 5, 25, 50, 75, 95, 100 %: " + ", ".join(f"{q:.2f}" for q in calibration.quantiles)),
        ("probes", f"{len(contract.probes)}: {listed(tuple(p.name for p in contract.probes))}"),
    ]
    if fit.classes_without_prototype:
        rows.insert(3, ("no prototype for", listed(fit.classes_without_prototype)))
    return rows


def _choice_rows(contract: Contract) -> list[tuple[str, str]]:
    bank, selection = contract.bank, contract.selection
    sources = " + ".join(
        o.source
        + (f" of {o.images} images" if o.images else "")
        + (f" at {o.layer}" if o.layer else "")
        + (" (real OOD data was used)" if o.uses_ood_data else "")
        for o in contract.ood_prototypes
    )
    rows = [("OOD prototype", f"{sources}, in the {contract.space}"), ("", f"{selection.asked}: {selection.reason}")]
    if selection.candidates:
        rows.append(("", _selection_table(selection)))
    rows.append(("scale", f"{contract.scale.value:g}; {contract.scale.asked}: {contract.scale.reason}"))
    if contract.scale.trials:
        tried = ", ".join(f"{trial.scale:g}: {trial.auroc:.1%}" for trial in contract.scale.trials)
        rows.append(("", f"AUROC of shuffled images: {tried}"))
    if bank.choice == "none":
        size = f"none; {bank.candidates:,} images were classified correctly"
    else:
        size = f"{bank.rows:,} rows ({bank.choice}, {bank.dtype}) from {bank.candidates:,} correctly classified images"
    rows += [("gradient bank", size), ("", f"{bank.asked}: {bank.reason}")]
    if bank.trials:
        tried = "; ".join(
            f"{trial.rows:,} rows {trial.auroc:.2%}" + (f" ({trial.changed:.2%} changed)" if index else " in full")
            for index, trial in enumerate(bank.trials)
        )
        rows.append(("", f"leave-class-out AUROC, ID decisions changed: {tried}"))
    return rows


def _selection_table(selection: Selection) -> str:
    parts = []
    for candidate in selection.candidates:
        text = f"{candidate.name} {candidate.auroc:.1%}"
        if candidate.difference is not None and candidate.standard_error is not None:
            text += f" ({100 * candidate.difference:+.1f} +- {100 * candidate.standard_error:.1f} points)"
        parts.append(text)
    return (
        f"leave-class-out AUROC, {selection.classes} classes, {selection.images:,} images: {', '.join(parts)}. "
        "Optimistic, and a rough ranking: the features were trained on the classes left out"
    )


def _decision(contract: Contract) -> str:
    c = contract.calibration
    few = "; fewer than 300 images calibrate, so few OOD images are found" if c.n < 300 else ""
    if not states_alpha(contract):
        return f"k = {c.k} of {c.n:,} training scores; no alpha is stated{few}"
    delta = "none" if c.delta is None else f"{c.delta:g}"
    ranks = f"k = {c.k}"
    if c.class_ranks:
        ranks = f"per predicted class: k = {_span(c.class_ranks)} of {_span(c.class_sizes)} scores"
    return f"alpha = {c.alpha:g}, delta = {delta}, {ranks}{few}"


def _span(values: tuple[int, ...]) -> str:
    low, high = min(values), max(values)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def listed(names: tuple[str, ...], most: int = 8) -> str:
    """Name the first ones, and say how many more there are."""
    return ", ".join(names[:most]) + (f", ... and {len(names) - most} more" if len(names) > most else "")


def _numbers(values: tuple[float, ...]) -> str:
    unique = values[:1] if len(set(values)) == 1 else values
    return (
        ", ".join(f"{value:g}" for value in unique) if len(unique) == 1 else f"[{', '.join(f'{v:g}' for v in unique)}]"
    )
