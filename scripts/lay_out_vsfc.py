"""Writes the official split of UIT-VSFC (Nguyen et al., KSE 2018) as train.csv, dev.csv and test.csv: text,label.

    python scripts/lay_out_vsfc.py DIR OUT

DIR is the corpus as it is published (train/sents.txt and train/sentiments.txt, and the same for dev and test), or has
train.csv, dev.csv and test.csv already. Sentiments 0, 1, 2 become negative, neutral, positive. The corpus is not part
of this project: its authors distribute it for research.
"""

from __future__ import annotations

import argparse
import csv
import sys
from pathlib import Path

SIZES = {"train": 11_426, "dev": 1_583, "test": 3_166}
_LABELS = ("negative", "neutral", "positive")  # published as 0, 1, 2


def read_split(directory: Path, split: str) -> list[tuple[str, str]]:
    """Returns ``(text, label)`` of a split. ValueError: its files are missing or damaged."""
    table = directory / f"{split}.csv"
    texts, sentiments = (directory / split / f"{name}.txt" for name in ("sents", "sentiments"))
    if table.is_file():
        source, rows = table, _table(table)
    elif texts.is_file() and sentiments.is_file():
        source, columns = sentiments, [_lines(texts), _lines(sentiments)]
        if len(columns[0]) != len(columns[1]):
            raise ValueError(
                f"{texts} has {len(columns[0]):,} lines and {sentiments} {len(columns[1]):,}; want as many"
            )
        rows = list(zip(*columns, strict=True))
    else:
        raise ValueError(
            f"{directory} has neither {split}.csv nor {split}/sents.txt with {split}/sentiments.txt; name "
            "the directory of UIT-VSFC (make finetune-vi DATA=...)"
        )
    known = {name: name for name in _LABELS} | {str(number): name for number, name in enumerate(_LABELS)}
    if unknown := sorted({label for _, label in rows} - known.keys()):
        raise ValueError(f"{source}: the sentiment {unknown[0]!r} is none of {', '.join(known)}")
    if empty := [number for number, (text, _) in enumerate(rows, start=1) if not text]:
        raise ValueError(f"{source}: text {empty[0]} is empty")
    return [(text, known[label]) for text, label in rows]


def _table(path: Path) -> list[tuple[str, str]]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        header, *rows = [row for row in csv.reader(file, strict=True) if row] or [[]]
    if not {"text", "label"} <= {*header} or any(len(row) != len(header) for row in rows):
        raise ValueError(f"{path}: want the columns text and label, and as many fields in every row")
    return [(row[header.index("text")].strip(), row[header.index("label")]) for row in rows]


def _lines(path: Path) -> list[str]:
    with path.open(encoding="utf-8-sig", newline="\n") as file:
        return [line.strip() for line in file]


def lay_out(directory: Path, out: Path) -> None:
    """Writes the three files to ``out``. ValueError: a split is missing or damaged; nothing is written then."""
    splits = {split: read_split(directory, split) for split in SIZES}
    out.mkdir(parents=True, exist_ok=True)
    for split, rows in splits.items():
        part = out / f".{split}.csv"
        with part.open("w", encoding="utf-8", newline="") as file:
            csv.writer(file).writerows([("text", "label"), *rows])
        part.replace(out / f"{split}.csv")
        other = "" if len(rows) == SIZES[split] else f"; the official split has {SIZES[split]:,}"
        print(f"{out / split}.csv: {len(rows):,} texts{other}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, metavar="DIR")
    parser.add_argument("out", type=Path, metavar="OUT")
    args = parser.parse_args()
    try:
        lay_out(args.directory, args.out)
    except (OSError, ValueError, csv.Error) as error:
        sys.exit(f"{parser.prog}: error: {error}")


if __name__ == "__main__":
    main()
