"""extract of models whose embedding is also their output head, or that of encoder and decoder: a file has it once."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
from support import tiny_decoder
from torch import Tensor, nn
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    T5Config,
    T5EncoderModel,
    T5ForConditionalGeneration,
)

from lora_ext import load_adapter
from lora_ext.checkpoints import extract, merge

pytestmark = pytest.mark.cpu_only("is about files, which hold CPU tensors")

T5 = T5Config(vocab_size=50, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, decoder_start_token_id=0)
BART = {f"{side}_{name}": value for side in ("encoder", "decoder") for name, value in (
    ("layers", 1), ("attention_heads", 2), ("ffn_dim", 16))}  # fmt: skip
BERT = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16, "vocab_size": 50}
MODELS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "llama": (lambda: tiny_decoder.llama(tie_word_embeddings=True), "q_proj"),
    "gpt2": (lambda: GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=50)), "c_attn"),
    "bert": (lambda: BertForMaskedLM(BertConfig(**BERT)), "query"),
    "t5": (lambda: T5ForConditionalGeneration(T5), ".q"),
    "t5 encoder": (lambda: T5EncoderModel(T5), ".q"),
    "bart": (lambda: BartForConditionalGeneration(
        BartConfig(vocab_size=50, d_model=16, max_position_embeddings=32, **BART)), "q_proj"),
}  # fmt: skip


def outputs(model: nn.Module) -> Tensor:
    ids = {"input_ids": torch.arange(4, 12)[None]}
    if getattr(model.config, "is_encoder_decoder", False) and not isinstance(model, T5EncoderModel):
        ids["decoder_input_ids"] = torch.arange(3, 9)[None]
    with torch.no_grad():
        return model.eval()(**ids)[0]


@pytest.mark.parametrize("name", MODELS)
def test_what_is_tied_follows_the_embedding(name: str, tmp_path: Path):
    make, layer = MODELS[name]
    base = make()
    base.save_pretrained(tmp_path / "base")
    tuned = copy.deepcopy(base)
    with torch.no_grad():
        for path, parameter in tuned.named_parameters():
            if path.endswith(f"{layer}.weight"):
                parameter.add_(0.1 * torch.randn(len(parameter), 1) @ torch.randn(1, parameter.shape[1]))
        embedding = tuned.get_input_embeddings().weight
        embedding.add_(0.1 * torch.randn_like(embedding))
    tuned.save_pretrained(tmp_path / "tuned")
    expected = outputs(tuned)
    assert (expected - outputs(base)).abs().max() > 0.1
    extract(tmp_path / "base", tmp_path / "tuned", tmp_path / "out", rank=4, fan_in_fan_out=name == "gpt2")
    near = {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(outputs(load_adapter(copy.deepcopy(base), tmp_path / "out")), expected, **near)
    if name in ("llama", "gpt2", "bert"):  # PEFT 0.21 puts the head in the place of an encoder's embedding
        by_peft = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "out")
        torch.testing.assert_close(outputs(by_peft), expected, **near)
    merge(tmp_path / "base", [tmp_path / "out"], tmp_path / "merged")
    torch.testing.assert_close(outputs(type(base).from_pretrained(tmp_path / "merged")), expected, **near)


def test_another_dtype_is_no_difference(tmp_path: Path):
    """Training saves in float32 what was loaded from bfloat16."""
    base = tiny_decoder.llama().bfloat16()
    base.save_pretrained(tmp_path / "base")
    tuned = copy.deepcopy(base).float()
    tuned.save_pretrained(tmp_path / "same")
    with pytest.raises(ValueError, match="extract: no tensor differs between"):
        extract(tmp_path / "base", tmp_path / "same", tmp_path / "out")
    weight = tuned.model.layers[0].self_attn.q_proj.weight
    with torch.no_grad():
        weight[3, 4] += 1e-5  # less than bfloat16 can say
    tuned.save_pretrained(tmp_path / "tuned")
    report = extract(tmp_path / "base", tmp_path / "tuned", tmp_path / "out", rank=1)
    assert list(report.layers) == ["model.layers.0.self_attn.q_proj"] and report.saved == []
    assert report.layers["model.layers.0.self_attn.q_proj"].norm == pytest.approx(1e-5, rel=0.01)
