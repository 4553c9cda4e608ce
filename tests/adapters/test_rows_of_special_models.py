"""Models whose layers get something else than a row for each name: refused before a shape fits by chance."""

from __future__ import annotations

import contextlib

import pytest
import torch
import transformers
from architectures.inputs import IMAGE_TOKEN
from architectures.table import (
    BART,
    DEBERTA,
    DECODER,
    ENCODER,
    LED,
    LLAVA,
    NLLB_EXPERTS,
    OPT,
    SWIN,
    SWITCH,
    T5,
    VISION,
    W2V_BERT,
    WHISPER,
    XLNET,
)
from support.models import refused
from support.pools import write_adapters
from support.rows import assert_rows_equal, use, with_adapters
from support.versions import before
from torch import Tensor, nn

from lora_ext import AdapterPool, load_adapter
from lora_ext.adapters import choose_adapters

NAMES = ["b", "__base__", "a", "b", "a"]
LONGFORMER = dict(**ENCODER, attention_window=4)
FSMT = dict(langs=["a", "b"], src_vocab_size=64, tgt_vocab_size=64, d_model=16, encoder_layers=1, decoder_layers=1)
FSMT |= dict(encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=24, decoder_ffn_dim=24)


def model_of(name: str, **sizes) -> nn.Module:
    kind = getattr(transformers, name)
    return kind(kind.config_class(**sizes)).eval()


@pytest.mark.parametrize(
    ("name", "sizes", "target"),
    [
        ("XLNetLMHeadModel", XLNET, "layer_1"),
        ("LongformerForMaskedLM", LONGFORMER, "query"),
        ("LEDForConditionalGeneration", LED, "query"),
        ("FSMTForConditionalGeneration", FSMT, "fc1"),
    ],
)
def test_tokens_before_rows(name, sizes, target):
    """With as many tokens as rows, nothing in the shape tells which is which."""
    ids = torch.randint(3, 60, (8, 8))
    model = with_adapters(model_of(name, **sizes), [target], same=True)
    with refused(model, ValueError, f".{target}' is a part of ", "whose layers get tokens first", "set_adapter"):
        model(ids, adapter_names=["a", "b"] * 4)
    expected = use(model, "a")(ids[:3])[0]
    torch.testing.assert_close(use(model, "b")(ids[:3], adapter_names=["a"] * 3)[0], expected)


@pytest.mark.parametrize(
    ("name", "sizes", "target"),
    [
        ("SwitchTransformersForConditionalGeneration", SWITCH, "wi"),
        ("NllbMoeForConditionalGeneration", BART | NLLB_EXPERTS, "fc1"),
    ],
)
def test_experts_that_are_modules(name, sizes, target):
    """They may get as many tokens as there are rows, or one. With one name for all rows, any number is right."""
    model = with_adapters(model_of(name, **sizes), rf".*experts.*\.{target}", same=True)
    ids = torch.randint(3, 60, (2, 2))
    with refused(model, ValueError, f"experts.expert_0.{target}' is in one of several experts", "set_adapter"):
        model(ids, decoder_input_ids=ids, adapter_names=["a", "b"])
    expected = use(model, "a")(ids, decoder_input_ids=ids).logits
    inputs = {"decoder_input_ids": ids, "adapter_names": ["a", "a"]}
    torch.testing.assert_close(use(model, "b")(ids, **inputs).logits, expected)


def test_experts_of_packed_rows():
    model, x = with_adapters(Mixture(), ["0", "1"], same=True), torch.randn(1, 4, 6)
    with refused(model, ValueError, "'a' cannot be chosen by a row: 'experts.0' is in one of several experts"):
        model(x, adapter_names=["a", "a"], adapter_lengths=[2, 2])


class Mixture(nn.Module):
    """Each half of the rows has an expert."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(6, 6) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([expert(part) for expert, part in zip(self.experts, x.chunk(2), strict=True)])


def test_a_pool_over_experts(tmp_path):
    model = Mixture().eval()
    write_adapters(model, tmp_path, ["n0"], ["0", "1"])
    with (
        AdapterPool(model, tmp_path, target_modules=["0", "1"], r=4, max_bytes=2**20),
        pytest.raises(ValueError, match="'n0' cannot be chosen by a row: 'experts.0' is in one of several experts"),
    ):
        model(torch.randn(4, 6), adapter_names=["n0", "__base__", "n0", "n0"])
    with AdapterPool(model, tmp_path, target_modules=["0", "1"], r=4, max_bytes=2**20):
        x = torch.randn(4, 6)
        alone = model(x, adapter_names=["n0"] * 4)
    torch.testing.assert_close(alone, load_adapter(model, tmp_path / "n0")(x))


def test_windows_of_an_image():
    model, x = model_of("SwinForImageClassification", **SWIN), torch.randn(2, 3, 32, 32)
    with_adapters(model, ["query", "value"] if before("transformers", "5.13") else ["q_proj", "v_proj"])
    with refused(model, ValueError, "whose rows do not belong to one name each", "one name for all rows"):
        model(x, adapter_names=["a", "b"])
    torch.testing.assert_close(model(x, adapter_names=["a"] * 2).logits, use(model, "a")(x).logits)


@pytest.mark.parametrize(("shared", "seen"), [(True, "query_proj"), (False, "pos_key_proj")])
def test_positions_that_rows_share(shared, seen):
    """DeBERTa-v2 repeats them for the rows of the batch by itself."""
    sizes = DEBERTA | {"share_att_key": shared}
    model, ids = model_of("DebertaV2ForMaskedLM", **sizes), torch.randint(3, 60, (5, 7))
    with_adapters(model, [seen, "value_proj"], same=True)
    with refused(model, ValueError, f"{seen}' computes positions or prompts once for all rows", "set_adapter"):
        model(ids, adapter_names=NAMES)
    others = with_adapters(model_of("DebertaV2ForMaskedLM", **sizes), ["value_proj"], same=True)
    assert_rows_equal(others, lambda **names: others(ids, **names)[0].detach(), NAMES)


@pytest.mark.parametrize(("name", "sizes"), [("T5ForConditionalGeneration", T5), ("MPNetForMaskedLM", ENCODER)])
def test_pairs_of_positions(name, sizes):
    """A lookup of [tokens, tokens], with as many tokens as rows."""
    model, ids = (
        with_adapters(model_of(name, **sizes), ["relative_attention_bias"], same=True),
        torch.randint(60, (6, 6)),
    )
    inputs = {"decoder_input_ids": ids} if name.startswith("T5") else {}
    with refused(model, ValueError, "relative_attention_bias' computes positions once for all rows", "set_adapter"):
        model(ids, **inputs, adapter_names=["a", "b"] * 3)
    expected = use(model, "a")(ids, **inputs).logits
    torch.testing.assert_close(use(model, "b")(ids, **inputs, adapter_names=["a"] * 6).logits, expected)


def test_positions_of_a_conformer():
    sizes = dict(**W2V_BERT, position_embeddings_type="relative")
    model, x = model_of("Wav2Vec2BertForCTC", **sizes), torch.randn(5, 20, 8)
    with_adapters(model, ["linear_q", "linear_pos"])
    with refused(model, ValueError, "linear_pos' computes positions or prompts once for all rows", "set_adapter"):
        model(x, adapter_names=NAMES)
    torch.testing.assert_close(
        model(x, adapter_names=["c"] * 5).logits, use(model, "c")(x).logits
    )  # it lacks that layer
    others = with_adapters(model_of("Wav2Vec2BertForCTC", **sizes), ["linear_q", "linear_v"], same=True)
    assert_rows_equal(others, lambda **names: others(x, **names).logits.detach(), NAMES)


def llava(targets) -> nn.Module:
    return with_adapters(model_of("LlavaForConditionalGeneration", **LLAVA), targets, same=True)


@pytest.mark.parametrize("how", ["forward", "generate", "context", "generate in a context"])
def test_images_that_are_not_spread_over_the_rows(how):
    """Two images for the first row and none for the second are as many as the rows."""
    text = torch.randint(3, 60, (2, 11))
    uneven = text.clone()
    uneven[0, :8] = IMAGE_TOKEN
    inputs = {"input_ids": uneven, "pixel_values": torch.randn(2, 3, 32, 32)}
    model = llava(["q_proj", "v_proj"])
    with refused(model, ValueError, "the rows have [8, 0] tokens of pixel_values (image_token_id)", "vision_tower"):
        call = model.generate if "generate" in how else model
        if "context" in how:
            with choose_adapters(model, ["a", "b"]):
                call(**inputs)
        else:
            call(**inputs, adapter_names=["a", "b"])
    for names in (["a", "a"], ["c", "c"]):
        torch.testing.assert_close(model(**inputs, adapter_names=names).logits, use(model, names[0])(**inputs).logits)
    of_text = llava(r".*language_model.*q_proj")
    assert_rows_equal(of_text, lambda **names: of_text(**inputs, **names).logits.detach(), ["a", "b"])
    inputs["input_ids"] = text.clone()
    inputs["input_ids"][:, :4] = IMAGE_TOKEN
    assert_rows_equal(model, lambda **names: model(**inputs, **names).logits.detach(), ["a", "b"])


def test_guidance_of_a_model_that_speaks():
    """Dia puts all prompts into a batch, and all again."""
    sizes = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2, head_dim=8)
    sizes |= dict(intermediate_size=24, vocab_size=64, max_position_embeddings=32)
    cross = dict(cross_num_attention_heads=2, cross_head_dim=8, cross_num_key_value_heads=2, cross_hidden_size=16)
    tokens = dict(pad_token_id=61, eos_token_id=60, bos_token_id=62, delay_pattern=[0, 1])
    decoder = dict(**sizes, **cross, num_channels=2)
    model = model_of("DiaForConditionalGeneration", encoder_config=sizes, decoder_config=decoder, **tokens)
    with_adapters(model, r".*decoder.*(q_proj|v_proj)", same=True)
    ids, names = torch.randint(3, 60, (3, 7)), ["a", "b", "a"]
    text = "3 names, but decoder_input_ids has 6 rows; with guidance, Dia .*set_adapter"
    with pytest.raises(ValueError, match=text):
        model.generate(ids, max_new_tokens=4, guidance_scale=3.0, adapter_names=names)
    spoken = model.generate(ids, max_new_tokens=4, guidance_scale=1.0, adapter_names=names)
    for i, name in enumerate(names):
        alone = use(model, name).generate(ids[i : i + 1], max_new_tokens=4, guidance_scale=1.0)
        assert torch.equal(spoken[i, : alone.shape[1]], alone[0])


def test_sounds_of_different_lengths():
    """Each row has one, so the encoder's rows are those of the batch, whatever the number of tokens."""
    encoder = dict(d_model=16, encoder_layers=1, encoder_attention_heads=2, encoder_ffn_dim=24, num_mel_bins=8)
    text = dict(**DECODER, model_type="qwen2")
    sizes = dict(audio_config=encoder | {"max_source_positions": 10}, text_config=text, audio_token_index=2)
    model = with_adapters(model_of("Qwen2AudioForConditionalGeneration", **sizes), ["q_proj", "v_proj"], same=True)
    ids, frames = torch.randint(3, 60, (2, 12)), torch.tensor([20, 8])
    ids[0, :5], ids[1, :2] = 2, 2
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "input_features": torch.randn(2, 8, 20)}
    inputs["feature_attention_mask"] = (torch.arange(20) < frames[:, None]).long()
    assert_rows_equal(model, lambda **names: model(**inputs, **names).logits.detach(), ["a", "b"])
    ids[1, :2] = 5
    with refused(model, ValueError, "the rows have [5, 0] tokens of input_features (audio_token_id)", "audio_tower"):
        model(**inputs, adapter_names=["a", "b"])


@pytest.mark.parametrize("more", [{}, {"return_timestamps": True}, {"temperature": (0.0, 0.5)}])
@pytest.mark.parametrize("how", ["names", "context"])
def test_whisper_leaves_rows_out_that_are_done(how, more):
    model = with_adapters(model_of("WhisperForConditionalGeneration", **WHISPER), r".*decoder.*q_proj", same=True)
    model.generation_config.no_timestamps_token_id = 50
    inputs, options = torch.randn(2, 8, 20 if more else 40), {"max_new_tokens": 4, "return_timestamps": not more}
    options |= {"attention_mask": torch.ones(2, inputs.shape[-1])}
    named = {"adapter_names": ["a", "b"]} if how == "names" else {}
    context = choose_adapters(model, ["a", "b"]) if how == "context" else contextlib.nullcontext()
    text = r"with more than one segment \(20 frames\), timestamps or several temperatures, rows drop out .*set_adapter"
    with pytest.raises(ValueError, match=text), context:
        model.generate(inputs, **options | more | named)
    options |= {
        "attention_mask": torch.ones(2, 20),
        "return_timestamps": bool(more),
        "force_unique_generate_call": True,
    }
    together = model.generate(inputs[..., :20], **options, adapter_names=["a", "b"])
    for i, name in enumerate("ab"):
        alone = use(model, name).generate(inputs[..., :20], **options)
        assert torch.equal(together[i, : alone.shape[1]], alone[i, : together.shape[1]])


@pytest.mark.parametrize("how", ["names", "context"])
def test_a_generate_that_calls_a_part_of_the_model(how):
    sizes = dict(vision_config=VISION, qformer_config=dict(**ENCODER, encoder_hidden_size=16), num_query_tokens=3)
    sizes |= dict(text_config=dict(**OPT, model_type="opt"), image_token_id=IMAGE_TOKEN)
    model = model_of("Blip2ForConditionalGeneration", **sizes)
    nn.init.normal_(model.query_tokens)
    with_adapters(model, ["q_proj", "query"], same=True)
    ids = torch.cat([torch.full((3, 3), IMAGE_TOKEN), torch.randint(3, 60, (3, 4))], dim=1)
    inputs = {"pixel_values": torch.randn(3, 3, 32, 32), "input_ids": ids, "num_beams": 3, "num_return_sequences": 2}
    inputs |= {"max_new_tokens": 4, "eos_token_id": -1, "pad_token_id": 0}
    names = ["a", "b", "a"]
    if how == "names":
        together = model.generate(**inputs, adapter_names=names)
    else:
        with choose_adapters(model, names):
            together = model.generate(**inputs)
    for name in "ab":
        alone = use(model, name).generate(**inputs)
        for i in (i for i, chosen in enumerate(names) if chosen == name):
            assert torch.equal(together[2 * i : 2 * i + 2], alone[2 * i : 2 * i + 2])


class Repeats(nn.Module):
    """Has a ``generate`` of its own, without a config."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)

    def generate(self, x: Tensor) -> Tensor:
        return self(self(x))


def test_a_generate_that_is_not_of_transformers():
    model, x = with_adapters(Repeats(), ["layer"], same=True), torch.randn(5, 4)
    assert_rows_equal(model, lambda **names: model.generate(x, **names).detach(), NAMES)
