"""Compares an injected model with PEFT's: targets, outputs, merged weights, files, tokens, gradients, a step."""

from __future__ import annotations

import copy
import tempfile
import warnings
from collections.abc import Callable
from functools import cached_property
from pathlib import Path

import peft
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from architectures.table import Architecture
from lora_ext import LoraConfig, inject, load_adapter, merge, save_adapter, unmerge
from lora_ext.adapters import merge_and_unload, trainable_parameter_counts

ALIVE = {"r": 2, "lora_alpha": 6, "init_lora_weights": False}
NEW_TOKENS = 4


def compare(architecture: Architecture, targets: str) -> dict[str, str]:
    """Runs every check on models of ``architecture``; one that fails does not stop the others.

    Args:
        architecture: a row of the table.
        targets: "all-linear", or "usual" for those in the row.

    Returns:
        A check's name -> how the two differ. {}: they are equal, or both refuse.
    """
    with torch.random.fork_rng(), tempfile.TemporaryDirectory() as directory, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(1)
        pair = _Pair(architecture, targets if targets == "all-linear" else architecture.targets.split(), directory)
        try:
            pair.output(pair.theirs)
        except (ValueError, AttributeError) as error:
            return {} if pair.refused() else {"targets": f"PEFT refuses: {error}"}
        differences = {}
        for name, check in CHECKS.items():
            try:
                check(pair)
            except Exception as error:
                differences[name] = f"{type(error).__name__}: {error}"
        return differences


class _Pair:
    """One model adapted twice with the same factors: ``theirs`` by PEFT, ``ours`` loaded from PEFT's file."""

    def __init__(self, architecture: Architecture, targets: str | list[str], directory: str) -> None:
        self.architecture, self.targets, self.directory = architecture, targets, Path(directory)
        self.base, self.inputs = architecture.build(), architecture.inputs()

    @cached_property
    def theirs(self) -> peft.PeftModel:
        config = peft.LoraConfig(target_modules=self.targets, **ALIVE)
        return peft.get_peft_model(copy.deepcopy(self.base), config).eval()

    @cached_property
    def file(self) -> dict[str, Tensor]:
        """The tensors of PEFT's file, in the directory "theirs"."""
        save_with_peft(self.theirs, self.directory / "theirs")
        return load_file(self.directory / "theirs" / "adapter_model.safetensors")

    @cached_property
    def ours(self) -> nn.Module:
        assert self.file
        return load_adapter(copy.deepcopy(self.base), self.directory / "theirs", trainable=True)

    @cached_property
    def injected(self) -> nn.Module:
        """Our model, adapted by the config instead of PEFT's file."""
        return inject(copy.deepcopy(self.base), LoraConfig(target_modules=self.targets, **ALIVE))

    def refused(self) -> bool:
        try:
            return self.injected is None
        except (TypeError, ValueError):
            return True

    def output(self, model: nn.Module) -> Tensor:
        return output(model, self.inputs)

    def values(self, model: nn.Module) -> dict[str, Tensor]:
        """The adapter's tensors, by their keys in PEFT's files."""
        directory = Path(tempfile.mkdtemp(dir=self.directory))
        if isinstance(model, peft.PeftModel):
            save_with_peft(model, directory)
        else:
            save_adapter(model, directory)
        return load_file(directory / "adapter_model.safetensors")

    def gradients(self, model: nn.Module) -> dict[str, Tensor]:
        """The gradients of the adapter's tensors, zero where there is none, by their keys in PEFT's files."""
        model.zero_grad(set_to_none=True)
        self.output(model).square().sum().backward()
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        values = [parameter.data for parameter in trained]
        for parameter in trained:
            parameter.data = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        gradients = self.values(model)
        for parameter, value in zip(trained, values, strict=True):
            parameter.data = value
        return gradients


def output(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    outputs = model(**inputs)
    return next(outputs[key] for key in ("logits", "logits_per_image", "sample") if key in outputs)


def save_with_peft(model: peft.PeftModel, directory: Path) -> None:
    """Saves the adapter alone; by default PEFT adds the base weight of an adapted output head."""
    model.save_pretrained(directory, save_embedding_layers=False)


def assert_near(actual: Tensor, expected: Tensor, what: str) -> None:
    """Checks equality up to the rounding of float32, in which many models compute their norms and softmax."""
    largest = expected.abs().max().item()
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=2e-5 * largest, msg=lambda text: f"{what}: {text}")


def assert_all_near(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys(), sorted(actual.keys() ^ expected.keys())
    for name, tensor in expected.items():
        assert_near(actual[name], tensor, name)


def check_targets(pair: _Pair) -> None:
    ours, theirs = (
        {key: tensor.shape for key, tensor in file.items()} for file in (pair.values(pair.injected), pair.file)
    )
    assert ours == theirs and theirs, sorted(ours.items() ^ theirs.items())
    trained, wanted = trainable_parameter_counts(pair.injected)[0], pair.theirs.get_nb_trainable_parameters()[0]
    assert trained == wanted, f"{trained} trainable parameters, PEFT has {wanted}"


@torch.no_grad()
def check_outputs(pair: _Pair) -> None:
    expected, without = pair.output(pair.theirs), pair.output(pair.base)
    assert (expected - without).abs().max() > 1e-3 * without.abs().max(), "the adapter changes nothing"
    assert_near(pair.output(pair.ours), expected, "output")


@torch.no_grad()
def check_merge(pair: _Pair) -> None:
    model = copy.deepcopy(pair.ours)
    adapted = pair.output(model)
    merge(model)
    assert_near(pair.output(model), adapted, "output of the merged model")
    unmerge(model)
    unmerged, state = model.state_dict(), pair.ours.state_dict()
    assert unmerged.keys() == state.keys()
    assert all(torch.equal(unmerged[name], state[name]) for name in state), "unmerging does not restore the weights"
    ours, theirs = merge_and_unload(model), copy.deepcopy(pair.theirs).merge_and_unload()
    assert_near(pair.output(ours), pair.output(theirs), "output of merge_and_unload")
    assert_all_near(ours.state_dict(), theirs.state_dict())


@torch.no_grad()
def check_files(pair: _Pair) -> None:
    again = pair.values(pair.ours)
    assert again.keys() == pair.file.keys(), sorted(again.keys() ^ pair.file.keys())
    assert all(torch.equal(again[key], pair.file[key]) for key in again), "the file changes when loaded and saved"
    save_adapter(pair.injected, pair.directory / "ours")
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(pair.base), pair.directory / "ours").eval()
    assert_all_near(pair.values(theirs), pair.values(pair.injected))
    assert_near(pair.output(theirs), pair.output(pair.injected), "output of PEFT with our file")


@torch.no_grad()
def check_tokens(pair: _Pair) -> None:
    if not pair.architecture.generates:
        return
    inputs = {name: tensor for name, tensor in pair.inputs.items() if name != "decoder_input_ids"}
    options = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "do_sample": False}
    expected = pair.theirs.generate(**inputs, **options)
    for model in (pair.ours, merge(copy.deepcopy(pair.ours))):
        tokens = model.generate(**inputs, **options)
        assert torch.equal(tokens, expected), f"{tokens.tolist()}, PEFT generates {expected.tolist()}"


def check_gradients(pair: _Pair) -> None:
    expected = pair.gradients(pair.theirs)
    assert any(gradient.count_nonzero() for gradient in expected.values()), "all gradients are zero"
    assert_all_near(pair.gradients(pair.ours), expected)


def check_step(pair: _Pair) -> None:
    """Trains a step in training mode, where layers such as batch norm behave otherwise; dropout masks are the same."""
    losses = []
    for model in (pair.theirs, pair.ours):
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        model.zero_grad(set_to_none=True)
        loss = pair.output(model).square().mean()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(trained, 0.1)
        torch.optim.SGD(trained, lr=0.1).step()
        with torch.no_grad():
            losses.append(torch.stack([loss.detach(), norm, pair.output(model).square().mean()]))
    theirs, ours = losses
    assert ours[2] < ours[0], f"the loss rises from {ours[0]} to {ours[2]}"
    assert_near(ours, theirs, "loss, norm of the gradients, loss after the step")
    assert_all_near(pair.values(pair.ours), pair.values(pair.theirs))


CHECKS: dict[str, Callable[[_Pair], None]] = {
    "targets": check_targets,
    "outputs": check_outputs,
    "merge": check_merge,
    "files": check_files,
    "tokens": check_tokens,
    "gradients": check_gradients,
    "step": check_step,  # the last, as it changes the factors
}
