"""Compares a model with PEFT's, through both doors: targets, outputs, merges, files, tokens, gradients, a step."""

from __future__ import annotations

import copy
import tempfile
import warnings
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import peft
import torch
from safetensors.torch import load_file
from support.peft_files import save_with_peft
from torch import Tensor, nn

from lora_ext import LoraConfig, inject, load_adapter, merge, save_adapter, unmerge
from lora_ext.adapters import merge_and_unload, trainable_parameter_counts
from lora_ext.integrations.peft import accelerate, report

ALIVE = {"r": 2, "lora_alpha": 6, "init_lora_weights": False}
NEW_TOKENS = 4
OF_BASE = ("lora_bias", "lora_B.default.bias", "tokens_delta.default", "magnitude_vector.default.weight")


def compare(
    base: nn.Module,
    inputs: Any,
    *,
    doors: str = "inject accelerate",
    generates: bool = False,
    trains: bool = False,
    **options: Any,
) -> dict[str, str]:
    """Runs every check on adapted copies of ``base``; one that fails does not stop the others.

    Args:
        inputs: of a forward, a tensor or keyword arguments.
        doors: which of ``inject`` and ``accelerate`` are compared with PEFT.
        trains: the models are in training mode, except to be merged.
        options: of the config, for both libraries.

    Returns:
        A check's name -> how the two differ. {}: they are equal, or both refuse.
    """
    memory = "/dev/shm" if Path("/dev/shm").is_dir() else None  # half of the time goes to files on a disk
    with torch.random.fork_rng(), tempfile.TemporaryDirectory(dir=memory) as directory, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pair = _Pair(base, inputs, ALIVE | options, Path(directory))
        pair.doors, pair.generates, pair.trains = doors, generates, trains
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
    """A model with the same adapter: ``theirs`` by PEFT, ``ours`` loaded from its file, ``fast`` accelerated."""

    def __init__(self, base: nn.Module, inputs: Any, options: dict[str, Any], directory: Path) -> None:
        self.base, self.inputs, self.options, self.directory = base, inputs, options, directory
        self.doors, self.generates, self.trains = "", False, False

    @cached_property
    def theirs(self) -> peft.PeftModel:
        model = peft.get_peft_model(copy.deepcopy(self.base), peft.LoraConfig(**self.options))
        return _spread(_with_settings_that_peft_drops(model)).train(self.trains)

    @cached_property
    def file(self) -> dict[str, Tensor]:
        """The tensors of PEFT's file, in the directory "theirs"."""
        save_with_peft(self.theirs, self.directory / "theirs", save_embedding_layers=False)
        return load_file(self.directory / "theirs" / "adapter_model.safetensors")

    @cached_property
    def ours(self) -> nn.Module:
        assert self.file
        model = load_adapter(copy.deepcopy(self.base), self.directory / "theirs", trainable=True)
        return model.train(self.trains)

    @cached_property
    def fast(self) -> peft.PeftModel:
        model = accelerate(copy.deepcopy(self.theirs))
        assert any(layer.accelerated for layer in report(model)), report(model)
        return model

    @property
    def injects(self) -> bool:
        return "inject" in self.doors

    @property
    def both(self) -> list[nn.Module]:
        return [getattr(self, {"inject": "ours", "accelerate": "fast"}[door]) for door in self.doors.split()]

    @cached_property
    def injected(self) -> nn.Module:
        """Our model, adapted by the config instead of PEFT's file."""
        return inject(copy.deepcopy(self.base), LoraConfig(**self.options)).train(self.trains)

    def refused(self) -> bool:
        try:
            return self.injected is None
        except (TypeError, ValueError):
            return True

    def output(self, model: nn.Module) -> Tensor:
        torch.manual_seed(3)
        return output(model, self.inputs)

    def values(self, model: nn.Module) -> dict[str, Tensor]:
        """The adapter's tensors, by their keys in PEFT's files."""
        directory = Path(tempfile.mkdtemp(dir=self.directory))
        if isinstance(model, peft.PeftModel):
            save_with_peft(model, directory, save_embedding_layers=False)
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


def _with_settings_that_peft_drops(model: nn.Module) -> nn.Module:
    for layer in model.modules():
        if hasattr(layer, "lora_A") and isinstance(getattr(layer, "base_layer", None), nn.modules.conv._ConvNd):
            for convolution in layer.lora_A.values():
                for setting in ("dilation", "padding_mode", "_reversed_padding_repeated_twice"):
                    setattr(convolution, setting, getattr(layer.base_layer, setting))
    return model


@torch.no_grad()
def _spread(model: nn.Module) -> nn.Module:
    """Changes what starts with the values of the base layer, so that it has an effect."""
    for path, parameter in model.named_parameters():
        if path.endswith(OF_BASE):
            parameter.add_(torch.randn_like(parameter) / 3)
    return model


def output(model: nn.Module, inputs: dict[str, Tensor] | Tensor) -> Tensor:
    outputs = model(**inputs) if isinstance(inputs, dict) else model(inputs)
    if isinstance(outputs, Tensor):
        return outputs
    return next(outputs[key] for key in ("logits", "logits_per_image", "sample") if key in outputs)


def assert_near(actual: Tensor, expected: Tensor, what: str) -> None:
    """Checks equality up to the rounding of float32, in which many models compute their norms and softmax."""
    largest = expected.abs().max().item()
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=2e-5 * largest, msg=lambda text: f"{what}: {text}")


def assert_all_near(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys(), sorted(actual.keys() ^ expected.keys())
    for name, tensor in expected.items():
        assert_near(actual[name], tensor, name)


def check_targets(pair: _Pair) -> None:
    if not pair.injects:
        return
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
    for model in pair.both:
        assert_near(pair.output(model), expected, "output")


@torch.no_grad()
def check_merge(pair: _Pair) -> None:
    theirs = copy.deepcopy(pair.theirs).eval()
    theirs.merge_adapter()
    for model in map(copy.deepcopy, pair.both):
        of_peft = isinstance(model.eval(), peft.PeftModel)
        expected = pair.output(model)
        state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
        model.merge_adapter() if of_peft else merge(model)
        assert_near(pair.output(model), expected, "output of the merged model")
        if of_peft:
            assert_all_near(model.state_dict(), theirs.state_dict())
        model.unmerge_adapter() if of_peft else unmerge(model)
        after = model.state_dict()
        changed = [key for key in state if not torch.equal(after[key], state[key])]
        allowed = (".experts", ".gate", ".router") if of_peft else ()  # PEFT's code merges bare parameters
        assert after.keys() == state.keys() and all(any(a in key for a in allowed) for key in changed), changed
    if not pair.injects:
        return
    ours, theirs = merge_and_unload(copy.deepcopy(pair.ours).eval()), theirs.merge_and_unload()
    assert_near(pair.output(ours), pair.output(theirs), "output of merge_and_unload")
    assert_all_near(ours.state_dict(), theirs.state_dict())


@torch.no_grad()
def check_files(pair: _Pair) -> None:
    for model in pair.both:
        again = pair.values(model)
        assert again.keys() == pair.file.keys(), sorted(again.keys() ^ pair.file.keys())
        assert all(torch.equal(again[key], pair.file[key]) for key in again), "the file changes when loaded and saved"
    if not pair.injects:
        return
    _spread(pair.injected)
    save_adapter(pair.injected, pair.directory / "ours")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(missing|unexpected|adapter key).*")
        theirs = peft.PeftModel.from_pretrained(copy.deepcopy(pair.base), pair.directory / "ours")
    theirs = _with_settings_that_peft_drops(theirs).train(pair.trains)
    assert_all_near(pair.values(theirs), pair.values(pair.injected))
    assert_near(pair.output(theirs), pair.output(pair.injected), "output of PEFT with our file")


@torch.no_grad()
def check_tokens(pair: _Pair) -> None:
    if not pair.generates:
        return
    inputs = {name: tensor for name, tensor in pair.inputs.items() if name != "decoder_input_ids"}
    options = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "do_sample": False}
    expected = pair.theirs.generate(**inputs, **options)
    for model in (*pair.both, *([merge(copy.deepcopy(pair.ours))] if pair.injects else [])):
        tokens = model.generate(**inputs, **options)
        assert torch.equal(tokens, expected), f"{tokens.tolist()}, PEFT generates {expected.tolist()}"


def check_training(pair: _Pair) -> None:
    """Gradients, and the loss after a step; dropout masks are the same."""
    models, expected, losses = (pair.theirs, *pair.both), {}, []
    with torch.no_grad():
        before = pair.output(pair.theirs).square().sum()
    for model in models:
        found = pair.gradients(model)
        expected = expected or found
        assert any(gradient.count_nonzero() for gradient in expected.values()), "all gradients are zero"
        assert_all_near(found, expected)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        norm = nn.utils.clip_grad_norm_(trained, 0.01)
        torch.optim.SGD(trained, lr=0.1).step()
        with torch.no_grad():
            losses.append(torch.stack([norm, pair.output(model).square().sum()]))
        assert losses[0][1] < before, f"the loss rises from {before} to {losses[0][1]}"
        assert_near(losses[-1], losses[0], "norm of the gradients, loss after the step")
    for model in pair.both:
        assert_all_near(pair.values(model), pair.values(pair.theirs))


CHECKS: dict[str, Callable[[_Pair], None]] = {
    "targets": check_targets,
    "outputs": check_outputs,
    "merge": check_merge,
    "files": check_files,
    "tokens": check_tokens,
    "training": check_training,  # the last, as it changes the factors
}
