"""Prompts from a file: plain text (one a line), CSV or Parquet (one a row of a column). Loads no torch.

A row that cannot be used is left out, counted and named; whitespace within a prompt counts as one space.
"""

from __future__ import annotations

import csv
import sys
from codecs import BOM_UTF8
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from ddops.captions.errors import CaptionError
from ddops.extras import explained

NAMED: Final = 20
"""Bad rows of a kind that are named; all are counted."""
EMPTY: Final = "empty"
TOO_LONG: Final = "too long"
NOT_UTF8: Final = "not UTF-8"

Row = tuple[int, bytes]
"""Its number in the file, from 1 on, and the prompt's bytes."""


@dataclass
class BadRows:
    """Of one kind."""

    count: int = 0
    rows: list[int] = field(default_factory=list)
    """Numbers of the first of them."""

    def add(self, number: int) -> None:
        """One more."""
        self.count += 1
        if len(self.rows) < NAMED:
            self.rows.append(number)


@dataclass(frozen=True)
class Prompts:
    """What a file holds."""

    texts: list[str]
    bad: dict[str, BadRows]

    def complaints(self) -> list[str]:
        """A sentence for each kind of bad rows."""
        return [
            f"{bad.count} rows are {kind}: {', '.join(map(str, bad.rows))}{', ...' if bad.count > NAMED else ''}"
            for kind, bad in self.bad.items()
        ]


def read_prompts(path: Path, column: str, max_characters: int, limit: int | None = None) -> Prompts:
    """The usable prompts of a ``.txt``, ``.csv`` or ``.parquet`` file, in order; the first ``limit`` of them.

    Raises:
        CaptionError: no such file, not of these kinds, without that column, damaged, or without a usable prompt.
    """
    if not path.is_file():
        raise CaptionError(f"{path}: no such file; put the prompts there, or name their file in captions.sets")
    readers = {".txt": _text_rows, ".csv": _csv_rows, ".parquet": _parquet_rows}
    if path.suffix not in readers:
        raise CaptionError(f"{path}: prompts are read from {', '.join(readers)}")
    prompts = sift(readers[path.suffix](path, column), max_characters, limit)
    if not prompts.texts:
        raise CaptionError(f"{path}: holds no usable prompt. {'; '.join(prompts.complaints())}")
    return prompts


def sift(rows: Iterable[Row], max_characters: int, limit: int | None = None) -> Prompts:
    """The usable prompts, and what is wrong with the others."""
    texts: list[str] = []
    bad: dict[str, BadRows] = {}
    for number, content in rows:
        if limit is not None and len(texts) == limit:
            break
        try:
            text = " ".join(content.decode("utf-8").split())
        except UnicodeDecodeError:
            bad.setdefault(NOT_UTF8, BadRows()).add(number)
            continue
        if not text or len(text) > max_characters:
            bad.setdefault(TOO_LONG if text else EMPTY, BadRows()).add(number)
        else:
            texts.append(text)
    return Prompts(texts, bad)


def _text_rows(path: Path, column: str) -> Iterator[Row]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            yield number, line.removeprefix(BOM_UTF8) if number == 1 else line


def _csv_rows(path: Path, column: str) -> Iterator[Row]:
    csv.field_size_limit(sys.maxsize)
    # "sig": without the byte order mark that spreadsheets write.
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        try:
            reader = csv.DictReader(file)
            _require_column(path, column, reader.fieldnames or ())
            for number, row in enumerate(reader, start=1):
                yield number, (row[column] or "").encode("utf-8", "surrogateescape")
        except csv.Error as error:
            raise CaptionError(f"{path}: not readable as CSV ({error})") from error


def _parquet_rows(path: Path, column: str) -> Iterator[Row]:
    try:
        import pyarrow as pa
        from pyarrow import parquet
    except ModuleNotFoundError as error:
        raise explained(error, f"{path}: Parquet") from None
    try:
        with parquet.ParquetFile(path) as file:
            _require_column(path, column, file.schema_arrow.names)
            number = 0
            for batch in file.iter_batches(columns=[column]):
                # As bytes: Arrow does not check that a string is UTF-8.
                for content in batch.column(0).cast(pa.binary()):
                    number += 1
                    yield number, content.as_py() or b""
    except (pa.ArrowException, OSError) as error:
        raise CaptionError(f"{path}: not readable as Parquet with text in {column!r} ({error})") from error


def _require_column(path: Path, column: str, names: Iterable[str]) -> None:
    if column not in (known := list(names)):
        raise CaptionError(f"{path}: has no column {column!r} but {', '.join(known)}; set column in captions.sets")
