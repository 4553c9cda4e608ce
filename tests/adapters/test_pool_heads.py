"""AdapterPool with modules that adapters train in full: each row gets the head of its adapter."""

from __future__ import annotations

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from support import tiny_classifier
from support.models import bert, llama, refused, roberta, shaken, snapshot, token_ids
from torch import nn
from transformers import AutoModelForSequenceClassification

from lora_ext import AdapterPool, LoraConfig, inject, load_adapter, save_adapter, set_adapter
from lora_ext.adapters import delete_adapter
from lora_ext.commands import main
from lora_ext.nn.rows.in_force import _current
from lora_ext.nn.trained import TrainedModule

TARGETS = ["query", "value"]
HEADS = {"bert": ["classifier"], "roberta": ["classifier"], "deep": ["pooler", "classifier"]}
MODELS = {"bert": bert, "roberta": roberta, "deep": bert}
NAMES = [f"n{i}" for i in range(6)]


def write_adapters(base: nn.Module, root: Path, heads: list[str], **options) -> None:
    """Saves random adapters of ranks 1 to 4; n2 and n5 train no head."""
    for i, name in enumerate(NAMES):
        mine = {"modules_to_save": heads} if i % 3 != 2 else {}
        config = {"r": 1 + i % 4, "lora_alpha": 3 + i, "target_modules": TARGETS, "init_lora_weights": False}
        save_adapter(shaken(inject(copy.deepcopy(base), LoraConfig(**config | mine | options))), root / name)


def expected_rows(base: nn.Module, root: Path, names: list[str], ids) -> torch.Tensor:
    alone = {n: base if n == "__base__" else load_adapter(copy.deepcopy(base), root / n).eval() for n in set(names)}
    with torch.no_grad():
        return torch.stack([alone[name](ids[i : i + 1]).logits[0] for i, name in enumerate(names)])


def pool_of(model: nn.Module, root: Path, heads: list[str], slots: int = 3, **options) -> AdapterPool:
    options = {"target_modules": TARGETS, "modules_to_save": heads, "r": 4, "max_bytes": 1 << 20} | options
    size = AdapterPool(copy.deepcopy(model), **options).stats().slot_bytes
    return AdapterPool(model, root, **options | {"max_bytes": slots * size})


@pytest.mark.parametrize("kind", HEADS)
def test_rows_get_the_heads_of_their_adapters(kind, tmp_path):
    base, ids, heads = MODELS[kind]().eval().requires_grad_(False), token_ids(4), HEADS[kind]
    write_adapters(base, tmp_path, heads)
    batches = [["n0", "n1", "__base__", "n2"], ["n3", "n0", "n4", "n3"], ["n5", "n5", "n5", "n5"], ["n1"] * 4]
    expected = [expected_rows(base, tmp_path, names, ids) for names in batches]
    model = copy.deepcopy(base)
    with pool_of(model, tmp_path, heads, host_bytes=1 << 16) as pool:
        assert torch.equal(model(ids).logits, base(ids).logits)
        for _ in range(2):
            for names, rows in zip(batches, expected, strict=True):
                torch.testing.assert_close(model(ids, adapter_names=names).logits, rows)
        assert pool.stats().slots == 3 and pool.stats().evictions > 5 and pool.stats().host == 6
    assert snapshot(model)["modules"].keys() == snapshot(base)["modules"].keys()
    assert torch.equal(model(ids).logits, base(ids).logits)


def test_adapters_of_peft_and_their_numbers(tmp_path):
    base, ids = bert().eval(), token_ids(4)
    for i, name in enumerate(("x", "y")):
        config = peft.LoraConfig(task_type="SEQ_CLS", r=2 + i, target_modules=TARGETS, init_lora_weights=False)
        shaken(peft.get_peft_model(copy.deepcopy(base), config)).save_pretrained(tmp_path / name)
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "x", "x")
    theirs.load_adapter(tmp_path / "y", "y")
    names = ["y", "__base__", "x", "y"]
    without = AdapterPool(copy.deepcopy(base), target_modules=TARGETS, r=4, max_bytes=1 << 20)
    pool = pool_of(base, tmp_path, ["classifier"])
    assert pool.stats().slot_bytes == without.stats().slot_bytes + 4 * (3 * 16 + 3)
    with torch.no_grad():
        expected = theirs.eval()(input_ids=ids, adapter_names=names).logits
        torch.testing.assert_close(base(ids, adapter_names=names).logits, expected)
    pool.close()


def test_next_to_adapters_of_the_model(tmp_path):
    base, ids = bert().eval(), token_ids(4)
    write_adapters(base, tmp_path, ["classifier"])
    model = shaken(inject(base, LoraConfig(r=2, target_modules=["key"], modules_to_save=["classifier"]), "own"))
    own = model(ids).logits
    expected = model(ids, adapter_names=["own"] * 4).logits
    torch.testing.assert_close(expected, own)
    pool = pool_of(model, tmp_path, ["classifier"], slots=2)
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, own)
        rows = model(ids, adapter_names=["n0", "own", "__base__", "n1"]).logits
        torch.testing.assert_close(rows[1], own[1])
        set_adapter(model, [])
        torch.testing.assert_close(rows[2], model(ids).logits[2])
        delete_adapter(model, "own")
        torch.testing.assert_close(model(ids, adapter_names=["n0", "n1", "n0", "n1"]).logits[0], rows[0])
    pool.close()
    assert type(model.classifier) is nn.Linear


def test_a_decoders_output_head(tmp_path):
    base, ids = llama().eval(), token_ids(3)
    for i, name in enumerate(("x", "y")):
        config = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"], init_lora_weights=False)
        torch.manual_seed(i)
        save_adapter(shaken(inject(copy.deepcopy(base), config), 0.5), tmp_path / name)
    names, options = ["y", "x", "__base__"], {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    alone = [load_adapter(copy.deepcopy(base), tmp_path / name).eval() for name in names[:2]]
    expected = torch.cat([m.generate(ids[i : i + 1], **options) for i, m in enumerate([*alone, base])])
    with AdapterPool(
        base, tmp_path, target_modules=["q_proj"], modules_to_save=["lm_head"], r=2, max_bytes=1 << 20
    ) as pool:
        assert torch.equal(base.generate(ids, adapter_names=names, **options), expected)
        assert pool.stats().in_use == 0


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
def test_the_base_layer_in_a_file_of_peft_is_refused_with_the_remedy(tmp_path):
    base, ids = llama().eval(), token_ids(2)
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "lm_head"], init_lora_weights=False)
    theirs = peft.get_peft_model(copy.deepcopy(base), config).eval()
    theirs.save_pretrained(tmp_path / "x")
    pool = AdapterPool(copy.deepcopy(base), tmp_path, target_modules=["q_proj", "lm_head"], r=2, max_bytes=1 << 20)
    text = r"unexpected key: base_model.model.lm_head.base_layer.weight .*save_embedding_layers=False"
    with pytest.raises(ValueError, match=text):
        pool.prefetch("x")[0].result()
    save_adapter(load_adapter(copy.deepcopy(base), tmp_path / "x"), tmp_path / "x", save_embedding_layers=False)
    model = copy.deepcopy(base)
    AdapterPool(model, tmp_path, target_modules=["q_proj", "lm_head"], r=2, max_bytes=1 << 20)
    torch.testing.assert_close(model(ids, adapter_names=["x", "x"]).logits, theirs(ids).logits)


def test_the_mode_of_the_model_is_that_of_the_heads(tmp_path):
    base, ids = roberta(), token_ids(2)
    base.classifier.dropout = nn.Dropout(0.5)
    write_adapters(base, tmp_path, ["classifier"])
    pool_of(base, tmp_path, ["classifier"])
    with torch.no_grad():
        for training in (False, True, False):
            base.train(training)
            torch.manual_seed(0)
            first = base(ids, adapter_names=["n0", "n1"]).logits
            torch.manual_seed(1)
            assert torch.equal(base(ids, adapter_names=["n0", "n1"]).logits, first) != training


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_model_that_is_converted_later(dtype, tmp_path):
    base, ids, names = bert().eval().requires_grad_(False), token_ids(4), ["n0", "n1", "__base__", "n2"]
    write_adapters(base, tmp_path, HEADS["deep"])
    model = copy.deepcopy(base)
    pool_of(model, tmp_path, HEADS["deep"])
    early = model(ids, adapter_names=names).logits
    model.to(dtype)
    expected = expected_rows(base.to(dtype), tmp_path, names, ids)
    copied = copy.deepcopy(model)
    for served in (model, copied):
        logits = served(ids, adapter_names=names).logits
        assert logits.dtype == dtype
        torch.testing.assert_close(logits, expected, atol=1e-5 if dtype == torch.float64 else 2e-2, rtol=0)
    assert pool_dtypes(model) == {torch.float32}, "running calls of other copies read the slots"
    base.float()
    if dtype == torch.float64:
        torch.testing.assert_close(model.float()(ids, adapter_names=names).logits, early)


def pool_dtypes(model: nn.Module) -> set[torch.dtype]:
    slots = [module.slots for module in model.modules() if isinstance(module, TrainedModule)]
    return {stack.dtype for held in slots for stack in held.stacks.values()}


def test_threads_and_copies(tmp_path):
    base, ids = bert().eval(), token_ids(4)
    write_adapters(base, tmp_path, ["classifier"])
    batches = [[NAMES[(i + j) % 6] for j in (0, 0, 1, 0)] for i in range(6)]
    expected = [expected_rows(base, tmp_path, names, ids) for names in batches]
    pool = pool_of(base, tmp_path, ["classifier"], slots=4)
    copied = copy.deepcopy(base)

    def run(i: int) -> None:
        with torch.inference_mode(i % 2 == 0):
            for turn in range(12):
                model = (base, copied)[turn % 2]
                with torch.no_grad():
                    logits = model(ids, adapter_names=batches[(i + turn) % 6]).logits
                torch.testing.assert_close(logits, expected[(i + turn) % 6])

    with ThreadPoolExecutor(3) as threads:
        list(threads.map(run, range(3)))
    assert pool.stats().in_use == 0 and pool.stats().evictions > 0 and _current.get() is None
    with pytest.raises(TypeError, match="close"):
        pickle.dumps(base)


def test_a_state_dict_and_save_pretrained_are_those_of_the_model(tmp_path):
    base, ids = bert().eval(), token_ids(4)
    write_adapters(base, tmp_path / "pool", ["classifier"])
    plain = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    pool = pool_of(base, tmp_path / "pool", ["classifier"])
    base(ids, adapter_names=["n0", "n1", "n2", "n0"])
    parameters = sum(p.numel() for p in base.parameters())
    assert parameters == sum(t.numel() for n, t in plain.items() if "position_ids" not in n)
    pool.close()
    assert all(torch.equal(base.state_dict()[name], tensor) for name, tensor in plain.items())
    assert base.state_dict().keys() == plain.keys()


# --- what is refused --------------------------------------------------------------------------------------------------


def changed(root: Path, how: str) -> None:
    """Copies n0 as "broken", and damages its head."""
    directory = root / "broken"
    directory.mkdir()
    tensors = load_file(root / "n0" / "adapter_model.safetensors")
    (directory / "adapter_config.json").write_text((root / "n0" / "adapter_config.json").read_text())
    key = "base_model.model.classifier.weight"
    if how == "classes":
        tensors[key] = tensors[key].repeat(2, 1)
    elif how == "half":
        del tensors["base_model.model.classifier.bias"]
    elif how == "none":
        del tensors["base_model.model.classifier.bias"], tensors[key]
    elif how == "kind":
        tensors[key] = tensors[key].to(torch.int32)
    elif how == "another":
        tensors["base_model.model.bert.pooler.dense.bias"] = torch.zeros(16)
    save_file(tensors, directory / "adapter_model.safetensors")


BROKEN = {
    "classes": "shape of base_model.model.classifier.weight: [6, 16] in the file, [3, 16] in the pool",
    "half": "missing key: base_model.model.classifier.bias",
    "none": "missing keys of base_model.model.classifier",
    "kind": "dtype of base_model.model.classifier.weight: torch.int32 in the file, torch.float32 in the pool",
    "another": "unexpected key: base_model.model.bert.pooler.dense.bias",
}


@pytest.mark.parametrize("how", BROKEN)
def test_heads_that_do_not_fit(how, tmp_path):
    base, ids = bert().eval(), token_ids(2)
    write_adapters(base, tmp_path, ["classifier"])
    changed(tmp_path, how)
    pool = pool_of(base, tmp_path, ["classifier"])
    expected = base(ids, adapter_names=["n0", "n1"]).logits
    with refused(base, ValueError, "AdapterPool: ", BROKEN[how]):
        base(ids, adapter_names=["n0", "broken"])
    assert torch.equal(base(ids, adapter_names=["n0", "n1"]).logits, expected) and pool.stats().in_use == 0


def test_a_head_of_several_layers_is_named_where_the_pool_has_none(tmp_path):
    model = roberta().eval()
    source = LoraConfig(r=2, target_modules=["query"], modules_to_save=["classifier"])
    save_adapter(inject(roberta(), source), tmp_path / "a")
    with (
        AdapterPool(model, tmp_path, target_modules=["query"], r=2, max_bytes=1 << 20),
        refused(model, ValueError, "the pool has no ['classifier']; make it with modules_to_save=['classifier']"),
    ):
        model(token_ids(1), adapter_names=["a"])


def test_factors_in_a_head_that_the_pool_holds_in_full(tmp_path):
    model = roberta().eval()
    save_adapter(inject(roberta(), LoraConfig(r=2, target_modules=["query", "classifier.dense"])), tmp_path / "a")
    options = {"target_modules": ["query", "classifier.dense"], "modules_to_save": ["classifier"]}
    with (
        AdapterPool(model, tmp_path, **options, r=2, max_bytes=1 << 20),
        refused(model, ValueError, "classifier.dense.lora_A.weight (the pool holds classifier in full only"),
    ):
        model(token_ids(1), adapter_names=["a"])


def test_adapters_of_finetune(tmp_path):
    base = tiny_classifier.save_model(tmp_path / "model")
    data = tiny_classifier.save_reviews(tmp_path / "data.csv", tiny_classifier.reviews(60))
    common = ["--model", str(base), "--data", str(data), "--max_length", "32", "--num_train_epochs", "1"]
    for r in (2, 3):
        out = ["--output_dir", str(tmp_path / f"run{r}"), "--lora_r", str(r), "--lora_targets", "query,value"]
        assert main(["finetune", *common, *out]) == 0

    model, ids = AutoModelForSequenceClassification.from_pretrained(base, num_labels=2).eval(), torch.randint(5, (2, 7))
    directories = [tmp_path / f"run{r}" / "adapter" for r in (2, 3)]
    alone = [load_adapter(copy.deepcopy(model), directory).eval()(ids).logits for directory in directories]
    text = "modules_to_save: the pool has no ['classifier']; make it with modules_to_save"
    lacking = AdapterPool(model, tmp_path / "run2", target_modules=TARGETS, r=3, max_bytes=1 << 16)
    with lacking, refused(model, ValueError, text):
        model(ids, adapter_names=["adapter", "adapter"])
    pool = pool_of(model, None, ["classifier"])
    for name, directory in zip("ab", directories, strict=True):
        pool.add(name, directory)
    with torch.no_grad():
        rows = model(ids, adapter_names=["a", "b"]).logits
    torch.testing.assert_close(rows, torch.stack([alone[0][0], alone[1][1]]))
