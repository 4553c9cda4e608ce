"""Adapters of stacked experts saved by PEFT before and after its change of layout: the present one is read."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.layers import delta_of
from support.models import refused
from torch import Tensor, nn

from lora_ext import LoraConfig, load_adapter, save_adapter
from lora_ext.adapters import lora_modules

R, NUM_EXPERTS, SCALING = 2, 3, 1.5


class Experts(nn.Module):
    def __init__(self, transposed: bool, sizes: tuple[tuple[int, int], ...]) -> None:
        super().__init__()
        self.is_transposed = transposed
        for name, (rows, columns) in zip(("up", "down"), sizes, strict=False):
            self.register_parameter(name, nn.Parameter(torch.zeros(NUM_EXPERTS, rows, columns, dtype=torch.float64)))

    def forward(self) -> list[Tensor]:
        return [parameter * 1.0 for parameter in (self.up, getattr(self, "down", None)) if parameter is not None]


def base(transposed: bool, *sizes: tuple[int, int]) -> nn.Module:
    return nn.ModuleDict({"experts": Experts(transposed, sizes)})


def saved(directory, model: nn.Module, version: str | None, is_exchanged: bool) -> dict[str, Tensor]:
    """Writes an adapter as PEFT does; returns the updates by parameter.

    ``is_exchanged``: the sizes ``[num_experts, in, out]`` are read off the parameter, as PEFT 0.17 to 0.18 do; the
    formulas are those of PEFT's get_delta_weight.
    """
    tensors, updates = {}, {}
    parameters = dict(model["experts"].named_parameters())
    for level, (name, parameter) in enumerate(parameters.items()):
        _, first, last = parameter.shape
        sizes = (first, last) if is_exchanged else (last, first)
        A = torch.randn(R * NUM_EXPERTS, sizes[0], dtype=torch.float64)
        B = torch.randn(sizes[1], R * NUM_EXPERTS, dtype=torch.float64)
        formula = "o r e, e r i -> e i o" if is_exchanged else "o r e, e r i -> e o i"
        updates[name] = SCALING * torch.einsum(formula, B.reshape(len(B), R, -1), A.reshape(NUM_EXPERTS, R, -1))
        path = "base_model.model.experts." + "base_layer." * (len(parameters) - 1 - level)
        tensors |= {f"{path}lora_A.weight": A, f"{path}lora_B.weight": B}
    config = LoraConfig(r=R, lora_alpha=3, target_modules=[], target_parameters=[f"experts.{n}" for n in parameters])
    values = config.to_dict() | ({"peft_version": version} if version else {})
    directory.mkdir()
    (directory / "adapter_config.json").write_text(json.dumps(values))
    save_file(tensors, directory / "adapter_model.safetensors")
    return updates


RECTANGULAR, SQUARE = ((8, 5), (4, 8)), ((6, 6),)
# (version, the sizes are read as [experts, in, out]) for parameters [experts, out, in], then for [experts, in, out]
PRESENT = [(False, "0.19.1", False), (False, "0.21.2", False), (True, "0.19.1", True), (True, "0.21.2@main", True)]
OLD = [(True, None, True), (True, "0.18.1", True)]  # the same layout, and so read if the shapes say it
EXCHANGED = [(False, None, True), (False, "0.18.1", True), (False, "0.19.0", True), (False, "0.19.1.dev0", True)]
EXCHANGED += [(True, "0.19.0", False), (True, "0.19.1.dev0", False)]


@pytest.mark.parametrize(
    ("transposed", "version", "is_exchanged", "sizes"),
    [*((*case, SQUARE) for case in PRESENT), *((*case, RECTANGULAR) for case in PRESENT + OLD)],
)
def test_the_present_layout_is_read(transposed, version, is_exchanged, sizes, tmp_path):
    model = base(transposed, *sizes)
    updates = saved(tmp_path / "file", model, version, is_exchanged)
    load_adapter(model, tmp_path / "file")
    for found, update in zip(model["experts"](), updates.values(), strict=True):
        torch.testing.assert_close(found, update)
    for _, layer in lora_modules(model):
        torch.testing.assert_close(delta_of(layer), updates[layer.parameter_name])

    save_adapter(model, tmp_path / "again")
    config = json.loads((tmp_path / "again" / "adapter_config.json").read_text())
    assert config["peft_version"] == (version if version in ("0.21.2", "0.21.2@main") else "0.19.1")
    again = load_adapter(base(transposed, *sizes), tmp_path / "again")
    assert all(torch.equal(*pair) for pair in zip(again["experts"](), model["experts"](), strict=True))


@pytest.mark.parametrize(("transposed", "version", "is_exchanged"), EXCHANGED + OLD)
def test_square_experts_of_an_old_peft_are_refused_and_shapes_tell_others(transposed, version, is_exchanged, tmp_path):
    model = base(transposed, *SQUARE)
    saved(tmp_path / "square", model, version, is_exchanged)
    words = "square experts", f"peft_version in adapter_config.json is {version!r}"
    with refused(model, ValueError, "load_adapter: ", *words):
        load_adapter(model, tmp_path / "square")
    if (transposed, version, is_exchanged) in EXCHANGED:
        model = base(transposed, *RECTANGULAR)
        saved(tmp_path / "file", model, version, is_exchanged)
        with refused(model, ValueError, "shape of base_model.model.experts.base_layer.lora_A.weight: [6, "):
            load_adapter(model, tmp_path / "file")


def test_one_adapter_for_each_expert_is_refused(tmp_path):
    model = base(False, *RECTANGULAR)
    saved(tmp_path / "each", model, None, False)
    file = tmp_path / "each" / "adapter_model.safetensors"
    save_file({key.replace("experts.", "experts.0."): value for key, value in load_file(file).items()}, file)
    with refused(model, ValueError, "one adapter for each expert. PEFT converts"):
        load_adapter(model, tmp_path / "each")
