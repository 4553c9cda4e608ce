"""Saving and loading sharded models: FSDP2, gathered states, split layers, and parameters that ZeRO-3 empties."""

from __future__ import annotations

import copy
import sys
import warnings

import pytest
import torch
import torch.distributed
from safetensors.torch import load_file
from support.models import bert, llama, snapshot, token_ids
from support.partitioned import partition
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

from lora_ext import LoraConfig, inject, load_adapter, merge, save_adapter, unmerge
from lora_ext.adapters import add_weighted_adapter, hotswap_adapter, prepare_hotswap, unload
from lora_ext.methods import apply_method, new_method, save_method

pytestmark = [pytest.mark.cpu_only("one process with gloo"), pytest.mark.usefixtures("one_process")]
WHOLE = StateDictOptions(full_state_dict=True)


def test_a_gathered_state_is_saved(tmp_path):
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
    assert snapshot(tmp_path / "sharded").items() <= snapshot(tmp_path / "adapter").items()


@pytest.mark.parametrize("is_main_process", [True, False])
def test_all_processes_gather_a_split_model_and_one_writes(is_main_process, tmp_path, monkeypatch):
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
def test_a_methods_files_have_the_values_of_a_given_state(name, is_sharded, tmp_path):
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


def test_a_model_wrapped_by_fsdp1_is_refused(tmp_path):
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


# --- parameters that DeepSpeed's ZeRO-3 empties between calls ---------------------------------------------------------


LORA = {"r": 2, "init_lora_weights": False}
CONFIGS = [
    {"target_modules": ["q_proj", "embed_tokens"]},
    {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    {"target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [3, 5]}},
]


@pytest.mark.parametrize(
    ("config", "embeddings"), [*((config, "auto") for config in CONFIGS), ({"target_modules": ["q_proj"]}, True)]
)
def test_saving_writes_whole_values(config, embeddings, tmp_path, monkeypatch):
    model = inject(llama(), LoraConfig(**LORA, **config))
    save_adapter(model, tmp_path / "whole", save_embedding_layers=embeddings)
    partition(model, monkeypatch, engine=True)
    save_adapter(model, tmp_path / "partitioned", save_embedding_layers=embeddings)
    assert snapshot(tmp_path / "whole") == snapshot(tmp_path / "partitioned")
    assert not any(parameter.numel() for parameter in model.parameters())


def test_what_the_caller_gathered_is_not_gathered_again(tmp_path, monkeypatch):
    """One rank may then save alone: nothing waits for the others."""
    model = inject(llama(), LoraConfig(**LORA, target_modules=["q_proj"]))
    save_adapter(model, tmp_path / "whole")
    partition(model, monkeypatch, engine=True)
    import deepspeed

    with deepspeed.zero.GatheredParameters(model.parameters()):
        torch.distributed.destroy_process_group()
        save_adapter(model, tmp_path / "partitioned")
        torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    assert snapshot(tmp_path / "whole") == snapshot(tmp_path / "partitioned")


def test_save_pretrained_and_save_method_write_no_empty_tensors(tmp_path, monkeypatch):
    model = inject(llama(), LoraConfig(**LORA, target_modules=["q_proj"]))
    state = {key: value.clone() for key, value in model.state_dict().items()}
    save_adapter(model, tmp_path / "whole")
    partition(model, monkeypatch, engine=True)
    with pytest.raises(ValueError, match="the model is sharded .*call lora_ext.save_adapter on all"):
        model.save_pretrained(tmp_path / "refused")
    assert not (tmp_path / "refused").exists()
    monkeypatch.delitem(sys.modules, "deepspeed")  # nothing is to be gathered, and accelerate looks for the package
    model.save_pretrained(tmp_path / "given", state_dict=state)  # what Trainer gathers
    assert snapshot(tmp_path / "whole").items() <= snapshot(tmp_path / "given").items()

    tuned = apply_method(bert(), new_method("bitfit"))
    partition(tuned, monkeypatch, engine=True)
    with pytest.raises(ValueError, match="save_method: the model is sharded; .* with DeepSpeed"):
        save_method(tuned, tmp_path / "method")
    assert not (tmp_path / "method").exists()


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda model, _: inject(model, LoraConfig(r=2, target_modules=["v_proj"]), "b"), "inject before deepspeed"),
        (lambda model, path: load_adapter(model, path), "load before deepspeed"),
        (lambda model, path: load_adapter(model, path, adapter_name="b"), "load before deepspeed"),
        (lambda model, _: merge(model), "merge in one process, or on disk"),
        (lambda model, _: unmerge(model), "merge in one process, or on disk"),
        (lambda model, _: unload(model), "disable_adapters"),
        (lambda model, _: add_weighted_adapter(model, ["default"], [0.5], "b", "cat"), "before you shard it"),
        (lambda model, _: prepare_hotswap(model, 4), "before you shard it"),
        (lambda model, path: hotswap_adapter(model, path), "load_adapter replaces"),
    ],
)
def test_what_a_partitioned_model_refuses(call, words, tmp_path, monkeypatch):
    model = inject(llama(), LoraConfig(**LORA, target_modules=["q_proj"]))
    save_adapter(model, tmp_path)
    partition(model, monkeypatch, engine=True)
    modules = list(model.modules())
    with pytest.raises(ValueError, match=f"ZeRO-3 has partitioned .*{words}"):
        call(model, tmp_path)
    assert modules == list(model.modules())


@pytest.mark.parametrize("config", [*CONFIGS, {"target_parameters": ["q_proj.weight"]}], ids=str)
def test_a_model_that_is_partitioned_as_it_is_loaded_takes_adapters(config, tmp_path, monkeypatch):
    """``from_pretrained`` does so while TrainingArguments(deepspeed=...) exist; the new parameters are whole."""
    base = llama()
    torch.manual_seed(2)
    save_adapter(inject(copy.deepcopy(base), LoraConfig(**LORA, **config)), tmp_path / "whole")
    partition(base, monkeypatch)
    torch.manual_seed(2)
    save_adapter(inject(base, LoraConfig(**LORA, **config)), tmp_path / "injected")
    assert all(parameter.numel() for parameter in base.parameters() if parameter.requires_grad)
    assert snapshot(tmp_path / "whole") == snapshot(tmp_path / "injected")


def test_accelerated_layers_of_peft_do_not_merge_empty_weights(monkeypatch):
    peft = pytest.importorskip("peft")
    from lora_ext.integrations.peft import accelerate, report

    model = accelerate(peft.get_peft_model(llama(), peft.LoraConfig(r=2, target_modules=["q_proj"])))
    partition(model, monkeypatch, engine=True)
    with pytest.raises(RuntimeError, match="ZeRO-3 has partitioned the weight"):
        model.merge_adapter()
    assert "ZeRO-3" in str(report(model))


@pytest.mark.parametrize("name", ["bitfit", "prefix-embed", "prefix-layer", "adapter-h", "adapter-l", "head-only"])
def test_methods_are_of_the_sizes_of_whole_parameters(name, monkeypatch):
    def sizes(model):
        parameters = model.named_parameters()
        return {path: tuple(getattr(p, "ds_shape", p.shape)) for path, p in parameters if p.requires_grad}

    want = sizes(apply_method(bert(), new_method(name)))
    model = bert()
    partition(model, monkeypatch)
    assert sizes(apply_method(model, new_method(name))) == want
    managed = bert()
    partition(managed, monkeypatch, engine=True)
    with pytest.raises(ValueError, match="apply_method: DeepSpeed's ZeRO-3 has partitioned the model"):
        apply_method(managed, new_method(name))


def test_a_file_with_base_layers_is_refused(tmp_path, monkeypatch):
    model, base = inject(llama(), LoraConfig(**LORA, target_modules=["q_proj"])), llama()
    save_adapter(model, tmp_path, save_embedding_layers=True)
    partition(base, monkeypatch)
    with pytest.raises(ValueError, match="embed_tokens.weight: DeepSpeed's ZeRO-3 has partitioned it"):
        load_adapter(base, tmp_path)
