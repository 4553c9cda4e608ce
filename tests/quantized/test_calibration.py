"""Merging with error feedback: which codes it chooses, what it keeps, what it refuses."""

from __future__ import annotations

import copy

import pytest
import torch
from support.models import VOCABULARY, refused
from support.quantized import QUANTIZE, quantized_copy, stored, unchanged_bytes
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from lora_ext import LoraConfig, inject, merge, unmerge
from lora_ext.adapters import lora_modules, merge_and_unload, merge_errors
from lora_ext.merging.feedback import LayerInputs, quantize_for
from lora_ext.quantized import quantized_weight

FORMATS = [name for name in QUANTIZE if name not in ("torchao-int4", "torchao-float8")]
pytestmark = pytest.mark.filterwarnings("ignore:.*were quantised again")


def inputs_of(tokens: int, features: int) -> Tensor:
    """Inputs of which a few directions are large, as in language models."""
    return torch.randn(tokens, features) @ (torch.randn(features, features) * torch.logspace(0, -2, features))


# --- codes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", FORMATS)
def test_feedback_lowers_the_error_on_the_inputs(format):
    weight = quantized_weight(QUANTIZE[format](nn.Linear(256, 64)))
    values, x = weight.dequantize() + 1e-3 * torch.randn(64, 256), inputs_of(500, 256)
    errors = []
    for new in (weight.quantize(values), quantize_for(weight, values, LayerInputs([x[:200], x[200:]]))):
        weight.write(new)
        errors.append(((weight.dequantize() - values) @ x.T).norm().item())
    assert errors[1] < (0.6 if "int8" in format else 0.8) * errors[0]


@pytest.mark.parametrize("format", FORMATS)
def test_a_grid_has_the_values_that_its_codes_stand_for(format):
    weight = quantized_weight(QUANTIZE[format](nn.Linear(256, 64)))
    values = weight.dequantize() + 1e-3 * torch.randn(64, 256)
    grid = weight.grid(weight.quantize(values))
    codes, found = grid.nearest(values.T.contiguous(), *grid.of_columns(torch.arange(256)))
    weight.write(grid.pack(codes.T))
    torch.testing.assert_close(weight.dequantize(), found.T, rtol=1e-6, atol=0)
    assert not quantized_weight(QUANTIZE["nf4"](nn.Linear(96, 64))).has_grid  # blocks of 64 go over two rows


def test_codes_follow_the_formula():
    """Against the algorithm in the paper's form, one column at a time and without blocks, in float64."""
    weight = quantized_weight(QUANTIZE["int8"](nn.Linear(80, 24)))
    values, x = weight.dequantize() + 1e-2 * torch.randn(24, 80), inputs_of(300, 80)
    H = (x.T @ x).double()
    order = H.diagonal().argsort(descending=True)
    H = H[order][:, order] + 0.01 * H.diagonal().mean() * torch.eye(80)
    inverse, rest = torch.linalg.inv(H), values[:, order].double()
    scale, expected = values.abs().amax(1).double() / 127, torch.empty(24, 80)
    for j in range(80):
        expected[:, order[j]] = codes = (rest[:, j] / scale).round().clamp(-127, 127)
        error = (rest[:, j] - codes * scale) / inverse[j, j]
        rest[:, j:] -= error[:, None] * inverse[j, j:]
        inverse = inverse - torch.outer(inverse[:, j], inverse[j]) / inverse[j, j]  # without column j
    found = quantize_for(weight, values, LayerInputs([x]))["weight"]
    assert (found.float() != expected).float().mean() < 0.01  # a tie may fall otherwise in float32


def test_where_nearest_is_better_it_is_taken():
    """One token, whose direction the feedback cannot serve in rows that it overshoots: neither may be worse."""
    for seed in range(20):
        torch.manual_seed(seed)
        weight = quantized_weight(QUANTIZE["nf4"](nn.Linear(64, 8)))
        values, x = weight.dequantize() + 1e-5 * torch.randn(8, 64), torch.randn(1, 64)
        errors = []
        for new in (weight.quantize(values), quantize_for(weight, values, LayerInputs([x]))):
            weight.write(new)
            errors.append(((weight.dequantize() - values) @ x.T).norm().item())
        assert errors[1] <= errors[0]


# --- models -----------------------------------------------------------------------------------------------------------


def llama() -> LlamaForCausalLM:
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, max_position_embeddings=32, **sizes))


def adapted(format: str = "nf4", targets: object = "all-linear") -> nn.Module:
    model = quantized_copy(llama(), format, skip=("lm_head",))
    config = LoraConfig(r=4, target_modules=targets, init_lora_weights=False)
    return inject(model, config)


def ids_of(rows: int, length: int, seed: int) -> Tensor:
    return torch.randint(VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


def batches() -> list[dict[str, Tensor]]:
    return [{"input_ids": ids_of(8, 32, seed)} for seed in (1, 2)]


@pytest.mark.parametrize("format", FORMATS)
def test_a_merged_model_keeps_more_of_the_update(format):
    model, ids = adapted(format), ids_of(4, 32, 1)
    with torch.no_grad():
        expected = model.eval()(ids).logits
        errors = {}
        for calibration in (None, batches()):
            with unchanged_bytes(model):
                merge(model, calibration=calibration)
                errors[calibration is None] = (model(ids).logits - expected).norm().item()
                assert merge_errors(model).keys() == {path for path, _ in lora_modules(model)}
                unmerge(model)
            assert torch.equal(model(ids).logits, expected)
    # Layers of bitsandbytes' int8 round their inputs, too, merged or not.
    assert errors[False] < (0.97 if format == "int8" else 0.9) * errors[True]


def test_merging_for_good_has_the_same_bytes():
    model = adapted()
    other = copy.deepcopy(model)
    merge(model, calibration=batches())
    merge_and_unload(other, calibration=batches())
    found, expected = stored(other), stored(model)
    assert [*found.values()] and all(map(torch.equal, found.values(), expected.values()))


def test_layers_that_read_one_tensor_share_a_factorisation(monkeypatch):
    calls = []
    factor = LayerInputs.factor
    monkeypatch.setattr(LayerInputs, "factor", lambda self: calls.append((self, self._factor)) or factor(self))
    model = adapted()
    merge(model, calibration=batches())
    layers = len(model.model.layers)
    assert (
        len(calls) == 7 * layers and len({id(inputs) for inputs, _ in calls}) == 4 * layers
    )  # q/k/v, o, gate/up, down
    assert sum(known is None for _, known in calls) == 4 * layers
    assert all(inputs._factor is None for inputs, _ in calls)  # one in memory


def test_padding_modes_and_hooks_leave_no_trace():
    model, ids = adapted(), ids_of(3, 12, 1)
    plain = copy.deepcopy(model)
    mask = torch.ones_like(ids)
    mask[0, 8:] = 0
    model.train()
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    merge(model, calibration=[{"input_ids": ids, "attention_mask": mask}])
    assert [module.training for module in model.modules()] == modes
    assert not any(layer._forward_pre_hooks for _, layer in lora_modules(model))
    # Each row alone, without its padding, and by position.
    merge(plain, calibration=[(ids[:1, :8],), ids[1:2], [ids[2:]]])
    found, expected = stored(model), stored(plain)
    same = [torch.equal(found[name], expected[name]) for name in found]
    assert sum(same) > 0.9 * len(same)  # sums in another order may round otherwise


def test_a_layer_that_no_batch_reaches_is_rounded_to_nearest():
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.other = nn.Linear(64, 64), nn.Linear(64, 64)

        def forward(self, x: Tensor, both: bool = False) -> Tensor:
            return self.used(x) + (self.other(x) if both else 0)

    model = quantized_copy(Net(), "nf4")
    inject(model, LoraConfig(r=2, target_modules=["used", "other"], init_lora_weights=False))
    nearest = copy.deepcopy(model)
    merge(nearest)
    with pytest.warns(UserWarning, match="merge: no calibration batch reaches 'other'"):
        merge(model, calibration=[inputs_of(200, 64)])
    found, expected = stored(model), stored(nearest)
    assert {name: torch.equal(found[name], expected[name]) for name in found if "weight" in name} == {
        "used.base_layer:weight": False,
        "other.base_layer:weight": True,
    }


# --- refusals ---------------------------------------------------------------------------------------------------------


def test_refusals():
    model = adapted(targets=["q_proj"])
    nan = [{"inputs_embeds": torch.full((1, 4, 64), torch.nan)}]
    for calibration, error, *said in (
        ([], ValueError, "calibration is empty, want about 1,000 tokens"),
        (batches()[0], TypeError, "calibration is a dict, want a list of batches"),
        (nan, ValueError, "calibration: batch 1 gives 'model.layers.0.self_attn.q_proj' NaN or infinite inputs"),
    ):
        with refused(model, error, "merge: ", *said), unchanged_bytes(model):
            merge(model, calibration=calibration)
        assert not any(layer._forward_pre_hooks for _, layer in lora_modules(model))
    merge(model, calibration=batches())
    mixed = quantized_copy(nn.Sequential(nn.Linear(64, 96), nn.Linear(96, 8)), "nf4")
    inject(mixed, LoraConfig(r=2, target_modules=["0", "1"]))
    with pytest.warns(UserWarning, match="calibration has no effect on '1' .bitsandbytes NF4., which are rounded"):
        merge(mixed, calibration=[torch.randn(9, 64)])
    other = inject(quantized_copy(llama(), "torchao-float8"), LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.warns(UserWarning, match="calibration has no effect on 'model.* .torchao float8.*rounded to nearest"):
        merge(other, calibration=batches())
    assert next(lora_modules(other))[1].is_merged


def test_ctrl_c_takes_back_the_layers_that_are_done(monkeypatch):
    model, calls = adapted(), []

    def interrupted(*arguments):
        calls.append(arguments)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return quantize_for(*arguments)

    monkeypatch.setattr("lora_ext.merging.quantized.quantize_for", interrupted)
    with unchanged_bytes(model), pytest.raises(KeyboardInterrupt):
        merge(model, calibration=batches())
    assert len(calls) == 4 and not merge_errors(model)
    monkeypatch.undo()
    merge(model, calibration=batches())
    assert merge_errors(model)
