"""Writes the official split of UIT-VSFC (Nguyen et al., KSE 2018) as train.csv, dev.csv and test.csv: text,label.

    python scripts/lay_out_vsfc.py DIR OUT

DIR is the corpus as it is published (train/sents.txt and train/sentiments.txt, and the same for dev and test), or has
train.csv, dev.csv and test.csv already. Sentiments 0, 1, 2 become negative, neutral, positive. The corpus is not part
of this project: its authors distribute it for research.
"""

from __future__ import annotations

import argparse
import csv
import io
import sys
from pathlib import Path

from lora_ext.tasks import TaskError
from lora_ext.tasks.finetune.data import read_examples, shown_names, text_lines
from lora_ext.tasks.shared.whole_files import write_whole

SIZES = {"train": 11_426, "dev": 1_583, "test": 3_166}
_LABELS = ("negative", "neutral", "positive")  # published as 0, 1, 2


def read_split(directory: Path, split: str) -> list[tuple[str, str]]:
    """Returns ``(text, label)`` of a split. TaskError: its files are missing or damaged."""
    table = directory / f"{split}.csv"
    texts, sentiments = (directory / split / f"{name}.txt" for name in ("sents", "sentiments"))
    if table.is_file():
        source, rows = table, [(example.text.strip(), example.label) for example in read_examples(table)]
    elif texts.is_file() and sentiments.is_file():
        source, rows = sentiments, list(zip(*_equally_long(texts, sentiments), strict=True))
    else:
        raise TaskError(
            f"{directory} has neither {split}.csv nor {split}/sents.txt with {split}/sentiments.txt; name "
            "the directory of UIT-VSFC (make finetune-vi DATA=...)"
        )
    known = {name: name for name in _LABELS} | {str(number): name for number, name in enumerate(_LABELS)}
    if unknown := sorted({label for _, label in rows} - known.keys()):
        raise TaskError(f"{source}: the sentiments [{shown_names(unknown)}] are none of {', '.join(known)}")
    if empty := [number for number, (text, _) in enumerate(rows, start=1) if not text]:
        raise TaskError(f"{source}: text {empty[0]} is empty")
    return [(text, known[label]) for text, label in rows]


def _equally_long(texts: Path, sentiments: Path) -> tuple[list[str], list[str]]:
    columns = []
    for path in (texts, sentiments):
        with text_lines(path) as lines:
            columns.append([line.strip() for line in lines])
    if len(columns[0]) != len(columns[1]):
        raise TaskError(f"{texts} has {len(columns[0]):,} lines and {sentiments} {len(columns[1]):,}; want as many")
    return columns[0], columns[1]


def lay_out(directory: Path, out: Path) -> None:
    """Writes the three files to ``out``. TaskError: a split is missing or damaged; nothing is written then."""
    splits = {split: read_split(directory, split) for split in SIZES}
    out.mkdir(parents=True, exist_ok=True)
    for split, rows in splits.items():
        content = io.StringIO(newline="")
        csv.writer(content).writerows([("text", "label"), *rows])
        write_whole(out / f"{split}.csv", content.getvalue())
        other = "" if len(rows) == SIZES[split] else f"; the official split has {SIZES[split]:,}"
        print(f"{out / split}.csv: {len(rows):,} texts{other}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, metavar="DIR")
    parser.add_argument("out", type=Path, metavar="OUT")
    args = parser.parse_args()
    try:
        lay_out(args.directory, args.out)
    except TaskError as error:
        sys.exit(f"{parser.prog}: error: {error}")


if __name__ == "__main__":
    main()
