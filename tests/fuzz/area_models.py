"""Fuzzes whole models: sequences of valid and invalid operations, and any public function with other arguments.

A refused operation must not change the model. After any other, the model must compute what plain tensors give for its
weights and adapters, and merging followed by unmerging must leave no trace.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from support import refusals
from support.public_calls import state
from torch import Tensor, nn

from .areas import Case
from .calls import CannotTell
from .choices import Choices
from .multiplied_out import multiplied_out, run
from .mutations import INTEGERS, NUMBERS, OTHERS
from .outcomes import Finding, Outcome, finding, judge_exception, parameter_names


def make(choices: Choices) -> Case:
    return _any_function(choices) if choices.chance(40) else _life(choices)


# --- any public function in the table of tests/support/refusals.py ----------------------------------------------------

_NAMES = (
    '"a"',
    '"b"',
    '"c"',
    '"x"',
    '["a"]',
    '["a", "b"]',
    '("b", "a")',
    "None",
    '["a", "a"]',
    '"a.b"',
    '"keys"',
    '""',
)
_VALUES = {str: _NAMES, bool: ("True", "False", "None", "1"), int: INTEGERS, float: NUMBERS}
_MODELS = (
    "injected()",
    "merged()",
    "Net()",
    "disabled()",
    "with_nan()",
    "parametrized()",
    "tied()",
    "bert()",
    "nn.Linear(6, 3)",
    "peft_model()",
    'Net().to("meta")',
    "injected().bfloat16()",
    "injected().double()",
    "torch.jit.script(nn.Linear(2, 2))",
    "nn.DataParallel(injected())",
    "injected().blocks[0]",
    "nn.Sequential()",
)


def _other_value(choices: Choices, value: Any) -> str:
    if choices.chance(30):
        return choices.pick(OTHERS)
    if isinstance(value, nn.Module):
        return choices.pick(_MODELS)
    if isinstance(value, Path):
        return choices.pick(
            ('directory / "none"', "directory", "saved(directory)", '"/dev/null"', 'Path("/proc/self/mem")', '"\\0"')
        )
    if isinstance(value, (list, tuple)):
        return choices.pick((*_NAMES, "[]", "[1.0]", "[1.0, float('nan')]", "[0.0, 0.0]", "range(2)", "iter([])"))
    return choices.pick(_VALUES.get(type(value), OTHERS))


def _any_function(choices: Choices) -> Case:
    entry = refusals.CALLS[choices.integer(len(refusals.CALLS))]
    name = entry.function.__name__
    parameters = parameter_names(entry.function)
    changes: dict[str, str] = {}
    if choices.chance(60):
        with tempfile.TemporaryDirectory() as directory:
            arguments = entry.arguments(Path(directory))
        for _ in range(choices.between(1, 2)):
            parameter = choices.pick(list(arguments))
            changes[parameter] = _other_value(choices, arguments[parameter])
    lines = [f'arguments["{parameter}"] = {text}' for parameter, text in changes.items()]
    setup = f"""import numpy, tempfile, torch
from pathlib import Path
from torch import nn
from support.public_calls import *
from support.refusals import *
torch.manual_seed(0)
directory = Path(tempfile.mkdtemp())
function = next(entry for entry in CALLS if entry.function.__name__ == "{name}")
arguments = function.arguments(directory)
"""
    setup += "".join(f"{line}\n" for line in lines)
    body = "call(function.function, arguments)\n"
    names = [name, *parameters, "LoRA", "adapter", "Adapter", *_CLASSES]
    label = f"{entry.function.__module__}.{name}"
    return Case(label, setup + body, lambda: _run_function(label, names, setup, body, bool(changes)))


# Names that messages begin with.
_CLASSES = ("LoraConfig", "LoraLinear", "LoraAdapter", "module", "model", "layer", "method")


def _run_function(label: str, names: list[str], setup: str, body: str, changed: bool) -> Outcome:
    with tempfile.TemporaryDirectory() as directory:
        space: dict[str, Any] = {}
        try:
            exec(setup.replace("tempfile.mkdtemp()", repr(directory)), space)
        except Exception:
            return Outcome("void")
        arguments = space["arguments"]
        try:
            before = {name: state(value) for name, value in arguments.items()}
            files = state(Path(directory))
        except Exception:  # an argument whose state is unknown
            before = files = None
        try:
            exec(body, space)
        except Exception as error:
            trouble = judge_exception(label, names, error, with_files=True)
            found = [trouble] if trouble else []
            if before is not None:
                after = {name: state(value) for name, value in arguments.items()}
                found += [
                    finding("changed after a refusal", label, f"{name} after {error}", name)
                    for name in before
                    if after[name] != before[name]
                ]
                if state(Path(directory)) != files:
                    found.append(finding("changed after a refusal", label, f"files after {error}", "files"))
            return Outcome("refused", tuple(found))
    return Outcome("accepted" if changed else "compared")


# --- a few operations on a model --------------------------------------------------------------------------------------

# Source of a model, source of an input, names of layers to adapt, names of modules to save.
_BASES = {
    "net": ("Net()", "torch.randn(4, 6)", ("up", "down", "head", "blocks.0.up"), ("head",)),
    "every": (
        "Every()",
        "torch.randint(9, (2, 5))",
        ("embed", "conv", "lin", "out"),
        ("out",),
    ),
    "bert": ("bert()", "torch.randint(50, (2, 7))", ("query", "value", "dense", "word_embeddings"), ("classifier",)),
    "llama": ("llama(tied=True)", "torch.randint(50, (2, 7))", ("q_proj", "down_proj", "embed_tokens"), ("lm_head",)),
    "gpt2": ("gpt2()", "torch.randint(50, (2, 7))", ("c_attn", "c_fc", "wte"), ()),
}
_ADAPTERS = ("a", "b", "c")


@dataclass
class Step:
    """An operation: the function it is counted under, its source, and whether it must keep the model's output."""

    function: str
    line: str
    keeps_output: bool = False


@dataclass
class Life:
    """A program of steps on one model."""

    base: str
    steps: list[Step] = field(default_factory=list)

    def setup(self) -> str:
        maker, argument, *_ = _BASES[self.base]
        return f"""import copy, numpy, pickle, tempfile, torch
from pathlib import Path
from torch import nn
from support.models import Net, bert, gpt2, llama
from adapters.test_life_cycle import Every
from lora_ext import LoraConfig, inject, load_adapter, merge, save_adapter, set_adapter, unmerge
from lora_ext.adapters import *
torch.manual_seed(0)
directory = Path(tempfile.mkdtemp())
model = {maker}.eval()
x = {argument}
"""

    def source(self) -> str:
        return self.setup() + "".join(f"{step.line}\n" for step in self.steps)


def _life(choices: Choices) -> Case:
    life = Life(choices.pick(list(_BASES)))
    life.steps += [_inject(choices, life.base, "a"), Step("train", _FILL)]
    if choices.chance(60):
        life.steps += [_inject(choices, life.base, "b"), Step("train", _FILL)]
    for _ in range(choices.between(1, 5)):
        life.steps.append(choices.pick(_STEPS)(choices, life.base))
    return Case("lora_ext.inject and others", life.source(), lambda: _run_life(life))


def _names(choices: Choices) -> str:
    pool = ('"a"', '"b"', '["a"]', '["a", "b"]', '"c"', '["b", "c"]')
    return choices.pick((*pool, "None", '"x"', '["a", "a"]', "[]", "3") if choices.chance(30) else pool)


def _config(choices: Choices, base: str) -> str:
    _, _, targets, to_save = _BASES[base]
    chosen = [choices.pick(targets) for _ in range(choices.between(1, 3))]
    options = [f"r={choices.pick((2, 1, 4))}", f"target_modules={sorted(set(chosen))}"]
    if choices.chance(20):
        options[1] = 'target_modules="all-linear"'
    extras = (
        "init_lora_weights=False",
        "lora_alpha=4",
        "use_rslora=True",
        "lora_bias=True",
        'bias="all"',
        'bias="lora_only"',
        f"modules_to_save={list(to_save)}",
        "ensure_weight_tying=True",
        "lora_dropout=0.2",
        "trainable_token_indices=[1, 3]",
        'init_lora_weights="gaussian"',
        "inference_mode=True",
        'enable_lora={"c_attn": (True, False, True)}',
        'rank_pattern={".*": 3}',
        'target_parameters=["up.weight"]',
        'exclude_modules=["blocks.1.up"]',
        "layers_to_transform=[0]",
    )
    taken = [choices.pick(extras) for _ in range(choices.between(0, 3))]
    return f"LoraConfig({', '.join(dict.fromkeys([*options, *_one_of_each(taken)]))})"


def _one_of_each(options: list[str]) -> list[str]:
    return list({option.partition("=")[0]: option for option in options}.values())


def _inject(choices: Choices, base: str, name: str = "") -> Step:
    name = name or choices.pick((*_ADAPTERS[1:], "a", "a.b", ""))
    return Step("inject", f'inject(model, {_config(choices, base)}, "{name}")')


def _combine(choices: Choices) -> Step:
    weights, kind = choices.pick(("[1.0, 0.5]", "[0.5]", "[-1.0, 2.0]")), choices.pick(("cat", "svd", "linear", "ties"))
    names = choices.pick(('["a", "b"]', '["a"]', '["a", "x"]'))
    return Step("add_weighted_adapter", f'add_weighted_adapter(model, {names}, {weights}, "c", "{kind}")')


_FILL = """with torch.no_grad():
    for name, parameter in model.named_parameters():
        if "lora_" in name or "adapters" in name and parameter.is_floating_point():
            parameter.copy_(torch.randn_like(parameter) * 0.3)"""

_STEPS: tuple[Callable[[Choices, str], Step], ...] = (
    lambda c, base: Step("train", _FILL),
    lambda c, base: Step("merge", f"merge(model, {_names(c)})", keeps_output=False),
    lambda c, base: Step("merge", "merge(model)", keeps_output=True),
    lambda c, base: Step("unmerge", "unmerge(model)"),
    lambda c, base: Step("unmerge", f"unmerge(model, {_names(c)})"),
    lambda c, base: Step("set_adapter", f"set_adapter(model, {_names(c)})"),
    lambda c, base: Step("set_adapter", f"set_adapter(model, {_names(c)}, trainable={c.pick((True, False))})"),
    lambda c, base: _inject(c, base),
    lambda c, base: _inject(c, base),
    lambda c, base: Step("delete_adapter", f"delete_adapter(model, {_names(c)})"),
    lambda c, base: Step("rename_adapter", f"rename_adapter(model, {_names(c)}, {_names(c)})", keeps_output=True),
    lambda c, base: _combine(c),
    lambda c, base: Step("unload", "unload(model)"),
    lambda c, base: Step("merge_and_unload", "merge_and_unload(model)", keeps_output=True),
    lambda c, base: Step("merge_and_unload", f"merge_and_unload(model, {_names(c)})"),
    lambda c, base: Step("save_adapter", f'save_adapter(model, directory / "saved", {_names(c)})', keeps_output=True),
    lambda c, base: Step("load_adapter", f'load_adapter(model, directory / "saved", adapter_name={_names(c)})'),
    lambda c, base: Step("hotswap_adapter", f'hotswap_adapter(model, directory / "saved", {_names(c)})'),
    lambda c, base: Step("prepare_hotswap", f"prepare_hotswap(model, {c.pick((4, 2, 0, 70))})", keeps_output=True),
    lambda c, base: Step("copy.deepcopy", "model = copy.deepcopy(model)", keeps_output=True),
    lambda c, base: Step("pickle", "model = pickle.loads(pickle.dumps(model))", keeps_output=True),
    lambda c, base: Step("disable_adapters", "with disable_adapters(model):\n    base_output = run(model, x)", True),
    lambda c, base: Step("adapter_status", "adapter_status(model), merge_record_bytes(model)", keeps_output=True),
    lambda c, base: Step("state_dict", "model.load_state_dict(copy.deepcopy(model.state_dict()))", keeps_output=True),
)


def _run_life(life: Life) -> Outcome:
    found: list[Finding] = []
    compared = refused = 0
    with tempfile.TemporaryDirectory() as directory:
        space: dict[str, Any] = {"run": run}
        exec(life.setup().replace("tempfile.mkdtemp()", repr(directory)), space)
        pristine = copy.deepcopy(space["model"])
        for step in life.steps:
            model = space["model"]
            before, files = state(model), state(Path(directory))
            output = _output(model, space["x"])
            names = [step.function, "adapter", "LoRA", "Lora", "layer", "merge", "model", "config"]
            try:
                exec(step.line, space)
            except Exception as error:
                refused += 1
                trouble = judge_exception(step.function, names, error, with_files=True)
                found += [trouble] if trouble else []
                if (after := state(model)) != before:
                    what = ", ".join(key for key in before if after.get(key) != before[key])
                    found.append(finding("changed after a refusal", step.function, f"{what} after {error}", what))
                if state(Path(directory)) != files:
                    found.append(finding("changed after a refusal", step.function, f"files after {error}", "files"))
                continue
            if step.function == "merge_and_unload":
                pristine = copy.deepcopy(space["model"])
            try:
                wrong = _wrong(space["model"], pristine, space["x"], output if step.keeps_output else None)
            except Exception as error:
                trouble = judge_exception(f"forward after {step.function}", names, error)
                found += [trouble] if trouble else []
                continue
            compared += 1
            if wrong:
                found.append(finding("wrong result", step.function, wrong))
    return Outcome("compared" if compared else "refused", tuple(found))


def _output(model: nn.Module, x: Tensor) -> Tensor | None:
    try:
        return run(model, x)
    except Exception:
        return None


def _wrong(model: nn.Module, pristine: nn.Module, x: Tensor, before: Tensor | None) -> str:
    """Describes what is wrong with a model's output; "" if nothing."""
    now = run(model, x)
    if before is not None and not torch.allclose(now, before, rtol=1e-3, atol=1e-4):
        return f"the output changed by {(now - before).abs().max().item():.1e}"
    try:
        expected = multiplied_out(model, pristine, x)
    except CannotTell:
        expected = None
    if expected is not None and not torch.allclose(now, expected, rtol=1e-3, atol=1e-3):
        return f"the output is {(now - expected).abs().max().item():.1e} off the weights and adapters multiplied out"
    return ""
