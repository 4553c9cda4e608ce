"""aLoRA: an adapter acts from its invocation tokens on. Files and numbers are those of PEFT."""

from __future__ import annotations

import copy
import json
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from support.alora import (
    MODELS,
    NAMES,
    OTHERS,
    STARTS,
    TOKENS,
    adapted,
    assert_same,
    config,
    generated,
    gradients,
    mixed_prompts,
    prompts,
    theirs_of,
    with_three,
)
from support.models import VOCABULARY, refused, shaken
from support.rows import use
from torch import Tensor, nn
from transformers import MambaConfig, MambaForCausalLM, RwkvConfig, RwkvForCausalLM, Trainer, TrainingArguments

from lora_ext import AdapterPool, LoraConfig, inject, load_adapter, save_adapter, set_adapter
from lora_ext.adapters import choose_adapters, delete_adapter, disable_adapters, hotswap_adapter, rename_adapter, unload
from lora_ext.nn.rows.in_force import _current

# --- numbers of PEFT --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"lora_bias": True}, {"use_rslora": True}], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_forward_and_gradients_equal_peft(name, options, tmp_path):
    model = adapted(name, **options)
    if "lora_bias" in options:
        shaken(model)
    theirs, (ids, mask) = theirs_of(model, tmp_path, "default"), prompts()
    ours, expected = (m(input_ids=ids, attention_mask=mask, labels=ids) for m in (model, theirs))
    torch.testing.assert_close(ours.logits, expected.logits)
    assert_same(gradients(model, ours.loss), gradients(theirs, expected.loss))
    with torch.no_grad(), disable_adapters(model):
        plain = model(ids, attention_mask=mask).logits
    for row, start in enumerate(STARTS):  # the base model's up to the invocation, and no further
        torch.testing.assert_close(ours.logits[row, :start], plain[row, :start])
        assert start is None or not torch.allclose(ours.logits[row, start], plain[row, start], atol=1e-4)


def test_a_batch_without_any_invocation_has_zero_gradients(tmp_path):
    model, ids = adapted(), torch.randint(10, VOCABULARY, (3, 6))
    theirs = theirs_of(model, tmp_path, "default")
    grads, expected = (gradients(m, m(input_ids=ids, labels=ids).loss) for m in (model, theirs))
    assert_same(grads, expected)
    assert not any(grad.any() for grad in grads.values())


@pytest.mark.parametrize("length", [1, 2])
def test_short_and_whole_rows(length, tmp_path):
    model, ids = adapted(), torch.tensor([TOKENS, [8, 7]])[:, :length]
    theirs = theirs_of(model, tmp_path, "default")
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, theirs(input_ids=ids).logits)


@pytest.mark.parametrize("mode", [torch.inference_mode, lambda: torch.autocast("cpu", torch.bfloat16), torch.no_grad])
def test_modes(mode, tmp_path):
    model, (ids, mask) = adapted(), prompts()
    theirs = theirs_of(model, tmp_path, "default")
    with mode():
        ours, expected = (m(input_ids=ids, attention_mask=mask).logits for m in (model, theirs))
    torch.testing.assert_close(ours, expected, rtol=0.05 if ours.dtype == torch.bfloat16 else 1e-4, atol=0.02)


@pytest.mark.parametrize("checkpointing", [True, False], ids=["reentrant", "not reentrant"])
def test_gradient_checkpointing(checkpointing):
    model, (ids, mask) = adapted(lora_dropout=0.3).train(), prompts()

    def step() -> dict[str, Tensor]:
        torch.manual_seed(3)
        losses = [model(ids, attention_mask=mask, labels=ids).loss, model(ids.flip(0), labels=ids.flip(0)).loss]
        return gradients(model, losses[0] + 2 * losses[1])  # two forwards before a backward

    expected = step()
    model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
    model.enable_input_require_grads()
    assert_same(step(), expected)


def test_the_head_of_the_last_tokens():
    model, (ids, mask) = adapted(), prompts()
    with torch.no_grad():
        for kept in (1, 4):
            last = model(ids, attention_mask=mask, logits_to_keep=kept).logits
            torch.testing.assert_close(last, model(ids, attention_mask=mask).logits[:, -kept:])


def test_offsets_that_the_caller_gives(tmp_path):
    model, (ids, mask) = adapted(), prompts()
    theirs, offsets = theirs_of(model, tmp_path, "default"), [1, None, 9, 20, 3]
    embedded = model.get_input_embeddings()(ids)
    with torch.no_grad():
        expected = theirs(input_ids=ids, attention_mask=mask, alora_offsets=offsets).logits
        torch.testing.assert_close(model(ids, attention_mask=mask, alora_offsets=offsets).logits, expected)
        torch.testing.assert_close(
            model(inputs_embeds=embedded, attention_mask=mask, alora_offsets=offsets).logits, expected
        )
        set_adapter(model, [])  # PEFT ignores them, too
        with theirs.disable_adapter():
            expected = theirs(input_ids=ids, alora_offsets=offsets).logits
        torch.testing.assert_close(model(ids, alora_offsets=offsets).logits, expected)


# --- generate ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_generate_equals_peft(name, tmp_path):
    model, (ids, mask) = adapted(name), prompts()
    theirs = theirs_of(model, tmp_path, "default")
    (ours, logits), (expected, their_logits) = (generated(m, ids, mask) for m in (model, theirs))
    assert torch.equal(ours, expected)
    torch.testing.assert_close(logits, their_logits)
    assert _current.get() is None and model._lora_adapters.active.row_calls == 0


@pytest.mark.parametrize(
    "options", [{"use_cache": False}, {"cache_implementation": "static"}, {"prefill_chunk_size": 4}], ids=str
)
def test_every_cache_gives_the_same(options):
    model, (ids, mask) = adapted(), prompts()
    (expected, logits), (found, their_logits) = generated(model, ids, mask), generated(model, ids, mask, **options)
    assert torch.equal(found, expected)
    torch.testing.assert_close(their_logits, logits, rtol=1e-4, atol=1e-5)


def test_a_cache_of_the_base_model_is_shared():
    """The point of aLoRA: keys and values before the invocation are the base model's."""
    model, (ids, _) = adapted(), prompts()
    row = ids[:1]
    with torch.no_grad():
        with disable_adapters(model):
            past = model(row[:, :2], use_cache=True).past_key_values
        expected = model(row).logits[:, 2:]
        found = model(row[:, 2:], past_key_values=copy.deepcopy(past)).logits
        torch.testing.assert_close(found, expected)
        tokens = model.generate(row, past_key_values=past, max_new_tokens=3, do_sample=False, pad_token_id=0)
        assert torch.equal(tokens, model.generate(row, max_new_tokens=3, do_sample=False, pad_token_id=0))


def test_generate_within_choose_adapters_finds_the_place_of_each_prompt():
    model, (ids, mask) = shaken(adapted()), prompts()
    expected = generated(model, ids, mask)
    with choose_adapters(model, ["default"]):
        found = generated(model, ids, mask)
        beams = generated(model, ids, mask, num_beams=2)[0]
    assert torch.equal(found[0], expected[0])
    torch.testing.assert_close(found[1], expected[1])
    assert torch.equal(beams, generated(model, ids, mask, num_beams=2)[0])


@pytest.mark.parametrize("kind", ["rwkv", "mamba"])
def test_caches_that_hold_states(kind):
    """They do not tell how many tokens they have seen."""
    if kind == "rwkv":
        settings = RwkvConfig(vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=2, attention_hidden_size=16)
        model, target = RwkvForCausalLM(settings).eval(), "key"
    else:
        settings = MambaConfig(vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=2, state_size=4)
        model, target = MambaForCausalLM(settings).eval(), "in_proj"
    model = shaken(inject(model, config(target_modules=[target]))).eval()
    ids = torch.tensor([[1, 3, *TOKENS, 5, 2], [4, 3, 2, 1, 3, 5]])
    ids = ids[:1] if kind == "rwkv" else ids  # Transformers 5.24 mixes up the rows of RWKV's steps
    found, expected = (
        generated(model, ids, torch.ones_like(ids), use_cache=use_cache, eos_token_id=None)
        for use_cache in (True, False)
    )
    assert torch.equal(found[0], expected[0])
    torch.testing.assert_close(found[1], expected[1], rtol=1e-4, atol=1e-5)


def test_padding_on_the_right_is_no_packing():
    model, mask = adapted(), torch.ones(2, 6, dtype=torch.int64)
    ids, mask[:, 4:] = torch.tensor([[1, *TOKENS, 3, 0, 0]] * 2), 0
    positions = (mask.cumsum(-1) - 1).masked_fill(mask == 0, 1)
    found = model(ids, attention_mask=mask, position_ids=positions).logits
    torch.testing.assert_close(found[:, :4], model(ids[:, :4]).logits)


def test_beams_equal_rows_alone():
    model, (ids, mask) = adapted(), prompts()
    options = {"num_beams": 4, "num_return_sequences": 2, "max_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
    tokens = model.generate(ids, attention_mask=mask, **options)
    for i in (0, 1, 3):
        alone = model.generate(ids[i : i + 1], attention_mask=mask[i : i + 1], **options)
        assert torch.equal(tokens[2 * i : 2 * i + 2], alone)


def test_tokens_that_the_model_generates_invoke_nothing(tmp_path):
    model = adapted()
    theirs = theirs_of(model, tmp_path, "default")
    ids = torch.tensor([[20, 21, 7]])  # a greedy model that says 8 would complete the invocation

    def say_8(module, args, y):
        return nn.functional.one_hot(torch.full(y.shape[:-1], 8), VOCABULARY).float()

    for m in (model, theirs):
        m.get_output_embeddings().register_forward_hook(say_8)
    ours, expected = (
        m.generate(input_ids=ids, max_new_tokens=3, do_sample=False, pad_token_id=0) for m in (model, theirs)
    )
    assert ours[0, 3] == 8 and torch.equal(ours, expected)


# --- several adapters -------------------------------------------------------------------------------------------------


def test_rows_choose_among_adapters_as_in_peft(tmp_path):
    model, (ids, mask) = with_three(), mixed_prompts()
    theirs = theirs_of(model, tmp_path, "alora", "other", "plain")
    with torch.no_grad():
        ours = model(ids, attention_mask=mask, adapter_names=NAMES).logits
        expected = theirs(input_ids=ids, attention_mask=mask, adapter_names=NAMES).logits
        torch.testing.assert_close(ours, expected)
        for row, name in enumerate(NAMES):  # and as alone
            use(model, name)
            torch.testing.assert_close(model(ids, attention_mask=mask).logits[row], ours[row])
        with choose_adapters(model, NAMES):
            torch.testing.assert_close(model(ids, attention_mask=mask).logits, ours)
            twice = [t.repeat_interleave(2, 0) for t in (ids, mask)]
            torch.testing.assert_close(model(*twice).logits, ours.repeat_interleave(2, 0))
    tokens = [generated(m, ids, mask, adapter_names=NAMES)[0] for m in (model, theirs)]
    assert torch.equal(*tokens)
    with choose_adapters(model, NAMES):
        assert torch.equal(generated(model, ids, mask)[0], tokens[0])
    beams = model.generate(ids, attention_mask=mask, adapter_names=NAMES, num_beams=2, max_new_tokens=3, pad_token_id=0)
    for row, name in enumerate(NAMES):
        use(model, name)
        alone = model.generate(ids, attention_mask=mask, num_beams=2, max_new_tokens=3, pad_token_id=0)[row]
        assert torch.equal(beams[row], alone)


def test_several_train_in_one_batch():
    model, (ids, mask) = with_three(), mixed_prompts()

    def losses(**names) -> Tensor:
        logits = model(ids, attention_mask=mask, **names).logits[:, :-1]
        return nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none").sum(1)

    set_adapter(model.train(), ["alora", "other", "plain"])
    losses(adapter_names=NAMES).sum().backward()
    together = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    model.zero_grad(set_to_none=True)
    for name in ("alora", "other", "plain"):
        set_adapter(model, name)
        losses()[torch.tensor([name == chosen for chosen in NAMES])].sum().backward()
    separate = {n: p.grad for n, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert_same(together, separate)


def test_threads():
    model, (ids, _) = with_three(), mixed_prompts()
    set_adapter(model, "alora")
    choices = [None, NAMES, NAMES[::-1], ["other"] * 5, ["__base__"] * 5, None]
    inputs = [ids, ids, ids.flip(0), ids, ids, ids.flip(0)]
    with torch.no_grad():
        expected = [model(x, adapter_names=names).logits for x, names in zip(inputs, choices, strict=True)]

    def run(i: int) -> bool:
        with torch.no_grad():
            return all(torch.equal(model(inputs[i], adapter_names=choices[i]).logits, expected[i]) for _ in range(10))

    with ThreadPoolExecutor(len(choices)) as pool:
        assert all(pool.map(run, range(len(choices))))


@pytest.mark.parametrize("other", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies(other):
    model, (ids, mask) = with_three(), mixed_prompts()
    set_adapter(model, "alora")
    expected = model(ids, attention_mask=mask).logits
    copied = other(model)
    rename_adapter(copied, "alora", "renamed")
    torch.testing.assert_close(copied(ids, attention_mask=mask).logits, expected)
    torch.testing.assert_close(model(ids, attention_mask=mask).logits, expected)
    set_adapter(copied, "plain")
    delete_adapter(copied, "renamed")
    assert copied._lora_adapters.active.invocations == {"other": tuple(OTHERS)}


def test_modules_trained_in_full_act_on_all_tokens_as_in_peft(tmp_path):
    model, (ids, mask) = adapted(target_modules=["q_proj"], modules_to_save=["lm_head"]), prompts()
    shaken(model)
    theirs = theirs_of(model, tmp_path, "default")
    with torch.no_grad():
        torch.testing.assert_close(
            model(ids, attention_mask=mask).logits, theirs(input_ids=ids, attention_mask=mask).logits
        )


def test_a_pool_serves_them(tmp_path):
    model, (ids, mask) = with_three(), mixed_prompts()
    for name in ("alora", "other"):
        save_adapter(model, tmp_path / name, name)
    inject(model, config(r=2, alora_invocation_tokens=None, target_modules=["k_proj"]), "own")
    with torch.no_grad():
        names = ["alora", "other", "own", "__base__", "alora"]
        expected = model(ids, attention_mask=mask, adapter_names=names).logits
        tokens = generated(model, ids, mask, adapter_names=names)[0]
        for name in ("alora", "other"):
            delete_adapter(model, name)
        targets = ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj", "lm_head"]
        with AdapterPool(model, tmp_path, target_modules=targets, r=4, max_bytes=2**20, host_bytes=2**20) as pool:
            for _ in range(2):  # read, then from the host cache
                torch.testing.assert_close(model(ids, attention_mask=mask, adapter_names=names).logits, expected)
                assert torch.equal(generated(model, ids, mask, adapter_names=names)[0], tokens)
                assert pool.stats().in_use == 0
                pool._table.evict(["alora"], "test")
            with refused(model, ValueError, "no input_ids"):
                model(inputs_embeds=model.get_input_embeddings()(ids), adapter_names=names)
            assert pool.stats().in_use == 0


# --- files ------------------------------------------------------------------------------------------------------------


def test_files_both_ways(tmp_path):
    model, (ids, mask) = adapted(), prompts()
    theirs = theirs_of(model, tmp_path, "default")
    theirs.save_pretrained(tmp_path / "theirs")
    directory = (
        tmp_path / "theirs" if (tmp_path / "theirs" / "adapter_config.json").exists() else tmp_path / "theirs/default"
    )
    written = [json.loads((path / "adapter_config.json").read_text()) for path in (tmp_path / "default", directory)]
    assert [values["alora_invocation_tokens"] for values in written] == [TOKENS, TOKENS]
    loaded = load_adapter(unload(copy.deepcopy(model)), directory).eval()
    torch.testing.assert_close(loaded(ids, attention_mask=mask).logits, model(ids, attention_mask=mask).logits)
    assert LoraConfig.from_peft(theirs.peft_config["default"]).alora_invocation_tokens == tuple(TOKENS)


def test_loading_into_an_adapter_with_other_tokens(tmp_path):
    model = adapted()
    save_adapter(model, tmp_path)
    other = adapted(alora_invocation_tokens=OTHERS)
    for load in (load_adapter, hotswap_adapter):
        with refused(other, ValueError, "alora_invocation_tokens"):
            load(other, tmp_path, adapter_name="default")
    assert hotswap_adapter(model, tmp_path) is model


# --- training ---------------------------------------------------------------------------------------------------------


class Examples(torch.utils.data.Dataset):
    def __init__(self) -> None:
        torch.manual_seed(1)
        self.ids = torch.cat([prompts()[0] for _ in range(4)])

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        return {"input_ids": self.ids[i], "labels": self.ids[i]}


def test_a_trainer_gets_pefts_losses_and_resumes(tmp_path):
    model = adapted(init_lora_weights=True)
    theirs = theirs_of(model, tmp_path, "default")
    fresh, histories = copy.deepcopy(model), []
    options = {"report_to": [], "use_cpu": True, "disable_tqdm": True, "logging_steps": 1, "learning_rate": 0.05}
    options |= {"per_device_train_batch_size": 4, "save_steps": 2}

    def trainer(model: nn.Module, name: str, steps: int) -> Trainer:
        arguments = TrainingArguments(str(tmp_path / name), max_steps=steps, **options)
        return Trainer(model.train(), arguments, train_dataset=Examples())

    for name, trained in (("ours", model), ("theirs", theirs)):
        run = trainer(trained, name, 4)
        run.train()
        histories.append([entry["loss"] for entry in run.state.log_history if "loss" in entry])
    torch.testing.assert_close(*map(torch.tensor, histories), rtol=1e-4, atol=1e-4)
    assert histories[0][0] != histories[0][-1]
    resumed = trainer(fresh, "ours", 4)
    resumed.train(resume_from_checkpoint=str(tmp_path / "ours" / "checkpoint-2"))
    for (name, parameter), (_, expected) in zip(fresh.named_parameters(), model.named_parameters(), strict=True):
        torch.testing.assert_close(parameter, expected, msg=name)
