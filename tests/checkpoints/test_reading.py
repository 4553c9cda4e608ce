"""The reading interface of lora_ext.checkpoints: tensors, the layers and factors of adapters."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file
from support.checkpoint_files import EveryLayer, peft_adapter, save_checkpoint

from lora_ext.checkpoints import Checkpoint, find_layers, merge, open_adapter

pytestmark = pytest.mark.cpu_only("is about files, which hold CPU tensors")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
@pytest.mark.parametrize("shape", [(7, 3), (5, 2, 4), (6,), (), (0, 3), (4, 0)])
def test_tensors_are_read_whole_and_in_parts(tmp_path, dtype, shape):
    tensor = torch.arange(torch.Size(shape).numel()).reshape(shape).to(dtype)
    save_file({"before": torch.zeros(3), "t": tensor}, tmp_path / "model.safetensors")
    checkpoint, half = Checkpoint.open(tmp_path), tensor.numel() // 2
    assert torch.equal(checkpoint.elements("t", half, tensor.numel()), tensor.flatten()[half:])
    assert torch.equal(checkpoint.elements("t", 0, tensor.numel()), tensor.flatten())
    assert torch.equal(checkpoint.tensor("t"), tensor)


def test_a_dtype_that_torch_lacks_is_named(tmp_path):
    save_file({"t": torch.zeros(2, 4, dtype=torch.uint8)}, tmp_path / "model.safetensors")
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes().replace(b'"dtype":"U8"', b'"dtype":"X8"'))
    with pytest.raises(ValueError, match="X8"):
        Checkpoint.open(tmp_path).tensor("t")


@pytest.fixture
def files(tmp_path):
    torch.manual_seed(0)
    model = EveryLayer()
    settings = {"target_modules": ["lin", "square", "embed"], "target_parameters": ["experts.gate_up"]}
    save_checkpoint(model.state_dict(), tmp_path / "base")
    peft_adapter(model, tmp_path / "adapter", **settings)
    return tmp_path / "base", tmp_path / "adapter"


def test_factors_of_a_layer_make_the_merged_weight(files, tmp_path):
    base, adapter = files
    merge(base, [adapter], tmp_path / "merged")
    merged, contents = Checkpoint.open(tmp_path / "merged"), open_adapter(adapter)
    layers = find_layers([contents], Checkpoint.open(base))
    names = ["embed", "experts[0]", "experts[1]", "experts[2]", "lin", "square"]
    assert sorted(layer.name for layer in layers) == names
    for layer in layers:
        factors, weight = layer.factors[0], layer.weight
        A, B = factors.read()
        assert layer.shape == (len(B), A.shape[1]) and weight.transposed == (layer.name == "embed")
        assert layer.nbytes == A.nbytes + B.nbytes + weight.nbytes
        update = factors.update.scaling * B @ A
        actual = merged.tensor(weight.key)
        actual = actual[weight.index] if actual.dim() == 3 else actual
        expected = weight.read() + (update.T if weight.transposed else update)
        torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6)
        assert not torch.equal(actual, weight.read())
    assert find_layers([contents], None)[0].weight is None


def test_fingerprints_change_with_the_files(files):
    base, adapter = files
    contents = open_adapter(adapter).fingerprint()
    assert open_adapter(adapter).fingerprint() == contents and len(contents) == 2
    (adapter / "adapter_config.json").write_text((adapter / "adapter_config.json").read_text() + "\n")
    assert open_adapter(adapter).fingerprint() != contents
    before = Checkpoint.open(base).fingerprint()
    weights = next(base.glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes())
    assert Checkpoint.open(base).fingerprint() != before


def test_errors_name_the_caller(tmp_path):
    with pytest.raises(FileNotFoundError, match="analyze: "):
        open_adapter(tmp_path, caller="analyze")
