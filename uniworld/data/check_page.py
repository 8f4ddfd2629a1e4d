"""A self-contained HTML page of checked samples: counts, errors, and a few samples with their masks.

Names and texts of a data set are anybody's: all of them are escaped, and the page allows no scripts.
"""

import base64
import io
from collections.abc import Sequence
from html import escape

import numpy as np
from PIL import Image

from uniworld.config import DataConfig
from uniworld.data.bad import SampleError
from uniworld.data.buckets import stretched
from uniworld.data.check import SourceReport, View, spaced, view
from uniworld.data.collate import fitted
from uniworld.data.dataset import Dataset
from uniworld.data.samples import Sample

THUMBNAIL_PX = 256
NUM_ERRORS = 50
TINT = (255, 60, 0)  # of what is edited
HEAD = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>Training data</title>
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<style>
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 72rem; padding: 0 1rem;
  background: Canvas; color: CanvasText; color-scheme: light dark; }
table { border-collapse: collapse; margin: 1rem 0; } th, td { padding: .25rem .75rem; text-align: right; }
th:first-child, td:first-child, .left { text-align: left; overflow-wrap: anywhere; }
tr { border-bottom: 1px solid color-mix(in srgb, CanvasText 20%, Canvas); }
article { border: 1px solid color-mix(in srgb, CanvasText 20%, Canvas); border-radius: 8px; padding: 1rem;
  margin: 1rem 0; }
.pictures { display: flex; flex-wrap: wrap; gap: 1rem; } figure { margin: 0; } img { display: block; max-width: 100%; }
figcaption, .small { font-size: .85em; opacity: .75; } .bad { color: #c33; } pre { white-space: pre-wrap; }
</style></head><body><h1>Training data</h1>
"""


def render(
    reports: Sequence[SourceReport], dataset: Dataset, config: DataConfig, header: Sequence[str],
    rows: Sequence[Sequence[str]], num_shown: int = 6,
) -> str:  # fmt: skip
    """The page as text.

    Args:
        header, rows: the table of sources.
        num_shown: samples of each source to show, evenly spaced.
    """
    parts = [HEAD, _table(header, rows)]
    for number, report in enumerate(reports):
        parts.append(f"<h2>{escape(report.name)}</h2>")
        if report.buckets:
            sizes = ", ".join(f"{w}×{h}: {count}" for (h, w), count in report.buckets.most_common())
            parts.append(f'<p class="small">Targets by size: {sizes}</p>')
        if report.errors:
            parts.append(_errors(report))
        shown = [_article(dataset, i, config) for i in spaced(dataset, number, num_shown)]
        parts += [article for article in shown if article]
    return "\n".join([*parts, "</body></html>\n"])


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    def line(cells: Sequence[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    return "\n".join(["<table>", line(header, "th"), *(line(row, "td") for row in rows), "</table>"])


def _errors(report: SourceReport) -> str:
    rows = [
        f'<tr><td>{escape(bad.id)}</td><td class="left">{escape(bad.path)}</td>'
        f'<td class="left">{escape(bad.reason)}</td></tr>'
        for bad in report.errors[:NUM_ERRORS]
    ]
    more = report.num_errors - len(rows)
    note = f'<p class="small">and {more} more</p>' if more else ""
    heading = f'<h3 class="bad">{report.num_errors} of {report.num_checked} samples cannot be used</h3>'
    return "\n".join([heading, "<table>", *rows, "</table>", note])


def _article(dataset: Dataset, number: int, config: DataConfig) -> str | None:
    """One sample, or None where it is bad: those stand in the list of errors."""
    try:
        sample = dataset[number]
        seen = view(sample, config)
    except SampleError:
        return None
    figures = [_figure(image, f"reference {i}") for i, image in enumerate(seen.references, 1)]
    figures.append(_figure(seen.target, f"target, trained on at {seen.bucket[1]}×{seen.bucket[0]}"))
    if seen.mask is not None:
        figures.append(_figure(overlay(seen, config), _mask_note(seen)))
    return (
        f'<article><p class="small">{escape(sample.id)} · {escape(sample.target.name)}</p>'
        f'{_words(sample)}<div class="pictures">{"".join(figures)}</div></article>'
    )


def _mask_note(seen: View) -> str:
    if seen.unchanged:
        return "no edited region found: every latent weighs 1"
    return f"edited: {(seen.mask != 0).mean():.1%} of the latents, weight {seen.weight:.2f}"


def _words(sample: Sample) -> str:
    turns = [f"<b>{escape(turn['from'])}</b> {escape(turn['value'])}" for turn in sample.conversations]
    return f"<pre>{chr(10).join(turns)}</pre>"


def overlay(seen: View, config: DataConfig) -> Image.Image:
    """The target as trained on with the edited latents tinted, the others darkened."""
    (part,) = fitted([seen.target], seen.bucket, config)
    pixels = np.asarray(stretched(part, seen.bucket), np.float32)
    edited = np.repeat(np.repeat(seen.mask != 0, 8, 0), 8, 1)[..., None]
    tinted = np.where(edited, 0.65 * pixels + 0.35 * np.array(TINT, np.float32), 0.4 * pixels)
    return Image.fromarray(tinted.astype(np.uint8))


def _figure(image: Image.Image, caption: str) -> str:
    size = f"{image.width}×{image.height}"
    image = image.copy()
    image.thumbnail((THUMBNAIL_PX, THUMBNAIL_PX))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=85)
    data = base64.b64encode(buffer.getvalue()).decode()
    text = f"{caption} ({size})"
    return (
        f'<figure><img alt="{escape(text)}" width="{image.width}" height="{image.height}" '
        f'src="data:image/jpeg;base64,{data}"><figcaption>{escape(text)}</figcaption></figure>'
    )
