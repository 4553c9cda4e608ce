"""Tests that files of save_pretrained of injected models load by the documented calls, or fail to load."""

from __future__ import annotations

import copy

import pytest
import safetensors.torch
import torch
import transformers.integrations.peft
import transformers.models.auto.auto_factory
from support.mixtures import mixture
from support.models import answer, bert, gpt2, llama, refused, shaken, snapshot, token_ids
from support.versions import before, needs
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

from lora_ext import LoraConfig, inject, load_adapter, merge, save_adapter, set_adapter, unmerge
from lora_ext.adapters import delete_adapter, merge_and_unload, unload
from lora_ext.model.adapter_state import MARKER

pytestmark = pytest.mark.cpu_only("files are about the CPU")


CASES = {
    "llama": (llama, {"target_modules": ["q_proj", "v_proj"]}),
    "bert": (bert, {"target_modules": ["query", "dense"], "task_type": "SEQ_CLS"}),
    "biases": (bert, {"target_modules": ["query"], "bias": "all", "task_type": "SEQ_CLS"}),
    "conv1d": (gpt2, {"target_modules": ["c_attn", "c_proj"]}),
    "packed": (gpt2, {"target_modules": ["c_attn"], "enable_lora": {"c_attn": (True, False, True)}}),
    "embedding": (llama, {"target_modules": ["embed_tokens", "q_proj"]}),
    "tied": (lambda: llama(tied=True), {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]}),
    "tokens": (llama, {"target_modules": ["q_proj"], "trainable_token_indices": [3, 1]}),
    # Files of this model have the experts one by one; Transformers converts them.
    "experts": (
        lambda: mixture("mixtral"),
        {"target_modules": ["q_proj"], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]},
    ),
    "tied tokens": (lambda: llama(tied=True), {"target_modules": ["q_proj"], "trainable_token_indices": [3, 1]}),
}
FROM_PRETRAINED_READS = {"tokens": "5.18", "tied tokens": "5.18", "tied": "5.18", "experts": "5.9"}
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
REPLACED = {"tokens": {EMBEDDING}, "tied tokens": {EMBEDDING, HEAD}, "tied": {EMBEDDING, HEAD}}  # others are merged
REPLACED |= {case: {"classifier.weight", "classifier.bias"} for case in ("bert", "biases")}
AUTO = {
    "LlamaForCausalLM": AutoModelForCausalLM,
    "GPT2LMHeadModel": AutoModelForCausalLM,
    "MixtralForCausalLM": AutoModelForCausalLM,
    "BertForSequenceClassification": AutoModelForSequenceClassification,
}


def loaded(model: nn.Module, directory) -> nn.Module:
    return AUTO[type(model).__name__].from_pretrained(directory).eval()


def made(case: str, tmp_path, name: str = "default") -> tuple[nn.Module, nn.Module]:
    """Returns ``(base, adapted)``; the base is on disk in "base", and both come from there."""
    make, options = CASES[case]
    make().save_pretrained(tmp_path / "base")
    base = loaded(make(), tmp_path / "base")
    return base, shaken(inject(copy.deepcopy(base), LoraConfig(r=2, lora_alpha=4, **options), name), by=0.3).eval()


@pytest.mark.parametrize("case", CASES)
def test_a_merged_model_is_saved_as_its_base_model_is(case, tmp_path):
    base, model = made(case, tmp_path)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    expected = answer(merge(model))
    merged = {key.replace(".base_layer", ""): v for key, v in model.state_dict().items()}
    for name, options in ("merged", {"max_shard_size": "5KB"}), ("given", {"state_dict": model.state_dict()}):
        model.save_pretrained(tmp_path / name, **options)
        again = loaded(model, tmp_path / name)
        torch.testing.assert_close(answer(again), expected)
        assert again.state_dict().keys() == base.state_dict().keys()
        same = {key for key, tensor in again.state_dict().items() if torch.equal(tensor, merged.get(key, tensor[:0]))}
        assert same == again.state_dict().keys() - REPLACED.get(case, set())
    assert not torch.allclose(answer(base), expected, atol=1e-3)
    assert len(list((tmp_path / "merged").glob("*.safetensors"))) > 1
    unmerge(model)
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in before.items())


@pytest.mark.full(but=3)
@pytest.mark.parametrize("case", CASES)
def test_an_unmerged_model_is_saved_as_peft_saves_it(case, tmp_path):
    base, model = made(case, tmp_path)
    expected = answer(model)
    assert not torch.allclose(answer(base), expected, atol=1e-3)
    model.save_pretrained(tmp_path / "saved")
    model.save_pretrained(tmp_path / "given", state_dict=model.state_dict())
    save_adapter(model, tmp_path / "adapter")
    written, given, adapter = (snapshot(tmp_path / name) for name in ("saved", "given", "adapter"))
    assert written == given
    assert adapter.keys() == {"adapter_config.json", "adapter_model.safetensors"} and adapter.items() <= written.items()
    assert "model.safetensors" in written
    ours = load_adapter(copy.deepcopy(base), tmp_path / "saved")
    assert torch.equal(answer(ours), expected) and torch.equal(answer(model), expected)
    if before("transformers", FROM_PRETRAINED_READS.get(case, "0")):
        pytest.skip(f"Transformers {transformers.__version__} reads such files, PEFT's too, only in part or not at all")
    peft = loaded(model, tmp_path / "saved")  # Transformers finds adapter_config.json and asks PEFT
    torch.testing.assert_close(answer(peft), expected)


@pytest.mark.parametrize("auto", [AutoModel, AutoModelForCausalLM])
def test_without_peft_adapters_are_not_read_as_a_model(auto, tmp_path, monkeypatch):
    _, model = made("llama", tmp_path)
    model.save_pretrained(tmp_path / "saved")
    for module in (transformers.integrations.peft, transformers.models.auto.auto_factory):
        monkeypatch.setattr(module, "is_peft_available", lambda *_: False)
    with pytest.raises((OSError, ValueError)):
        auto.from_pretrained(tmp_path / "saved")
    with pytest.raises(RuntimeError, match="(?s)Missing key.*Unexpected key.*call lora_ext.load_adapter"):
        llama().load_state_dict(safetensors.torch.load_file(tmp_path / "saved" / "model.safetensors"))


def test_several_adapters_are_in_directories_by_name(tmp_path):
    base, model = made("llama", tmp_path)
    inject(model, LoraConfig(r=3, target_modules=["down_proj"]), "style")
    shaken(model, by=0.3)
    expected = {name: answer(set_adapter(model, name)) for name in ("default", "style")}
    model.save_pretrained(tmp_path / "saved")
    again = load_adapter(copy.deepcopy(base), tmp_path / "saved")
    load_adapter(again, tmp_path / "saved" / "style", adapter_name="style")
    for name, values in expected.items():
        assert torch.equal(answer(set_adapter(again, name)), values)


def test_a_part_saves_itself_merged_or_without_adapters(tmp_path):
    base, model = made("bert", tmp_path)
    ids = token_ids()
    with refused(model, ValueError, "BertModel.save_pretrained: it is a part of the adapted", "inject the part alone"):
        model.bert.save_pretrained(tmp_path / "part")
    assert not (tmp_path / "part").exists()
    with torch.no_grad():
        expected = merge(model).bert(ids).last_hidden_state
        model.bert.save_pretrained(tmp_path / "merged")
        assert torch.equal(AutoModel.from_pretrained(tmp_path / "merged").eval()(ids).last_hidden_state, expected)
        base = inject(base, LoraConfig(r=2, target_modules=["classifier"]))
        base.bert.save_pretrained(tmp_path / "bare")
        expected = base.bert(ids).last_hidden_state
        assert torch.equal(AutoModel.from_pretrained(tmp_path / "bare").eval()(ids).last_hidden_state, expected)


def test_no_file_is_written_that_would_load_wrong(tmp_path):
    _, model = made("llama", tmp_path)
    weights = tmp_path / "base" / "model.safetensors"
    for content in (weights.read_bytes(), b"no safetensors file"):  # damaged, it may still be of use
        weights.write_bytes(content)
        found = snapshot(tmp_path / "base")
        with refused(model, ValueError, "holds weights of a whole model", "choose another directory"):
            model.save_pretrained(tmp_path / "base")
        assert snapshot(tmp_path / "base") == found
    model.save_pretrained(tmp_path / "saved")
    model.save_pretrained(tmp_path / "saved")
    merge(model)
    with refused(model, ValueError, "holds an adapter", "choose another directory"):
        model.save_pretrained(tmp_path / "saved")
    model.model.layers[0].self_attn.q_proj.unmerge()
    with refused(model, ValueError, "['default'] are merged", "merge or unmerge all"):
        model.save_pretrained(tmp_path / "mixed")
    unmerge(model)
    for option in ("distributed_checkpoint", "push_to_hub"):
        with refused(model, ValueError, f"{option}=True is for whole models"):
            model.save_pretrained(tmp_path / "mixed", **{option: True})
    with refused(model, TypeError, "save_directory"):
        model.save_pretrained()
    compiled = {f"_orig_mod.{key}": tensor for key, tensor in model.state_dict().items()}
    for state in ({"lm_head.weight": model.lm_head.weight}, compiled):
        words = "state_dict lacks", "torch.compile(model) changes the keys", "torch_compile=True"
        with refused(model, ValueError, *words):
            model.save_pretrained(tmp_path / "mixed", state_dict=state)
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="cannot write there.*/file"):
        model.save_pretrained(tmp_path / "file")
    assert not (tmp_path / "mixed").exists()


@needs("transformers", "5.15", "save_pretrained writes weights in every process")
def test_only_the_main_process_writes(tmp_path):
    _, model = made("llama", tmp_path)
    model.save_pretrained(tmp_path / "nothing", state_dict={})  # as Trainer under DeepSpeed
    assert not any(name.startswith("adapter") for name in snapshot(tmp_path / "nothing"))
    model.save_pretrained(tmp_path / "saved", is_main_process=False)
    assert not snapshot(tmp_path / "saved")


def test_the_model_has_its_own_method_back_after_unloading(tmp_path):
    for undo in (unload, merge_and_unload, lambda model: delete_adapter(set_adapter(model, ()), "default")):
        base, model = made("llama", tmp_path)
        undo(model)
        assert "save_pretrained" not in vars(model) and "save_pretrained" not in vars(model.model)
        assert not model._load_state_dict_post_hooks
        model.save_pretrained(tmp_path / "plain")
        assert loaded(model, tmp_path / "plain").state_dict().keys() == base.state_dict().keys()


@pytest.mark.parametrize("assign", [False, True])
def test_the_state_of_adapters_alone_leaves_the_base_as_it_is(assign, tmp_path):
    base, model = made("tied tokens", tmp_path)
    expected = answer(model)
    model.save_pretrained(tmp_path / "saved")
    state = safetensors.torch.load_file(tmp_path / "saved" / "model.safetensors")
    assert MARKER in state
    other = inject(copy.deepcopy(base), LoraConfig(r=2, lora_alpha=4, **CASES["tied tokens"][1])).eval()
    parameters = [id(p) for p in other.parameters() if not p.requires_grad]
    assert other.load_state_dict(state, assign=assign) == ([], [])
    assert torch.equal(answer(other), expected)
    assert [id(p) for p in other.parameters() if not p.requires_grad] == parameters


def test_what_the_state_of_other_adapters_lacks_and_has_is_reported(tmp_path):
    base, model = made("llama", tmp_path)
    model.save_pretrained(tmp_path / "saved")
    state = safetensors.torch.load_file(tmp_path / "saved" / "model.safetensors")
    other = inject(base, LoraConfig(r=2, target_modules=["q_proj", "o_proj"]))
    missing, unexpected = other.load_state_dict(state, strict=False)
    assert set(missing) == {key for key in other.state_dict() if "o_proj.adapters." in key}
    assert set(unexpected) == {key for key in model.state_dict() if "v_proj.adapters." in key}
    for broken in (state | {"other": torch.ones(1)}, {key: state[key] for key in state if "layers.1" not in key}):
        with pytest.raises(RuntimeError, match="key"):
            model.load_state_dict(broken)
    whole, unknown = model.load_state_dict({}, strict=False)
    assert [*whole] == [*dict(model.named_parameters())] and not unknown
