"""Exported programs run without lora_ext, with our ops and their library or plain PyTorch; decoders export, too."""

from __future__ import annotations

import contextlib
import copy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from architectures.table import ARCHITECTURES
from support.ways import WAYS, adapted, save_random_adapter
from torch import Tensor, nn
from torch.export import Dim
from transformers.integrations.executorch import TorchExportableModuleForDecoderOnlyLM

from lora_ext import LoraConfig, functional, inject, set_adapter
from lora_ext.adapters import merge_and_unload
from lora_ext.export import library_paths, plain_pytorch
from lora_ext.functional import bottleneck, lora_linear_siblings

pytestmark = [pytest.mark.cpu_only("the subprocesses compute on the CPU"), pytest.mark.full]

ALIVE = {"r": 2, "lora_alpha": 6, "init_lora_weights": False}
BATCH = Dim("batch", min=2)

RUN = """
import sys
sys.modules["lora_ext"] = None  # importing it raises, even if it is installed
import torch
folder, kind, libraries = sys.argv[1], sys.argv[2], sys.argv[3:]
for library in libraries:
    torch.ops.load_library(library)
inputs, expected = torch.load(folder + "/values.pt")
if kind == "export":
    model = torch.export.load(folder + "/program.pt2").module()
else:
    model = torch._inductor.aoti_load_package(folder + "/package.pt2")
torch.testing.assert_close(model(*inputs), expected)
assert not [name for name in sys.modules if name.startswith("lora_ext.")]
print("equal")
"""


class Net(nn.Module):
    """A layer of each kind, with two adapters on some."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 8)
        self.conv = nn.Conv1d(8, 12, 3, padding=1)
        self.attention = nn.MultiheadAttention(12, 2, batch_first=True)
        self.up, self.down = nn.Linear(12, 16), nn.Linear(16, 5)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.conv(self.embed(ids).transpose(1, 2)).transpose(1, 2)
        x = self.attention(x, x, x, need_weights=False)[0]
        return self.down(torch.relu(self.up(x)))


class Ops(nn.Module):
    """The ops that inject does not use: siblings, and shrink and expand in a bottleneck."""

    def __init__(self) -> None:
        super().__init__()
        shapes = {"q": (6, 8), "A": (2, 8), "B": (6, 2), "down": (3, 8), "up": (8, 3)}
        self.tensors = nn.ParameterDict({name: torch.randn(shape) for name, shape in shapes.items()})

    def forward(self, x: Tensor) -> Tensor:
        t = self.tensors
        q, v = lora_linear_siblings(x, [t.q, t.q], [None, None], [t.A, 2 * t.A], [t.B, t.B], [0.5, 2.0])
        return torch.cat([q, v, bottleneck(x, t.down, None, t.up, t.q.sum(0))], dim=-1)


def net() -> nn.Module:
    model = Net()
    for name in ("first", "second"):
        targets = ["up", "down"] if name == "second" else ["embed", "conv", "attention", "up", "down"]
        inject(model, LoraConfig(target_modules=targets, lora_dropout=0.1, **ALIVE), adapter_name=name)
    return set_adapter(model, ["first", "second"]).eval()


def exported(model: nn.Module, inputs: Tensor, **options) -> torch.export.ExportedProgram:
    return torch.export.export(model, (inputs,), dynamic_shapes=({0: BATCH},), **options)


def our_ops(program: torch.export.ExportedProgram) -> set[str]:
    names = {str(node.target) for module in program.graph_module.modules() for node in module.graph.nodes}
    return {name for name in names if name.startswith("lora_ext.")}


def run_elsewhere(folder: Path, kind: str, inputs: Tensor, expected: Tensor, libraries: list[Path]) -> None:
    torch.save(((inputs,), expected.detach()), folder / "values.pt")
    command = [sys.executable, "-I", "-c", RUN, folder, kind, *libraries]
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert result.stdout == "equal\n", result.stderr


@pytest.mark.parametrize("plain", [False, True], ids=["ops", "plain"])
def test_a_program_runs_without_the_package(plain, tmp_path):
    model = net()
    if plain:
        model.double()  # PyTorch's products round differently
        with plain_pytorch():
            program = exported(model, torch.randint(20, (3, 7)))
        assert not our_ops(program)
    else:
        model.down.adapters["second"].bfloat16()  # of another dtype than the first: not joined
        program = exported(model, torch.randint(20, (3, 7)))
        assert our_ops(program) == {"lora_ext.lora_linear.default", "lora_ext.lora_delta_.default"}
    torch.export.save(program, tmp_path / "program.pt2")
    ids = torch.randint(20, (5, 7))
    run_elsewhere(tmp_path, "export", ids, model(ids), [] if plain else library_paths())


@pytest.mark.parametrize(
    ("dtype", "strict"),
    [(torch.float64, False), (torch.float32, True), (torch.float32, False), (torch.bfloat16, False)],
)
def test_plain_formulas_of_every_op(dtype, strict):
    model, x = Ops().to(dtype), torch.randn(3, 4, 8, dtype=dtype)
    assert len(our_ops(exported(model, x))) == 3
    with plain_pytorch():
        program = exported(model, x, strict=strict)
    assert not our_ops(program)
    other = torch.randn(6, 4, 8, dtype=dtype)
    expected = copy.deepcopy(model).double()(other.double())
    error = (program.module()(other).double() - expected).abs().max()
    assert error <= 8 * torch.finfo(dtype).eps * expected.abs().max()


class Rows(nn.Module):
    """The ops for mixed batches. Graphs of our function have the first only."""

    def forward(self, x: Tensor, tensors: dict[str, Tensor]) -> Tensor:
        weight, bias, A, B, groups, scalings = tensors.values()
        y = functional.lora_grouped_linear(x, weight, bias, A, B, groups, scalings)
        return y + torch.ops.lora_ext.lora_grouped_linear(x, 2 * weight, None, [A], [B], groups, scalings)


def test_plain_formulas_of_rows_that_choose():
    shapes = {"weight": (6, 8), "bias": (6,), "A": (3, 2, 8), "B": (3, 6, 2)}
    tensors = {name: torch.randn(shape, dtype=torch.float64) for name, shape in shapes.items()}
    tensors |= {"groups": torch.tensor([2, -1, 0]), "scalings": torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)}
    model, x = Rows(), torch.randn(3, 8, dtype=torch.float64)
    ours = {"lora_ext.lora_grouped_.default", "lora_ext.lora_grouped_linear.default"}
    assert our_ops(torch.export.export(model, (x, tensors))) == ours
    with plain_pytorch():
        program = torch.export.export(model, (x, tensors))
    assert not our_ops(program)
    torch.testing.assert_close(program.module()(x, tensors), model(x, tensors))


def test_plain_program_has_gradients():
    model, ids = net(), torch.randint(20, (3, 7))
    with plain_pytorch():
        program = exported(model, ids)
    gradients = []
    for run in (model, program.module()):
        run(ids).square().sum().backward()
        named = {name: p.grad for name, p in run.named_parameters() if p.grad is not None}
        gradients.append(named)
    assert gradients[0].keys() == gradients[1].keys() and len(gradients[0]) > 10
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=name)


def test_torchscript_is_traced_and_scripted_once_the_adapter_is_merged():
    model = inject(nn.Sequential(nn.Linear(4, 3)), LoraConfig(target_modules=["0"], **ALIVE))
    x = torch.randn(2, 4)
    expected = model(x)
    with torch.no_grad():
        assert "lora_ext::" in str(torch.jit.trace(model, (x,)).inlined_graph)
        with plain_pytorch():
            traced = torch.jit.trace(model, (x,))
    assert "lora_ext::" not in str(traced.inlined_graph)
    torch.testing.assert_close(traced(x), expected)
    torch.testing.assert_close(torch.jit.script(merge_and_unload(model))(x), expected)


def test_dropout_is_refused():
    wanted = r"plain_pytorch: dropout_p is 0.1.*call model.eval\(\) first"
    with plain_pytorch(), pytest.raises(ValueError, match=wanted):
        exported(net().train(), torch.randint(20, (3, 7)))


@pytest.mark.parametrize("plain", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["ops", "plain"])
def test_aotinductor(plain, tmp_path):
    """Packages linear layers alone: compiling PyTorch's own operations takes most of the time."""
    model = nn.Sequential(nn.Linear(7, 6), nn.ReLU(), nn.Linear(6, 5))
    inject(model, LoraConfig(target_modules="all-linear", **ALIVE)).eval()
    x = torch.randn(5, 7)
    with plain_pytorch() if plain else contextlib.nullcontext():
        program = exported(model, torch.randn(3, 7))
    torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "package.pt2"))
    run_elsewhere(tmp_path, "package", x, model(x), [] if plain else library_paths())


# --- decoders: prompts of any length, a static cache ------------------------------------------------------------------

ROWS = {row.name: row for row in ARCHITECTURES}


def decoder(name: str, directory, way: str = "inject") -> nn.Module:
    base = ROWS[name].build()
    save_random_adapter(base, directory, target_modules="all-linear")
    return adapted(WAYS[way], base, directory).eval()


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
    dynamic = {"input_ids": {0: BATCH, 1: Dim("length", min=2, max=32)}, "use_cache": None}
    if way == "accelerate":  # PEFT's wrapper has no signature that names the arguments
        model = model.get_base_model()
    with plain_pytorch() if plain else contextlib.nullcontext():
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
