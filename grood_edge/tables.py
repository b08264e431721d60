"""Results as tables for people and as documents for machines."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import rich.box
from rich.table import Table

from grood_edge.artifact import Artifact
from grood_edge.contract import Contract, Selection
from grood_edge.probes import ProbeReport
from grood_edge.runtime.score import ScoreRow, ScoreSummary
from grood_edge.runtime.session import Session

__all__ = [
    "artifact_document",
    "artifact_table",
    "decision_rows",
    "guarantee_sentence",
    "key_values",
    "probe_document",
    "probe_table",
    "score_document",
    "score_tables",
    "written_document",
    "written_table",
]


def written_table(report: Any) -> Table:
    """Return the summary of an export or a recalibration (`ExportReport` or `RecalibrateReport`)."""
    contract, verified = report.contract, report.verification
    size = report.path.stat().st_size
    return key_values(
        f"wrote {report.path} ({size:,} bytes)",
        [
            *_network_rows(contract),
            *_speed_rows(getattr(report, "speeds", ())),
            *decision_rows(contract),
            (
                "verified",
                f"{verified.frames} frames: logits within {verified.largest_logit_error:.1e} of the classifier's, "
                f"ood_score within {verified.largest_score_error:.1e} of its definition ({verified.compared_scores} "
                f"compared), {verified.flips} flips",
            ),
        ],
    )


def _speed_rows(speeds: tuple[tuple[str, float], ...]) -> list[tuple[str, str]]:
    where = "time of fp32 on this machine's onnxruntime cpu; other devices differ"
    return [("speed", f"{name}: {ratio:.2f} of the {where}") for name, ratio in speeds]


def written_document(report: Any) -> dict[str, Any]:
    """Return the same for machines."""
    return {
        "path": str(report.path),
        "contract": _contract_document(report.contract),
        "verification": asdict(report.verification),
        "speeds": dict(getattr(report, "speeds", ())),
        "unreadable": [{"path": path, "reason": reason} for path, reason in report.unreadable],
        "warnings": list(report.warnings),
    }


def artifact_document(artifact: Artifact) -> dict[str, Any]:
    """Return everything the contract says, with sizes, opset and digests."""
    return {
        "contract": _contract_document(artifact.contract),
        "opset": artifact.opset,
        "ir_version": artifact.ir_version,
        "bytes": len(artifact.model),
        "graph_digest": artifact.graph_digest,
        "contract_digest": artifact.contract_digest,
    }


def probe_document(report: ProbeReport) -> dict[str, Any]:
    """Return a verification for machines."""
    return {
        "passed": report.passed,
        "provider": report.provider,
        "largest_error": report.largest_error if report.rows else None,
        "tolerance": report.tolerance,
        "flips": report.flips,
        "rows": [asdict(row) for row in report.rows],
    }


def score_document(summary: ScoreSummary, session: Session, rows: list[ScoreRow], out: Path | None) -> dict[str, Any]:
    """Return a scoring run for machines: all rows, unless they are in `out`."""
    calibration = session.contract.calibration
    return {
        **asdict(summary),
        "alpha": session.alpha,
        "k": session.rule.ranks[0] if len(session.rule.ranks) == 1 else list(session.rule.ranks),
        "n": calibration.n,
        "delta": calibration.delta,
        "provenance": calibration.provenance,
        "guarantee": calibration.guarantee,
        "out": None if out is None else str(out),
        "rows": [asdict(row) for row in rows],
    }


def score_tables(summary: ScoreSummary, session: Session, rows: list[ScoreRow]) -> list[Any]:
    """Return the first rows and the summary of a scoring run."""
    table = Table(box=rich.box.SIMPLE_HEAD)
    names = ["path", "class", "logit margin", "ood_score", "p_value", "is_ood"]
    explained = any(row.nearest_class is not None for row in rows)
    names += ["nearest class", "log s", "nearest bank row"] if explained else []
    for name in names:
        right = name in ("logit margin", "ood_score", "p_value", "log s")
        table.add_column(name, justify="right" if right else "left", overflow="fold")
    for row in rows:
        margin = "-" if row.logit_margin is None else f"{row.logit_margin:.2f}"
        verdict = "OOD" if row.is_ood else "known"
        behind = []
        if explained:
            log_s = "-" if row.log_s is None else f"{row.log_s:.2f}"
            image = f" ({row.bank_path})" if row.bank_path else ""
            behind = [row.nearest_class or "-", log_s, f"{row.bank_class or '-'}{image}"]
        scores = (f"{row.ood_score:.3f}", f"{row.p_value:.4f}", verdict)
        table.add_row(row.path, row.class_name, margin, *scores, *behind)
    counts = [
        ("images", f"{summary.images:,}" + (f", {len(summary.unreadable)} unreadable" if summary.unreadable else "")),
        ("is_ood", f"{summary.flagged:,} ({summary.flagged_share:.1%}), {summary.invalid} of them not valid"),
        ("classes", _listed(tuple(f"{name} {count}" for name, count in summary.classes.items()))),
        ("decision", _rule_sentence(session)),
        ("guarantee", guarantee_sentence(session.contract) + _at_another_alpha(session)),
    ]
    return [*([table] if rows else []), key_values("summary", counts)]


def _at_another_alpha(session: Session) -> str:
    own = session.contract.calibration.alpha
    if session.alpha == own:
        return ""
    return f" (that is at the artifact's own alpha {own:g}; delta holds for an alpha that was fixed beforehand)"


def _rule_sentence(session: Session) -> str:
    rule = session.rule
    alpha = f"alpha = {session.alpha:g}" if states_alpha(session.contract) else "no alpha is stated"
    if len(rule.ranks) > 1:
        return f"{alpha}: OOD where fewer than k calibration scores of the predicted class are >="
    return f"{alpha}: OOD where at most {rule.ranks[0] - 1} of {rule.scores[0].size:,} calibration scores are >="


def _contract_document(contract: Contract) -> dict[str, Any]:
    document: dict[str, Any] = json.loads(contract.to_json())
    return document


def key_values(title: str, rows: list[tuple[str, str]]) -> Table:
    """Return a two-column table."""
    table = Table(title=title, box=rich.box.SIMPLE_HEAD, show_header=False, title_justify="left")
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows:
        table.add_row(name, value)
    return table


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


def artifact_table(artifact: Artifact) -> Table:
    """Return everything the contract says, for people."""
    contract = artifact.contract
    return key_values(
        "artifact",
        [*_network_rows(contract), *decision_rows(contract), *_stream_rows(contract), *_file_rows(artifact)],
    )


def probe_table(report: ProbeReport) -> Table:
    """Return the probes of a verification: each with its worst run, alone or in a batch."""
    table = Table(box=rich.box.SIMPLE_HEAD, title=f"probes on {report.provider}", title_justify="left")
    for name in ("probe", "expected ood_score", "ood_score", "error", "decision"):
        table.add_column(name, justify="left" if name in ("probe", "decision") else "right")
    for name in dict.fromkeys(row.name for row in report.rows):
        runs = [row for row in report.rows if row.name == name]
        worst = max(runs, key=lambda row: row.error)
        flips = sum(row.flipped for row in runs)
        table.add_row(
            name,
            f"{worst.expected_score:.5f}",
            f"{worst.ood_score:.5f}",
            f"{worst.error:.1e}",
            f"FLIPPED in {flips} of {len(runs)} runs" if flips else f"same in {len(runs)} runs",
        )
    return table


def _stream_rows(contract: Contract) -> list[tuple[str, str]]:
    if (stream := contract.stream) is None:
        return []
    fed = "no decimation could be set" if stream.interval is None else f"a frame every {stream.interval:.3g} s is fed"
    return [("video", f"{stream.episodes:,} episodes, {stream.frames:,} frames at {stream.fps:g} a second; {fed}")]


def _network_rows(contract: Contract) -> list[tuple[str, str]]:
    p, c = contract.preprocessing, contract.classifier
    colour = "RGB" if p.channels == 3 else "grey"
    if p.camera is not None:
        colour = f"raw frames, {p.camera.layout.upper()}; resized in the graph to {p.height}x{p.width}"
    batch = "any batch size" if c.batch == "dynamic" else "batch 1 (larger batches did not give the same rows)"
    kept = f"kept, padded with grey levels {', '.join(map(str, p.padding))}" if p.crop == "letterbox" else "not kept"
    resize = f"short side to {p.short_side}, centre crop" if p.short_side else f"whole frame, aspect ratio {kept}"
    return [
        ("classes", f"{len(contract.classes)}: {_listed(contract.classes)}"),
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
        rows.append(("", f"in float32: {_listed(precision.float_layers, 20)}"))
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
        ("probes", f"{len(contract.probes)}: {_listed(tuple(p.name for p in contract.probes))}"),
    ]
    if fit.classes_without_prototype:
        rows.insert(3, ("no prototype for", _listed(fit.classes_without_prototype)))
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


def _file_rows(artifact: Artifact) -> list[tuple[str, str]]:
    return [
        ("opset, IR", f"{artifact.opset}, {artifact.ir_version}"),
        ("file", f"{len(artifact.model):,} bytes, {len(artifact.contract.to_json()):,} of them the contract"),
        ("graph digest", artifact.graph_digest),
        ("contract digest", artifact.contract_digest),
        ("made with", ", ".join(f"{name} {version}" for name, version in sorted(artifact.contract.tools.items()))),
    ]


def _listed(names: tuple[str, ...], most: int = 8) -> str:
    return ", ".join(names[:most]) + (f", ... and {len(names) - most} more" if len(names) > most else "")


def _numbers(values: tuple[float, ...]) -> str:
    unique = values[:1] if len(set(values)) == 1 else values
    return (
        ", ".join(f"{value:g}" for value in unique) if len(unique) == 1 else f"[{', '.join(f'{v:g}' for v in unique)}]"
    )
