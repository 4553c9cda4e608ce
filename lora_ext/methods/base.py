"""The interface of adaptation methods: what a method states, the modules that it inserts, and new heads."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from lora_ext._common.arguments import checked
from lora_ext._common.messages import shown
from lora_ext._common.modules import remove_hooks
from lora_ext.config import TASK_HEADS
from lora_ext.model.bare_model import BareModel, root_module

if TYPE_CHECKING:
    from lora_ext.config import LoraConfig


class Inserted(nn.Module):
    """A child of its host, the module whose input or output it changes. The paths of other modules do not change.

    The host's forward hooks are plain functions that look up the child in the host, so copies and pickles of a model
    call the right children.
    """

    def enter(self, host: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        """Returns the arguments for the host."""
        return args, kwargs

    def leave(self, host: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
        """Returns the output for the host; ``args`` and ``kwargs`` come from :meth:`enter`."""
        return output


class Insertion(NamedTuple):
    """``module`` becomes the child ``name`` of ``host``, which is at ``path`` in the bare model."""

    path: str
    host: nn.Module
    name: str
    module: Inserted


@dataclass(frozen=True)
class Method:
    """A way to adapt a model: which parameters are trained, and which modules are inserted.

    A subclass is a frozen dataclass whose fields are the method's options; it overrides :meth:`trained_parameters`,
    :meth:`insertions` or :meth:`lora_config`. These do not change the model; all errors are raised in them and in
    ``__post_init__``.
    """

    name: ClassVar[str]  # on the command line and in files

    def trained_parameters(self, bare: BareModel) -> dict[str, nn.Parameter]:
        """Returns the bare model's parameters to train in place, by path, without the head's."""
        return {}

    def buffers(self, bare: BareModel) -> dict[str, Tensor]:
        """Returns buffers of the bare model, by path, that training changes and files must hold."""
        return {}

    def insertions(self, model: nn.Module) -> list[Insertion]:
        """Returns new modules to insert; all their parameters are trained."""
        return []

    def lora_config(self, model: nn.Module) -> LoraConfig | None:
        """Returns the config of the low-rank adapter to inject, or None."""
        return None

    def count(self, model: nn.Module) -> int:
        """Counts the parameters trained in the bare ``model`` by the paper's formula, without the head."""
        raise NotImplementedError

    @property
    def parts(self) -> tuple[Method, ...]:
        """The methods that this one combines, or itself."""
        return (self,)

    def options(self) -> dict[str, Any]:
        """Returns JSON values such that ``type(self)(**options)`` is an equal method."""
        return dict(vars(self))


def check_at_least(method: str, least: int, **options: int) -> None:
    """Raises for the first option that is not an integer of at least ``least``."""
    for name, value in options.items():
        if not isinstance(value, int) or isinstance(value, bool):
            raise TypeError(f"{method}: {name} is {shown(value)}, want an integer")
        if value < least:
            raise ValueError(f"{method}: {name} is {shown(value)}, want at least {least}")


def task_type(model: nn.Module) -> str | None:
    """Returns PEFT's ``task_type`` of a Transformers model; None for other models."""
    name = type(root_module(model)).__name__
    return next((task for ending, task in _TASKS.items() if name.endswith(ending)), None)


@checked
def pooling_of(model: nn.Module) -> str | None:
    """Returns what :func:`lora_ext.methods.set_pooling` chose; None if it was not called."""
    return getattr(root_module(model), POOLING, None)


def head_paths(bare: BareModel) -> list[str]:
    """Returns the paths of new heads, which every method trains in addition.

    These are PEFT's for ``task_type``, matched by the end of the name, so ``pre_classifier`` is one. Empty for language
    models and base models, which are pretrained throughout. With the pooling "cls", the head includes BERT's pooler.
    """
    names = TASK_HEADS.get(task_type(bare.root), ())
    if names and pooling_of(bare.root) == "cls":
        names = (*names, ".pooler")
    found = [path for path in bare.modules if names and path.endswith(names)]
    return [path for path in found if not any(path.startswith(f"{other}.") for other in found)]


@checked
def head_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Returns the parameters of new heads of the bare ``model``, by path; :meth:`Method.count` omits them."""
    bare = BareModel(root_module(model))
    return {f"{path}.{name}": one for path in head_paths(bare) for name, one in bare.modules[path].named_parameters()}


@checked
def head_parameter_count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in head_parameters(model).values())


POOLING = "_classifier_pooling"  # attribute of the root module

_TASKS = {
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
}


def parameter_names(host: nn.Module) -> tuple[str, ...]:
    """Returns the parameter names of ``host.forward``. Not for use in hooks: ``torch.compile`` would trace it."""
    return tuple(inspect.signature(host.forward).parameters)


def by_name(names: tuple[str, ...], args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Returns all arguments of a call by keyword; ``names`` come from :func:`parameter_names`.

    The cache gets the host's name for it: ``cache`` since Transformers 5.24, ``past_key_values`` before.
    """
    named = dict(zip(names, args, strict=False)) | kwargs
    for given in {"past_key_values", "cache"} & named.keys() - {cache_name(names)}:
        named[cache_name(names)] = named.pop(given)
    return named


def cache_name(names: tuple[str, ...]) -> str:
    """Returns the name of the cache of keys and values among a host's parameters ``names``."""
    return "cache" if "cache" in names else "past_key_values"


def new_parameter_dtype(like: Tensor) -> torch.dtype:
    """Returns the dtype for new parameters: float32 if ``like`` has 16 bits (they are cast at use), else the same."""
    return torch.float32 if like.dtype in (torch.bfloat16, torch.float16) else like.dtype


def insert(insertion: Insertion) -> None:
    """Adds the module to its host."""
    is_first = not any(_inserted(insertion.host))
    insertion.module.train(insertion.host.training)
    insertion.host.add_module(insertion.name, insertion.module)
    if is_first:
        insertion.host.register_forward_pre_hook(_enter, with_kwargs=True)
        insertion.host.register_forward_hook(_leave, with_kwargs=True)


def remove_inserted(model: nn.Module) -> None:
    """Removes everything that :func:`insert` added to ``model``."""
    for host in list(model.modules()):
        for name, child in list(host.named_children()):
            if isinstance(child, Inserted):
                delattr(host, name)
        remove_hooks(host, _enter, _leave)


def _inserted(host: nn.Module) -> Iterator[Inserted]:
    return (child for child in host._modules.values() if isinstance(child, Inserted))


def _enter(host: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    for child in _inserted(host):
        args, kwargs = child.enter(host, args, kwargs)
    return args, kwargs


def _leave(host: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
    for child in _inserted(host):
        output = child.leave(host, args, kwargs, output)
    return output
