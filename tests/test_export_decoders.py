"""An injected decoder exports: prompts of any length, a static cache, our ops or plain PyTorch's."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
import transformers
from architectures.table import ARCHITECTURES
from support.ways import WAYS, adapted, save_random_adapter
from torch import nn
from torch.export import Dim
from transformers.integrations.executorch import TorchExportableModuleForDecoderOnlyLM

from lora_ext.export import plain_pytorch

pytestmark = [pytest.mark.cpu_only("makes its inputs on the CPU"), pytest.mark.full]

ROWS = {row.name: row for row in ARCHITECTURES}


def decoder(name: str, directory, way: str = "inject") -> nn.Module:
    base = ROWS[name].build()
    save_random_adapter(base, directory, target_modules="all-linear")
    return adapted(WAYS[way], base, directory).eval()


def our_ops(program: torch.export.ExportedProgram) -> set[str]:
    names = {str(node.target) for module in program.graph_module.modules() for node in module.graph.nodes}
    return {name for name in names if name.startswith("lora_ext.")}


@pytest.mark.parametrize(
    ("name", "way", "strict", "plain"),
    [
        ("Llama", "inject", True, False),
        ("Gemma3", "inject", False, False),
        ("Qwen2", "inject", False, True),
        ("Llama", "accelerate", False, False),
    ],
)
def test_prompts_of_any_length(name, way, strict, plain, tmp_path):
    model, ids = decoder(name, tmp_path, way), ROWS[name].inputs()["input_ids"]
    dynamic = {"input_ids": {0: Dim("batch", min=2), 1: Dim("length", min=2, max=32)}, "use_cache": None}
    if way == "accelerate":  # PEFT's wrapper has no signature that names the arguments
        model = model.get_base_model()
    with plain_pytorch() if plain else nullcontext():
        inputs = {"input_ids": ids, "use_cache": False}
        program = torch.export.export(model, (), inputs, dynamic_shapes=dynamic, strict=strict)
    assert our_ops(program) == (set() if plain or way == "accelerate" else {"lora_ext.lora_linear.default"})
    other = torch.randint(3, 64, (5, 13))
    expected = model(input_ids=other).logits
    torch.testing.assert_close(program.module()(input_ids=other, use_cache=False).logits, expected)


@torch.no_grad()
def test_a_static_cache(tmp_path):
    """Transformers' recipe for devices: one token a call, the cache in the program."""
    model, prompt = decoder("Llama", tmp_path).float(), [5, 9, 3, 17]
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    expected = model.generate(torch.tensor([prompt]), **options)[0].tolist()
    cache = {"batch_size": 1, "max_cache_len": 16}
    model.generation_config = transformers.GenerationConfig(
        use_cache=True, cache_implementation="static", cache_config=cache
    )
    exportable = TorchExportableModuleForDecoderOnlyLM(model, **cache)
    program = exportable.export(input_ids=torch.tensor([[5]]), cache_position=torch.tensor([0]))
    assert our_ops(program) == {"lora_ext.lora_linear.default"}
    run, tokens = program.module(), list(prompt)
    for position in range(len(prompt) + 5):
        token = torch.tensor([[tokens[position]]])
        last = run(input_ids=token, cache_position=torch.tensor([position]))[0, -1]
        if position >= len(prompt) - 1:
            tokens.append(last.argmax().item())
    assert tokens == expected
