"""AdapterFile: tensors read on demand, bad files, and the meaning of the keys in PEFT's files."""

from __future__ import annotations

import json
import os
import pickle
import random
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from support.checkpoint_files import EVERY_LAYER, EveryLayer, peft_adapter
from support.models import gpt2, llama

from lora_ext.checkpoints.contents import LowRankUpdate, read_contents
from lora_ext.checkpoints.layouts import assign_parameters
from lora_ext.files.adapter_file import AdapterFile, TensorFile

pytestmark = pytest.mark.cpu_only("is about files, which hold CPU tensors")


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    peft_adapter(EveryLayer(), tmp_path / "adapter", **EVERY_LAYER)
    return tmp_path / "adapter"


def change_config(directory: Path, **values) -> None:
    path = directory / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def change_tensors(directory: Path, change) -> None:
    path = directory / "adapter_model.safetensors"
    save_file(change(load_file(path)), path)


# --- tensors ----------------------------------------------------------------------------------------------------------


def test_open_describes_the_file_and_reads_tensors_on_demand(directory: Path):
    expected = load_file(directory / "adapter_model.safetensors")
    file = AdapterFile.open(directory)
    assert file.config["r"] == 2
    assert file.metadata == {"format": "pt"}
    assert sorted(file.keys()) == sorted(expected)
    for key, tensor in expected.items():
        assert key in file
        assert (file.shape(key), file.dtype(key)) == (tuple(tensor.shape), tensor.dtype)
        assert torch.equal(file.tensor(key), tensor)
    kept = file.tensor(key)
    file.release()
    assert torch.equal(kept, expected[key])
    assert torch.equal(file.tensor(key), expected[key])
    with pytest.raises(KeyError, match="has no tensor 'nothing'"):
        file.tensor("nothing")


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_is_read_only_when_allowed(directory: Path, zipped: bool):
    expected = load_file(directory / "adapter_model.safetensors")
    torch.save(expected, directory / "adapter_model.bin", _use_new_zipfile_serialization=zipped)
    (directory / "adapter_model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"adapter_model\.bin is there: save it again as safetensors"):
        AdapterFile.open(directory)
    file = AdapterFile.open(directory, allow_pickle=True)
    assert sorted(file.keys()) == sorted(expected)
    for key, tensor in expected.items():
        assert (file.shape(key), file.dtype(key)) == (tuple(tensor.shape), tensor.dtype)
        assert torch.equal(file.tensor(key), tensor)


def test_a_pickle_that_runs_code_is_refused(directory: Path):
    class Evil:
        def __reduce__(self):
            return (Path.touch, (directory / "ran",))

    (directory / "adapter_model.safetensors").unlink()
    for content in (pickle.dumps(Evil(), protocol=2), b"", b"PK\x03\x04 not a zip"):
        (directory / "adapter_model.bin").write_bytes(content)
        with pytest.raises(ValueError, match=r"adapter_model\.bin is corrupted, or holds more than tensors"):
            AdapterFile.open(directory, allow_pickle=True)
    torch.save([torch.ones(1)], directory / "adapter_model.bin")
    with pytest.raises(ValueError, match="holds a list, want a dict of tensors"):
        AdapterFile.open(directory, allow_pickle=True)
    assert not (directory / "ran").exists()


def test_a_pickle_of_unsuitable_content_is_refused(directory: Path):
    (directory / "adapter_model.safetensors").unlink()
    contents = {
        "a dict with an entry int: Tensor": {1: torch.ones(1)},
        "a dict with an entry str: int": {"a": 1},
        "'a' is torch.sparse_coo on cpu, want a dense tensor": {"a": torch.eye(2).to_sparse()},
        "'a' is torch.strided on meta, want a dense tensor": {"a": torch.ones(1, device="meta")},
        "'a' is quantized, want a dense tensor": {"a": torch.quantize_per_tensor(torch.ones(2), 1.0, 0, torch.qint8)},
        "has a name with characters that cannot be printed": {"a\nb": torch.ones(1)},
        "has a name of 501 characters": {"x" * 501: torch.ones(1)},
    }
    for message, content in contents.items():
        torch.save(content, directory / "adapter_model.bin")
        with pytest.raises(ValueError, match=message):
            AdapterFile.open(directory, allow_pickle=True)


def test_a_replaced_file_does_not_change_the_tensors(directory: Path):
    """After release() the new file is refused, not read."""
    expected = load_file(directory / "adapter_model.safetensors")
    file = AdapterFile.open(directory, mapped=True)
    change_tensors(directory, lambda tensors: {key: tensor + 1 for key, tensor in tensors.items()})
    assert all(torch.equal(file.tensor(key), tensor) for key, tensor in expected.items())
    file.tensors._read = 1 << 30
    file.release()
    with pytest.raises(ValueError, match="was changed while it was read"):
        file.tensor(next(iter(expected)))


@pytest.mark.parametrize("how", ["shorter", "overwritten", "replaced"])
def test_a_file_that_is_not_mapped_and_changes(directory: Path, how: str):
    """Read as a mapping, a file that became shorter would kill the process."""
    path = directory / "adapter_model.safetensors"
    expected, descriptors = load_file(path), len(os.listdir("/proc/self/fd"))
    expected = {key: tensor.clone() for key, tensor in expected.items()}
    file = AdapterFile.open(directory)
    first, *others = file.keys()
    assert torch.equal(file.tensor(first), expected[first])
    if how == "replaced":
        change_tensors(directory, lambda tensors: {key: tensor + 1 for key, tensor in tensors.items()})
        assert all(torch.equal(file.tensor(key), expected[key]) for key in others)
    else:
        content = path.read_bytes()
        with open(path, "r+b") as written:
            if how == "shorter":
                written.truncate(8)
            else:
                written.write(content)
        os.utime(path, ns=(0, 0))  # clocks of file systems tick slowly
        for key in others:
            with pytest.raises(ValueError, match="adapter_model.safetensors was changed while it was read"):
                file.tensor(key)
    del file
    assert len(os.listdir("/proc/self/fd")) == descriptors


def test_missing_files(directory: Path, tmp_path: Path):
    with pytest.raises(FileNotFoundError, match=r"merge: .*none/adapter_config\.json is missing"):
        AdapterFile.open(tmp_path / "none", caller="merge")
    (directory / "adapter_model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"adapter_model\.safetensors is missing$"):
        AdapterFile.open(directory, allow_pickle=True)


# --- what the keys mean -----------------------------------------------------------------------------------------------


def test_the_keys_identify_every_layer_type(directory: Path):
    contents = read_contents(AdapterFile.open(directory))
    kinds = sorted((update.path, update.kind) for update in contents.updates)
    assert kinds == [
        ("attn", "attention"),
        ("attn.out_proj", "linear"),
        ("conv1d", "conv"),
        ("conv2d", "conv"),
        ("conv3d", "conv"),
        ("embed", "embedding"),
        ("experts", "parameter"),
        ("experts", "parameter"),
        ("lin", "linear"),
        ("single", "parameter"),
        ("square", "linear"),
    ]
    assert sorted(contents.replaced) == ["head.bias", "head.weight"]
    named = [key for update in contents.updates for key in (update.lora_A, update.lora_B)]
    assert sorted([*named, *contents.replaced.values()]) == sorted(contents.file.keys())


def test_biases_tokens_and_copies_of_the_base(tmp_path: Path):
    peft_adapter(EveryLayer(), tmp_path / "a", target_modules=["lin", "conv1d"], lora_bias=True, bias="all")
    contents = read_contents(AdapterFile.open(tmp_path / "a"))
    assert all(update.lora_bias == update.lora_B.replace("weight", "bias") for update in contents.updates)
    assert {"lin.bias", "norm.bias", "attn.out_proj.bias"} <= contents.replaced.keys()

    peft_adapter(llama(), tmp_path / "b", target_modules=["lm_head"], trainable_token_indices={"embed_tokens": [3, 1]})
    contents = read_contents(AdapterFile.open(tmp_path / "b"))
    assert [(rows.path, rows.indices) for rows in contents.tokens] == [("model.embed_tokens", (3, 1))]
    peft_adapter(llama(), tmp_path / "c", target_modules=["lm_head"])
    assert list(read_contents(AdapterFile.open(tmp_path / "c")).replaced) == ["lm_head.weight"]


@pytest.mark.parametrize("use_rslora", [False, True])
def test_ranks_and_scalings_equal_those_of_peft(tmp_path: Path, use_rslora: bool):
    adapted = peft_adapter(
        llama(),
        tmp_path,
        target_modules="all-linear",
        use_rslora=use_rslora,
        rank_pattern={"q_proj": 4, "model.layers.1.mlp.(gate|down).*": 3, r"layers\.\d\.mlp\.up_proj": 5},
        alpha_pattern={"^model.layers.0.self_attn.k_proj": 7, "layers.1.self_attn.v_proj": 0.5},
    )
    updates = read_contents(AdapterFile.open(tmp_path)).updates
    assert len({update.r for update in updates}) == 4
    for update in updates:
        layer = adapted.base_model.model.get_submodule(update.path)
        assert (update.r, update.scaling) == (layer.r["default"], layer.scaling["default"]), update.path


def test_all_problems_with_the_keys_are_listed(directory: Path):
    prefix = "base_model.model."

    def change(tensors):
        del tensors[f"{prefix}lin.lora_B.weight"]
        tensors[f"{prefix}square.lora_magnitude_vector"] = torch.ones(8)
        tensors[f"{prefix}attn.lora_A.weight"] = torch.ones(3, 8)
        tensors[f"{prefix}embed.lora_embedding_A"] = torch.ones(11)
        return tensors

    change_tensors(directory, change)
    with pytest.raises(ValueError) as caught:
        read_contents(AdapterFile.open(directory))
    for problem in (
        f"missing key: the other half of {prefix}lin.lora_A.weight",
        "square has a lora_magnitude_vector, but the config's use_dora is False",
        "rank of attn: lora_A [3, 8] and lora_B [24, 2], but the config gives it r=2",
        "shapes of embed: lora_A [11], lora_B [8, 2]",
    ):
        assert problem in str(caught.value), str(caught.value)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"peft_type": "LOHA"}, "peft_type is 'LOHA', want 'LORA'"),
        ({"use_qalora": True}, "use_qalora=True not supported"),
        ({"use_dora": True, "target_parameters": None}, "use_dora is True"),
        ({"layer_replication": [[0, 2]]}, "layer_replication="),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights is 'pissa_niter_4'"),
        ({"r": 3}, "the config gives it r=3"),
        ({"r": "2"}, "r is '2' of type str"),
    ],
)
def test_unsupported_configs_are_refused(directory: Path, values: dict, message: str):
    change_config(directory, **values)
    with pytest.raises(ValueError, match=message):
        read_contents(AdapterFile.open(directory))


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False")
def test_conv1d_of_transformers(tmp_path: Path):
    model = peft.get_peft_model(gpt2(), peft.LoraConfig(r=2, target_modules=["c_attn", "wte"]))
    model.save_pretrained(tmp_path)
    kinds = {update.path: update.kind for update in read_contents(AdapterFile.open(tmp_path)).updates}
    assert kinds == {"transformer.wte": "embedding", "transformer.h.0.attn.c_attn": "linear"}


def test_shapes_assign_updates_to_parameters(tmp_path: Path):
    """Tells whether the assignment is unique without trying all: twelve equal shapes have 479,001,600."""
    rng = random.Random(0)
    for number in (1, 2, 3, 4, 5, 12):
        sizes = [rng.choice([2, 3, 4]) for _ in range(number)] if number < 12 else [2] * number
        tensors = {}
        for i, size in enumerate(sizes):
            tensors[f"{i}.lora_A.weight"], tensors[f"{i}.lora_B.weight"] = torch.zeros(1, size), torch.zeros(5, 1)
        save_file(tensors, tmp_path / "a.safetensors")
        file = TensorFile(tmp_path / "a.safetensors")
        updates = [LowRankUpdate("m", "parameter", *list(tensors)[2 * i : 2 * i + 2], 1, 1.0) for i in range(number)]
        shapes = {f"p{i}": (5, size) for i, size in enumerate(rng.sample(sizes, number))}
        found = assign_parameters(file, updates, shapes)
        for way in found:
            assert sorted(way.values()) == sorted(shapes)
            assert all(shapes[key] == (5, file.shape(update.lora_A)[1]) for update, key in way.items())
        assert len(found) == (1 if len(set(sizes)) == number else 2)
        assert found[0] != found[-1] or len(found) == 1
    assert assign_parameters(file, updates, {"p": (5, 2)}) == []
