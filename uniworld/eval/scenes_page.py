"""A self-contained HTML page of scores: the table, and for each column some items with what the model made of them."""

import base64
import io
from collections.abc import Sequence
from html import escape
from pathlib import Path

import numpy as np
from PIL import Image

from uniworld.data.scenes.tasks import Item
from uniworld.eval.scenes_columns import COLUMNS, Column, item_of
from uniworld.eval.scenes_score import Verdict
from uniworld.eval.scenes_suite import SuitePlan, answer_path, read_picture, said
from uniworld.eval.scenes_table import TITLES, Row

SHOWN_PX = 128
HEAD = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>Scores</title>
<meta name="viewport" content="width=device-width">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<style>
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 80rem; padding: 0 1rem;
  background: Canvas; color: CanvasText; color-scheme: light dark; }
table { border-collapse: collapse; margin: 1rem 0; } th, td { padding: .2rem .75rem; text-align: right; }
th:first-child, td:first-child, td:nth-child(2), .left { text-align: left; }
tr { border-bottom: 1px solid color-mix(in srgb, CanvasText 20%, Canvas); }
.items { display: flex; flex-wrap: wrap; gap: 1rem; }
article { border: 1px solid color-mix(in srgb, CanvasText 20%, Canvas); border-left-width: 5px; border-radius: 6px;
  padding: .6rem; max-width: 27rem; } .right { border-left-color: #2a8f4a; } .wrong { border-left-color: #c33; }
article p { margin: .25rem 0; overflow-wrap: anywhere; } .pictures { display: flex; gap: .4rem; } figure { margin: 0; }
img { display: block; } figcaption, .small { font-size: .85em; opacity: .75; }
.bad { color: #c33; } .good { color: #2a8f4a; }
</style></head><body><h1>Scores</h1>
"""


def render(plan: SuitePlan, rows: Sequence[Row], verdicts: Sequence[Verdict], folder: Path, num_shown: int = 12) -> str:
    """The page as text.

    Args:
        folder: where the answers are.
        num_shown: items of each column, the first ones.
    """
    told = ", ".join(f"{name} {value}" for name, value in vars(plan).items() if name != "version")
    parts = [HEAD, f'<p class="small">{escape(told)}</p>', _table(rows)]
    for column in COLUMNS:
        shown = [verdict for verdict in verdicts if verdict.column == column.name][:num_shown]
        if shown:
            articles = [_article(column, verdict, plan, folder) for verdict in shown]
            heading = f"{TITLES[column.group]}: {column.kind}" if column.kind else TITLES[column.group]
            parts.append(f'<h2>{escape(heading)}</h2><div class="items">{"".join(articles)}</div>')
    return "\n".join([*parts, "</body></html>\n"])


def _table(rows: Sequence[Row]) -> str:
    lines = ["<table><tr><th></th><th class=left></th><th>items</th><th>score</th><th>floor</th><th></th></tr>"]
    for row in rows:
        met = {None: "", True: '<span class="good">met</span>', False: '<span class="bad">not met</span>'}[row.met]
        cells = (TITLES[row.group], row.name, str(row.num), row.told(), row.floor_told())
        lines.append("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in cells) + f"<td>{met}</td></tr>")
    return "\n".join([*lines, "</table>"])


def _article(column: Column, verdict: Verdict, plan: SuitePlan, folder: Path) -> str:
    item = item_of(column, plan.seed, verdict.index, plan.size_px)
    figures = [_figure(picture, name) for picture, name in _pictures(column, item, verdict.index, folder)]
    words = "" if column.group == "understanding" else f"<p>{escape(said(item, 0))}</p>"
    return (
        f'<article class="{"right" if verdict.right else "wrong"}">{words}'
        f'<div class="pictures">{"".join(figures)}</div><p class="small">{escape(verdict.note)}</p></article>'
    )


def _pictures(column: Column, item: Item, index: int, folder: Path) -> list[tuple[np.ndarray, str]]:
    """What is shown of an item, with captions."""
    if not column.draws:
        given = item.pictures if item.task == "understanding" else item.pictures[:-1]
        return [(picture, "") for picture in ([] if item.task == "t2i" else given)]
    drawn = read_picture(answer_path(folder, column, index)), "drawn"
    if column.group == "t2i":
        return [drawn, (item.pictures[-1], "one that is right")]
    return [(item.pictures[0], "given"), drawn, (item.pictures[-1], "target")]


def _figure(picture: np.ndarray, caption: str) -> str:
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "PNG", optimize=True)
    data = base64.b64encode(buffer.getvalue()).decode()
    return (
        f'<figure><img alt="{escape(caption)}" width="{SHOWN_PX}" height="{SHOWN_PX}" '
        f'src="data:image/png;base64,{data}"><figcaption>{escape(caption)}</figcaption></figure>'
    )
