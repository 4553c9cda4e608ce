"""Models that Transformers quantised: inject, train, save, load, merge, export to a plain checkpoint; against PEFT."""

import warnings

import peft
import pytest
import torch
import transformers
from support.quantized import stored, unchanged_bytes
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM, TorchAoConfig

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig, PerGroup

import lora_ext
from lora_ext import LoraConfig, inject, load_adapter, merge, save_adapter, unmerge
from lora_ext.adapters import merge_and_unload, unload

_QUIET = pytest.mark.filterwarnings("ignore:.*were quantised again", "ignore::DeprecationWarning")
pytestmark = [pytest.mark.full, _QUIET]

QUANTIZATIONS = {
    "nf4": lambda: BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
    "fp4-double": lambda: BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_use_double_quant=True),
    "int8": lambda: BitsAndBytesConfig(load_in_8bit=True),
    "torchao-int8": lambda: TorchAoConfig(Int8WeightOnlyConfig()),
    "torchao-int4": lambda: TorchAoConfig(IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32))),
}
TARGETS = ["q_proj", "v_proj", "gate_proj", "down_proj"]
OPTIONS = {"r": 4, "lora_alpha": 8, "target_modules": TARGETS, "lora_dropout": 0.0}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 128, "max_position_embeddings": 64}
    heads = {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2}
    directory = tmp_path_factory.mktemp("llama")
    LlamaForCausalLM(LlamaConfig(**sizes, **heads)).save_pretrained(directory)
    return directory


def load(checkpoint, quantization: str, dtype: torch.dtype = torch.float32):
    return AutoModelForCausalLM.from_pretrained(
        checkpoint, quantization_config=QUANTIZATIONS[quantization](), dtype=dtype, device_map={"": 0} if GPU else None
    )


GPU = torch.get_default_device().type == "cuda"


def ids(rows: int = 4) -> torch.Tensor:
    return torch.randint(0, 64, (rows, 12))


def train(model, batch: torch.Tensor, steps: int = 3) -> tuple[list[float], dict[str, torch.Tensor]]:
    """The losses, and the gradients of the first step."""
    model.train()
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    optimizer, losses, first = torch.optim.AdamW([p for _, p in trained], lr=1e-2), [], {}
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        first = first or {name: p.grad.clone() for name, p in trained}
        optimizer.step()
        losses.append(loss.item())
    return losses, first


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_train_save_load_merge_and_generate(checkpoint, quantization, tmp_path):
    model, batch = inject(load(checkpoint, quantization), LoraConfig(**OPTIONS)), ids()
    with unchanged_bytes(model):
        losses, _ = train(model, batch)
        assert losses[-1] < losses[0]
        model.eval()
        with torch.no_grad():
            y = model(batch).logits
        text = model.generate(batch[:2], max_new_tokens=5, do_sample=False)
        save_adapter(model, tmp_path / "ours")
        model.save_pretrained(tmp_path / "same")
    for directory in ("ours", "same"):
        again = load_adapter(load(checkpoint, quantization), tmp_path / directory).eval()
        with torch.no_grad():
            torch.testing.assert_close(again(batch).logits, y)
    theirs = peft.PeftModel.from_pretrained(load(checkpoint, quantization), tmp_path / "ours").eval()
    with torch.no_grad():
        # bitsandbytes computes in bfloat16 in PEFT's model in eval mode.
        near = 1e-5 if quantization.startswith("torchao") else 0.03
        torch.testing.assert_close(theirs(batch).logits, y, rtol=0, atol=near * y.abs().max().item())
    theirs.save_pretrained(tmp_path / "theirs")
    again = load_adapter(load(checkpoint, quantization), tmp_path / "theirs").eval()
    with torch.no_grad(), unchanged_bytes(model):
        torch.testing.assert_close(again(batch).logits, y)
        merge(model)
        merged = model(batch).logits
        assert not torch.equal(merged, y)
        model.save_pretrained(tmp_path / "merged")
        unmerge(model)
        assert torch.equal(model(batch).logits, y)
    assert torch.equal(model.generate(batch[:2], max_new_tokens=5, do_sample=False), text)
    if quantization == "torchao-int4":
        return  # Transformers writes it, and does not read it
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", device_map={"": 0} if GPU else None)
    assert again.config.quantization_config
    here, there = stored(merge_and_unload(model)), stored(again)
    assert here.keys() == there.keys() and all(torch.equal(here[name], there[name]) for name in here)
    with torch.no_grad():
        torch.testing.assert_close(again(batch).logits, merged, rtol=0, atol=near * merged.abs().max().item())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("quantization", ["nf4", "fp4-double", "int8"])
def test_an_adapter_becomes_a_part_of_the_dequantised_model(checkpoint, quantization, dtype, tmp_path):
    model, batch = inject(load(checkpoint, quantization, dtype), LoraConfig(**OPTIONS)), ids()
    train(model, batch)
    save_adapter(model, tmp_path / "adapter")
    with torch.no_grad():
        # In training mode LLM.int8 does not quantise the input, and dropout is 0.
        y = model(batch).logits.float()
        plain = load_adapter(load(checkpoint, quantization, dtype).dequantize(), tmp_path / "adapter")
        merge_and_unload(plain).save_pretrained(tmp_path / "plain")
        plain = AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
        assert {p.dtype for p in plain.parameters()} == {dtype}
        tolerance = (1e-4 if dtype == torch.float32 else 0.05) * y.abs().max().item()
        torch.testing.assert_close(plain(batch).logits.float(), y, rtol=0, atol=tolerance)


def test_packed_conv1d_of_gpt2(tmp_path):
    """Transformers quantises the transpose of GPT-2's weights."""
    config = transformers.GPT2Config(vocab_size=64, n_positions=32, n_embd=64, n_layer=1, n_head=2)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / "base")
    parts = {"c_attn": (True, False, True)}
    model = inject(load(tmp_path / "base", "nf4"), LoraConfig(r=4, target_modules=["c_attn"], enable_lora=parts))
    train(model, batch := ids())
    layer, x = model.eval().transformer.h[0].attn.c_attn, torch.randn(5, 64)
    with torch.no_grad():
        want = layer.base_layer(x) + x @ layer.delta_weight().T
        torch.testing.assert_close(layer(x), want, rtol=1e-4, atol=1e-5)
        assert not torch.equal(model(batch).logits, unload(model)(batch).logits)


def test_all_linear_leaves_the_head_out(checkpoint):
    model = inject(load(checkpoint, "nf4"), LoraConfig(r=4, target_modules="all-linear"))
    assert len(dict(lora_ext.adapters.lora_modules(model))) == 2 * 7
