"""The report's figures as inline SVG: score histograms, ROC, risk against coverage."""

from collections.abc import Callable, Sequence
from html import escape

import numpy as np

from grood_edge.evaluate.metrics import roc_curve
from grood_edge.evaluate.passes import ScoredSet
from grood_edge.evaluate.results import Evaluation

__all__ = ["histograms", "risk_figure", "roc_figure"]

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7a4fa3", "#6b6b6b")
DASHES = ("", "6 3", "2 2", "8 3 2 3")  # sets stay apart in black and white
RIGHT, WRONG = "#8fb3cc", "#c8372d"
BINS = 72
_ROW = 74


def histograms(evaluation: Evaluation) -> str:
    """Return one histogram a set over a common axis of ood_score; wrong decisions are red."""
    sets = (evaluation.id_set, *evaluation.ood_sets)
    edges = _edges(sets, evaluation.threshold)
    width, left, right, top = 760.0, 12.0, 12.0, 22.0
    height = top + _ROW * len(sets) + 44

    def x(value: float) -> float:
        return float(left + (value - edges[0]) / (edges[-1] - edges[0]) * (width - left - right))

    parts = [_histogram(one, edges, top + index * _ROW, x, known=index == 0) for index, one in enumerate(sets)]
    bottom = top + _ROW * len(sets)
    if evaluation.threshold is not None:
        parts.append(_threshold_line(evaluation.threshold, x(evaluation.threshold), width, bottom))
    for tick in _ticks(edges[0], edges[-1]):
        parts.append(f'<text x="{x(tick):.1f}" y="{bottom + 14}" text-anchor="middle" class="small">{tick:g}</text>')
    parts.append(
        f'<text x="{width / 2}" y="{bottom + 32}" text-anchor="middle">ood_score (higher = more OOD); '
        "outermost bars hold everything beyond</text>"
    )
    return _svg(width, height, "Histograms of ood_score, one a set, with the threshold", parts)


def roc_figure(evaluation: Evaluation) -> str:
    """Return the ROC of every OOD set; the dot is the decision that the artifact makes."""
    axes = _Axes("share of ID called OOD (false alarms)", "share of OOD called OOD (found)")
    parts = [axes.frame(), axes.line([0.0, 1.0], [0.0, 1.0], "#bbb", "3 3")]
    id_scores = evaluation.id_set.rows.scores
    for index, (one, result) in enumerate(zip(evaluation.ood_sets, evaluation.ood, strict=True)):
        colour, dash = COLOURS[index % len(COLOURS)], DASHES[index % len(DASHES)]
        called_id, called_ood = roc_curve(id_scores, one.rows.scores)
        parts.append(axes.line(called_id, called_ood, colour, dash))
        parts.append(axes.dot(evaluation.id.rate, result.found / result.images, colour))
        if index < 8:
            parts.append(axes.legend(index, f"{_short(result.name)}: {result.auroc:.1%}", colour, dash))
    return axes.svg("ROC of every OOD set", parts)


def risk_figure(evaluation: Evaluation) -> str:
    """Return risk against coverage of the ID images; empty without labels."""
    curve = evaluation.id.risk_coverage
    if curve is None:
        return ""
    most = _ceiling(float(curve.risk.max()))
    axes = _Axes("coverage: share of ID images accepted", "share of wrong classes among them", most)
    picks = np.unique(np.linspace(0, curve.risk.size - 1, 200).astype(int))
    accepted = 1 - evaluation.id.rate
    risk_there = 0.0 if evaluation.id.accuracy_accepted is None else 1 - evaluation.id.accuracy_accepted
    parts = [
        axes.frame(),
        axes.line(curve.coverage[picks], curve.risk[picks], COLOURS[0], ""),
        axes.dot(accepted, min(risk_there, most), COLOURS[0]),
    ]
    return axes.svg("Risk against coverage", parts)


class _Axes:
    """A square plot over 0..1 and 0..`most`."""

    size, left, right, top, bottom = 370.0, 52.0, 20.0, 10.0, 46.0

    def __init__(self, x_label: str, y_label: str, most: float = 1.0) -> None:
        self.labels = (x_label, y_label)
        self.most = most

    def x(self, share: float) -> float:
        return self.left + share * (self.size - self.left - self.right)

    def y(self, value: float) -> float:
        return self.size - self.bottom - value / self.most * (self.size - self.top - self.bottom)

    def frame(self) -> str:
        parts = [
            f'<rect x="{self.x(0.0)}" y="{self.y(self.most)}" width="{self.x(1.0) - self.x(0.0)}" '
            f'height="{self.y(0.0) - self.y(self.most)}" class="frame"/>'
        ]
        for share in (0.0, 0.2, 0.4, 0.6, 0.8, 1.0):
            x, y = self.x(share), self.y(share * self.most)
            digits = 0 if self.most >= 0.05 else 1
            parts += [
                f'<text x="{x:.1f}" y="{self.y(0.0) + 15:.1f}" text-anchor="middle" class="small">{share:.0%}</text>',
                f'<text x="{self.x(0.0) - 5:.1f}" y="{y + 4:.1f}" text-anchor="end" class="small">'
                f"{share * self.most:.{digits}%}</text>",
            ]
        middle = (self.y(0.0) + self.y(self.most)) / 2
        parts += [
            f'<text x="{(self.x(0.0) + self.x(1.0)) / 2:.1f}" y="{self.size - 8}" text-anchor="middle">'
            f"{escape(self.labels[0])}</text>",
            f'<text transform="translate(12 {middle:.1f}) rotate(-90)" text-anchor="middle">'
            f"{escape(self.labels[1])}</text>",
        ]
        return "".join(parts)

    def line(self, xs: Sequence[float] | np.ndarray, ys: Sequence[float] | np.ndarray, colour: str, dash: str) -> str:
        points = " ".join(f"{self.x(float(x)):.1f},{self.y(float(y)):.1f}" for x, y in zip(xs, ys, strict=True))
        return f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2" stroke-dasharray="{dash}"/>'

    def dot(self, x: float, y: float, colour: str) -> str:
        return f'<circle cx="{self.x(x):.1f}" cy="{self.y(y):.1f}" r="4.5" fill="{colour}" stroke="#fff"/>'

    def legend(self, index: int, text: str, colour: str, dash: str) -> str:
        x, y = self.x(0.42), self.y(0.05 * self.most) - 17 * index
        return (
            f'<line x1="{x:.1f}" y1="{y - 4:.1f}" x2="{x + 22:.1f}" y2="{y - 4:.1f}" stroke="{colour}" '
            f'stroke-width="2" stroke-dasharray="{dash}"/>'
            f'<text x="{x + 28:.1f}" y="{y:.1f}" class="small">{escape(text)}</text>'
        )

    def svg(self, title: str, parts: list[str]) -> str:
        return _svg(self.size, self.size, title, parts)


def _threshold_line(threshold: float, at: float, width: float, bottom: float) -> str:
    anchor = "end" if at > width / 2 else "start"
    return (
        f'<line x1="{at:.1f}" y1="14" x2="{at:.1f}" y2="{bottom}" class="threshold"/>'
        f'<text x="{at + (-6 if anchor == "end" else 6):.1f}" y="11" text-anchor="{anchor}" class="small">'
        f"threshold {threshold:.2f}: to the right is called OOD</text>"
    )


def _histogram(one: ScoredSet, edges: np.ndarray, top: float, x: Callable[[float], float], known: bool) -> str:
    """One bar a bin; where decisions of both kinds fall into it, the wrong ones are its lower part."""
    scores = np.clip(one.rows.scores, edges[0], edges[-1])
    counts, _ = np.histogram(scores, edges)
    wrong_counts, _ = np.histogram(scores[one.rows.flagged == known], edges)
    highest = max(1, int(counts.max()))
    called = float(one.rows.flagged.mean())
    wrong = f"{called:.1%} false alarms" if known else f"{1 - called:.1%} missed"
    base = top + _ROW - 6
    parts = [
        f'<text x="12" y="{top + 12}"><tspan font-weight="600">{escape(_short(one.name))}</tspan> '
        f'<tspan class="small">{len(one.paths):,} images, {wrong}</tspan></text>',
        f'<line x1="{x(edges[0]):.1f}" y1="{base}" x2="{x(edges[-1]):.1f}" y2="{base}" class="axis"/>',
    ]
    for index, count in enumerate(counts):
        if count:
            left, right = x(edges[index]), x(edges[index + 1])
            height = max(1.5, (count / highest) ** 0.5 * (_ROW - 28))
            red = height * wrong_counts[index] / count
            parts += [
                f'<rect x="{left + 0.5:.1f}" y="{bottom - part:.1f}" width="{max(0.5, right - left - 1):.1f}" '
                f'height="{part:.1f}" fill="{colour}"/>'
                for part, bottom, colour in ((red, base, WRONG), (height - red, base - red, RIGHT))
                if part > 0
            ]
    return "".join(parts)


def _edges(sets: Sequence[ScoredSet], threshold: float | None) -> np.ndarray:
    """Return bin edges over the middle 99 % of every set; the threshold, where there is one, is one of them."""
    valid = [one.rows.scores[one.rows.valid] for one in sets]
    ends = [float(np.quantile(scores, q)) for scores in valid if scores.size for q in (0.005, 0.995)]
    low, high = min(ends, default=0.0), max(ends, default=0.0)
    threshold = low if threshold is None else threshold
    margin = max(high - low, abs(threshold) * 1e-3, 1e-3) * 0.02
    low, high = min(low, threshold) - margin, max(high, threshold) + margin
    step = (high - low) / BINS
    before, after = int(np.ceil((threshold - low) / step)), int(np.ceil((high - threshold) / step))
    return threshold + step * np.arange(-before, after + 1)


def _ticks(low: float, high: float) -> list[float]:
    step = 10 ** np.floor(np.log10((high - low) / 3))
    step = next(step * factor for factor in (1, 2, 5, 10) if (high - low) / (step * factor) <= 9)
    return [round(float(tick), 9) + 0.0 for tick in np.arange(np.ceil(low / step), np.floor(high / step) + 1) * step]


def _ceiling(value: float) -> float:
    return next((top for top in (0.01, 0.02, 0.05, 0.1, 0.2, 0.5) if value <= top), 1.0)


def _short(name: str) -> str:
    return name if len(name) <= 24 else name[:23] + "…"


def _svg(width: float, height: float, title: str, parts: Sequence[str]) -> str:
    return (
        f'<svg viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img" '
        f'aria-label="{escape(title)}" xmlns="http://www.w3.org/2000/svg">{"".join(parts)}</svg>'
    )
