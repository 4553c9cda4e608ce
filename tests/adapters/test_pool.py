"""AdapterPool: rows get what their adapter alone computes, however the slots change; what it refuses."""

from __future__ import annotations

import copy
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from support.checkpoint_files import Change, edit_config, edit_tensors, put
from support.models import llama, refused, token_ids
from support.pools import NAMES, expected_rows, pool_of, slot_bytes, write_adapters
from torch import Tensor, nn

from lora_ext import AdapterPool, LoraConfig, inject, load_adapter, set_adapter
from lora_ext.adapters import adapter_names, delete_adapter, merge_and_unload, rename_adapter, unload


def test_rows_are_those_of_the_adapter_alone(base, root):
    x, batches = torch.randn(4, 6), [NAMES[:3] + ["__base__"], ["n3", "n0", "n4", "n3"], ["n7", "n6", "n7", "n5"]]
    expected = [expected_rows(base, root, names, x) for names in batches]
    model = copy.deepcopy(base)
    pool = pool_of(model, root)
    assert torch.equal(model(x), base(x)) and type(model.head).__name__ == "LoraLinear"
    for _ in range(2):
        for names, rows in zip(batches, expected, strict=True):
            torch.testing.assert_close(model(x, adapter_names=names), rows)
    stats = pool.stats()
    assert (stats.slots, stats.slot_bytes, stats.resident, stats.in_use) == (3, slot_bytes(), 3, 0)
    # n0, n1, n2; n3 and n4 evict n1 and n2; then n7, n6, n5 ... the second time as well
    assert stats.loads == 2 * 8 and stats.evictions == 2 * 8 - 3 and stats.hits == 2
    assert sorted(pool.resident()) == ["n5", "n6", "n7"] and pool.names() == NAMES


def test_the_least_recently_used_is_evicted(base, root):
    model, x = copy.deepcopy(base), torch.randn(1, 6)
    pool = pool_of(model, root)
    for name in ("n0", "n1", "n2", "n0", "n3"):
        model(x, adapter_names=[name])
    assert pool.resident() == ["n2", "n0", "n3"]
    pool.acquire(["n2"])  # a call that does not end
    for name in ("n4", "n5"):
        model(x, adapter_names=[name])
    assert pool.resident() == ["n2", "n4", "n5"] and pool.stats().in_use == 1
    pool.release(["n2"])
    model(x, adapter_names=["n6"])
    assert "n2" not in pool.resident()


def test_generate_and_adapters_of_the_model(tmp_path):
    base, ids = llama().eval(), token_ids(4)
    targets = ["q_proj", "v_proj", "down_proj"]
    write_adapters(base, tmp_path, ["x", "y", "z"], targets, use_rslora=True)
    names = ["y", "x", "own", "__base__"]
    options = {"max_new_tokens": 4, "num_beams": 2, "pad_token_id": 0, "attention_mask": torch.ones_like(ids)}
    model = inject(copy.deepcopy(base), LoraConfig(r=2, target_modules=["o_proj", "q_proj"], init_lora_weights=False))
    own = copy.deepcopy(model).eval().generate(ids, **options)
    rename_adapter(model, "default", "own")
    pool = AdapterPool(model.eval(), tmp_path, target_modules=targets, r=4, max_bytes=1 << 20)
    tokens = model.generate(ids, adapter_names=names, **options)
    for i, name in enumerate(names):
        alone = copy.deepcopy(base)
        if name in "xyz":
            load_adapter(alone, tmp_path / name)
        want = own if name == "own" else alone.eval().generate(ids, **options)
        assert torch.equal(tokens[i], want[i]), name
    assert pool.stats().in_use == 0 and pool.stats().loads == 2
    delete_adapter(set_adapter(model, []), "own")  # the pool's layers stay
    assert torch.equal(
        model.generate(ids[:2], adapter_names=names[:2], **options | {"attention_mask": None}), tokens[:2]
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_16_bit_models_and_factors(base, root, dtype):
    model, x = copy.deepcopy(base).to(torch.bfloat16), torch.randn(4, 6, dtype=torch.bfloat16)
    expected = expected_rows(model, root, NAMES[:4], x)
    pool = pool_of(model, root, 6, dtype=dtype)
    torch.testing.assert_close(model(x, adapter_names=NAMES[:4]), expected, rtol=0.05, atol=0.05)
    assert pool.stats().slots == (6 if dtype is torch.float32 else 11)


@pytest.mark.parametrize(
    ("name", "options", "lacks"),
    [
        ("n0", {"target_modules": "all-linear"}, ()),
        ("n0", {"target_modules": r"(.*\.)?(up|head)"}, ()),
        ("n2", {"target_modules": ["head", "up"], "exclude_modules": ["head"]}, ()),
        ("n2", {"layers_to_transform": [0], "layers_pattern": "blocks"}, ("blocks.1",)),
    ],
)
def test_a_config_may_name_the_layers_in_any_way(base, root, name, options, lacks):
    x = torch.randn(1, 6)
    expected = expected_rows(base, root, [name], x)
    edit_tensors(root / name, lambda tensors: {k: tensors[k] for k in tensors if not any(part in k for part in lacks)})
    edit_config(root / name, **options)
    expected = expected_rows(base, root, [name], x) if lacks else expected
    model = copy.deepcopy(base)
    pool_of(model, root)
    torch.testing.assert_close(model(x, adapter_names=[name]), expected)


def test_directories_that_move(base, root, tmp_path, monkeypatch):
    """Paths belong to the working directory of the call that gave them. What a slot holds outlives its directory."""
    x, model = torch.randn(2, 6), copy.deepcopy(base)
    expected = expected_rows(base, root, ["n3", "n0"], x)
    monkeypatch.chdir(tmp_path)
    pool = pool_of(model, Path("pool"))
    monkeypatch.chdir("/")
    (root / "link").symlink_to(root / "n3")
    torch.testing.assert_close(model(x, adapter_names=["link", "n0"]), expected)
    shutil.rmtree(root)
    torch.testing.assert_close(model(x, adapter_names=["link", "n0"]), expected)
    pool.evict("n0")
    with pytest.raises(KeyError, match=r"there is no adapter 'n0'; the adapters are \[\]"):
        model(x, adapter_names=["link", "n0"])


@pytest.mark.parametrize(
    ("on_disk", "slots"),
    [
        (300, 100),
        pytest.param(2_000, 200, marks=pytest.mark.full),
        pytest.param(10_000, 1_000, marks=pytest.mark.slow),
    ],
)
@torch.no_grad()
def test_hundreds_of_adapters(base, root, on_disk, slots):
    """Most directories have links to the files of a few; the storage is allocated once."""
    x, model = torch.randn(1, 6), copy.deepcopy(base)
    expected = expected_rows(base, root, NAMES, x.expand(len(NAMES), -1))
    names = [f"tenant-{i}" for i in range(on_disk)]
    for i, name in enumerate(names):
        (root / name).mkdir()
        for file in (root / NAMES[i % 8]).iterdir():
            os.link(file, root / name / file.name)
    pool = pool_of(model, root, slots)
    storage = [held.lora_A.data_ptr() for held in pool._layers.values()]
    numbers = torch.randperm(on_disk)[: slots + 100].tolist()
    for batch in (numbers[i : i + 100] for i in range(0, len(numbers), 100)):
        y = model(x.expand(100, -1), adapter_names=[names[i] for i in batch])
        torch.testing.assert_close(y, torch.stack([expected[i % 8] for i in batch]))
    stats = pool.stats()
    assert len(pool.names()) == on_disk + 8 and (stats.slots, stats.resident) == (slots, slots)
    assert stats.loads == slots + 100 and stats.evictions == 100
    assert [held.lora_A.data_ptr() for held in pool._layers.values()] == storage


# --- the model around it ----------------------------------------------------------------------------------------------


def test_closing_makes_the_model_plain_again(base, root):
    model, x = copy.deepcopy(base), torch.randn(2, 6)
    with pool_of(model, root):
        model(x, adapter_names=["n0", "n1"])
    assert type(model.head) is nn.Linear and not model._forward_pre_hooks and not adapter_names(model)
    assert model.state_dict().keys() == base.state_dict().keys()
    again = pool_of(model, root)
    inject(model, LoraConfig(r=2, target_modules=["up"]), "own")
    again.close()
    assert adapter_names(model) == ["own"] and type(model.head) is nn.Linear
    third = pool_of(model, root)
    with refused(model, RuntimeError, "merge_and_unload: the model has an AdapterPool", "call pool.close() first"):
        merge_and_unload(model)
    unload(model)
    third.close()
    assert torch.equal(model(x), base(x))


def test_saving_a_model_with_a_pool(tmp_path):
    base, ids = llama().eval(), token_ids(2)
    write_adapters(base, tmp_path / "pool", ["a"], ["q_proj"])
    model = copy.deepcopy(base)
    AdapterPool(model, tmp_path / "pool", target_modules=["q_proj"], r=4, max_bytes=1 << 16)
    model.save_pretrained(tmp_path / "saved")
    again = type(base).from_pretrained(tmp_path / "saved").eval()
    assert torch.equal(again(ids).logits, base(ids).logits)


def test_a_model_that_accelerate_offloads(base, root):
    x = torch.randn(3, 6)
    expected = expected_rows(base, root, ["n0", "n1"], x)
    model = copy.deepcopy(base)
    cpu_offload(model, execution_device="cpu")
    with pool_of(model, root):
        torch.testing.assert_close(model(x[:2], adapter_names=["n0", "n1"]), expected)
    assert model.head.weight.is_meta


# --- what it refuses --------------------------------------------------------------------------------------------------


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


def wider(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: torch.cat([t] * 5, 0 if "lora_A" in key else 1) for key, t in tensors.items()}


# By name: the changed tensors of a copy of n0, the changed values of its config, and words of the error.
BROKEN: dict[str, tuple[Change, dict[str, Any], str]] = {
    "rank": (wider, {"r": 5}, "rank of head: 5, above the pool's 4"),
    "another base": (
        lambda tensors: {key.replace("head", "classifier"): t for key, t in tensors.items()},
        *({}, f"unexpected key: {A.replace('head', 'classifier')}"),
    ),
    "another size": (put(A, lambda t: t.repeat(1, 2)), {}, f"shape of {A}: [1, 12] in the file, [1, 6] in the model"),
    "half": (lambda tensors: {key: t for key, t in tensors.items() if key != A}, {}, f"missing key: {A}"),
    "layer": (lambda tensors: {key: t for key, t in tensors.items() if key not in (A, B)}, {}, f"missing key: {A}"),
    "not named": (dict, {"target_modules": ["up"]}, f"unexpected key: {A}"),
    "integers": (put(A, lambda t: t.to(torch.int64)), {}, f"dtype of {A}: torch.int64"),
    **{
        option: (dict, {option: value}, f"{option}: a pool holds low-rank updates of linear layers")
        for option, value in {
            "modules_to_save": ["head"],
            "trainable_token_indices": [1],
            "target_parameters": ["head.weight"],
            "lora_bias": True,
            "use_dora": True,
            "bias": "lora_only",
        }.items()
    },
}


@pytest.mark.parametrize("how", BROKEN)
def test_adapters_that_do_not_fit(base, root, how):
    change, options, text = BROKEN[how]
    shutil.copytree(root / "n0", root / "broken")
    edit_tensors(root / "broken", change)
    edit_config(root / "broken", **options)
    model, x = copy.deepcopy(base), torch.randn(3, 6)
    pool = pool_of(model, root, 4)
    expected = model(x, adapter_names=["n0", "n1", "n1"])
    with refused(model, ValueError, "AdapterPool: ", text):
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
