"""merge(rounding="stochastic") of models, of PEFT's accelerated models, and of checkpoints on disk: the same bits."""

from __future__ import annotations

import contextlib
import copy
import pickle
import re

import peft
import pytest
import torch
from support.merging import same_bits
from torch import Tensor, nn

from lora_ext import LoraConfig, inject, merge, save_adapter, unmerge
from lora_ext.adapters import merge_and_unload, merge_errors
from lora_ext.checkpoints import merge as merge_on_disk
from lora_ext.functional import lora_merge_
from lora_ext.integrations.peft import accelerate
from lora_ext.merging.rounding import LayerSeed, draws_for

SEED = 2**63 + 5
SETTINGS = {"r": 3, "target_modules": ["up", "down"], "init_lora_weights": False}


class Net(nn.Module):
    """Two layers of one shape, and a third that no adapter changes."""

    def __init__(self, dtype: torch.dtype = torch.bfloat16) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.up, self.down, self.head = (nn.Linear(40, 40, dtype=dtype) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.down(self.up(x)))


def adapted(dtype: torch.dtype = torch.bfloat16, **settings) -> nn.Module:
    torch.manual_seed(5)
    return inject(Net(dtype), LoraConfig(**SETTINGS | settings))


def bits_of(model: nn.Module) -> dict[str, Tensor]:
    """Returns the frozen parameters, by their names without adapters."""
    state = model.state_dict().items()
    return {key.replace("base_layer.", ""): value for key, value in state if not re.search("lora_|_extra_state", key)}


def assert_same(model: nn.Module, expected: dict[str, Tensor]) -> None:
    state = bits_of(model)
    for key, value in expected.items():
        assert same_bits(state[key], value), key


def expected_weights(model: nn.Module, seed: int = SEED) -> dict[str, Tensor]:
    """Merges each layer's weight by the op, with the random numbers of its path."""
    weights = {}
    for path in ("up", "down"):
        layer = model.get_submodule(path)
        adapter, weight = layer.adapters["default"], layer.base_layer.weight.detach().clone()
        numbers = draws_for(LayerSeed(seed, path)).seed
        lora_merge_(weight, adapter.lora_A, adapter.lora_B, adapter.scaling, seed=numbers)
        weights[f"{path}.weight"] = weight
    return weights


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_model_is_merged_by_its_paths_and_comes_back(dtype):
    model = adapted(dtype)
    before, expected = copy.deepcopy(bits_of(model)), expected_weights(model)
    assert merge(model, rounding="stochastic", seed=SEED) is model
    assert_same(model, expected)
    assert not same_bits(expected["up.weight"], expected_weights(model, 1)["up.weight"])
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), model):
        assert_same(unmerge(other), before)
    plain = merge_and_unload(model, rounding="stochastic", seed=SEED)
    assert type(plain.up) is nn.Linear
    assert_same(plain, expected)


def test_taking_one_of_two_adapters_out_keeps_the_rounding():
    model = adapted()
    inject(model, LoraConfig(**SETTINGS), adapter_name="other")
    before, alone = copy.deepcopy(bits_of(model)), expected_weights(model)
    merge(model, ["default", "other"], rounding="stochastic", seed=SEED)
    both = copy.deepcopy(bits_of(model))
    assert_same(unmerge(model, "other"), alone)
    merge(model, "other", rounding="stochastic", seed=SEED)
    assert_same(model, both)
    merge(unmerge(model), "default")  # to nearest, as before
    assert not same_bits(bits_of(model)["up.weight"], alone["up.weight"])
    assert_same(unmerge(model), before)


def test_peft_and_the_checkpoint_on_disk_get_the_same_bits(tmp_path):
    from safetensors.torch import load_file, save_file

    model = adapted()
    before, expected = copy.deepcopy(bits_of(model)), expected_weights(model)
    save_adapter(model, tmp_path / "adapter")
    (tmp_path / "base").mkdir()
    save_file({key: value.clone() for key, value in before.items()}, tmp_path / "base" / "model.safetensors")
    options = {"rounding": "stochastic", "seed": SEED}
    merge_on_disk(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "out", **options)
    on_disk = load_file(tmp_path / "out" / "model.safetensors")
    assert all(same_bits(on_disk[key], value) for key, value in expected.items())

    wrapped = peft.PeftModel.from_pretrained(Net(), tmp_path / "adapter")
    accelerate(wrapped, merge_rounding="stochastic", merge_seed=SEED)
    layers = wrapped.base_model.model
    wrapped.merge_adapter()
    assert all(same_bits(layers.get_parameter(f"{key[:-7]}.base_layer.weight"), v) for key, v in expected.items())
    wrapped.unmerge_adapter()
    for path in ("up", "down"):
        assert same_bits(layers.get_parameter(f"{path}.base_layer.weight"), before[f"{path}.weight"])
    assert_same(wrapped.merge_and_unload(), expected)


# --- what rounding loses ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("scaling", [1.0, 0.002])
def test_merge_errors_say_what_is_kept_and_a_merge_warns(scaling, rounding):
    """A small update: to nearest, most weights stay as they are."""
    model = adapted(lora_alpha=3 * scaling)
    before, update = bits_of(model)["up.weight"].double(), model.up.delta_weight().detach().double()
    before = before.clone()
    loses = scaling < 1 and rounding == "nearest"
    text = r"^merge: rounding to 16 bits keeps less than 95% of the update in 2 of 2 weights \(.*% in '.*'\); rounding="
    with pytest.warns(UserWarning, match=text) if loses else contextlib.nullcontext():
        merge(model, rounding=rounding)
    errors = merge_errors(model)
    assert errors.keys() == {"up", "down"}
    change, error = bits_of(model)["up.weight"].double() - before, errors["up"]
    assert error.kept == pytest.approx(((change * update).sum() / update.square().sum()).item(), rel=1e-4)
    assert error.unchanged == (change == 0).double().mean()
    assert error.of_update == pytest.approx(((change - update).norm() / update.norm()).item(), rel=1e-4)
    assert error.largest == pytest.approx((change - update).abs().max().item(), rel=1e-4)
    assert error.kept < 0.9 if loses else 0.7 < error.kept < 1.3
    unmerge(model)
    assert (bits_of(model)["up.weight"] == before).all()  # the question changed nothing
    assert merge_errors(model) == {}


def test_a_dora_adapter_of_peft_is_not_rounded_stochastically():
    theirs = peft.get_peft_model(Net(), peft.LoraConfig(**SETTINGS, use_dora=True))
    model = accelerate(theirs, merge_rounding="stochastic")
    with pytest.raises(ValueError, match=r"^merge: the weight of 'up' cannot be rounded stochastically: of DoRA"):
        model.merge_adapter()


@pytest.mark.parametrize("stored, dtype", [(torch.float32, None), (torch.float32, torch.bfloat16)], ids=str)
def test_a_checkpoint_that_does_not_stay_in_16_bits_is_refused(tmp_path, stored, dtype):
    from safetensors.torch import save_file

    model = adapted(stored)
    save_adapter(model, tmp_path / "adapter")
    (tmp_path / "base").mkdir()
    save_file({key: value.clone() for key, value in bits_of(model).items()}, tmp_path / "base" / "model.safetensors")
    with pytest.raises(ValueError, match=r"is stored as torch.float32 and becomes .*leave it out, or convert"):
        merge_on_disk(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "out", dtype=dtype, rounding="stochastic")
    assert not (tmp_path / "out").exists()
