"""Reads the texts of a fine-tuning run with ``datasets``, and splits them so that no text is on two sides."""

from __future__ import annotations

import csv
import hashlib
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import datasets
from datasets import Dataset, DatasetDict
from datasets.exceptions import DatasetsError

from lora_ext._common.messages import first_of
from lora_ext.commands.options import CommandError, refusing
from lora_ext.commands.training_options import TaskOptions

SIDES = ("train", "validation", "test")

_INTEGER = re.compile(r"[+-]?[0-9]{1,100}")


def load_rows(path: str, columns: Sequence[str]) -> DatasetDict:
    """Reads a .csv, .tsv or .jsonl file, whose rows are ``train``, or the splits of a data set on the hub.

    The ``columns`` of a CSV or TSV file stay strings: "NA" is no missing value, and 01 is not 1. In TSV files quotes
    are ordinary characters.

    CommandError: it cannot be read, holds no rows, or lacks a column or a value.
    """
    file, options = Path(path), {}
    if not file.exists():
        with refusing(f"--data {path}", DatasetsError):
            found = datasets.load_dataset(path)
        found = DatasetDict({name: rows for name, rows in found.items() if name in SIDES})
    else:
        kind = {".csv": "csv", ".tsv": "csv", ".jsonl": "json"}.get(file.suffix.lower())
        if kind is None or not file.is_file():
            raise CommandError(f"{path}: want a file with the suffix .csv, .tsv or .jsonl")
        if not file.stat().st_size:
            raise CommandError(f"{path}: the file is empty")
        if kind == "csv":
            options = {"converters": dict.fromkeys(columns, str), "keep_default_na": False, "encoding": "utf-8-sig"}
            options |= {"sep": "\t", "quoting": csv.QUOTE_NONE} if file.suffix.lower() == ".tsv" else {}
            _check_header(file, columns)
        with refusing(path, Exception):  # pandas, pyarrow and archives have errors of their own
            found = DatasetDict({"train": datasets.load_dataset(kind, data_files=str(file), split="train", **options)})
    for rows in found.values():
        _check_rows(path, rows, columns)
    if "train" not in found:
        raise CommandError(f"{path}: has no split `train`")
    return found


def _check_header(file: Path, columns: Sequence[str]) -> None:
    """Says what pandas would say cryptically: a header without rows, another separator, a column that is not there."""
    separator = "\t" if file.suffix.lower() == ".tsv" else ","
    with refusing(str(file), csv.Error), file.open(encoding="utf-8-sig", newline="") as opened:
        header = next(csv.reader(opened, delimiter=separator), [])
        has_rows = any(line.strip() for line in opened)
    if twice := [name for name in header if header.count(name) > 1 and name in columns]:
        raise CommandError(f"{file}: the column {twice[0]!r} occurs {header.count(twice[0])} times; rename the others")
    if missing := [name for name in columns if name not in header]:
        wanted = "; want tabs between columns" if separator == "\t" else "; want commas between columns"
        raise CommandError(_no_column(file, missing[0], header) + (wanted if len(header) == 1 else ""))
    if not has_rows:
        raise CommandError(f"{file}: holds no rows after its header")


def _no_column(path: Path | str, name: str, known: Sequence[str]) -> str:
    return (
        f"{path}: no column {name!r} but {first_of(map(repr, known), 10)}; --text_column and --label_column name them"
    )


def _check_rows(path: str, rows: Dataset, columns: Sequence[str]) -> None:
    if not len(rows):
        raise CommandError(f"{path}: holds no rows")
    for name in columns:
        if name not in rows.column_names:
            raise CommandError(_no_column(path, name, rows.column_names))
        values = rows[name][:]
        if (at := next((at for at, value in enumerate(values) if value is None or value == ""), None)) is not None:
            raise CommandError(f"{path}: row {at + 1} has no {name!r}")


def split_rows(
    options: TaskOptions, path: str, columns: Sequence[str], key_of: Callable[[dict[str, Any]], str]
) -> dict[str, Dataset]:
    """Returns ``{"train", "validation", "test"}``: parts of ``path``, its own splits, or the files that options name.

    Parts are chosen by the hash of a row's text: they do not depend on the order, and equal texts, also in case and
    white space, land on one side. A text that is in several files counts once: in the test file, or else in the
    validation file; a line says how many are left out.

    Args:
        key_of: returns the text that must not be on two sides: of a prompt with an answer, the prompt.

    CommandError: a file is damaged, or a side has no rows.
    """
    sides = dict(load_rows(path, columns))
    for side in ("test", "validation"):
        if file := getattr(options, f"{side}_file"):
            sides[side] = load_rows(file, columns)["train"]
    keys = {side: [_hash(key_of(row)) for row in rows] for side, rows in sides.items()}
    for side, others in (("validation", ["test"]), ("train", ["test", "validation"])):
        taken = {key for other in others for key in keys.get(other, ())}
        if side in sides:
            kept = [at for at, key in enumerate(keys[side]) if key not in taken]
            if left_out := len(keys[side]) - len(kept):
                print(f"{left_out:,} texts of {side} are left out, because {' or '.join(others)} has them, too")
            sides[side], keys[side] = sides[side].select(kept), [keys[side][at] for at in kept]
    rest = distinct = sorted(set(keys["train"]))
    by_hash = sorted(enumerate(keys["train"]), key=lambda pair: pair[1])  # the file's order decides nothing
    for side in ("test", "validation"):
        if side not in sides:
            size = round(getattr(options, f"{side}_split") * len(distinct))
            chosen, rest = set(rest[:size]), rest[size:]
            sides[side] = sides["train"].select([at for at, key in by_hash if key in chosen])
    kept = set(rest)
    sides["train"] = sides["train"].select([at for at, key in by_hash if key in kept])
    needed = [side for side in SIDES if side != "validation" or options.validation_split or options.validation_file]
    if empty := [side for side in needed if not len(sides[side])]:
        raise CommandError(f"{path}: no text is left for {empty[0]}; change --validation_split or --test_split")
    return {side: sides[side] for side in SIDES}


def _hash(text: str) -> bytes:
    return hashlib.sha256(" ".join(text.lower().split()).encode()).digest()


def label_names(path: str, sides: dict[str, Dataset], column: str) -> list[str]:
    """Returns the labels in the order of their class indices: integers by value, others by code points.

    CommandError: there is one label only; two look like one (1 and 01); or no training text has a label.
    """
    found = {side: list(map(str, rows[column])) for side, rows in sides.items()}
    known = set(found["train"])
    meanings: dict[Any, str] = {}
    for label in sorted(known.union(*found.values())):
        meaning = int(label) if _INTEGER.fullmatch(label.strip()) else label.strip()
        if (other := meanings.setdefault(meaning, label)) != label:
            raise CommandError(f"{path}: the labels {other!r} and {label!r} are two classes, but look like one")
    for side in ("validation", "test"):
        for at, label in enumerate(found[side]):
            if label not in known:
                raise CommandError(
                    f"{path}: row {at + 1} of {side} has the label {label!r}, which no training text has; labels are "
                    f"{first_of(map(repr, sorted(known)), 10)}"
                )
    if len(known) < 2:
        raise CommandError(f"{path}: every training text has the label {known.pop()!r}; want at least two")
    if all(_INTEGER.fullmatch(label) for label in known):
        return sorted(known, key=lambda label: (int(label), label))
    return sorted(known)
