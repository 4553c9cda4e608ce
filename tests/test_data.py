from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from lora_ext.tasks import TaskError
from lora_ext.tasks.data import Example, label_names, read_examples, split_examples, without_texts_of


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
        ("a.csv", "text,label\nx,1\na,b,1\n", "line 3: 3 columns, but the header has 2"),
        ("a.csv", 'text,label\nx,1\n"never closed,1\n', "line 3: unexpected end of data"),
        ("a.csv", "text,label\nx,\n", "line 2: 'label' is \"\", want a string or an integer"),
        ("a.tsv", "text\tlabel\nx\n", "line 2: 1 columns, but the header has 2"),
        ("a.jsonl", '{"text": "x", "label": 1}\n{"text": "x", ', "line 2: not JSON: Expecting property name"),
        ("a.jsonl", '["x", 1]\n', "line 1: a JSON list, want an object"),
        ("a.jsonl", '{"text": 3, "label": 1}\n', "line 1: 'text' is 3, want a string"),
        ("a.jsonl", '{"text": "x", "label": 0.5}\n', "line 1: 'label' is 0.5, want a string or an integer"),
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
    with pytest.raises(TaskError, match="not UTF-8 .* convert it, for example with iconv -f latin1 -t utf-8"):
        read_examples(tmp_path / "latin.csv")


def test_label_names_sort_integers_by_value():
    examples = [Example("", label, 0) for label in ("10", "9", "-1", "9")]
    assert label_names(examples) == ["-1", "9", "10"]
    assert label_names([*examples, Example("", "none", 0)]) == ["-1", "10", "9", "none"]


def test_split_is_disjoint_by_text_and_fixed():
    examples = [Example(f"text {i % 900}", str(i % 2), i) for i in range(1000)]  # a tenth of the texts twice
    examples.append(Example("  TEXT   7", "1", 1000))  # the same text in other writing
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
