"""Mixed batches in models whose layers get something else than a row for each name, and in those that generate."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import transformers
from architectures.inputs import IMAGE_TOKEN
from architectures.table import DEBERTA, ENCODER, LED, LLAVA, OPT, SWIN, SWITCH, T5, UNET, VISION, W2V_BERT, XLNET
from support.models import refused
from support.optional import diffusers
from support.pools import write_adapters
from support.rows import assert_rows_equal, use, with_adapters
from support.versions import before
from torch import Tensor, nn

from lora_ext import AdapterPool, load_adapter

NAMES = ["b", "__base__", "a", "b", "a"]
LONGFORMER = dict(**ENCODER, attention_window=4)
FSMT = dict(langs=["a", "b"], src_vocab_size=64, tgt_vocab_size=64, d_model=16, encoder_layers=1, decoder_layers=1)
FSMT |= dict(encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=24, decoder_ffn_dim=24)
SWIN_TARGET = "query" if before("transformers", "5.13") else "q_proj"
W2V = dict(**W2V_BERT, position_embeddings_type="relative")


def model_of(name: str, **sizes) -> nn.Module:
    kind = getattr(transformers, name)
    return kind(kind.config_class(**sizes)).eval()


IDS = torch.arange(3, 67).view(8, 8) % 60
TOKENS_FIRST = "layers get tokens first"
SHAPE = "whose rows do not belong to one name each"
REFUSED = {
    # As many tokens as rows: nothing in the shape tells which is which.
    "xlnet": ("XLNetLMHeadModel", XLNET, ["layer_1"], IDS, TOKENS_FIRST),
    "longformer": ("LongformerForMaskedLM", LONGFORMER, ["query"], IDS, TOKENS_FIRST),
    "led": ("LEDForConditionalGeneration", LED, ["query"], IDS, TOKENS_FIRST),
    "fsmt": ("FSMTForConditionalGeneration", FSMT, ["fc1"], IDS, TOKENS_FIRST),
    "t5": ("T5ForConditionalGeneration", T5, ["relative_attention_bias"], IDS[:5], SHAPE),
    "switch": ("SwitchTransformersForConditionalGeneration", SWITCH, r".*experts.*\.wi", IDS, SHAPE),
    # Windows of an image; positions that the model repeats for the rows by itself.
    "swin": ("SwinForImageClassification", SWIN, [SWIN_TARGET], torch.randn(2, 3, 32, 32), SHAPE),
    "deberta": ("DebertaV2ForMaskedLM", DEBERTA | {"share_att_key": False}, ["pos_key_proj"], IDS[:5], SHAPE),
    "conformer": ("Wav2Vec2BertForCTC", W2V, ["linear_pos"], torch.randn(4, 20, 8), SHAPE),
}


@pytest.mark.parametrize("model", REFUSED)
def test_layers_without_a_row_for_each_name(model):
    """Different names are refused. One name for all rows is right, whatever the layer gets."""
    name, sizes, targets, x, text = REFUSED[model]
    model = with_adapters(model_of(name, **sizes), targets, same=True)
    more = {"decoder_input_ids": x} if model.config.is_encoder_decoder else {}
    with pytest.raises(ValueError, match=f"{text}.*set_adapter"):  # Switch casts its router in its forward
        model(x, **more, adapter_names=["a", "b", "a", "b", "a", "b", "a", "b"][: len(x)])
    expected = use(model, "a")(x, **more)[0]
    torch.testing.assert_close(use(model, "b")(x, **more, adapter_names=["a"] * len(x))[0], expected)


class Mixture(nn.Module):
    """Each half of the rows has an expert."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(6, 6) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([expert(part) for expert, part in zip(self.experts, x.chunk(2), strict=True)])


def test_a_pool_over_experts(tmp_path):
    model, x = Mixture().eval(), torch.randn(4, 6)
    write_adapters(model, tmp_path, ["n0"], ["0", "1"])
    with AdapterPool(model, tmp_path, target_modules=["0", "1"], r=4, max_bytes=2**20):
        with refused(model, ValueError, SHAPE):
            model(x, adapter_names=["n0", "__base__", "n0", "n0"])
        alone = model(x, adapter_names=["n0"] * 4)
    torch.testing.assert_close(alone, load_adapter(model, tmp_path / "n0")(x))


# --- images and sounds ------------------------------------------------------------------------------------------------


def llava(targets) -> nn.Module:
    return with_adapters(model_of("LlavaForConditionalGeneration", **LLAVA), targets, same=True)


@pytest.mark.parametrize("how", ["forward", "generate"])
def test_images_next_to_text(how):
    """All of them are computed in one batch, so rows name adapters of the text model only."""
    ids = torch.randint(3, 60, (2, 11))
    ids[:, :4] = IMAGE_TOKEN
    inputs = {"input_ids": ids, "pixel_values": torch.randn(2, 3, 32, 32)}
    model = llava(["q_proj", "v_proj"])
    with refused(model, ValueError, "vision_tower", "computes images or sounds", "set_adapter"):
        (model.generate if how == "generate" else model)(**inputs, adapter_names=["a", "b"])
    torch.testing.assert_close(model(**inputs, adapter_names=["a"] * 2).logits, use(model, "a")(**inputs).logits)
    text = torch.randint(3, 60, (2, 11))
    assert_rows_equal(model, lambda **names: model(text, **names).logits.detach(), ["a", "b"])
    of_text = llava(r".*(language_model.*q_proj|lm_head)")
    assert_rows_equal(of_text, lambda **names: of_text(**inputs, **names).logits.detach(), ["a", "b"])


def test_each_row_of_a_diffusion_model_however_the_arguments_are_passed():
    model = with_adapters(diffusers.UNet2DConditionModel(**UNET), ["to_q", "to_k", "to_v", "to_out.0"])
    x, text = torch.randn(2, 4, 8, 8), torch.randn(2, 5, 16)
    with torch.no_grad():
        expected = torch.cat([use(model, name)(x[i : i + 1], 3, text[i : i + 1]).sample for i, name in enumerate("ab")])
        assert not torch.allclose(model(x, 3, text).sample, expected, atol=1e-5)
        named = {"timestep": torch.tensor([3]), "encoder_hidden_states": text, "sample": x}
        for args, kwargs in (((x, 3, text), {}), ((), named)):
            y = model(*args, **kwargs, adapter_names=["a", "b"]).sample
            torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)


# --- generate ---------------------------------------------------------------------------------------------------------


def test_a_generate_that_calls_a_part_of_the_model():
    sizes = dict(vision_config=VISION, qformer_config=dict(**ENCODER, encoder_hidden_size=16), num_query_tokens=3)
    sizes |= dict(text_config=dict(**OPT, model_type="opt"), image_token_id=IMAGE_TOKEN)
    model = model_of("Blip2ForConditionalGeneration", **sizes)
    nn.init.normal_(model.query_tokens)
    with_adapters(model, r".*language_model.*q_proj", same=True)
    ids = torch.cat([torch.full((3, 3), IMAGE_TOKEN), torch.randint(3, 60, (3, 4))], dim=1)
    inputs = {"pixel_values": torch.randn(3, 3, 32, 32), "input_ids": ids, "num_beams": 4, "num_return_sequences": 2}
    inputs |= {"max_new_tokens": 4, "eos_token_id": -1, "pad_token_id": 0}
    names = ["a", "b", "a"]
    together = model.generate(**inputs, adapter_names=names)
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

    def generate(self, x: Tensor, step: Callable[[Tensor], Tensor] = lambda x: x) -> Tensor:
        return self(step(self(x)))


def test_a_generate_that_is_not_of_transformers():
    model, x = with_adapters(Repeats(), ["layer"], same=True), torch.randn(5, 4)
    assert_rows_equal(model, lambda **names: model.generate(x, **names).detach(), NAMES)
    # Guidance, as Dia's, puts all prompts into a batch, and all again; Whisper leaves out rows that are done.
    for step, rows in ((lambda x: x.repeat(2, 1), 10), (lambda x: x[1:], 4)):
        with refused(model, ValueError, f"5 names, but argument 1 has {rows} rows in a step of generate", "guidance"):
            model.generate(x, step, adapter_names=NAMES)
