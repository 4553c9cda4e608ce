"""The kinds of layers, each adapted through one of the two doors. A new kind is a row of :data:`KINDS`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import peft
import pytest
import torch
from support.quantized import QUANTIZE
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lora_ext import LoraConfig, inject, merge, set_adapter, unmerge
from lora_ext.adapters import merge_and_unload, unload
from lora_ext.integrations.peft import accelerate, report


class Injected:
    """Layers of ``inject``."""

    use, merge, unmerge = staticmethod(set_adapter), staticmethod(merge), staticmethod(unmerge)
    unload, merge_and_unload = staticmethod(unload), staticmethod(merge_and_unload)

    @staticmethod
    def add(model: nn.Module, name: str, **options: Any) -> nn.Module:
        return inject(model, LoraConfig(**options), name)

    @staticmethod
    def layer(model: nn.Module) -> nn.Module:
        return model[0]


class Accelerated:
    """Layers of PEFT after ``accelerate``."""

    @staticmethod
    def add(model: nn.Module, name: str, **options: Any) -> nn.Module:
        config = peft.LoraConfig(**options)
        if isinstance(model, peft.PeftModel):
            model.add_adapter(name, config)
        else:
            model = peft.get_peft_model(model, config, name)
        reasons = [layer.forward for layer in report(accelerate(model))]
        assert all(reason.startswith("now") for reason in reasons if reason), reasons
        return model

    @staticmethod
    def use(model: nn.Module, names: str | Sequence[str]) -> nn.Module:
        model.base_model.set_adapter(names)
        return model

    @staticmethod
    def merge(model: nn.Module, name: str) -> nn.Module:
        model.merge_adapter([name])
        return model

    @staticmethod
    def unmerge(model: nn.Module) -> nn.Module:
        model.unmerge_adapter()
        return model

    @staticmethod
    def unload(model: nn.Module) -> nn.Module:
        return model.unload()

    @staticmethod
    def merge_and_unload(model: nn.Module) -> nn.Module:
        return model.merge_and_unload()

    @staticmethod
    def layer(model: nn.Module) -> nn.Module:
        return model.base_model.model[0]


class Attends(nn.Module):
    """Passes one tensor to an attention."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x)[0]


class Uses(nn.Module):
    """Multiplies by three experts, in either layout, and by a matrix."""

    def __init__(self, is_transposed: bool) -> None:
        super().__init__()
        self.is_transposed = is_transposed
        self.up = nn.Parameter(torch.randn((3, 8, 5) if is_transposed else (3, 5, 8)) / 3)
        self.mix = nn.Parameter(torch.randn(6, 5) / 3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x @ (self.up if self.is_transposed else self.up.mT)).sum(0) @ self.mix.T


class Siblings(nn.Module):
    """Three layers of different sizes that read one tensor, so that they are computed together."""

    def __init__(self, make: Callable[[nn.Linear], nn.Module] = lambda linear: linear, width: int = 8) -> None:
        super().__init__()
        self.q, self.k = make(nn.Linear(width, 32)), make(nn.Linear(width, 32, bias=False))
        self.v = make(nn.Linear(width, 64))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([torch.tanh(self.q(x)) * self.k(x), self.v(x)], -1)


class Kind(NamedTuple):
    """``door`` adapts ``make()``, or a layer in it, by a config of these ``options``; inputs have the ``shape``.

    ``dtype``: of a model where nothing else is said.
    """

    make: Callable[[], nn.Module]
    options: dict[str, Any]
    shape: tuple[int, ...] = (4, 8)
    door: type = Injected
    dtype: torch.dtype = torch.float64

    @property
    def names(self) -> tuple[str, ...]:
        """Adapters that can be in use at the same time."""
        return ("default",) if "use_dora" in self.options else ("a", "b")

    @property
    def rows_choose(self) -> bool:
        """Whether rows of a mixed batch may choose adapters."""
        return self.make is not Attends and not {"use_dora", "target_parameters"} & self.options.keys()


def oblong() -> nn.Module:
    return nn.Conv2d(8, 6, (3, 2), padding=1)


WITH_BIAS = {"target_modules": ["0"], "lora_bias": True}
PACKED = {"target_modules": ["0"], "enable_lora": {"0": (True, False, True)}}
DORA = {"target_modules": ["0"], "use_dora": True}
CONV1D = {"target_modules": ["0"], "fan_in_fan_out": True}
SIBLINGS = {"target_modules": ["q", "k", "v"], "rank_pattern": {"k": 3}}
KINDS = {
    "linear": Kind(lambda: nn.Linear(8, 6), WITH_BIAS),
    "conv1d": Kind(lambda: Conv1D(6, 8), {"target_modules": ["0"]}),
    "packed": Kind(lambda: nn.Linear(8, 6), PACKED),
    "packed conv1d": Kind(lambda: Conv1D(6, 8), PACKED),
    "dora": Kind(lambda: nn.Linear(8, 6), DORA),
    "dora conv1d": Kind(lambda: Conv1D(6, 8), DORA),
    "embedding": Kind(lambda: nn.Embedding(20, 8), {"target_modules": ["0"]}),
    "conv": Kind(oblong, WITH_BIAS, (2, 8, 5, 4)),
    "channels last": Kind(lambda: oblong().to(memory_format=torch.channels_last), WITH_BIAS, (2, 8, 5, 4)),
    "attention": Kind(Attends, {"target_modules": ["attention"], "lora_bias": True}, (2, 5, 8)),
    "siblings": Kind(Siblings, SIBLINGS),
    "experts": Kind(lambda: Uses(False), {"target_parameters": ["0.up", "0.mix"]}),
    "transposed experts": Kind(lambda: Uses(True), {"target_parameters": ["0.up", "0.mix"]}),
    "peft siblings": Kind(Siblings, SIBLINGS, door=Accelerated),
    "peft linear": Kind(lambda: nn.Linear(8, 6), WITH_BIAS, door=Accelerated),
    "peft conv1d": Kind(lambda: Conv1D(6, 8), CONV1D, door=Accelerated),
    "peft dora": Kind(lambda: nn.Linear(8, 6), DORA, door=Accelerated),
    "peft dora conv1d": Kind(lambda: Conv1D(6, 8), DORA | CONV1D, door=Accelerated),
    "peft embedding": Kind(lambda: nn.Embedding(20, 8), {"target_modules": ["0"]}, door=Accelerated),
    "peft experts": Kind(lambda: Uses(False), {"target_parameters": ["0.up"]}, door=Accelerated),
}
# Quantised base layers, in float32; tests/quantized has what depends on the format.
QUANTISED = {
    name: Kind(lambda quantize=quantize: quantize(nn.Linear(64, 32)), WITH_BIAS, (4, 64), dtype=torch.float32)
    for name, quantize in QUANTIZE.items()
}
QUANTISED["siblings in nf4"] = Kind(lambda: Siblings(QUANTIZE["nf4"], 64), SIBLINGS, (4, 64), dtype=torch.float32)
QUANTISED |= {f"peft {name}": QUANTISED[name]._replace(door=Accelerated) for name in ("nf4", "int8")}
# PEFT has no biases next to torchao's weights.
QUANTISED["peft torchao-int8"] = QUANTISED["torchao-int8"]._replace(door=Accelerated, options={"target_modules": ["0"]})


def of_kinds(
    door: type | None = None,
    without: tuple[str, ...] = (),
    quantised: bool = False,
    quick: tuple[str, ...] | None = None,
) -> pytest.MarkDecorator:
    """Runs a test for the kinds through ``door`` (default: both) whose names contain nothing of ``without``.

    ``quantised``: also for those with quantised base layers. ``quick``: the kinds of the quick tests (default: all).
    """
    kinds = KINDS | QUANTISED if quantised else KINDS
    names = [
        name for name, kind in kinds.items() if door in (None, kind.door) and not any(text in name for text in without)
    ]
    full = set() if quick is None else {*names} - {*quick}
    marks = {name: [pytest.mark.full] * (name in full) for name in names}
    return pytest.mark.parametrize("kind", [pytest.param(kinds[name], id=name, marks=marks[name]) for name in names])


def adapted(kind: Kind, *names: str, dtype: torch.dtype | None = None, **more: Any) -> nn.Module:
    """A model with adapters ``names`` of different ranks, all in use if the kind allows it, or the first."""
    torch.manual_seed(0)
    dtype = dtype or kind.dtype
    model = nn.Sequential(kind.make())
    model = model if kind in QUANTISED.values() else model.to(dtype)
    for i, name in enumerate(names or ("default",)):
        options = {"r": 2 + i, "lora_alpha": 3, "init_lora_weights": False, "target_modules": []}
        model = kind.door.add(model, name, **options | kind.options | more)
    with torch.no_grad():
        for name, parameter in trained(model).items():
            if name.endswith("bias"):
                parameter.normal_()
            elif "magnitude" in name:
                parameter *= torch.linspace(0.4, 2.0, len(parameter))
            elif dtype.itemsize == 2:
                parameter.data = parameter.data.float()
    in_use = list(names or ("default",))
    return kind.door.use(model.eval(), in_use if len(kind.names) > 1 else in_use[:1])


def frozen(model: nn.Module) -> dict[str, Tensor]:
    return {name: p for name, p in model.named_parameters() if "lora_" not in name}


def trained(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.requires_grad_() for name, p in model.named_parameters() if "lora_" in name}


def step(model: nn.Module, x: Tensor, run: Callable | None = None) -> list[Tensor]:
    """The output and the gradients of the adapters."""
    torch.manual_seed(1)
    y = (model if run is None else run)(x)
    return [y, *torch.autograd.grad(y.float().square().sum(), list(trained(model).values()))]


def input_of(kind: Kind, dtype: torch.dtype | None = None) -> Tensor:
    if type(kind.make()) is nn.Embedding:
        return torch.randint(20, kind.shape)
    return torch.randn(kind.shape).to(dtype or kind.dtype)
