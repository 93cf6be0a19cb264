"""The picture of a sweep: its points as cells, coloured by mean score, in one offline page."""

import html
from collections.abc import Sequence

from composer_replication.experiments.sweep_table import SweepReport, SweepRow

_CELL_WIDTH, _CELL_HEIGHT, _LABEL_WIDTH, _TOP = 112, 56, 200, 56
_LOW, _HIGH, _UNKNOWN = (247, 251, 255), (8, 81, 156), "#dddddd"
"""Light blue for the lowest score, dark blue for the highest, grey where there is none."""


def sweep_page(report: SweepReport, title: str) -> str:
    """An HTML page with the grid as SVG; it loads nothing from anywhere."""
    rows, columns, cells, axes = _layout(report.rows)
    width = _LABEL_WIDTH + _CELL_WIDTH * len(columns) + 8
    height = _TOP + _CELL_HEIGHT * len(rows) + 8
    scores = [row.score_mean for row in report.rows if row.score_mean is not None]
    low, high = min(scores, default=0.0), max(scores, default=0.0)
    shapes = [_text(_LABEL_WIDTH - 8, _TOP - 10, axes, anchor="end", size=12)]
    for number, label in enumerate(columns):
        shapes.append(_text(_LABEL_WIDTH + (number + 0.5) * _CELL_WIDTH, _TOP - 10, label))
    for number, label in enumerate(rows):
        y = _TOP + (number + 0.5) * _CELL_HEIGHT
        shapes.append(_text(_LABEL_WIDTH - 8, y + 4, label, anchor="end"))
    for (down, right), row in cells.items():
        x, y = _LABEL_WIDTH + right * _CELL_WIDTH, _TOP + down * _CELL_HEIGHT
        shapes += _cell(x, y, row, low, high)
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8">'
        f"<title>{html.escape(title)}</title>"
        '<body style="font-family: sans-serif">'
        f"<h1>{html.escape(title)}</h1>"
        "<p>Mean training reward over the last quarter of the steps, with the spread over seeds. "
        "Darker is higher; grey has no run that passed.</p>"
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
        f'viewBox="0 0 {width} {height}" role="img">{"".join(shapes)}</svg></body></html>\n'
    )


def _layout(
    rows: Sequence[SweepRow],
) -> tuple[list[str], list[str], dict[tuple[int, int], SweepRow], str]:
    """Labels of rows and columns, the point of each cell, and what the axes are called."""
    keys = list(dict.fromkeys(key for row in rows for key in row.point))
    if len(keys) == 2 and all(len(row.point) == 2 for row in rows):
        down = _sorted({row.point[keys[0]] for row in rows})
        right = _sorted({row.point[keys[1]] for row in rows})
        cells = {(down.index(r.point[keys[0]]), right.index(r.point[keys[1]])): r for r in rows}
        return down, right, cells, f"{keys[0]} down, {keys[1]} across"
    labels = [", ".join(f"{k}={v}" for k, v in row.point.items()) or "base" for row in rows]
    return labels, ["score"], {(n, 0): row for n, row in enumerate(rows)}, ""


def _sorted(values: set[str]) -> list[str]:
    """By size where all are numbers."""
    try:
        return sorted(values, key=float)
    except ValueError:
        return sorted(values)


def _cell(x: float, y: float, row: SweepRow, low: float, high: float) -> list[str]:
    colour, ink = _UNKNOWN, "#333333"
    label, below = "none", f"{row.num_passed}/{row.num_seeds} seeds"
    if row.score_mean is not None:
        share = (row.score_mean - low) / (high - low) if high > low else 0.5
        parts = [round(a + (b - a) * share) for a, b in zip(_LOW, _HIGH, strict=True)]
        colour = "#" + "".join(f"{part:02x}" for part in parts)
        ink = "#ffffff" if share > 0.5 else "#333333"
        label = f"{row.score_mean:.3f}"
        if row.score_spread is not None:
            below = f"sd {row.score_spread:.3f}, {below}"
    tip = html.escape(f"rank {row.rank}: {row.point}")
    return [
        f'<rect x="{x}" y="{y}" width="{_CELL_WIDTH - 2}" height="{_CELL_HEIGHT - 2}" '
        f'fill="{colour}"><title>{tip}</title></rect>',
        _text(x + _CELL_WIDTH / 2, y + 26, label, ink=ink, size=15),
        _text(x + _CELL_WIDTH / 2, y + 43, below, ink=ink, size=9),
    ]


def _text(
    x: float, y: float, text: str, *, anchor: str = "middle", ink: str = "#333333", size: int = 13
) -> str:
    return (
        f'<text x="{x}" y="{y}" text-anchor="{anchor}" font-size="{size}" fill="{ink}">'
        f"{html.escape(text)}</text>"
    )
