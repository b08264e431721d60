"""An evaluation as tables of text, which terminal and report share, and as one document for machines."""

from dataclasses import asdict, dataclass
from typing import Any

import rich.box
from rich.table import Table
from rich.text import Text

from grood_edge.evaluate.metrics import Interval
from grood_edge.evaluate.results import Evaluation
from grood_edge.terminal import plain_text

__all__ = ["TextTable", "evaluation_document", "evaluation_tables", "gets_through", "headline", "text_tables"]

FPR95 = "share of OOD accepted when 95 % of ID is accepted"
MAX_CLASSES = 200
_SHOWN_CLASSES = 12  # on the terminal; the report has more


@dataclass(frozen=True)
class TextTable:
    """Cells of text. `marked` is the row that stands out, None for none; notes stand below the table."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...] = ()
    marked: int | None = None


def headline(evaluation: Evaluation) -> str:
    """Return the verdict in one sentence."""
    aim = {"marginal": "promised on average", "approximate": "aimed at"}.get(evaluation.guarantee, "promised")
    rate, promised = f"{evaluation.id.rate:.1%} of ID images", f"{aim}: at most {100 * evaluation.alpha:.3g}%"
    agree = "are within what was promised"
    if evaluation.id.rate > evaluation.alpha:
        agree = f"agree with the promise, as far as {evaluation.id.images} images can tell"
    alarms = {
        "kept": f"False alarms {agree} ({rate}; {promised})",
        "stricter": f"False alarms are rarer than promised ({rate}; {promised})",
        "broken": f"Recalibrate before use here: false alarms exceed the promise ({rate}; {promised})",
        "none": f"No false-alarm rate was promised (measured: {rate})",
        "untested": f"These ID images cannot test the promise, because the artifact knows them ({rate} alarmed)",
    }[evaluation.promise.outcome]
    worst = max(evaluation.ood, key=lambda result: result.missed)
    if worst.missed == 0:
        return f"{alarms}, and every OOD image was found."
    if gets_through(evaluation):
        joint = "but" if evaluation.promise.outcome in ("kept", "stricter") else "and"
        through = f'{worst.missed:.1%} of "{worst.name}" is taken for a known class'
        return f"{alarms}, {joint} {through}: it does not stop these."
    which = f'missed most is "{worst.name}", of which' if len(evaluation.ood) > 1 else f'of "{worst.name}"'
    return f"{alarms}; {which} {worst.missed:.1%} is taken for a known class."


def gets_through(evaluation: Evaluation) -> bool:
    """Return whether more than half of an OOD set is accepted as known."""
    return max(result.missed for result in evaluation.ood) > 0.5


def text_tables(evaluation: Evaluation, most_classes: int = MAX_CLASSES) -> tuple[TextTable, ...]:
    """Return every table that has rows, in the order of reading."""
    tables = [_id_table(evaluation), _ood_table(evaluation)]
    if evaluation.id.classes:
        tables.append(_class_table(evaluation, most_classes))
    if evaluation.shift:
        tables.append(_shift_table(evaluation))
    if evaluation.baselines:
        tables.append(_baseline_table(evaluation))
    return tuple(tables)


def evaluation_tables(evaluation: Evaluation) -> list[Any]:
    """Return the tables for the terminal, with their notes."""
    items: list[Any] = []
    for table in text_tables(evaluation, _SHOWN_CLASSES):
        items.append(_rich_table(table))
        items += map(plain_text, table.notes)
    verdict = (headline(evaluation), evaluation.promise.sentence, evaluation.missed_most)
    return [*items, "", *map(plain_text, verdict)]


def evaluation_document(evaluation: Evaluation) -> dict[str, Any]:
    """Return the figures for machines, without the curves and the single images."""
    known = evaluation.id
    curve = known.risk_coverage
    return {
        "verdict": headline(evaluation),
        "promise": asdict(evaluation.promise),
        "missed_most": evaluation.missed_most,
        "alpha": evaluation.alpha,
        "threshold": evaluation.threshold,
        "id": {
            "folder": known.folder,
            "images": known.images,
            "unreadable": known.unreadable,
            "invalid": known.invalid,
            "false_alarms": known.false_alarms,
            "false_alarm_rate": known.rate,
            "false_alarm_interval": known.interval,
            "accuracy": known.accuracy,
            "accuracy_accepted": known.accuracy_accepted,
            "aurc": None if curve is None else curve.aurc,
            "classes": [{**asdict(result), "rate": result.rate} for result in known.classes],
            "data_digest": evaluation.id_set.digest,
        },
        "ood": [{**asdict(result), "missed": result.missed} for result in evaluation.ood],
        "covariate_shift": [asdict(result) for result in evaluation.shift],
        "baselines": [{**asdict(result), "mean_auroc": result.mean} for result in evaluation.baselines],
        "baselines_left_out": [{"name": name, "reason": reason} for name, reason in evaluation.left_out],
        "unreadable": [
            {"set": one.name, "path": path, "reason": reason}
            for one in (evaluation.id_set, *evaluation.ood_sets)
            for path, reason in one.unreadable
        ],
        "warnings": list(evaluation.warnings),
    }


def _id_table(evaluation: Evaluation) -> TextTable:
    known, promise = evaluation.id, evaluation.promise
    unreadable = f", {known.unreadable} unreadable" if known.unreadable else ""
    band = "none" if promise.band is None else f"{promise.band[0]} to {promise.band[1]} of {promise.images} (99 % band)"
    rows = [
        ("images", f"{known.images:,}{unreadable}"),
        ("false alarms", f"{known.false_alarms:,}: {known.rate:.1%}, 95 % interval {_interval(known.interval)}"),
        ("false alarms expected", band),
    ]
    if known.accuracy is not None and known.risk_coverage is not None:
        accepted = "nothing was accepted" if known.accuracy_accepted is None else f"{known.accuracy_accepted:.1%}"
        rows += [
            ("accuracy", f"{known.accuracy:.1%}"),
            ("accuracy on accepted images", f"{accepted} (of {1 - known.rate:.1%} of the images)"),
            (
                "AURC",
                f"{known.risk_coverage.aurc:.4f} (mean share of wrong classes over all coverages; lower is better)",
            ),
        ]
    return TextTable("ID images", ("", ""), tuple(rows))


def _ood_table(evaluation: Evaluation) -> TextTable:
    rows = tuple(
        (
            result.name,
            f"{result.images:,}" + (f" ({result.unreadable} unreadable)" if result.unreadable else ""),
            f"{result.found / result.images:.1%}",
            f"{result.missed:.1%}",
            f"{result.auroc:.1%} ({_interval(result.auroc_interval)})",
            f"{result.fpr95:.1%}",
            f"{result.aupr_ood:.1%}",
            f"{result.aupr_id:.1%}",
        )
        for result in evaluation.ood
    )
    columns = (
        "set",
        "images",
        "found",
        "missed",
        "AUROC (95 % interval)",
        FPR95,
        "AUPR, OOD positive",
        "AUPR, ID positive",
    )
    note = f"found, missed: called OOD, accepted as known, at alpha {evaluation.alpha:g}. The others need no threshold."
    return TextTable("OOD sets", columns, rows, (note,))


def _class_table(evaluation: Evaluation, most: int) -> TextTable:
    ranked = sorted(evaluation.id.classes, key=lambda result: -result.rate)
    rows = tuple(
        (
            result.name,
            f"{result.images:,}",
            f"{result.false_alarms} ({result.rate:.1%})",
            _interval(result.interval),
            f"{result.accuracy:.1%}",
        )
        for result in ranked[:most]
    )
    notes = ("by folder name, most false alarms first",)
    if len(ranked) > most:
        notes = (f"{notes[0]}; {len(ranked) - most} more classes are not shown",)
    return TextTable(
        "ID images by class", ("class", "images", "false alarms", "95 % interval", "accuracy"), rows, notes
    )


def _shift_table(evaluation: Evaluation) -> TextTable:
    known = evaluation.id
    clean = ("none", "", f"{known.images:,}", _share(known.accuracy), f"{known.rate:.1%}", "")
    rows = tuple(
        (r.kind, r.strength, f"{r.images:,}", _share(r.accuracy), f"{r.flagged:.1%}", f"{r.auroc:.1%}")
        for r in evaluation.shift
    )
    notes = (
        "These images are still ID: an alarm is right when the class is no longer right, and a nuisance when it is.",
        "AUROC against the same images without corruption: 50 % = the score does not notice.",
    )
    columns = ("corruption", "strength", "images", "accuracy", "called OOD", "AUROC against clean ID")
    return TextTable("covariate shift (still ID)", columns, (clean, *rows), notes)


def _baseline_table(evaluation: Evaluation) -> TextTable:
    rows = tuple(
        (
            result.name,
            f"{result.mean:.1%}",
            *(f"{a:.1%} / {f:.1%}" for a, f in zip(result.aurocs, result.fpr95s, strict=True)),
        )
        for result in evaluation.baselines
    )
    columns = ("score", "mean AUROC", *(result.name for result in evaluation.ood))
    notes = (
        f"best mean first. Each set: AUROC / {FPR95}. Same images, features and logits.",
        *(f"left out: {name}: {reason}" for name, reason in evaluation.left_out),
    )
    marked = next(index for index, result in enumerate(evaluation.baselines) if result.ours)
    return TextTable("beside other scores", columns, rows, notes, marked)


def _rich_table(table: TextTable) -> Table:
    named = any(table.columns)
    result = Table(box=rich.box.SIMPLE_HEAD, title=table.title, title_justify="left", show_header=named)
    for index, name in enumerate(table.columns):
        justify: Any = "left" if index == 0 or not named or name == "strength" else "right"
        result.add_column(
            Text(plain_text(name)), justify=justify, overflow="fold", max_width=60 if index or not named else 40
        )
    for index, row in enumerate(table.rows):
        result.add_row(*(Text(plain_text(cell)) for cell in row), style="bold" if index == table.marked else "")
    return result


def _interval(interval: Interval) -> str:
    return f"{interval[0]:.1%} to {interval[1]:.1%}"


def _share(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.1%}"
