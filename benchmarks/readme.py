"""The README's picture and table of measured results, from the last run: no figure of the table is typed by hand.

    python benchmarks/readme.py        # after `make reproduce`; rewrites docs/images/digits.png and README.md

A test holds the README to the committed metrics.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from ddops.evaluation.report import table
from ddops.stages import paths

METRICS = Path("reports/metrics.json")
README = Path("README.md")
BEGIN, END = "<!-- table:begin -->\n", "<!-- table:end -->\n"
SHOWN = ("steps", "FID", "FID / teacher", "recall", "class accuracy")
"""The report has the rest."""
GRIDS = {
    "data": "real images",
    "teacher": "teacher, 16 passes",
    "dd1_1step": "DD1 student, 1 pass",
    "dd2_1step": "DD2 generator, 1 pass",
}
PICTURE = Path("docs/images/digits.png")
HEIGHT, MARGIN, HEADING = 218, 24, 30
"""Pixels: of each grid the first lines, between the grids, above them."""
EMPHASISED = ("dd1", "dd2")


def markdown(metrics: Mapping[str, Any]) -> str:
    """The rows of the metrics file as a Markdown table, students in bold."""
    rows = table(metrics)
    headings = [heading for heading, _ in rows.headings]
    columns = [headings.index(heading) for heading in SHOWN]
    lines = [f"| | {' | '.join(SHOWN)} |", "|---" * (len(SHOWN) + 1) + "|"]
    for row in rows.rows:
        title = f"**{row.title}**" if row.name.startswith(EMPHASISED) else row.title
        lines.append(f"| {title} | {' | '.join(row.cells[column] for column in columns)} |")
    return "\n".join(lines) + "\n"


def replaced(readme: str, new: str) -> str:
    """The README with ``new`` between the two marks; raises ValueError where they are missing."""
    before, _, rest = readme.partition(BEGIN)
    _, found, after = rest.partition(END)
    if not found:
        raise ValueError(f"README.md lacks {BEGIN.strip()} ... {END.strip()}")
    return f"{before}{BEGIN}{new}{END}{after}"


def picture(grids: Mapping[str, Image.Image]) -> Image.Image:
    """The first lines of each grid side by side, under their titles."""
    width = sum(grid.width + MARGIN for grid in grids.values()) - MARGIN
    canvas = Image.new("RGB", (width, HEADING + HEIGHT), "white")
    left = 0
    for title, grid in grids.items():
        canvas.paste(grid.crop((0, 0, grid.width, HEIGHT)), (left, HEADING))
        ImageDraw.Draw(canvas).text((left + 6, 4), title, fill="black", font=ImageFont.load_default(20))
        left += grid.width + MARGIN
    return canvas


def main() -> None:
    picture({title: Image.open(paths.GRIDS / f"{row}.png") for row, title in GRIDS.items()}).save(PICTURE)
    metrics = json.loads(METRICS.read_text())
    README.write_text(replaced(README.read_text(), markdown(metrics)))


if __name__ == "__main__":
    main()
