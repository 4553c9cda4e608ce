"""Tests that packed texts do not see each other, that GGUF files load, and which models are refused."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from support import tiny_decoder, tiny_gguf
from torch import nn
from transformers import (
    BertConfig,
    BertLMHeadModel,
    BloomConfig,
    BloomForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from lora_ext import LoraConfig, inject
from lora_ext.tasks import TaskError
from lora_ext.tasks.causal_lm.decoder import check_causal, check_packing, load_decoder
from lora_ext.tasks.causal_lm.evaluating import batches_of, perplexity
from lora_ext.tasks.causal_lm.packing import Collator, pack
from lora_ext.tasks.causal_lm.rendering import IGNORED
from lora_ext.tasks.causal_lm.settings import CausalSettings

pytestmark = pytest.mark.cpu_only("the command chooses the device")

SIZES = tiny_decoder.sizes()
DECODERS = {
    "llama": tiny_decoder.llama,
    "gemma3": tiny_decoder.gemma3,  # its sliding window is shorter than a text
    "mistral": lambda: MistralForCausalLM(MistralConfig(**SIZES, sliding_window=6)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES)),
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(vocab_size=320, n_positions=256, n_embd=32, n_layer=2, n_head=2, initializer_range=0.1)
    ),
}
MAMBA = {"vocab_size": 320, "hidden_size": 32, "num_hidden_layers": 1, "state_size": 4, "initializer_range": 0.5}


def rows(*lengths: int, seed: int = 0) -> list[dict[str, list[int]]]:
    generator = torch.Generator().manual_seed(seed)
    found = []
    for length in lengths:
        ids = torch.randint(4, 320, (length,), generator=generator).tolist()
        found.append({"input_ids": ids, "labels": [IGNORED, IGNORED, *ids[2:]]})
    return found


def test_packs_are_full_and_lose_nothing():
    lengths = [5, 60, 33, 31, 64, 4, 12, 7, 40]
    texts = rows(*lengths)
    packs = pack(texts, 64)
    assert len(packs) == 4  # 256 tokens: the least possible
    assert all(len(one["input_ids"]) <= 64 for one in packs)
    assert all(len({len(values) for values in one.values()}) == 1 for one in packs)
    found = []
    for one in packs:
        starts = [at for at, position in enumerate(one["position_ids"]) if position == 0] + [len(one["input_ids"])]
        for start, end in itertools.pairwise(starts):
            found.append({name: one[name][start:end].tolist() for name in ("input_ids", "labels")})
    key = lambda row: row["input_ids"]  # noqa: E731
    assert sorted(found, key=key) == sorted(texts, key=key)


def test_a_batch_of_packs_has_no_mask_and_its_padding_is_a_text():
    packs = pack(rows(5, 3), 8) + pack(rows(4), 8)
    batch = Collator(padding=0)(packs)
    assert batch.keys() == {"input_ids", "labels", "position_ids"}
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 4, 0, 1, 2], [0, 1, 2, 3, 0, 1, 2, 3]]
    assert batch["labels"][1, 4:].tolist() == [IGNORED] * 4
    plain = Collator(padding=0)(rows(4, 2))
    assert plain["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", DECODERS)
def test_the_loss_of_packs_is_that_of_their_texts(name: str, attention: str):
    """Also the gradients, with adapters: what a text gives does not depend on the texts that are packed with it."""
    torch.manual_seed(0)
    model = DECODERS[name]()
    model.set_attn_implementation(attention)
    inject(model, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    model.eval()
    texts = rows(20, 11, 7, 13, 9, 25)
    total = sum(label != IGNORED for row in texts for label in row["labels"])

    def losses(batches: list[list[dict[str, list[int]]]]) -> tuple[float, list[torch.Tensor]]:
        model.zero_grad()
        found = 0.0
        for batch in batches:
            inputs = Collator(padding=0)(batch)
            loss = model(**inputs, use_cache=False, num_items_in_batch=torch.tensor(total)).loss
            loss.backward()
            found += float(loss.detach())
        return found, [p.grad.clone() for p in model.parameters() if p.requires_grad]

    alone, gradients = losses([[text] for text in texts])
    packed, others = losses([pack(texts, 48)])
    assert packed == pytest.approx(alone, rel=1e-5)
    for first, second in zip(gradients, others, strict=True):
        torch.testing.assert_close(second, first, rtol=1e-3, atol=1e-5)
    check_packing(model)


def test_perplexity_is_the_mean_over_tokens():
    model = tiny_decoder.llama()
    texts = sorted(rows(5, 9, 30, 12), key=lambda row: len(row["input_ids"]))
    collator, device = Collator(padding=0), torch.device("cpu")
    settings = CausalSettings(model="m", data="d", batch_size=3)
    found = perplexity(model.eval(), batches_of(texts, settings), collator, device)
    losses = [
        (model(**collator([text])).loss.item(), sum(label != IGNORED for label in text["labels"])) for text in texts
    ]
    mean = sum(loss * count for loss, count in losses) / sum(count for _, count in losses)
    assert found["loss"] == pytest.approx(mean, rel=1e-5) and found["tokens"] == sum(count for _, count in losses)
    assert found["perplexity"] == pytest.approx(torch.tensor(mean).exp().item(), rel=1e-5)
    few = batches_of(texts, CausalSettings(model="m", data="d", batch_size=1, max_length=30, packing=True))
    assert [len(batch) for batch in few] == [2, 1, 1]
    assert perplexity(model, few, collator, device)["loss"] == pytest.approx(mean, rel=1e-5)


def test_models_that_show_packed_texts_to_each_other_are_refused():
    torch.manual_seed(0)
    mamba = MambaForCausalLM(MambaConfig(**MAMBA))
    with pytest.raises(TaskError, match=r"--packing: in MambaForCausalLM \(model type 'mamba'\) a text sees"):
        check_packing(mamba)
    bloom = BloomForCausalLM(BloomConfig(vocab_size=320, hidden_size=32, n_layer=2, n_head=2, initializer_range=0.5))
    with pytest.raises(TaskError, match="--packing: in BloomForCausalLM"):
        check_packing(bloom)


def test_a_cache_would_hide_the_packs():
    """The reason why the trainer turns the cache off: with one, Transformers finds no packs."""
    model = tiny_decoder.llama().eval()
    batch = Collator(padding=0)(pack(rows(20, 20), 40))
    with torch.no_grad():
        assert not torch.allclose(model(**batch, use_cache=True).loss, model(**batch, use_cache=False).loss)


def test_an_encoder_is_refused(tmp_path: Path):
    torch.manual_seed(0)
    sizes = {"vocab_size": 320, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = BertLMHeadModel(BertConfig(**sizes, intermediate_size=48, initializer_range=0.1))
    with pytest.raises(TaskError, match="BertLMHeadModel reads the tokens after a token, too"):
        check_causal(model, "bert")
    for decoder in DECODERS.values():
        check_causal(decoder(), "a decoder")


def gguf_file(path: Path) -> tuple[Path, nn.Module]:
    """A GGUF file, and the model with the values that are in it."""
    model = tiny_decoder.llama(intermediate_size=64)
    return tiny_gguf.save(path, model, tiny_decoder.tokenizer()), model


def test_a_gguf_file_is_an_ordinary_model(tmp_path: Path):
    path, original = gguf_file(tmp_path / "tiny.gguf")
    decoder = load_decoder(str(path))
    ids = torch.tensor([decoder.tokenizer("What is the colour of the sky?")["input_ids"]])
    assert ids[0].tolist() == tiny_decoder.tokenizer()("What is the colour of the sky?")["input_ids"]
    assert decoder.tokenizer.chat_template == tiny_decoder.TEMPLATE and decoder.most_tokens == tiny_decoder.LENGTH
    with torch.no_grad():
        logits = decoder.model(ids).logits
        torch.testing.assert_close(logits, original(ids).logits, rtol=1e-5, atol=1e-5)
    assert {p.dtype for p in decoder.model.parameters()} == {torch.float32}
    decoder.model.save_pretrained(tmp_path / "saved")
    decoder.tokenizer.save_pretrained(tmp_path / "saved")
    assert "quantization_config" not in (tmp_path / "saved" / "config.json").read_text()
    with torch.no_grad():
        assert torch.equal(load_decoder(str(tmp_path / "saved")).model(ids).logits, logits)


def test_a_gguf_file_is_never_kept_in_its_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Next to the package kernels, Transformers keeps them for some architectures unless it is told."""
    path, _ = gguf_file(tmp_path / "tiny.gguf")
    quantizer = pytest.importorskip("transformers.quantizers.quantizer_gguf").GgufHfQuantizer
    seen, check = [], quantizer.validate_environment
    monkeypatch.setattr(quantizer, "validate_environment", lambda self, **how: (seen.append(self), check(self, **how)))
    load_decoder(str(path))
    assert [one.quantization_config.dequantize for one in seen] == [True]


def test_bad_gguf_files_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path, _ = gguf_file(tmp_path / "tiny.gguf")
    whole = path.read_bytes()
    for name, content in {"half": whole[: len(whole) // 2], "header": whole[:200], "few": whole[:10]}.items():
        (tmp_path / f"{name}.gguf").write_bytes(content)
        with pytest.raises(TaskError, match=f"--model .*{name}.gguf (cannot be loaded|is damaged): "):
            load_decoder(str(tmp_path / f"{name}.gguf"))
    (tmp_path / "text.gguf").write_text("no model")
    with pytest.raises(TaskError, match="is not a GGUF file: it does not begin with GGUF"):
        load_decoder(str(tmp_path / "text.gguf"))
    with pytest.raises(TaskError, match=r"none\.gguf cannot be read: No such file"):
        load_decoder(str(tmp_path / "none.gguf"))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(TaskError, match=r"GGUF files need the package gguf: pip install .*\[gguf\]"):
        load_decoder(str(path))


def test_bad_directories_are_refused(tmp_path: Path):
    tiny_decoder.save(tmp_path / "whole")
    weights = tmp_path / "whole" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(TaskError, match="--model .*whole cannot be loaded"):
        load_decoder(str(tmp_path / "whole"))
    bare = tiny_decoder.llama()
    bare.model.save_pretrained(tmp_path / "bare")  # without lm_head
    tiny_decoder.tokenizer().save_pretrained(tmp_path / "bare")
    with pytest.raises(TaskError, match="has no values for lm_head.weight, which would stay random"):
        load_decoder(str(tmp_path / "bare"))
    with pytest.raises(TaskError, match="--model .*none cannot be loaded"):
        load_decoder(str(tmp_path / "none"))
