"""The demo's result for people."""

from typing import Any

import rich.box
from rich.table import Table

from grood_edge.demo.run import DemoReport
from grood_edge.tables import key_values

__all__ = ["demo_tables"]


def demo_tables(report: DemoReport) -> list[Any]:
    """Return the demo's result: one row a test set, and the paths."""
    table = Table(box=rich.box.SIMPLE_HEAD, title="what the artifact says", title_justify="left")
    for name in ("test set", "images", "AUROC", "FPR95 *", "called OOD"):
        table.add_column(name, justify="left" if name == "test set" else "right")
    for row in report.sets:
        numbers = ("-", "-") if row.auroc is None else (f"{row.auroc:.1%}", f"{row.fpr95:.1%}")
        table.add_row(row.name, f"{row.images:,}", *numbers, f"{row.flagged_share:.1%}")
    note = (
        "* FPR95: share of OOD accepted when 95 % of ID is accepted. Called OOD on the ID row is the false-alarm rate."
    )
    paths = key_values("written", [(name, str(path)) for name, path in report.paths.items()])
    facts = key_values(
        "measured",
        [
            ("accuracy on ID test", f"{report.accuracy:.1%}"),
            ("guarantee", report.guarantee),
            ("time", f"{report.seconds:.1f} s"),
        ],
    )
    return [table, note, facts, paths]
