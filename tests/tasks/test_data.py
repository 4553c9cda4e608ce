from __future__ import annotations

import ast
import csv
import json
import os
import random
from pathlib import Path

import pytest
from support import tiny_classifier
from support.processes import run_python

from lora_ext.tasks import TaskError
from lora_ext.tasks.finetune import data
from lora_ext.tasks.finetune.data import (
    Example,
    check_labels,
    label_names,
    read_examples,
    split_examples,
    without_texts_of,
)

pytestmark = pytest.mark.cpu_only("has no tensors")


def write(path: Path, content: str) -> Path:
    path.write_bytes(content.encode())
    return path


def test_the_three_formats_read_alike(tmp_path: Path):
    text = "a film, dull and 'hollow'; caf\u00e9"
    expected = [Example("fine", "1", 2), Example(text, "0", 3)]
    csv_file = write(tmp_path / "a.csv", f'label,text\r\n1,fine\r\n0,"{text}"\r\n')
    tsv_file = write(tmp_path / "a.TSV", f"\ufefftext\tlabel\nfine\t1\n{text}\t0\n")
    rows = [{"text": "fine", "label": 1, "more": None}, {"label": "0", "text": text}]
    jsonl_file = write(tmp_path / "a.jsonl", "\n" + "\n".join(map(json.dumps, rows)))
    assert read_examples(csv_file) == expected
    assert read_examples(tsv_file) == expected
    assert read_examples(jsonl_file) == expected


def test_columns_are_chosen_by_name_and_lines_counted_through_quoted_line_breaks(tmp_path: Path):
    path = write(tmp_path / "a.csv", 'id,review,stars\n1,"two\nlines",5\n\n2,"say ""no""",1\n')
    assert read_examples(path, "review", "stars") == [Example("two\nlines", "5", 2), Example('say "no"', "1", 5)]


def test_quotes_in_tsv_are_ordinary_characters(tmp_path: Path):
    path = write(tmp_path / "a.tsv", 'text\tlabel\n"Wasabi\tpos\nan "ending"\tneg\n')
    assert [example.text for example in read_examples(path)] == ['"Wasabi', 'an "ending"']


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", "text\n", "the suffix '.txt' is none of .csv, .tsv, .jsonl"),
        ("a.csv", "", "a.csv: holds no examples"),
        ("a.csv", "text,label\n", "a.csv: holds no examples"),
        ("a.csv", "body,label\nx,1\n", "line 2: no column 'text' but body, label; set --text-column"),
        ("a.csv", "text,stars\nx,1\n", "line 2: no column 'label' but text, stars; set --label-column"),
        ("a.csv", "text;label\nx;1\n", "line 2: its columns are separated by ';', want commas; tabs go with .tsv"),
        ("a.tsv", "text,label\nx,1\n", "line 2: its columns are separated by ',', want tabs"),
        ("a.csv", "text,label\nx,1\na,b,1\n", "line 3: 3 columns, but the header has 2"),
        ("a.csv", 'text,label\nx,1\n"never closed,1\n', "line 3: unexpected end of data; is a quote not closed?"),
        ("a.csv", "text,label\nx,\n", "line 2: 'label' is \"\", want a string or an integer"),
        ("a.tsv", "text\tlabel\nx\n", "line 2: 1 columns, but the header has 2"),
        ("a.jsonl", '{"text": "x", "label": 1}\n{"text": "x", ', "line 2 is not JSON: Expecting property name"),
        ("a.jsonl", '["x", 1]\n', "line 1 holds a list, want an object"),
        ("a.jsonl", '{"text": 3, "label": 1}\n', "line 1: 'text' is 3, want a string"),
        ("a.jsonl", '{"text": "x", "label": 0.5}\n', "line 1: 'label' is 0.5, want a string or an integer"),
        ("a.jsonl", '{"text": "x", "text": "y", "label": 1}\n', "line 1 is not JSON: the key 'text' occurs twice"),
        ("a.jsonl", '{"text": "\\ud800", "label": 1}\n', "line 1 has a string that is not Unicode: '\\ud800'"),
        ("a.jsonl", '{"text": "x", "label": "\\udfff"}\n', "line 1 has a string that is not Unicode"),
        ("a.jsonl", '{"text": "x", "label": ' + "[" * 100_000 + "}\n", "line 1 is nested too deeply"),
        ("a.jsonl", '{"text": "x", "label": 1' + "0" * 5000 + "}\n", "a number has 5001 digits, want at most 100"),
        ("a.jsonl", '{"text": "x", "label": 1e999}\n', "line 1: 'label' is Infinity, want a string or an integer"),
        ("a.jsonl", '{"text": [' + "1, " * 1000 + '1], "label": 1}\n', "1, ..., want a string"),
        ("a.jsonl", '{"\\u001b[2J": "x", "label": 1}\n', "no column 'text' but '\\x1b[2J', label; set --text-column"),
        ("a.csv", "text,label,text\nx,1,y\n", "line 1: the column 'text' occurs 2 times; rename all except one of"),
        ("a.csv", "\nlabel,text,label,label\nx,1,y,z\n", "line 2: the column 'label' occurs 3 times"),
        (
            "a.csv",
            ",".join(f"c{i}" for i in range(9999)) + "\n" + "," * 9998,
            "c8, c9 and 9,989 more; set --text-column",
        ),
        ("a.csv", "text,label\nx\0,1\n", "line 2: holds a NUL character; if the file is UTF-16, convert it to UTF-8"),
        ("a.csv", f"text,{'l' * 1000}\nx,1\n", f"no column 'label' but text, {'l' * 50}...; set --label-column"),
        ("a.jsonl", '{"text": "x", "label": true}\n', "line 1: 'label' is true, want a string or an integer"),
    ],
)
def test_bad_files_are_refused_with_file_and_line(tmp_path: Path, name: str, content: str, message: str):
    path = write(tmp_path / name, content)
    with pytest.raises(TaskError) as caught:
        read_examples(path)
    assert message in str(caught.value)
    assert str(path) in str(caught.value)


def test_missing_and_wrongly_encoded_files(tmp_path: Path):
    with pytest.raises(TaskError, match=r"none\.csv: cannot be read: No such file"):
        read_examples(tmp_path / "none.csv")
    (tmp_path / "latin.csv").write_bytes("text,label\ncaf\u00e9,1\n".encode("latin-1"))
    message = "latin.csv, line 2: not UTF-8 .*; convert the file, for example with iconv -f latin1 -t utf-8"
    with pytest.raises(TaskError, match=message):
        read_examples(tmp_path / "latin.csv")
    (tmp_path / "long.csv").write_bytes(b"text,label\n" + b"x,1\n" * 9998 + b"caf\xe9,1\n")
    with pytest.raises(TaskError, match="long.csv, line 10000: not UTF-8"):
        read_examples(tmp_path / "long.csv")
    (tmp_path / "wide.csv").write_text("text,label\nx,1\n", encoding="utf-16")
    with pytest.raises(TaskError, match="wide.csv, line 1: not UTF-8 .* iconv -f utf-16 -t utf-8"):
        read_examples(tmp_path / "wide.csv")


def test_only_regular_files_are_read(tmp_path: Path):
    os.mkfifo(tmp_path / "pipe.csv")
    (tmp_path / "directory.csv").mkdir()
    (tmp_path / "zero.jsonl").symlink_to("/dev/zero")
    for name, kind in (("pipe.csv", "pipe"), ("directory.csv", "directory"), ("zero.jsonl", "device")):
        with pytest.raises(TaskError, match=f"{name} is a {kind}, want a regular file"):
            read_examples(tmp_path / name)
    (tmp_path / "link.csv").symlink_to(write(tmp_path / "a.csv", "text,label\nx,1\n"))
    assert read_examples(tmp_path / "link.csv") == [Example("x", "1", 2)]


def test_long_texts_are_read_and_endless_ones_refused(tmp_path: Path, monkeypatch):
    before = csv.field_size_limit()
    text = "word " * 200_000
    for name, quote, comma in (("a.csv", '"', ","), ("a.tsv", "", "\t")):
        path = write(tmp_path / name, f"text{comma}label\n{quote}{text}{quote}{comma}1\n")
        assert read_examples(path) == [Example(text, "1", 2)]
    assert csv.field_size_limit() == before
    monkeypatch.setattr(data, "_LONGEST_FIELD", 1000)
    open_quote = write(tmp_path / "open.csv", 'text,label\nx,1\n"never closed,1\n' + "more,2\n" * 1000)
    with pytest.raises(TaskError, match=r"open.csv, line 3: field larger than field limit \(1000\)"):
        read_examples(open_quote)
    monkeypatch.setattr(data, "_LONGEST_LINE", 10_000)
    with (tmp_path / "sparse.jsonl").open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(TaskError, match="sparse.jsonl, line 1: longer than 10,000 characters, the most that is read"):
        read_examples(tmp_path / "sparse.jsonl")


def test_label_names_sort_integers_by_value():
    examples = [Example("", label, 0) for label in ("10", "9", "-1", "9")]
    assert label_names(examples) == ["-1", "9", "10"]
    assert label_names([*examples, Example("", "none", 0)]) == ["-1", "10", "9", "none"]
    assert label_names([Example("", label, 0) for label in ("\u0663", "1", "1" * 5000)]) == ["1", "1" * 5000, "\u0663"]


@pytest.mark.parametrize(
    "labels", [("1", "01"), ("7", "+7"), ("-0", "0"), ("pos", "pos "), (" 3", "03"), ("\u00a0x", "x")]
)
def test_labels_that_look_alike_are_refused(labels: tuple[str, str]):
    """ "1" and "01" are different strings, but a column with both was almost certainly written by two programs."""
    with pytest.raises(TaskError, match="are different strings, and so two classes, but look like one; write a label"):
        check_labels([*labels, "another", "5"])
    check_labels(["1", "10", "-1", "one", "One", "0x1", "1.0"])


@pytest.mark.full
def test_nothing_depends_on_how_strings_are_hashed(tmp_path: Path):
    """Compares a run in this process with one in a process that iterates over sets of these strings in other orders."""
    from support import hashed_run  # imports the Trainer, for seconds

    rows = tiny_classifier.reviews(60)
    rows = [(text, {"pos": "10", "neg": "2"}[label] if i % 5 else "-3") for i, (text, label) in enumerate(rows)]
    model = tiny_classifier.save_model(tmp_path / "model")
    arguments = [str(model), str(tiny_classifier.save_reviews(tmp_path / "reviews.csv", rows))]
    strings = [hashed_run.TARGETS, hashed_run.SAVED, ["10", "2", "-3"]]
    code = f"print([list(set(part)) for part in {strings}])"
    ours = [list(set(part)) for part in strings]
    for seed in map(str, range(100)):
        theirs = ast.literal_eval(run_python("-S", "-c", code, PYTHONHASHSEED=seed).stdout)
        if all(a != b for a, b in zip(ours, theirs, strict=True)):
            break
    else:
        pytest.fail("no seed orders all sets differently")
    other = run_python("-m", "support.hashed_run", *arguments, tmp_path / "other", PYTHONHASHSEED=seed)
    assert other.returncode == 0, other.stderr
    results = json.loads(json.dumps(hashed_run.run(*arguments, str(tmp_path / "here"))))
    assert results[0] == {"0": "-3", "1": "2", "2": "10"}
    assert json.loads(other.stdout.splitlines()[-1]) == results


def test_split_is_disjoint_by_text_and_fixed():
    examples = [Example(f"text {i % 900}", str(i % 2), i) for i in range(1000)]  # a tenth of the texts twice
    examples.append(Example("  TEXT   7", "1", 1000))  # the same text, written differently
    splits = split_examples(examples, 0.1, 0.2)
    texts = [{" ".join(example.text.lower().split()) for example in side} for side in splits]
    assert [len(side) for side in texts] == [630, 90, 180]
    assert len(set.union(*texts)) == 900
    assert sorted(example for side in splits for example in side) == sorted(examples)

    shuffled = random.Random(0).sample(examples, len(examples))
    again = split_examples(shuffled, 0.1, 0.2)
    assert [set(side) for side in again] == [set(side) for side in splits]
    assert without_texts_of(examples, splits.test) == [
        example for example in examples if example in set(splits.train + splits.validation)
    ]


@pytest.mark.parametrize(
    ("fractions", "message"),
    [
        ((0.1, 1.0), "the test fraction is 1.0, want 0 <= fraction < 1"),
        ((-0.1, 0.1), "the validation fraction is -0.1"),
        ((0.5, 0.5), "4 distinct texts with a validation fraction of 0.5 and a test fraction of 0.5 leave none"),
    ],
)
def test_split_refuses_bad_fractions(fractions: tuple[float, float], message: str):
    with pytest.raises(TaskError, match=message):
        split_examples([Example(str(i), "a", i) for i in range(4)], *fractions)
