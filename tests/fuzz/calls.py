"""A call as it is run and printed: lines that make its arguments, the call, and what its results must be."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from .choices import Choices
from .values import Value

IMPORTS = "import numpy\nimport torch\nimport lora_ext"


class CannotTell(Exception):
    """An oracle's: for these arguments there is nothing to compare with."""


@dataclass
class Call:
    """One call of a function.

    Attributes:
        function: what is called, as it is counted and written.
        arguments: what they are made from, by name. All are passed by name, except those that begin with "_", of which
            others are made.
        oracle: compares the result with what it must be: ``oracle(before, result, after)`` gets the arguments as they
            were, what came back, and the arguments as they are now. Raises :class:`WrongResult` or :class:`CannotTell`.
        changes: the arguments that the function may change.
        around: a context manager to call it in, as source, or "".
        after: lines that use the result: part of the call.
        differentiated: what gradients are taken of, as source; "": none are.
        mutated: the arguments that may be wrong.
        words: that a message may name instead of the function or an argument.
    """

    function: str
    arguments: dict[str, Value]
    oracle: Callable[[Mapping[str, Any], Any, Mapping[str, Any]], None] | None = None
    changes: tuple[str, ...] = ()
    around: str = ""
    after: str = ""
    differentiated: str = ""
    mutated: list[str] = field(default_factory=list)
    words: list[str] = field(default_factory=list)

    def imports(self) -> str:
        module = ".".join(part for part in self.function.split(".")[:-1] if part[0].islower())
        return IMPORTS if module.startswith("torch") else f"{IMPORTS}\nimport {module}, lora_ext.nn"

    def setup(self) -> str:
        lines = [line for name, value in self.arguments.items() for line in value.lines(name)]
        return "\n".join([self.imports(), *lines]) + "\n"

    def body(self) -> str:
        passed = ", ".join(f"{name}={name}" for name in self.arguments if not name.startswith("_"))
        line = f"result = {self.function}({passed})\n"
        return (f"with {self.around}:\n    {line}" if self.around else line) + self.after

    def backward(self) -> str:
        return f"differentiated = {self.differentiated}\n{GRADIENTS}" if self.differentiated else ""

    def source(self) -> str:
        return self.setup() + self.body() + self.backward()


# Of all outputs that have any, after a fixed pattern, to those arguments that ask.
GRADIENTS = """
outputs = [t for t in differentiated if t.requires_grad]
if outputs:
    patterns = [torch.linspace(-1, 1, t.numel()).to(t.dtype).view(t.shape) for t in outputs]
    torch.autograd.backward(outputs, patterns)
"""

Maker = Callable[[Choices], Call]
