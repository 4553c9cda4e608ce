"""FSDP2 and torch.distributed.checkpoint know the keys of injected models, and gathered states are saved."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
import torch.distributed
from safetensors.torch import load_file
from support.models import bert, llama, token_ids
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

from lora_ext import LoraConfig, inject, load_adapter, merge, save_adapter
from lora_ext.methods import apply_method, new_method, save_method

pytestmark = pytest.mark.cpu_only("one process with gloo")
WHOLE = StateDictOptions(full_state_dict=True)


@pytest.fixture
def one_process(tmp_path):
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_a_gathered_state_is_saved(one_process, tmp_path):
    base, ids = llama().eval(), token_ids()
    model = inject(copy.deepcopy(base), LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)).eval()
    expected, state = model(ids).logits, {key: value.clone() for key, value in model.state_dict().items()}
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    gathered = get_model_state_dict(model, options=WHOLE)
    assert gathered.keys() == state.keys() and all(torch.equal(gathered[key], value) for key, value in state.items())
    set_model_state_dict(model, dict(gathered), options=WHOLE)

    model.save_pretrained(tmp_path / "adapter", state_dict=get_model_state_dict(model, options=WHOLE))
    again = load_adapter(copy.deepcopy(base), tmp_path / "adapter").eval()
    assert torch.equal(again(ids).logits, expected)
    assert torch.equal(model(ids).logits, expected)
    with pytest.raises(ValueError, match="is sharded .*save_adapter .*state_dict=accelerator"):
        model.save_pretrained(tmp_path / "sharded")
    save_adapter(model, tmp_path / "sharded")
    for file in (tmp_path / "sharded").iterdir():
        assert file.read_bytes() == (tmp_path / "adapter" / file.name).read_bytes()


@pytest.mark.parametrize("is_main_process", [True, False])
def test_all_processes_gather_a_split_model_and_one_writes(is_main_process, one_process, tmp_path, monkeypatch):
    """Transformers calls it on all ranks of a model with tensor parallelism; one alone would wait for the others."""
    model = llama()
    mesh = init_device_mesh("cpu", (1,))
    parallelize_module(model, mesh, {"model.layers.*.self_attn.q_proj": ColwiseParallel()})
    inject(model, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    gathered, whole = [], DTensor.full_tensor
    monkeypatch.setattr(DTensor, "full_tensor", lambda tensor: gathered.append(tensor) or whole(tensor))
    model.save_pretrained(tmp_path / "saved", is_main_process=is_main_process)
    assert gathered and (tmp_path / "saved").exists() == is_main_process
    if is_main_process:
        state = load_file(tmp_path / "saved" / "model.safetensors")
        key = "model.layers.0.self_attn.q_proj.adapters.default.lora_B"
        assert torch.equal(state[key], whole(model.state_dict()[key]))
        load_adapter(llama(), tmp_path / "saved")


@pytest.mark.parametrize("is_sharded", [False, True])
@pytest.mark.parametrize("name", ["prefix-layer", "lora+bitfit"])
def test_a_methods_files_have_the_values_of_a_given_state(name, is_sharded, one_process, tmp_path):
    model = apply_method(bert(), new_method(name, **({"target_modules": ["query"]} if "lora" in name else {})))
    if is_sharded:
        fully_shard(model)
        with pytest.raises(ValueError, match="save_method: the model is sharded; gather"):
            save_method(model, tmp_path / "method")
    gathered = {key: value + 1 for key, value in get_model_state_dict(model, options=WHOLE).items()}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model.save_pretrained(tmp_path / "saved", state_dict=gathered)
    assert not [w for w in caught if "does not belong" in str(w.message)]
    file, whole = (load_file(tmp_path / "saved" / f"{name}.safetensors") for name in ("method", "model"))
    plain = {key.replace(".base_layer.", "."): key for key in gathered}  # the method's keys are the base model's
    assert len(file) > 3
    for key, tensor in file.items():
        assert torch.equal(tensor, gathered[plain[key]]) and torch.equal(tensor, whole[plain[key]])


def test_a_model_wrapped_by_fsdp1_is_refused(one_process, tmp_path):
    model = inject(llama(), LoraConfig(r=2, target_modules=["q_proj"]))
    cpu = torch.device("cpu")
    keys = set(model.state_dict())
    model.model.layers[0] = FullyShardedDataParallel(model.model.layers[0], use_orig_params=True, device_id=cpu)
    wrapped = FullyShardedDataParallel(model, use_orig_params=True, device_id=cpu)
    assert set(wrapped.state_dict()) == keys
    with pytest.raises(ValueError, match="wrapped by FullyShardedDataParallel .*use fully_shard"):
        model.save_pretrained(tmp_path / "adapter", state_dict=wrapped.state_dict())
    functions = {"save_adapter": lambda model: save_adapter(model, tmp_path / "adapter"), "merge": merge}
    for caller, function in functions.items():
        with pytest.raises(ValueError, match=rf"^{caller}: parts .* FullyShardedDataParallel \(FSDP1\); use"):
            function(wrapped)
    assert not (tmp_path / "adapter").exists()
