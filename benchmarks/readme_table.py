"""The README's table of measured results, from the metrics of the last run: no figure there is typed by hand.

    python benchmarks/readme_table.py        # after `make reproduce`; rewrites the table in README.md

A test holds the README to the committed metrics.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ddops.evaluation.report import table

METRICS = Path("reports/metrics.json")
README = Path("README.md")
BEGIN, END = "<!-- table:begin -->\n", "<!-- table:end -->\n"
SHOWN = ("steps", "FID", "FID / teacher", "recall", "class accuracy")
"""The report has the rest."""
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


def main() -> None:
    metrics = json.loads(METRICS.read_text())
    README.write_text(replaced(README.read_text(), markdown(metrics)))


if __name__ == "__main__":
    main()
