"""Rows that hold several sequences: each gets what a call with its adapter alone computes."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator

import pytest
import torch
from support.alora import TOKENS, with_three
from support.models import VOCABULARY, Net, gpt2, llama, refused, shaken
from support.rows import gradients, use, with_adapters
from torch import Tensor, nn
from transformers import DataCollatorWithFlattening, Trainer, TrainingArguments

from lora_ext import AdapterPool, LoraConfig, inject, save_adapter, set_adapter
from lora_ext.adapters import choose_adapters, disable_adapters, unload
from lora_ext.nn.rows.in_force import _current

NAMES, LENGTHS = ["b", "__base__", "a", "b", "c"], [3, 2, 5, 1, 4]
TARGETS = ["q_proj", "v_proj", "o_proj", "down_proj", "embed_tokens", "lm_head"]


def packed(lengths: list[int] = LENGTHS, rows: int = 1) -> dict[str, Tensor]:
    """Random sequences in ``rows`` rows, and their positions."""
    positions = torch.cat([torch.arange(length) for length in lengths]).view(rows, -1)
    return {"input_ids": torch.randint(VOCABULARY, positions.shape), "position_ids": positions, "use_cache": False}


def alone(model: nn.Module, ids: Tensor, names: list[str] = NAMES, lengths: list[int] = LENGTHS) -> Iterator[Tensor]:
    """The logits of each sequence in a call of its own."""
    for name, part in zip(names, ids.flatten().split(lengths), strict=True):
        use(model, name)
        yield model(part[None]).logits[0]


@pytest.mark.parametrize(("rows", "lengths"), [(1, LENGTHS), (3, [3, 2, 5, 4, 1])])
def test_sequences_equal_calls_of_their_own(rows, lengths):
    model, inputs = with_adapters(llama(), TARGETS), packed(lengths, rows)
    with torch.no_grad():
        y = model(**inputs, adapter_names=NAMES, adapter_lengths=torch.tensor(lengths)).logits.flatten(0, 1)
        expected = torch.cat(list(alone(model, inputs["input_ids"], lengths=lengths)))
        other = torch.cat(list(alone(model, inputs["input_ids"], ["a", "a", "b", "c", "a"], lengths)))
    torch.testing.assert_close(y, expected)
    assert not torch.allclose(y, other, rtol=0.1, atol=0.1)
    assert _current.get() is None and model._lora_adapters.active.row_calls == 0


def test_16_bit_models():
    """As near to float64 as a call with the adapter alone: not the same kernels, so not the same rounding."""
    model, inputs = with_adapters(llama().bfloat16(), TARGETS, use_rslora=True), packed()
    exact_model = copy.deepcopy(model).double()
    with torch.no_grad():
        parts = model(**inputs, adapter_names=NAMES).logits[0].split(LENGTHS)
        for i, name in enumerate(NAMES):
            use(model, name)
            use(exact_model, name)
            exact, alone = (m(**inputs).logits[0].split(LENGTHS)[i].double() for m in (exact_model, model))
            assert (parts[i].double() - exact).norm() < 2 * (alone - exact).norm()
            assert (parts[i].double() - exact).norm() < 0.02 * exact.norm()


def test_sequences_that_the_call_describes():
    model, inputs = with_adapters(llama(), TARGETS), packed()
    ends = torch.tensor([0, *LENGTHS]).cumsum(0)
    with torch.no_grad():
        expected = model(**inputs, adapter_names=NAMES, adapter_lengths=LENGTHS).logits
        assert torch.equal(model(**inputs, adapter_names=NAMES).logits, expected)
        assert torch.equal(model(**inputs, adapter_names=NAMES, cu_seq_lens_q=ends.int()).logits, expected)
        with choose_adapters(model, NAMES, LENGTHS):
            assert torch.equal(model(**inputs).logits, expected)
            torch.testing.assert_close(model(**packed(rows=3)).logits.shape, (3, 5, VOCABULARY))
            with pytest.raises(ValueError, match=r"adapter_lengths is for 15 tokens, but argument 1 has 14, \[1, 14\]"):
                model(inputs["input_ids"][:, 1:])
        with disable_adapters(model):
            bare = model(**inputs, adapter_names=NAMES).logits
        assert torch.equal(bare, model(**inputs, adapter_names=["__base__"]).logits)


@pytest.mark.parametrize(
    "kept", [1, 4, [2, 4, 9, 10, 14], [14, 0, 0, 3], list(range(15))[::-1], [i % 3 > 0 for i in range(15)]], ids=str
)
def test_logits_of_some_tokens(kept):
    model, inputs = with_adapters(llama(), ["q_proj", "lm_head"]), packed()
    names = {"adapter_names": NAMES, "adapter_lengths": LENGTHS}
    with torch.no_grad():
        every = model(**inputs, **names).logits
        some = model(**inputs, **names, logits_to_keep=torch.tensor(kept) if isinstance(kept, list) else kept).logits
    torch.testing.assert_close(some, every[:, kept] if isinstance(kept, list) else every[:, -kept:])


class Attention(nn.Module):
    """Attention within a row, on whose tokens a mask separates the sequences."""

    def __init__(self, batch_first: bool) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=batch_first)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x = x if self.attention.batch_first else x.transpose(0, 1)
        y, _ = self.attention(x, x, x, attn_mask=mask, need_weights=False)
        return y if self.attention.batch_first else y.transpose(0, 1)


@pytest.mark.parametrize("batch_first", [True, False])
def test_attention(batch_first):
    model, x = with_adapters(Attention(batch_first), ["attention"], lora_bias=True), torch.randn(1, 15, 8)
    sequence = torch.arange(5).repeat_interleave(torch.tensor(LENGTHS))
    mask = sequence[:, None] != sequence
    with torch.no_grad():
        y = model(x, mask, adapter_names=NAMES, adapter_lengths=LENGTHS)
        for name in "abc":
            tokens = torch.tensor([NAMES[i] == name for i in sequence])
            torch.testing.assert_close(y[:, tokens], set_adapter(model, name)(x, mask)[:, tokens])


def test_rows_of_features_are_tokens():
    model, x = with_adapters(Net(), ["up", "head"], lora_bias=True), torch.randn(15, 6)
    each = [name for name, length in zip(NAMES, LENGTHS, strict=True) for _ in range(length)]
    assert torch.equal(model(x, adapter_names=NAMES, adapter_lengths=LENGTHS), model(x, adapter_names=each))


def test_gpt2_and_its_positions():
    model, inputs = with_adapters(gpt2(), ["wte", "wpe", "c_attn", "c_proj"]), packed()
    inputs.pop("use_cache")
    shape = {"adapter_names": ["a", "b"], "adapter_lengths": [6, 4]}
    with torch.no_grad():
        y = model(**inputs, adapter_names=NAMES, use_cache=False).logits[0]
        torch.testing.assert_close(y, torch.cat(list(alone(model, inputs["input_ids"]))))
        # one row of positions for two rows of tokens
        two = model(inputs["input_ids"][:, :10].view(2, 5), adapter_names=["a", "b"]).logits
        three = model(inputs["input_ids"][:, :10].view(2, 5), **shape | {"adapter_lengths": [5, 5]}).logits
    torch.testing.assert_close(two, three)


def test_heads_and_token_rows():
    model = llama()
    inject(model, LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head", "norm"]), "a")
    tokens = {"trainable_token_indices": {"embed_tokens": [3, 4]}}
    inject(model, LoraConfig(r=3, target_modules=["v_proj", "lm_head"], **tokens), "b")
    inject(model, LoraConfig(r=3, target_modules=["v_proj"], modules_to_save=["lm_head"]), "c")
    for name in "abc":
        shaken(set_adapter(model.eval(), name))
    inputs = packed()
    inputs["input_ids"][0, ::2] = 3
    with torch.no_grad():
        y = model(**inputs, adapter_names=NAMES).logits[0]
        torch.testing.assert_close(y, torch.cat(list(alone(model, inputs["input_ids"]))))


def test_a_pool(tmp_path):
    model = with_adapters(llama(), TARGETS[:4])
    for name in "abc":
        save_adapter(model, tmp_path / name, name)
    inputs = packed()
    with torch.no_grad():
        expected = torch.cat(list(alone(model, inputs["input_ids"])))
        bare = unload(model)
        with AdapterPool(bare, tmp_path, target_modules=TARGETS[:4], r=5, max_bytes=1 << 20) as pool:
            torch.testing.assert_close(bare(**inputs, adapter_names=NAMES).logits[0], expected)
            assert pool.stats().loads == 3 and pool.stats().in_use == 0


@pytest.mark.parametrize("other", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_have_it(other):
    model, inputs = with_adapters(llama(), TARGETS), packed()
    y = model(**inputs, adapter_names=NAMES).logits
    assert torch.equal(other(model)(**inputs, adapter_names=NAMES).logits, y)


def test_sequences_that_activate_their_adapters():
    """An aLoRA acts from the last invocation in its sequence on, whatever the others hold."""
    model, names, lengths = with_three(), ["alora", "plain", "alora", "__base__", "alora"], [6, 4, 5, 3, 2]
    ids = torch.randint(10, VOCABULARY, (1, 20))
    for place in (1, 3, 7, 12, 16):  # the last sequence has none
        ids[0, place : place + len(TOKENS)] = torch.tensor(TOKENS)
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    inputs = {"input_ids": ids, "position_ids": positions, "use_cache": False, "adapter_names": names}
    with torch.no_grad():
        y = model(**inputs, adapter_lengths=lengths).logits[0]
        torch.testing.assert_close(y, torch.cat(list(alone(model, ids, names, lengths))))
        with choose_adapters(model, names, lengths):
            torch.testing.assert_close(model(ids, position_ids=positions, use_cache=False).logits[0], y)
    with refused(model, ValueError, "'alora' acts from its invocation tokens on (aLoRA), and packed rows need"):
        model(**inputs, adapter_lengths=lengths, alora_offsets=[1] * 5)


# --- training ---------------------------------------------------------------------------------------------------------


def losses(logits: Tensor, ids: Tensor, lengths: list[int]) -> list[Tensor]:
    """The sum of the losses of each sequence."""
    parts = zip(logits.flatten(0, 1).split(lengths), ids.flatten().split(lengths), strict=True)
    return [nn.functional.cross_entropy(y[:-1], part[1:], reduction="sum") for y, part in parts]


@pytest.mark.parametrize("checkpointing", [None, pytest.param(True, marks=pytest.mark.full), False])
def test_training_equals_separate_runs(checkpointing):
    model, inputs = with_adapters(llama(), TARGETS).double().train(), packed()
    if checkpointing is not None:
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
        model.enable_input_require_grads()
    set_adapter(model, ["a", "b", "c"])
    batches = [(NAMES, inputs), (["c", "a"], packed([6, 4]))]
    results = [
        losses(model(**batch, adapter_names=names).logits, batch["input_ids"], LENGTHS if names is NAMES else [6, 4])
        for names, batch in batches
    ]
    for (names, batch), together in reversed(list(zip(batches, results, strict=True))):  # other calls lie between
        lengths = LENGTHS if names is NAMES else [6, 4]
        set_adapter(model, ["a", "b", "c"])
        grads, seen = gradients(model, sum(together)), set()
        for name in "abc":
            set_adapter(model, name)
            mine = [i for i, chosen in enumerate(names) if chosen == name]
            parts = batch["input_ids"].flatten().split(lengths)
            separate = [losses(model(parts[i][None]).logits, parts[i], [lengths[i]])[0] for i in mine]
            torch.testing.assert_close([together[i] for i in mine], separate)
            expected = gradients(model, sum(separate)) if separate and any(lengths[i] > 1 for i in mine) else {}
            for parameter, grad in expected.items():
                torch.testing.assert_close(grads[parameter], grad)
            seen |= expected.keys()
        assert grads.keys() == seen


def test_dropout_masks_are_those_of_a_batch_with_one_adapter():
    model, inputs = with_adapters(llama(), ["q_proj", "down_proj"], lora_dropout=0.3).train(), packed()

    def call(**names) -> Tensor:
        torch.manual_seed(3)
        return model(**inputs, **names).logits

    inject(model, LoraConfig(r=2, target_modules=["q_proj", "down_proj"], lora_dropout=0.3), "zero")
    y = call(adapter_names=["a", "zero"], adapter_lengths=[3, 12])
    set_adapter(model, "a")
    torch.testing.assert_close(y[:, :3], call()[:, :3])


def test_a_trainer_trains_packed_documents(tmp_path):
    model = with_adapters(llama(), ["q_proj", "down_proj"])
    set_adapter(model, ["a", "b", "c"])
    ids = [torch.randint(VOCABULARY, (length,)).tolist() for length in (3, 6, 2, 5, 4, 3)]
    data = [{"input_ids": ids[i], "adapter_names": "abc"[i % 3]} for i in range(6)]
    flatten, seen = DataCollatorWithFlattening(), []

    def collate(documents: list[dict]) -> dict[str, object]:
        names = [document["adapter_names"] for document in documents]
        batch = flatten([{"input_ids": document["input_ids"]} for document in documents])
        seen.append((names, batch["input_ids"].shape[0]))
        return dict(batch) | {"adapter_names": names}

    options = {"report_to": [], "use_cpu": True, "disable_tqdm": True, "save_strategy": "no", "max_grad_norm": 0.0}
    arguments = TrainingArguments(
        str(tmp_path), per_device_train_batch_size=3, max_steps=2, remove_unused_columns=False, **options
    )
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    Trainer(model, arguments, train_dataset=data, data_collator=collate).train()
    changed = {name for name, parameter in model.named_parameters() if not torch.equal(before[name], parameter)}
    assert changed == {name for name in before if ".adapters." in name}
    assert all(len(names) == 3 and rows == 1 for names, rows in seen)


# --- refusals ---------------------------------------------------------------------------------------------------------


BAD_LENGTHS = [
    ([3, 2, 5, 1], ValueError, "adapter_lengths has 4 entries, but adapter_names has 5 names"),
    (
        [3, 2, 5, 1, 3],
        ValueError,
        "adapter_lengths is for 14 tokens, but input_ids has 15, [1, 15]; padding",
    ),
    ([3, 2, 5, 6, -1], ValueError, "adapter_lengths has the entry -1, want numbers of tokens"),
    ([3, 2, 5, 1, 4.0], TypeError, "adapter_lengths is of type list, want a list or a tensor [names]"),
    (torch.ones(5), TypeError, "adapter_lengths is of type Tensor of shape [5], want a list"),
    (torch.ones(1, 5).long(), TypeError, "adapter_lengths is of type Tensor of shape [1, 5], want a list"),
    ("abcde", TypeError, "adapter_lengths is of type str"),
]


@pytest.mark.parametrize(("lengths", "error", "text"), BAD_LENGTHS, ids=[text[19:40] for *_, text in BAD_LENGTHS])
def test_bad_lengths(lengths, error, text):
    model = with_adapters(llama(), ["q_proj"])
    with refused(model, error, text):
        model(**packed(), adapter_names=NAMES, adapter_lengths=lengths)
    if "input_ids" not in text:
        expected = "want None" if isinstance(lengths, str | list) and error is TypeError else "lengths"
        with (
            pytest.raises(error, match=expected if error is ValueError else ""),
            choose_adapters(model, NAMES, lengths),
        ):
            pass


def test_calls_that_nothing_can_serve():
    model, inputs = with_adapters(llama(), ["q_proj"]), packed()
    with refused(model, KeyError, "LlamaForCausalLM: there is no adapter 'x'; the adapters are ['a', 'b', 'c']"):
        model(**inputs, adapter_names=["x"] * 5, adapter_lengths=LENGTHS)
    with refused(model, ValueError, "LlamaForCausalLM: adapter_lengths needs adapter_names"):
        model(**inputs, adapter_lengths=LENGTHS)
    with refused(model, ValueError, "adapter_names has 4 names, but input_ids has 1 rows; pass a name for each row"):
        model(**inputs, adapter_names=NAMES[:4])
    with refused(model, ValueError, "LlamaForCausalLM.generate: adapter_lengths is for calls of the model"):
        model.generate(inputs["input_ids"], adapter_names=NAMES, adapter_lengths=LENGTHS)
    with choose_adapters(model, NAMES, LENGTHS), pytest.raises(ValueError, match="generate_batch take a name for each"):
        model.generate(inputs["input_ids"])
    assert _current.get() is None and model._lora_adapters.active.row_calls == 0


class MixesTokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv1d(4, 4, 3, padding=1)
        self.block = nn.Sequential(nn.Linear(4, 4), nn.Flatten(0))
        self.expert = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.expert(self.convolution(x.mT).mT[:, ::2])


@pytest.mark.parametrize(
    ("config", "text"),
    [
        ({"target_modules": ["convolution"]}, "'default' cannot be chosen by a token: 'convolution' is a Conv1d"),
        (
            {"target_modules": ["expert"], "modules_to_save": ["block"]},
            "'default' cannot be chosen by a token: 'block' is a Sequential, which may mix the tokens of a row",
        ),
        (
            {"target_modules": ["expert"]},
            "LoraLinear: adapter_lengths are for 1 rows of 6 tokens, but the",
        ),
    ],
)
def test_layers_that_may_mix_tokens(config, text):
    model = inject(MixesTokens(), LoraConfig(r=1, **config))
    with refused(model, ValueError, text):
        model(torch.randn(1, 6, 4), adapter_names=["default", "__base__"], adapter_lengths=[2, 4])


def test_models_with_an_encoder_and_a_decoder():
    model = with_adapters(llama(), ["q_proj"])
    model.config.is_encoder_decoder = True
    with refused(model, ValueError, "has an encoder and a decoder, which read different tokens"):
        model(**packed(), adapter_names=NAMES, adapter_lengths=LENGTHS)


def test_layers_share_what_is_copied_to_their_device(monkeypatch):
    """On a GPU, a copy from the host waits for it: a call of the model makes one of the choice and one of scalings."""
    model, x = with_adapters(Net(), ["up", "head"], same=True), torch.randn(5, 6)
    model(x, adapter_names=NAMES)
    made, tensor = [], torch.tensor
    monkeypatch.setattr(torch, "tensor", lambda *args, **options: made.append(args) or tensor(*args, **options))
    model(x, adapter_names=NAMES)
    assert len(made) == 2
