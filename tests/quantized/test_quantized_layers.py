"""LoRA next to quantised layers: forward, gradients, copies, compilation; the same as plain PyTorch on their output."""

import copy
import io
import warnings

import pytest
import torch
from support.optional import bitsandbytes
from support.quantized import QUANTIZE, quantized_copy, stored, unchanged_bytes
from torch import nn
from torchao.quantization import (
    Float8WeightOnlyConfig,
    Int8DynamicActivationInt8WeightConfig,
    Int8WeightOnlyConfig,
    IntxWeightOnlyConfig,
    PerGroup,
    PerTensor,
    quantize_,
)
from torchao.quantization.quant_primitives import MappingType
from torchao.quantization.quantize_.workflows import Int4TilePackedTo4dTensor

from lora_ext import LoraConfig, inject
from lora_ext.adapters import disable_adapters, unload
from lora_ext.nn import LoraLinear
from lora_ext.quantized import quantized_weight

FORMATS = list(QUANTIZE)
BREAKS = ("nf4-double", "int8")  # of bitsandbytes, whose functions break graphs
TORCHAO = [name for name in FORMATS if name.startswith("torchao")]
CONFIG = LoraConfig(r=4, lora_alpha=6, target_modules=["up", "down"], init_lora_weights=False, lora_bias=True)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(64, 128)
        self.down = nn.Linear(128, 64, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(torch.tanh(self.up(x)))


class Packed(nn.Module):
    """Stands for a quantised linear layer of another library, which is no nn.Linear and has no weight."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.register_buffer("qweight", torch.zeros(out_features, in_features, dtype=torch.int8))


def net(format: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    return quantized_copy(Net().to(dtype), format)


def by_hand(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """The same with plain products on what the base layers return."""

    def layer(lora: LoraLinear, x: torch.Tensor) -> torch.Tensor:
        adapter = lora.adapters["default"]
        update = x.to(adapter.lora_A.dtype) @ adapter.lora_A.T @ adapter.lora_B.T + adapter.lora_bias
        y = lora.base_layer(x)
        return (y + adapter.scaling * update).to(y.dtype)

    return layer(model.down, torch.tanh(layer(model.up, x)))


def step(run, model: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    """The output and all gradients."""
    x = x.detach().requires_grad_()
    model.zero_grad(set_to_none=True)
    y = run(x)
    y.float().square().sum().backward()
    gradients = [p.grad for p in model.parameters() if p.requires_grad]
    assert len(gradients) == 6 and all(gradient is not None for gradient in gradients)
    return [y.detach(), x.grad, *gradients]


def assert_same(ours: list[torch.Tensor], theirs: list[torch.Tensor], tolerance: float = 1e-5) -> None:
    for actual, expected in zip(ours, theirs, strict=True):
        assert actual.dtype == expected.dtype
        error = (actual.float() - expected.float()).norm()
        assert error <= tolerance * expected.float().norm(), (error, expected.norm())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, "autocast"], ids=str)
@pytest.mark.parametrize("format", FORMATS)
def test_output_and_gradients(format, dtype):
    autocast = torch.autocast(torch.get_default_device().type, torch.bfloat16, enabled=dtype == "autocast")
    dtype = torch.float32 if dtype == "autocast" else dtype
    model, x = net(format, dtype), torch.randn(2, 5, 64).to(dtype)
    base = model(x)
    fresh = inject(copy.deepcopy(model), LoraConfig(r=4, target_modules=["up", "down"]))
    torch.testing.assert_close(fresh(x), base)
    inject(model, CONFIG)
    assert {type(model.up), type(model.down)} == {LoraLinear}
    for layer in (model.up, model.down):
        nn.init.normal_(layer.adapters["default"].lora_bias)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    rounding = torch.bfloat16 if autocast._enabled else dtype
    with autocast:  # in 16 bits two roundings of the same sums at different places
        tolerance = max(1e-5, 4 * torch.finfo(rounding).eps)
        assert_same(step(model, model, x), step(lambda x: by_hand(model, x), model, x), tolerance)
    with disable_adapters(model):
        torch.testing.assert_close(model(x), model.down.base_layer(torch.tanh(model.up.base_layer(x))))


@pytest.mark.parametrize("format", [*(pytest.param(f, marks=pytest.mark.full) for f in BREAKS), "torchao-int8"])
def test_compilation(format):
    model, base, x = inject(net(format), CONFIG), net(format), torch.randn(6, 64)
    torch._dynamo.reset()
    breaks = torch._dynamo.explain(base)(x).graph_break_count
    torch._dynamo.reset()
    assert torch._dynamo.explain(model)(x).graph_break_count <= breaks
    torch._dynamo.reset()
    assert_same(step(torch.compile(model, backend="aot_eager"), model, x), step(model, model, x))


@pytest.mark.parametrize("format", FORMATS)
def test_evaluation_between_training_steps_changes_no_byte(format):
    """bitsandbytes packs a 4-bit weight for some CPUs in eval mode, which rounds its scales and ends training."""
    base = net(format)
    packs = getattr(base.up, "support_avx512bf16_for_cpu", None)
    model, x = inject(base, CONFIG), torch.randn(6, 64)
    expected = step(model, model, x)
    with unchanged_bytes(model):
        model.eval()
        with torch.no_grad():
            y = model(x)
        assert (y - expected[0]).norm() <= 0.02 * expected[0].norm()  # LLM.int8 quantises the input in eval mode
        model.train()
        assert_same(step(model.to(x.device), model, x), expected)
    assert getattr(unload(model).up, "support_avx512bf16_for_cpu", None) == packs


@pytest.mark.parametrize("format", ["nf4", "fp4", "nf4-double"])
@pytest.mark.parametrize("unpacked", [False, True])
def test_the_scales_of_a_packed_weight_keep_their_order(unpacked, format):
    """bitsandbytes transposes them, and without double quantisation it does not transpose them back."""
    base = nn.Sequential(nn.Linear(256, 64))
    with torch.no_grad():
        base[0].weight.mul_(torch.logspace(-1, 1, 64)[:, None])
    base = quantized_copy(base, format)
    expected = quantized_weight(base[0]).dequantize()
    weight = base[0].weight
    # As a call in eval mode does on some CPUs.
    weight.data, _ = bitsandbytes.functional._convert_weight_packed_for_cpu(weight.data, weight.quant_state)
    if unpacked:
        base.state_dict()
    model = inject(base, LoraConfig(r=2, target_modules=["0"]))
    found = quantized_weight(model[0].base_layer).dequantize()
    assert (found - expected).norm() <= 2**-8 * expected.norm()  # bfloat16's rounding of the scales
    x = torch.randn(6, 256)
    torch.testing.assert_close(model(x), x @ found.T + model[0].base_layer.bias, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("how", ["deepcopy", "torch.save"])
@pytest.mark.parametrize("format", FORMATS)
def test_copies(format, how):
    model, x = inject(net(format), CONFIG), torch.randn(6, 64)
    other = copy.deepcopy(model)  # bitsandbytes itself loads no int8 state into a layer that was called
    expected = step(model, model, x)
    if how == "torch.save":
        file = io.BytesIO()
        torch.save(model.state_dict(), file)
        file.seek(0)
        nn.init.zeros_(other.up.adapters["default"].lora_A)
        # bitsandbytes itself does not load the scales of a 4-bit weight.
        other.load_state_dict(torch.load(file, weights_only=format not in TORCHAO), strict="4" not in format)
    else:
        other = copy.deepcopy(model)
    nn.init.zeros_(model.up.adapters["default"].lora_A)
    assert_same(step(other, other, x), expected)
    assert all(torch.equal(a, b) for a, b in zip(stored(model).values(), stored(other).values(), strict=True))


def test_every_layer_that_cannot_be_adapted_is_listed():
    model = net("nf4")
    model.tile, model.scaled, model.fine = nn.Linear(128, 64), nn.Linear(32, 32), nn.Linear(4, 4)
    # Its kernels need CUDA; here the weight is put together by hand.
    packed, scales = torch.zeros(8, 4, 32, 4, dtype=torch.int32), torch.ones(2, 64, 2, dtype=torch.bfloat16)
    tile = Int4TilePackedTo4dTensor(packed, scales, [1, 32], torch.Size([64, 128]))
    model.tile.weight = nn.Parameter(tile, requires_grad=False)
    quantize_(model.scaled, Int8DynamicActivationInt8WeightConfig())
    model.sixteen, model.table = bitsandbytes.nn.Linear8bitLt(4, 4), bitsandbytes.nn.Embedding4bit(4, 64)
    model.packed, model.lazy, model.integer = Packed(4, 4), nn.LazyLinear(4), nn.Linear(4, 4)
    model.integer.weight = nn.Parameter(torch.ones(4, 4, dtype=torch.int8), requires_grad=False)
    targets = ["tile", "scaled", "sixteen", "table", "packed", "lazy", "integer", "fine"]
    before = {path: id(module) for path, module in model.named_modules()}
    with pytest.raises(TypeError) as caught:
        inject(model, LoraConfig(target_modules=targets, modules_to_save=["down"], target_parameters=["up.weight"]))
    for line in (
        "tile (Linear): its weight is a torchao Int4TilePackedTo4dTensor, whose kernels compute no gradient; use",
        "scaled (Linear): torchao (Int8Tensor) quantises its input too, and passes no gradient to it; use a weight-",
        "sixteen (Linear8bitLt): it keeps 16-bit weights and quantises them in each call; set has_fp16_weights=False",
        "table (Embedding4bit): it is quantised as bitsandbytes Embedding4bit, and only Linear4bit and Linear8bitLt",
        "packed (Packed): it is quantised in a format that is not supported (Packed has a qweight); load the",
        "lazy (LazyLinear): its weight is not initialised yet",
        "integer (Linear): its weight is torch.int8, want one of",
        "down (Linear4bit): modules_to_save would train its quantised weight",
        "up.weight: it is quantised as bitsandbytes",
    ):
        assert line in str(caught.value)
    assert "fine" not in str(caught.value)
    assert {path: id(module) for path, module in model.named_modules()} == before


def _torchao(config):
    def make(linear: nn.Linear) -> nn.Linear:
        quantize_(linear, config)
        return linear.requires_grad_(False)

    return make


VARIANTS = {
    "int4, asymmetric": _torchao(
        IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32), mapping_type=MappingType.ASYMMETRIC)
    ),
    "int2, rows": _torchao(IntxWeightOnlyConfig(weight_dtype=torch.int2)),
    "int8, the whole tensor": _torchao(Int8WeightOnlyConfig(granularity=PerTensor())),
    "float8, the whole tensor": _torchao(Float8WeightOnlyConfig(granularity=PerTensor())),
}


@pytest.mark.parametrize(
    ("format", "dtype"),
    [(name, torch.float32) for name in [*QUANTIZE, *VARIANTS]] + [(name, torch.bfloat16) for name in VARIANTS],
    ids=str,
)
def test_a_format_describes_its_weight(format, dtype):
    """Quantising the values again gives tensors of the same kind, whose values are as near as the first."""
    linear = nn.Linear(128, 96).to(dtype)
    values, bias = linear.weight.detach().float().clone(), linear.bias.float()
    weight = quantized_weight((QUANTIZE | VARIANTS)[format](linear))
    assert weight.shape == (96, 128)
    first = weight.dequantize()
    assert first.dtype == torch.float32 and first.shape == values.shape
    error = (first - values).norm() / values.norm()
    assert error > 0 and (format in VARIANTS or error < (0.14 if "4" in format else 0.04))
    before, again = weight.stored(), weight.quantize(values)
    assert {n: (t.shape, t.dtype) for n, t in again.items()} == {n: (t.shape, t.dtype) for n, t in before.items()}
    weight.write(again)
    assert (weight.dequantize() - values).norm() / values.norm() <= error * (1.02 if format in VARIANTS else 1 + 1e-3)
    x = torch.randn(5, 128).to(dtype)
    y = weight.module.train()(x)
    expected = x.float() @ weight.dequantize().T + bias
    rtol, atol = (1e-4, 1e-3) if format in QUANTIZE else (1e-4, 1e-5) if dtype == torch.float32 else (0.02, 0.02)
    torch.testing.assert_close(y.float(), expected, rtol=rtol, atol=atol)


@pytest.mark.full
@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("format", FORMATS)
@torch.no_grad()
def test_exported_programs_compute_the_same(format, strict):
    model, x = inject(net(format), CONFIG).eval(), torch.randn(5, 64)
    expected = model(x)
    if not (strict or format in TORCHAO):
        for module in (model, model.up.base_layer):  # bitsandbytes cannot either, and says so in words of its own
            with pytest.raises((RuntimeError, AttributeError)):
                torch.export.export(module, (x,), strict=False)
        return
    program = torch.export.export(model, (x,), strict=strict)
    torch.testing.assert_close(program.module()(x), expected)
    assert sum("lora_ext" in str(node.target) for node in program.graph.nodes) == 2


def test_all_linear_tells_of_the_quantised_layers_that_it_leaves_out():
    model = nn.Sequential(nn.Linear(4, 4), Packed(4, 4), Packed(4, 4))
    with pytest.warns(UserWarning, match=r"leaves out \['1', '2'\] of Sequential; name them in target_modules"):
        inject(model, LoraConfig(r=2, target_modules="all-linear"))
    with pytest.raises(ValueError, match="nothing is left to adapt .*; name a layer in target_modules to see why"):
        inject(nn.Sequential(Packed(4, 4)), LoraConfig(r=2, target_modules="all-linear"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        excluded = LoraConfig(r=2, target_modules="all-linear", exclude_modules=["1", "2"])
        inject(nn.Sequential(nn.Linear(4, 4), Packed(4, 4), Packed(4, 4)), excluded)
