"""Reads labelled texts from CSV, TSV or JSONL, checks every line, and splits them without repeating a text."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import re
from codecs import BOM_UTF16_BE, BOM_UTF16_LE
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from lora_ext._common.printable import first_of
from lora_ext.files import open_regular, parse_json_object, read_json_object
from lora_ext.tasks import TaskError
from lora_ext.tasks.shared.whole_files import write_json

DATA_FILE = "data-fingerprint.json"

_LONGEST_FIELD = 10_000_000  # characters; an unclosed quote turns the rest of the file into one field
_LONGEST_LINE = 50_000_000  # characters; a file without line ends must not fill the memory
_INTEGER = re.compile(r"[+-]?[0-9]{1,100}")


class Example(NamedTuple):
    text: str
    label: str
    line: int  # in its file, counted from 1


class Splits(NamedTuple):
    train: list[Example]
    validation: list[Example]
    test: list[Example]

    @property
    def labels(self) -> list[str]:
        """:func:`label_names` of all three splits."""
        return label_names(example for split in self for example in split)


def read_examples(path: str | Path, text_column: str = "text", label_column: str = "label") -> list[Example]:
    """Reads labelled texts from a UTF-8 file; its suffix names the format.

    ``.csv``: header line, comma-separated, fields may be quoted. ``.tsv``: header line, tab-separated, quotes are
    ordinary characters. ``.jsonl``: one object a line. Labels are strings or integers; both are kept as strings.

    Raises:
        TaskError: names the file, the line and the mistake. Pipes and devices are refused.
    """
    path = Path(path)
    readers = {".csv": _read_csv, ".tsv": _read_tsv, ".jsonl": _read_jsonl}
    if path.suffix.lower() not in readers:
        raise TaskError(f"{path}: the suffix {path.suffix!r} is none of {', '.join(readers)}, which name the format")
    columns = (text_column, label_column)
    with text_lines(path) as lines:
        rows = readers[path.suffix.lower()](path, lines, columns)
        examples = [_example(path, line, row, columns) for line, row in rows]
    if not examples:
        raise TaskError(f"{path}: holds no examples")
    return examples


@contextmanager
def text_lines(path: Path) -> Iterator[Iterator[str]]:
    """Yields the lines of a UTF-8 file; errors while they are read become TaskErrors that name the file and the line.

    Raises:
        TaskError: the file cannot be read, is a pipe or a device, is not UTF-8, holds a NUL character, or has a line
            of more than 50 million characters.
    """
    try:
        with open_regular(path) as raw, io.TextIOWrapper(io.BufferedReader(raw), "utf-8-sig", newline="") as file:
            yield _lines(path, file)
    except OSError as error:
        raise TaskError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        with path.open("rb") as raw:
            coding = "utf-16" if raw.read(2) in (BOM_UTF16_LE, BOM_UTF16_BE) else "latin1"
        raise TaskError(
            f"{path}, line {_first_line_not_utf_8(path)}: not UTF-8 ({error.reason}); convert the file, for example "
            f"with iconv -f {coding} -t utf-8"
        ) from error
    except ValueError as error:  # not a regular file
        raise TaskError(str(error)) from error


def json_lines(path: Path, lines: Iterable[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields ``(line number, object)`` for every line that is not blank. TaskError: a line is not a JSON object."""
    for line, content in enumerate(lines, start=1):
        if not content.strip():
            continue
        try:
            row = parse_json_object(content.rstrip("\r\n"), f"{path}, line {line}")
        except ValueError as error:
            text = re.sub(r": line 1 column (\d+) \(char \d+\)$", r" at column \1", str(error))
            raise TaskError(text) from error
        yield line, row


def label_names(examples: Iterable[Example]) -> list[str]:
    """Returns the distinct labels in the order of their class indices: integers by value, others by code points."""
    labels = {example.label for example in examples}
    if all(_INTEGER.fullmatch(label) for label in labels):
        return sorted(labels, key=lambda label: (int(label), label))
    return sorted(labels)


def check_labels(labels: Iterable[str]) -> None:
    """Refuses labels that are different strings, and so different classes, but almost certainly mean the same.

    Such labels differ only in surrounding white space, or write one integer in two ways: 1, 01 and +1.

    Raises:
        TaskError: names two such labels.
    """
    seen: dict[str | int, str] = {}
    for label in sorted(labels):
        meaning = label.strip()
        other = seen.setdefault(int(meaning) if _INTEGER.fullmatch(meaning) else meaning, label)
        if other != label:
            raise TaskError(
                f"the labels {other!r} and {label!r} are different strings, and so two classes, but look like one; "
                "write a label in one way only"
            )


def shown_names(names: Iterable[str]) -> str:
    """Formats the first of ``names`` for a message: printable, and short for any number of names."""
    printable = [name if name.isprintable() else ascii(name) for name in names]
    return first_of((name if len(name) <= 50 else f"{name[:50]}..." for name in printable), 10)


def split_examples(examples: list[Example], validation_fraction: float, test_fraction: float) -> Splits:
    """Splits by the hash of the text: independent of the order, and equal texts land on the same side.

    Fractions count distinct texts; case and white space are ignored when texts are compared.

    Raises:
        TaskError: a fraction is outside [0, 1) or leaves no text for training.
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


def fingerprint(splits: Splits, *more: str) -> str:
    """Returns a hexadecimal SHA-256 that identifies the texts, their labels and their sides in any order.

    ``more``: what else decides which tokens are learned, such as a chat template.
    """
    content = [*(sorted(example[:2] for example in split) for split in splits), *more]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def save_fingerprint(out: Path, sha256: str) -> None:
    write_json(out / DATA_FILE, {"sha256": sha256})


def saved_fingerprint(out: Path) -> str | None:
    """Reads the fingerprint of the texts that the run in ``out`` was started with; None if the file is missing.

    Raises:
        TaskError: the file is damaged.
    """
    path = out / DATA_FILE
    try:
        sha256 = read_json_object(path, "--resume", 10_000).get("sha256")
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise TaskError(f"{error}; start a new run") from error
    if not isinstance(sha256, str):
        raise TaskError(f"--resume: {path} has no fingerprint of the texts; start a new run")
    return sha256


def resumed_fingerprint(splits: Splits, out: Path, *more: str) -> str:
    """Returns :func:`fingerprint`. TaskError: the run in ``out`` was started with other texts."""
    texts = fingerprint(splits, *more)
    if saved_fingerprint(out) not in (None, texts):
        what = "the texts or the chat template are" if more else "the texts are"
        raise TaskError(f"--resume: {what} not those that the run in {out} was started with; start a new run")
    return texts


def without_texts_of(examples: list[Example], others: Iterable[Example]) -> list[Example]:
    """Returns ``examples`` without those whose text is also in ``others``."""
    keys = {_text_key(example.text) for example in others}
    return [example for example in examples if _text_key(example.text) not in keys]


def _text_key(text: str) -> bytes:
    return hashlib.sha256(" ".join(text.lower().split()).encode()).digest()


def _lines(path: Path, file: TextIO) -> Iterator[str]:
    number = 1
    while line := file.readline(_LONGEST_LINE + 1):
        if len(line) > _LONGEST_LINE:
            raise TaskError(f"{path}, line {number}: longer than {_LONGEST_LINE:,} characters, the most that is read")
        if "\0" in line:
            raise TaskError(f"{path}, line {number}: holds a NUL character; if the file is UTF-16, convert it to UTF-8")
        yield line
        number += 1


def _first_line_not_utf_8(path: Path) -> int:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                line.decode()
            except UnicodeDecodeError:
                return number
    return 1


def _read_csv(path: Path, lines: Iterable[str], columns: Sequence[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    return _read_table(path, csv.reader(lines, strict=True), columns)


def _read_tsv(path: Path, lines: Iterable[str], columns: Sequence[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    return _read_table(path, csv.reader(lines, delimiter="\t", quoting=csv.QUOTE_NONE), columns)


def _read_table(path: Path, reader: Any, columns: Sequence[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    header: list[str] | None = None
    line = 1  # where the row starts; a quoted field can span several lines
    while True:
        try:
            with _long_fields():
                row = next(reader, None)
        except csv.Error as error:
            hint = "; is a quote not closed?" if "end of data" in str(error) else ""
            raise TaskError(f"{path}, line {line}: {error}{hint}") from error
        if row is None:
            return
        if row and header is None:
            header = row
            where = {name: header.index(name) for name in columns if name in header}
            if twice := [name for name in where if header.count(name) > 1]:
                raise TaskError(
                    f"{path}, line {line}: the column {twice[0]!r} occurs {header.count(twice[0])} times; rename all "
                    "except one of them"
                )
        elif row:
            if len(row) != len(header):
                raise TaskError(f"{path}, line {line}: {len(row)} columns, but the header has {len(header)}")
            if len(where) < len(set(columns)):
                _check_separator(path, line, header)
                _check_columns(path, line, header, columns)
            yield line, {name: row[index] for name, index in where.items()}
        line = reader.line_num + 1


def _check_separator(path: Path, line: int, header: Sequence[str]) -> None:
    if len(header) == 1 and (found := [mark for mark in (";", "\t", "|", ",") if mark in header[0]]):
        want = "tabs" if path.suffix.lower() == ".tsv" else "commas; tabs go with .tsv"
        raise TaskError(f"{path}, line {line}: its columns are separated by {found[0]!r}, want {want}")


@contextmanager
def _long_fields() -> Iterator[None]:
    before = csv.field_size_limit(_LONGEST_FIELD)
    try:
        yield
    finally:
        csv.field_size_limit(before)  # the limit is global


def _read_jsonl(path: Path, lines: Iterable[str], columns: Sequence[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    for line, row in json_lines(path, lines):
        _check_columns(path, line, row, columns)
        yield line, row


def _check_columns(path: Path, line: int, names: Iterable[str], columns: Sequence[str]) -> None:
    for column, option in zip(columns, ("--text-column", "--label-column"), strict=True):
        if column not in names:
            raise TaskError(f"{path}, line {line}: no column {column!r} but {shown_names(names)}; set {option}")


def _example(path: Path, line: int, row: dict[str, Any], columns: Sequence[str]) -> Example:
    text, label = (row[column] for column in columns)
    if not isinstance(text, str):
        raise TaskError(f"{path}, line {line}: {columns[0]!r} is {shown_value(text)}, want a string")
    if isinstance(label, bool) or not isinstance(label, (str, int)) or label == "":
        raise TaskError(f"{path}, line {line}: {columns[1]!r} is {shown_value(label)}, want a string or an integer")
    return Example(text, str(label), line)


def shown_value(value: Any) -> str:
    """Formats a value from a file for a message."""
    text = json.dumps(value)
    return text if len(text) <= 100 else f"{text[:100]}..."
