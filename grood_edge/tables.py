"""Results as tables for people and as documents for machines."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import rich.box
from rich.table import Table

from grood_edge.artifact import Artifact
from grood_edge.contract import Contract
from grood_edge.contract_rows import (
    decision_rows,
    guarantee_sentence,
    listed,
    network_rows,
    states_alpha,
    stream_rows,
)
from grood_edge.probes import ProbeReport
from grood_edge.runtime.score import ScoreRow, ScoreSummary
from grood_edge.runtime.session import Session
from grood_edge.terminal import plain_text

__all__ = [
    "artifact_document",
    "artifact_table",
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
            *network_rows(contract),
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
        table.add_row(plain_text(row.path), row.class_name, margin, *scores, *behind)
    counts = [
        ("images", f"{summary.images:,}" + (f", {len(summary.unreadable)} unreadable" if summary.unreadable else "")),
        ("is_ood", f"{summary.flagged:,} ({summary.flagged_share:.1%}), {summary.invalid} of them not valid"),
        ("classes", listed(tuple(f"{name} {count}" for name, count in summary.classes.items()))),
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
        table.add_row(name, plain_text(value))
    return table


def artifact_table(artifact: Artifact) -> Table:
    """Return everything the contract says, for people."""
    contract = artifact.contract
    return key_values(
        "artifact",
        [*network_rows(contract), *decision_rows(contract), *stream_rows(contract), *_file_rows(artifact)],
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


def _file_rows(artifact: Artifact) -> list[tuple[str, str]]:
    return [
        ("opset, IR", f"{artifact.opset}, {artifact.ir_version}"),
        ("file", f"{len(artifact.model):,} bytes, {len(artifact.contract.to_json()):,} of them the contract"),
        ("graph digest", artifact.graph_digest),
        ("contract digest", artifact.contract_digest),
        ("made with", ", ".join(f"{name} {version}" for name, version in sorted(artifact.contract.tools.items()))),
    ]
