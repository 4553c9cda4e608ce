"""Tests that AdapterPool refuses unknown names, files that do not fit, too few slots and bad arguments."""

from __future__ import annotations

import copy
import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.models import refused
from support.pools import NAMES, TARGETS, pool_of
from torch import nn

from lora_ext import AdapterPool, LoraConfig, inject, set_adapter
from lora_ext.adapters import delete_adapter


def test_unknown_names(base, root, tmp_path):
    shutil.copytree(root / "n0", tmp_path / "outside")
    model, x = copy.deepcopy(base), torch.randn(1, 6)
    pool_of(model, root)
    for name in ("n9", "../outside", str(tmp_path / "outside"), "", ".", "n0/", "n0\0"):
        with refused(model, KeyError, "Net: there is no adapter ", "the adapters are ['n0', 'n1'"):
            model(x, adapter_names=[name])
    inject(model, LoraConfig(r=2, target_modules=["head"]))
    for change in (set_adapter, delete_adapter):
        with refused(model, KeyError, f"{change.__name__}: there is no adapter 'n1'; the adapters are ['default']"):
            change(model, "n1")


A, B = "base_model.model.head.lora_A.weight", "base_model.model.head.lora_B.weight"
OTHER_PARTS = {
    "modules_to_save": ["head"],
    "trainable_token_indices": [1],
    "target_parameters": ["head.weight"],
    "lora_bias": True,
    "use_dora": True,
    "bias": "lora_only",
}
BROKEN = {
    "truncated": "adapter_model.safetensors",
    "no config": "adapter_config.json",
    "rank": "rank of head: 5, above the pool's 4",
    "another base": f"unexpected key: {A.replace('head', 'classifier')}",
    "another size": f"shape of {A}: [1, 12] in the file, [1, 6] in the model",
    "half": f"missing key: {A}",
    "layer": f"missing key: {A}",
    "not named": f"unexpected key: {A}",
    "integers": f"dtype of {A}: torch.int64",
    **{option: f"{option}: a pool holds low-rank updates of linear layers" for option in OTHER_PARTS},
}


def broken(root: Path, how: str) -> None:
    """Makes a copy of n0 that does not fit the pool."""
    path = root / "broken"
    shutil.copytree(root / "n0", path)
    weights, config = path / "adapter_model.safetensors", path / "adapter_config.json"
    tensors, values = load_file(weights), json.loads(config.read_text())
    if how == "rank":
        tensors = {k: torch.cat([t] * 5, dim=0 if "lora_A" in k else 1) for k, t in tensors.items()}
        values["r"] = 5
    elif how == "another base":
        tensors = {k.replace("head", "classifier"): t for k, t in tensors.items()}
    elif how == "another size":
        tensors[A] = tensors[A].repeat(1, 2)
    elif how in ("half", "layer"):
        tensors = {k: t for k, t in tensors.items() if k != A and (k != B or how == "half")}
    elif how == "not named":
        values["target_modules"] = ["up"]
    elif how == "integers":
        tensors[A] = tensors[A].to(torch.int64)
    elif how in OTHER_PARTS:
        values[how] = OTHER_PARTS[how]
    save_file({k: t.contiguous() for k, t in tensors.items()}, weights)
    config.write_text("{" if how == "no config" else json.dumps(values))
    if how == "truncated":
        weights.write_bytes(weights.read_bytes()[:-9])


@pytest.mark.parametrize("how", BROKEN)
def test_adapters_that_do_not_fit(base, root, how):
    broken(root, how)
    model, x = copy.deepcopy(base), torch.randn(3, 6)
    pool = pool_of(model, root, 4)
    expected = model(x, adapter_names=["n0", "n1", "n1"])
    with refused(model, ValueError, "AdapterPool: ", BROKEN[how]):
        model(x, adapter_names=["n0", "broken", "n2"])
    assert model._lora_adapters.active.running.choice is None and pool.stats().in_use == 0
    assert sorted(pool.resident()) == ["n0", "n1"]
    assert torch.equal(model(x, adapter_names=["n0", "n1", "n1"]), expected)
    shutil.rmtree(root / "broken")
    shutil.copytree(root / "n0", root / "broken")
    assert torch.equal(model(x, adapter_names=["broken", "n1", "n1"]), expected)


def test_too_few_slots(base, root):
    model, x = copy.deepcopy(base), torch.randn(4, 6)
    pool = pool_of(model, root)
    with refused(model, RuntimeError, "4 adapters are wanted at once", "use 0 of 3 slots; raise max_bytes"):
        model(x, adapter_names=NAMES[:4])
    slots = pool.acquire(["n0", "n1"])  # a call that does not end
    with pytest.raises(RuntimeError, match="'n2', 'n3'.*running calls use 2 of 3 slots"):
        model(x, adapter_names=["n2", "n3", "n2", "n3"])
    with pytest.raises(RuntimeError, match="'n1' is used by a running call"):
        pool.evict("n3", "n1")
    with pytest.raises(RuntimeError, match="running calls use the pool"):
        pool.close()
    pool.release(list(slots))
    assert pool.stats().in_use == 0
    model(x, adapter_names=["n2", "n3", "n2", "n3"])


BAD = [
    ({"max_bytes": 100}, ValueError, "AdapterPool: max_bytes is 100, but one slot of rank 4 takes"),
    ({"r": 0}, ValueError, "r is 0"),
    ({"target_modules": ["nothing"]}, ValueError, "nothing"),
    ({"target_modules": ["norm"]}, TypeError, "norm"),
    ({"host_bytes": 1}, TypeError, "unexpected keyword argument 'host_bytes'"),
    ({"modules_to_save": ["head"]}, TypeError, "unexpected keyword argument 'modules_to_save'"),
    ({"directory": "nowhere"}, ValueError, "AdapterPool: directory is 'nowhere', which is not a directory"),
]


@pytest.mark.parametrize(("options", "error", "text"), BAD)
def test_bad_arguments(base, root, options, error, text):
    with refused(base, error, text):
        AdapterPool(base, **{"directory": root, "target_modules": TARGETS, "r": 4, "max_bytes": 1 << 20} | options)


def test_other_layers_second_pools_and_training_are_refused(base, root):
    other = nn.Sequential(nn.Embedding(4, 4), nn.Linear(4, 4))
    with refused(other, TypeError, "a pool holds adapters of linear layers", "0 (LoraEmbedding)"):
        AdapterPool(other, root, target_modules=["0", "1"], r=2, max_bytes=1 << 20)
    model, x = copy.deepcopy(base), torch.randn(1, 6)
    pool = pool_of(model, root)
    with refused(model, ValueError, "AdapterPool: the model has a pool already; close that first"):
        pool_of(model, root)
    for other in {"use_dora": True}, {"enable_lora": {"up": (True, False)}}:
        with refused(model, ValueError, "has adapters (those of an AdapterPool) in a LoraLinear", "pool.close()"):
            inject(model, LoraConfig(r=2, target_modules=["up"], **other))
    model.train()
    with refused(model, ValueError, "'n0' is in a pool, whose adapters do not train; call model.eval()"):
        model(x.repeat(2, 1), adapter_names=["n0", "n0"])
    for fails in (pickle.dumps, copy.deepcopy, lambda model: pickle.dumps(pool)):
        with pytest.raises(TypeError, match="close()"):
            fails(model)
