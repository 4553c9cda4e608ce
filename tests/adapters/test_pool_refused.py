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
from lora_ext.adapters import delete_adapter, pool_names
from lora_ext.nn.rows.in_force import _current


def test_unknown_names(base, root, tmp_path, monkeypatch):
    shutil.copytree(root / "n0", tmp_path / "outside")
    model, x = copy.deepcopy(base), torch.randn(1, 6)
    pool_of(model, root)
    for name in ("n9", "../outside", str(tmp_path / "outside"), "", ".", "n0/", "n0\0"):
        with refused(model, KeyError, "Net: there is no adapter ", "the adapters are ['n0', 'n1'"):
            model(x, adapter_names=[name])
    with pytest.raises(KeyError, match=r"\(close to 'n0'\); the adapters are \['n0', 'n1'"):
        model(x, adapter_names=["n00"])
    with monkeypatch.context() as patched, refused(model, KeyError, "there is no adapter 'n00'; the adapters are"):
        patched.setattr(pool_names, "_COMPARED", 7)  # of thousands of names, the search would take longer than a call
        model(x, adapter_names=["n00"])
    inject(model, LoraConfig(r=2, target_modules=["head"]))
    for change in (set_adapter, delete_adapter):
        with refused(model, KeyError, f"{change.__name__}: 'n1' is an adapter of the model's AdapterPool"):
            change(model, "n1")
        with refused(model, KeyError, f"{change.__name__}: there is no adapter 'n9'; the adapters are ['default']"):
            change(model, "n9")


def broken(root: Path, how: str) -> Path:
    """A copy of n0 that does not fit the pool."""
    path = root / "broken"
    shutil.copytree(root / "n0", path)
    weights, config = path / "adapter_model.safetensors", path / "adapter_config.json"
    tensors, values = load_file(weights), json.loads(config.read_text())
    key = "base_model.model.head.lora_A.weight"
    if how == "truncated":
        weights.write_bytes(weights.read_bytes()[:-9])
        return path
    if how == "no config":
        config.write_text("{")
    elif how == "rank":
        tensors = {k: torch.cat([t] * 5, dim=0 if "lora_A" in k else 1) for k, t in tensors.items()}
        values["r"] = 5
    elif how == "another base":
        tensors = {k.replace("head", "classifier"): t for k, t in tensors.items()}
    elif how == "another size":
        tensors[key] = tensors[key].repeat(1, 2)
    elif how == "half":
        del tensors[key]
    elif how == "layer":
        del tensors[key], tensors["base_model.model.head.lora_B.weight"]
    elif how == "not named":
        values["target_modules"] = ["up"]
    elif how == "heads":
        values["modules_to_save"] = ["head"]
        tensors["base_model.model.head.weight"] = torch.zeros(3, 6)
    elif how == "dora":
        values["use_dora"] = True
    elif how == "integers":
        tensors[key] = tensors[key].to(torch.int64)
    save_file({k: t.contiguous() for k, t in tensors.items()}, weights)
    if how != "no config":
        config.write_text(json.dumps(values))
    return path


BROKEN = {
    "truncated": "adapter_model.safetensors",
    "no config": "adapter_config.json",
    "rank": "rank of head: 5, above the pool's 4",
    "another base": "unexpected key: base_model.model.classifier.lora_A.weight",
    "another size": "shape of base_model.model.head.lora_A.weight: [1, 12] in the file, [1, 6] in the pool",
    "half": "missing key: base_model.model.head.lora_A.weight",
    "layer": "missing key: base_model.model.head.lora_A.weight",
    "not named": "unexpected key: base_model.model.head.lora_A.weight, of a layer that the config does not name",
    "heads": "modules_to_save: the pool has no ['head']; make it with modules_to_save=['head']",
    "dora": "use_dora",
    "integers": "dtype of base_model.model.head.lora_A.weight: torch.int64",
}


@pytest.mark.parametrize("how", BROKEN)
def test_adapters_that_do_not_fit(base, root, how):
    broken(root, how)
    model, x = copy.deepcopy(base), torch.randn(3, 6)
    pool = pool_of(model, root, 4)
    expected = model(x, adapter_names=["n0", "n1", "n1"])
    with refused(model, ValueError, "AdapterPool: ", BROKEN[how]):
        model(x, adapter_names=["n0", "broken", "n2"])
    assert _current.get() is None and pool.stats().in_use == 0 and pool.stats().failures == 1
    assert sorted(pool.resident()) == ["n0", "n1", "n2"]  # those that fit were loaded
    assert torch.equal(model(x, adapter_names=["n0", "n1", "n1"]), expected)
    shutil.rmtree(root / "broken")
    shutil.copytree(root / "n0", root / "broken")
    assert torch.equal(model(x, adapter_names=["broken", "n1", "n1"]), expected)


@pytest.mark.parametrize("method", ["pin", "unpin", "evict"])
def test_names_in_a_list(base, root, method):
    pool = pool_of(copy.deepcopy(base), root)
    for names in ((["n0", "n1"],), ("n0", ["n1"]), ("n0", None)):
        with pytest.raises(TypeError, match=rf"{method}: names is .*, want a string"):
            getattr(pool, method)(*names)
    assert pool.resident() == []


def test_a_pool_without_room(base, root):
    model, x = copy.deepcopy(base), torch.randn(4, 6)
    pool = pool_of(model, root, timeout=0.05)
    with refused(model, RuntimeError, "4 adapters are wanted at once, but of the pool's 3 slots 0 are pinned"):
        model(x, adapter_names=NAMES[:4])
    pool.pin("n0", "n1")
    with refused(model, RuntimeError, "2 adapters are wanted at once", "2 are pinned ('n0', 'n1'); unpin some"):
        model(x, adapter_names=["n2", "n3", "n2", "n3"])
    model(x, adapter_names=["n0", "n1", "n2", "n2"])
    pool.pin("n2")
    with pytest.raises(RuntimeError, match="3 are pinned"):
        pool.pin("n3")
    with pytest.raises(RuntimeError, match="'n0' is pinned"):
        pool.evict("n3", "n0")
    with pytest.raises(KeyError, match=r"'n3' is not pinned; the pinned adapters are \['n0', 'n1', 'n2'\]"):
        pool.unpin("n0", "n3")
    pool.unpin("n0", "n1", "n2")
    slots = pool.acquire(["n0", "n1"])  # a call that does not end
    with pytest.raises(RuntimeError, match="running calls use the slots that 'n3' need"):
        model(x, adapter_names=["n2", "n3", "n2", "n3"])
    with pytest.raises(RuntimeError, match="'n1' is used by a running call"):
        pool.evict("n1")
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
    ({"timeout": -1.0}, ValueError, "AdapterPool: timeout is -1.0, want 0 or more"),
    ({"timeout": float("nan")}, ValueError, "AdapterPool: timeout is nan, want 0 or more"),
    ({"host_bytes": -1}, ValueError, "AdapterPool: host_bytes is -1, want 0 or more"),
    ({"max_bytes": "1GB"}, TypeError, "AdapterPool: max_bytes is '1GB' of type str, want an integer"),
    ({"directory": "nowhere"}, ValueError, "AdapterPool: directory is 'nowhere', which is not a directory"),
]


@pytest.mark.parametrize(("options", "error", "text"), BAD)
def test_bad_arguments(base, root, options, error, text):
    with refused(base, error, text):
        AdapterPool(base, **{"directory": root, "target_modules": TARGETS, "r": 4, "max_bytes": 1 << 20} | options)


def test_other_layers_second_pools_and_training_are_refused(base, root):
    other = nn.Sequential(nn.Embedding(4, 4), nn.Linear(4, 4))
    with refused(other, TypeError, "a pool holds adapters of linear layers", "0 (LoraEmbedding)"):
        AdapterPool(other, target_modules=["0", "1"], r=2, max_bytes=1 << 20)
    model, x = copy.deepcopy(base), torch.randn(1, 6)
    pool = pool_of(model, root)
    with refused(model, ValueError, "AdapterPool: the model has a pool already; close that first"):
        pool_of(model, root)
    with refused(model, ValueError, "(those of an AdapterPool), and none with it can join them", "pool.close()"):
        inject(model, LoraConfig(r=2, target_modules=["up"], use_dora=True))
    model.train()
    with refused(model, ValueError, "'n0' is in a pool, whose adapters do not train; call model.eval()"):
        model(x.repeat(2, 1), adapter_names=["n0", "n0"])
    for fails in (pickle.dumps, lambda model: pickle.dumps(pool)):
        with pytest.raises(TypeError, match="close()"):
            fails(model)
