"""Makes checkpoints and adapters on disk, as transformers and PEFT write them, and compares them."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
from safetensors import deserialize
from safetensors.torch import load_file, save_file
from support.merging import bits
from support.models import shaken
from support.peft_files import save_with_peft
from torch import Tensor, nn

Change = Callable[[dict[str, Tensor]], dict[str, Tensor]]
"""Returns the tensors of a file as they are to be."""
INDEX = "model.safetensors.index.json"
SHARD = "model-00001-of-00002.safetensors"
EVERY_LAYER = {
    "target_modules": ["conv1d", "conv2d", "conv3d", "lin", "square", "embed"],
    "target_parameters": ["experts.gate_up", "experts.down", "single.weight"],
    "modules_to_save": ["head"],
}


class EveryLayer(nn.Module):
    """A model with a layer of each type that is merged on disk, and an attention."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.attn = nn.MultiheadAttention(8, 2)
        self.conv1d = nn.Conv1d(4, 6, 3)
        self.conv2d = nn.Conv2d(4, 6, (3, 2), bias=False)
        self.conv3d = nn.Conv3d(2, 3, (1, 2, 3))
        self.lin = nn.Linear(8, 12)
        self.square = nn.Linear(8, 8)
        self.experts = nn.Module()
        self.experts.gate_up = nn.Parameter(torch.randn(3, 10, 8))
        self.experts.down = nn.Parameter(torch.randn(3, 8, 5))
        self.single = nn.Linear(6, 5)
        self.norm = nn.BatchNorm1d(8)
        self.head = nn.Linear(8, 3)


def save_checkpoint(tensors: dict[str, Tensor], directory: Path, shards: int = 3) -> Path:
    """Saves tensors in ``shards`` files, with an index and other small files."""
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps({"model_type": "own", "dtype": "float32"}))
    (directory / "tokenizer.json").write_text("{}")
    keys = list(tensors)
    names = [f"model-{i + 1:05d}-of-{shards:05d}.safetensors" for i in range(shards)]
    weight_map = {}
    for i, name in enumerate(names):
        shard = {key: tensors[key].detach().clone().contiguous() for key in keys[i::shards]}
        save_file(shard, directory / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shard, name)
    size = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    (directory / INDEX).write_text(json.dumps(index))
    return directory


def add_tensor(directory: Path, name: str, dtype: str = "U8", shape: tuple[int, ...] = (1,), nbytes: int = 1) -> None:
    """Adds a tensor to a file of a checkpoint of two, and to the index."""
    data = dict(deserialize((directory / SHARD).read_bytes()))
    data[name] = {"dtype": dtype, "shape": shape, "data": bytes(range(nbytes))}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for key, one in data.items():
        begin, end = end, end + len(one["data"])
        header[key] = {"dtype": one["dtype"], "shape": one["shape"], "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    content = b"".join(bytes(one["data"]) for one in data.values())
    (directory / SHARD).write_bytes(len(text).to_bytes(8, "little") + text + content)
    index = json.loads((directory / INDEX).read_text())
    index["weight_map"][name] = SHARD
    (directory / INDEX).write_text(json.dumps(index))


def peft_adapter(model: nn.Module, directory: Path, **settings: Any) -> peft.PeftModel:
    """Adapts a copy of ``model`` with PEFT, so that its output changes, and saves the adapter."""
    settings = {"r": 2, "lora_alpha": 5, "init_lora_weights": False} | settings
    with warnings.catch_warnings():
        for message in ("fan_in_fan_out is set to False", "Adapter 'default': ", "Setting `save_embedding_layers`"):
            warnings.filterwarnings("ignore", message)
        adapted = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(**settings))
        save_with_peft(shaken(adapted), directory)
    return adapted


def put(key: str, change: Callable[[Tensor], Tensor]) -> Change:
    return lambda tensors: tensors | {key: change(tensors[key])}


def edit_tensors(directory: Path, change: Change) -> None:
    """Changes the tensors of an adapter on disk."""
    path = directory / "adapter_model.safetensors"
    save_file(change(load_file(path)), path)


def edit_config(directory: Path, **values: object) -> None:
    """Changes values of an adapter's config."""
    path = directory / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values, ensure_ascii=False), encoding="utf-8")


def merged_by_peft(adapted: peft.PeftModel) -> dict[str, Tensor]:
    """Returns the model's state after PEFT merged the adapter."""
    return dict(copy.deepcopy(adapted).merge_and_unload().state_dict())


def tensors_of(directory: Path) -> dict[str, Tensor]:
    """Reads all tensors of a checkpoint's files."""
    tensors = {}
    for file in sorted(directory.glob("*.safetensors")):
        tensors |= load_file(file)
    return tensors


def integers(tensor: Tensor) -> Tensor:
    """Returns floating-point numbers as :func:`bits`, others unchanged."""
    return bits(tensor) if tensor.is_floating_point() else tensor


def assert_same_bits(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for key, tensor in expected.items():
        assert actual[key].dtype == tensor.dtype, key
        assert torch.equal(integers(actual[key]), integers(tensor)), key
