"""The report: one HTML file that opens offline, for somebody who decides whether the robot may use the artifact.

Names of files, folders and classes are other people's: everything is escaped, and a content security policy in the file
forbids scripts and the network.
"""

from collections.abc import Sequence
from html import escape

from grood_edge.evaluate.figures import histograms, risk_figure, roc_figure
from grood_edge.evaluate.mistakes import Mistake, mistakes_of
from grood_edge.evaluate.results import Evaluation
from grood_edge.evaluate.summary import TextTable, gets_through, headline, text_tables

__all__ = ["Facts", "report_html"]

Facts = Sequence[tuple[str, str]]  # (name, value)

_STYLE = """
* { box-sizing: border-box }
body { font: 15px/1.5 system-ui, -apple-system, "Segoe UI", "DejaVu Sans", sans-serif; color: #1c2126; background: #fff;
  max-width: 800px; margin: 0 auto; padding: 24px 20px 60px }
h1 { font-size: 22px; margin: 0 } h2 { font-size: 17px; margin: 34px 0 8px; border-bottom: 1px solid #d8dde2 }
h3 { font-size: 14px; margin: 16px 0 6px } p { margin: 6px 0 } .note, .small { color: #59626b; font-size: 12.5px }
.verdict { border-left: 8px solid; padding: 12px 16px; margin: 16px 0; border-radius: 3px }
.verdict strong { font-size: 18px; line-height: 1.4; display: block; margin-bottom: 6px }
.good { border-color: #2d8a4e; background: #eef7f1 } .broken { border-color: #c8372d; background: #fdf0ef }
.doubtful { border-color: #c98a00; background: #fdf6e6 }
.tiles { display: flex; gap: 12px; flex-wrap: wrap }
.tile { flex: 1 1 150px; border: 1px solid #d8dde2; padding: 8px 12px; border-radius: 3px }
.tile b { font-size: 22px; display: block; line-height: 1.3 }
.wide { overflow-x: auto }
table { border-collapse: collapse; width: 100%; font-size: 13.5px; margin: 8px 0 }
th { text-align: right; font-weight: 600; vertical-align: bottom; padding: 4px 8px; border-bottom: 2px solid #aab2ba;
  font-size: 12.5px; overflow-wrap: break-word; max-width: 160px }
td { text-align: right; padding: 3px 8px; border-bottom: 1px solid #e6e9ec; font-variant-numeric: tabular-nums }
td:first-child, .facts td { overflow-wrap: anywhere }
th:first-child, td:first-child { text-align: left; min-width: 104px } .facts td { text-align: left }
.facts td:first-child { width: 190px; color: #59626b } tr.marked td { font-weight: 700; background: #f1f5f8 }
svg { max-width: 100%; height: auto; font: 12px system-ui, "DejaVu Sans", sans-serif; fill: #1c2126 }
svg .small { font-size: 11px; fill: #59626b } svg .frame { fill: none; stroke: #aab2ba } svg .axis { stroke: #aab2ba }
svg .threshold { stroke: #1c2126; stroke-width: 1.5; stroke-dasharray: 5 3 }
.pair { display: flex; flex-wrap: wrap; gap: 12px } .pair figure { flex: 1 1 340px; margin: 0 }
.gallery { display: grid; grid-template-columns: repeat(auto-fill, minmax(116px, 1fr)); gap: 8px }
.gallery figure { margin: 0; border: 1px solid #d8dde2; padding: 5px; border-radius: 3px; break-inside: avoid }
.gallery .frame { height: 106px; display: flex; align-items: center; justify-content: center; background: #f4f6f8 }
.gallery .small { font-size: 11px }
.gallery figcaption { font-size: 11.5px; line-height: 1.35; overflow-wrap: anywhere; margin-top: 3px }
.warnings { background: #fdf6e6; border-left: 8px solid #c98a00; padding: 8px 16px 8px 32px;
  margin: 12px 0; list-style: disc }
dt { font-weight: 600 } dd { margin: 0 0 6px }
@media print { body { max-width: none; padding: 0; font-size: 12px } h2, h3, h2 + .note { break-after: avoid }
  table, svg, .verdict, .gallery figure { break-inside: avoid }
  * { print-color-adjust: exact; -webkit-print-color-adjust: exact } }
"""

_WORDS = (
    (
        "ID, OOD",
        "In distribution: things of the classes the network knows. Out of distribution: anything else.",
    ),
    ("false alarm", "An ID image that is called OOD."),
    ("missed", "An OOD image that is accepted as a known class."),
    (
        "alpha",
        "The accepted false-alarm rate, fixed before. The threshold follows from it and calibration images.",
    ),
    (
        "ood_score, p_value",
        "High score, small p_value: more OOD. p_value: share of calibration images at least as odd.",
    ),
    ("AUROC", "How often an OOD image scores higher than an ID image: 50 % is chance, 100 % is perfect. No threshold."),
    ("AUPR", "Like AUROC, but depends on how many images each set has; compare it on the same sets only."),
    (
        "risk and coverage",
        "Accept the least odd images first: what share gets a wrong class? AURC is the mean.",
    ),
    (
        "limits",
        "All figures are for images like those given here. Another camera, light or place needs another evaluation, "
        "and nothing here says how an OOD thing behaves that is in none of the sets.",
    ),
)


def report_html(evaluation: Evaluation, model: str, choices: Facts, settings: Facts) -> str:
    """Return the whole page.

    Args:
        evaluation: what was found.
        model: the artifact's name, for the title.
        choices: what was chosen at export, and why.
        settings: what is needed to do this again.
    """
    title = f"Does {model} know what it does not know?"
    tables = {table.title: table for table in text_tables(evaluation)}
    sections = [
        f"<h1>{escape(title)}</h1>",
        _verdict(evaluation),
        _tiles(evaluation),
        _warnings(evaluation),
        _table(tables.pop("OOD sets")),
        f"<h2>Scores</h2><p class='note'>Blue: right decision. Red: wrong decision ({_where_red(evaluation)}). Heights "
        "grow with the square root of the count, so that single images are seen; each row has its own scale.</p>"
        f"{histograms(evaluation)}",
        _curves(evaluation),
        _mistakes(evaluation),
        *(_table(table) for table in tables.values()),
        _facts("What was chosen, and why", choices),
        _facts("To do this again", settings),
        "<h2>Words</h2><dl>" + "".join(f"<dt>{escape(w)}</dt><dd>{escape(m)}</dd>" for w, m in _WORDS) + "</dl>",
    ]
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data:; '
        "style-src 'unsafe-inline'\">"
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head><body>\n"
        + "\n".join(section for section in sections if section)
        + "\n</body></html>\n"
    )


def _where_red(evaluation: Evaluation) -> str:
    if evaluation.threshold is None:
        return "no line: each predicted class has a threshold of its own"
    return "ID right of the threshold, OOD left of it"


def _verdict(evaluation: Evaluation) -> str:
    promise = evaluation.promise
    kind = {"broken": "broken", "kept": "good", "stricter": "good"}.get(promise.outcome, "doubtful")
    if kind == "good" and gets_through(evaluation):
        kind = "doubtful"
    return (
        f'<div class="verdict {kind}"><strong>{escape(headline(evaluation))}</strong>'
        f"<p>{escape(promise.sentence)}</p><p>{escape(evaluation.missed_most)}</p></div>"
    )


def _tiles(evaluation: Evaluation) -> str:
    known = evaluation.id
    worst = max(evaluation.ood, key=lambda result: result.missed)
    tiles = [("false alarms on ID images", f"{known.rate:.1%}"), (f'of "{worst.name}" missed', f"{worst.missed:.1%}")]
    if known.accuracy is not None:
        tiles.append(("accuracy on all ID images", f"{known.accuracy:.1%}"))
    if known.accuracy_accepted is not None:
        tiles.append(("accuracy on accepted ID images", f"{known.accuracy_accepted:.1%}"))
    cells = (f'<div class="tile"><b>{escape(v)}</b><span class="small">{escape(n)}</span></div>' for n, v in tiles)
    return f'<div class="tiles">{"".join(cells)}</div>'


def _warnings(evaluation: Evaluation) -> str:
    if not evaluation.warnings:
        return ""
    return f'<ul class="warnings">{"".join(f"<li>{escape(text)}</li>" for text in evaluation.warnings)}</ul>'


def _curves(evaluation: Evaluation) -> str:
    risk = risk_figure(evaluation)
    figures = [("ROC. Dots: the decision at this alpha.", roc_figure(evaluation))]
    if risk:
        figures.append(("ID images: risk against coverage. Dot: what is accepted at this alpha.", risk))
    cells = (f'<figure>{svg}<figcaption class="note">{escape(text)}</figcaption></figure>' for text, svg in figures)
    return f'<h2>Curves</h2><div class="pair">{"".join(cells)}</div>'


def _mistakes(evaluation: Evaluation) -> str:
    galleries = [
        f'<h3>{escape(title)}</h3><div class="gallery">{"".join(map(_figure, mistakes))}</div>'
        for title, mistakes in mistakes_of(evaluation)
    ]
    body = "".join(galleries) or "<p>None: every ID image was accepted and every OOD image found.</p>"
    return f"<h2>The most confident mistakes</h2>{body}"


def _figure(mistake: Mistake) -> str:
    looks = f"taken for <b>{escape(mistake.class_name)}</b>"
    own = f"<br>is {escape(mistake.own_class)}" if mistake.own_class is not None else ""
    return (
        f'<figure><div class="frame"><img alt="{escape(mistake.name)}" src="data:image/jpeg;base64,{mistake.jpeg}">'
        "</div>"
        f"<figcaption>{looks}{own}<br>score {mistake.ood_score:.2f}<br>p_value {mistake.p_value:.3f}<br>"
        f'<span class="small">{escape(mistake.name)}</span></figcaption></figure>'
    )


def _table(table: TextTable) -> str:
    named = any(table.columns)
    head = f"<tr>{''.join(f'<th>{_cell(name)}</th>' for name in table.columns)}</tr>" if named else ""
    rows = "".join(
        f"<tr{' class=marked' if index == table.marked else ''}>"
        f"{''.join(f'<td>{_cell(cell)}</td>' for cell in row)}</tr>"
        for index, row in enumerate(table.rows)
    )
    notes = "".join(f'<p class="note">{escape(note)}</p>' for note in table.notes)
    kind = "" if named else ' class="facts"'
    title = table.title[:1].upper() + table.title[1:]
    return f'<h2>{escape(title)}</h2><div class="wide"><table{kind}>{head}{rows}</table></div>{notes}'


def _cell(text: str) -> str:
    """Escape; intervals and percentages stay on one line."""
    return escape(text).replace("% to ", "%\u00a0to\u00a0").replace(" %", "\u00a0%").replace("% /", "%\u00a0/")


def _facts(title: str, facts: Facts) -> str:
    return _table(TextTable(title, ("", ""), tuple(facts)))
