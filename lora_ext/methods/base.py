"""What a method of adaptation is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor, nn

from lora_ext._common.arguments import checked
from lora_ext._common.printable import shown
from lora_ext.config import TASK_HEADS
from lora_ext.injection.bare_model import BareModel, root_module
from lora_ext.methods.inserted import Insertion

if TYPE_CHECKING:
    from lora_ext.config import LoraConfig


@dataclass(frozen=True)
class Method:
    """A way to adapt a model: which of its parameters are trained, and what is put into it.

    A subclass is a frozen dataclass whose fields are the method's options; it says one or several of
    :meth:`trained_parameters`, :meth:`insertions` and :meth:`lora_config`. None of them changes the model: all that can
    fail happens in them, and in ``__post_init__``.

    Attributes:
        name: on the command line and in files.
    """

    name: ClassVar[str]

    def trained_parameters(self, bare: BareModel) -> dict[str, nn.Parameter]:
        """Parameters that the bare model has and that are trained in place, by their paths; the head's left out."""
        return {}

    def buffers(self, bare: BareModel) -> dict[str, Tensor]:
        """Buffers of the bare model that belong to what is trained, by their paths: files hold them."""
        return {}

    def insertions(self, model: nn.Module) -> list[Insertion]:
        """New modules with new parameters, all of them trained."""
        return []

    def lora_config(self, model: nn.Module) -> LoraConfig | None:
        """Low-rank adapters to inject."""
        return None

    def count(self, model: nn.Module) -> int:
        """How many parameters the method trains in the bare ``model``, by the paper's formula; the head left out."""
        raise NotImplementedError

    @property
    def parts(self) -> tuple[Method, ...]:
        """The methods that it consists of: itself, or several."""
        return (self,)

    def options(self) -> dict[str, Any]:
        """What makes an equal method: ``type(self)(**options)``; ready for JSON."""
        return dict(vars(self))


def check_at_least(method: str, least: int, **options: int) -> None:
    """Raises for the first option that is no integer of at least ``least``."""
    for name, value in options.items():
        if not isinstance(value, int) or isinstance(value, bool):
            raise TypeError(f"{method}: {name} is {shown(value)}, want an integer")
        if value < least:
            raise ValueError(f"{method}: {name} is {shown(value)}, want at least {least}")


def task_type(model: nn.Module) -> str | None:
    """PEFT's ``task_type`` of a Transformers model whose head is new; None for other models."""
    name = type(root_module(model)).__name__
    return next((task for ending, task in _TASKS.items() if name.endswith(ending)), None)


def head_paths(bare: BareModel) -> list[str]:
    """Where a new head is, which every method trains beside its own parameters.

    Those that LoRA trains with ``task_type``, by PEFT's rule: ``pre_classifier`` is one, as its name ends like one.
    Empty for language models and base models: what they have is pretrained.
    """
    names = TASK_HEADS.get(task_type(bare.root), ())
    found = [path for path in bare.modules if names and path.endswith(names)]
    return [path for path in found if not any(path.startswith(f"{other}.") for other in found)]


@checked
def head_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Of the new heads of the bare ``model``, by their paths: what :meth:`Method.count` leaves out."""
    bare = BareModel(root_module(model))
    heads = {path: bare.modules[path] for path in head_paths(bare)}
    return {f"{path}.{name}": each for path, head in heads.items() for name, each in head.named_parameters()}


@checked
def head_parameter_count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in head_parameters(model).values())


_TASKS = {
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
}
