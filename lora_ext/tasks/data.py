"""Labelled texts: read from CSV, TSV or JSONL, checked line by line, and split so that no text is on two sides."""

from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from . import TaskError
from .run_directory import write_json

DATA_FILE = "data-fingerprint.json"


class Example(NamedTuple):
    text: str
    label: str
    line: int  # in the file it came from, counted from 1


class Splits(NamedTuple):
    train: list[Example]
    validation: list[Example]
    test: list[Example]

    @property
    def labels(self) -> list[str]:
        """Of all three, as :func:`label_names` has them."""
        return label_names(example for split in self for example in split)


def read_examples(path: str | Path, text_column: str = "text", label_column: str = "label") -> list[Example]:
    """Reads labelled texts from a UTF-8 file; its suffix names the format.

    ``.csv``: header line, comma-separated, fields may be quoted. ``.tsv``: header line, tab-separated, quotes are
    ordinary characters. ``.jsonl``: one object a line. Labels are strings or integers; both are kept as strings.

    Raises:
        TaskError: naming the file, the line and what is wrong with it.
    """
    path = Path(path)
    readers = {".csv": _read_csv, ".tsv": _read_tsv, ".jsonl": _read_jsonl}
    if path.suffix.lower() not in readers:
        raise TaskError(f"{path}: the suffix {path.suffix!r} is none of {', '.join(readers)}, which name the format")
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = readers[path.suffix.lower()](path, file)
            examples = [_example(path, line, row, text_column, label_column) for line, row in rows]
    except OSError as error:
        raise TaskError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise TaskError(
            f"{path}: not UTF-8 ({error.reason} at byte {error.start}); convert it, for example with "
            f"iconv -f latin1 -t utf-8"
        ) from error
    if not examples:
        raise TaskError(f"{path}: holds no examples")
    return examples


def label_names(examples: Iterable[Example]) -> list[str]:
    """The distinct labels in the order of their class indices: integers by value, anything else by alphabet."""
    labels = {example.label for example in examples}
    try:
        return sorted(labels, key=int)
    except ValueError:
        return sorted(labels)


def split_examples(examples: list[Example], validation_fraction: float, test_fraction: float) -> Splits:
    """Splits by the hash of the text: fixed for a file whatever its order, and equal texts land on the same side.

    Fractions are of the distinct texts, which are compared without regard to case and white space.

    Raises:
        TaskError: if a fraction is outside [0, 1) or leaves no text for training.
    """
    for name, fraction in (("validation", validation_fraction), ("test", test_fraction)):
        if not 0.0 <= fraction < 1.0:
            raise TaskError(f"the {name} fraction is {fraction}, want 0 <= fraction < 1")
    by_text: dict[bytes, list[Example]] = {}
    for example in examples:
        by_text.setdefault(_text_key(example.text), []).append(example)
    keys = sorted(by_text)
    num_test, num_validation = round(test_fraction * len(keys)), round(validation_fraction * len(keys))
    if num_test + num_validation >= len(keys):
        raise TaskError(
            f"{len(keys)} distinct texts with a validation fraction of {validation_fraction} and a test fraction of "
            f"{test_fraction} leave none for training"
        )
    sides = keys[num_test + num_validation :], keys[num_test : num_test + num_validation], keys[:num_test]
    return Splits(*([example for key in side for example in by_text[key]] for side in sides))


def fingerprint(splits: Splits) -> str:
    """The same for the same texts with the same labels on the same sides, and for no others: SHA-256, hexadecimal."""
    content = [sorted(example[:2] for example in split) for split in splits]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def save_fingerprint(out: Path, sha256: str) -> None:
    write_json(out / DATA_FILE, {"sha256": sha256})


def saved_fingerprint(out: Path) -> str | None:
    """Of the texts that the run in ``out`` was started with; None: the file is missing."""
    try:
        return json.loads((out / DATA_FILE).read_text())["sha256"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def without_texts_of(examples: list[Example], others: Iterable[Example]) -> list[Example]:
    """``examples`` less those whose text is also in ``others``."""
    keys = {_text_key(example.text) for example in others}
    return [example for example in examples if _text_key(example.text) not in keys]


def _text_key(text: str) -> bytes:
    return hashlib.sha256(" ".join(text.lower().split()).encode()).digest()


def _read_csv(path: Path, file: Iterable[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    return _read_table(path, csv.reader(file, strict=True))


def _read_tsv(path: Path, file: Iterable[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    return _read_table(path, csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE))


def _read_table(path: Path, reader: Any) -> Iterator[tuple[int, dict[str, Any]]]:
    header: list[str] | None = None
    line = 1  # where the row starts; a quoted field may run over several lines
    while True:
        try:
            row = next(reader, None)
        except csv.Error as error:
            raise TaskError(f"{path}, line {line}: {error}") from error
        if row is None:
            return
        if row and header is None:
            header = row
        elif row:
            if len(row) != len(header):
                raise TaskError(f"{path}, line {line}: {len(row)} columns, but the header has {len(header)}")
            yield line, dict(zip(header, row, strict=True))
        line = reader.line_num + 1


def _read_jsonl(path: Path, file: Iterable[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    for line, content in enumerate(file, start=1):
        if not content.strip():
            continue
        try:
            row = json.loads(content)
        except json.JSONDecodeError as error:
            raise TaskError(f"{path}, line {line}: not JSON: {error.msg} at column {error.colno}") from error
        if not isinstance(row, dict):
            raise TaskError(f"{path}, line {line}: a JSON {type(row).__name__}, want an object")
        yield line, row


def _example(path: Path, line: int, row: dict[str, Any], text_column: str, label_column: str) -> Example:
    for column, option in ((text_column, "--text-column"), (label_column, "--label-column")):
        if column not in row:
            raise TaskError(f"{path}, line {line}: no column {column!r} but {', '.join(row)}; set {option}")
    text, label = row[text_column], row[label_column]
    if not isinstance(text, str):
        raise TaskError(f"{path}, line {line}: {text_column!r} is {json.dumps(text)}, want a string")
    if isinstance(label, bool) or not isinstance(label, (str, int)) or label == "":
        raise TaskError(f"{path}, line {line}: {label_column!r} is {json.dumps(label)}, want a string or an integer")
    return Example(text, str(label), line)
