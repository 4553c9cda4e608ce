"""A call as it is run and printed: source of its arguments, the call, and the oracle of its results."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from .choices import Choices
from .values import Value

IMPORTS = "import numpy\nimport torch\nimport lora_ext"


class CannotTell(Exception):
    """Raised by an oracle that has nothing to compare with for these arguments."""


@dataclass
class Call:
    """One call of a function.

    Attributes:
        function: the function's dotted name.
        arguments: sources of the arguments, all passed by name. Names that start with "_" are not passed; others use
            them.
        oracle: checks the result: ``oracle(before, result, after)`` gets the arguments before the call, the result,
            and the arguments after it. Raises :class:`WrongResult` or :class:`CannotTell`.
        changes: the arguments that the function may change.
        around: source of a context manager around the call, or "".
        after: further lines of the call, which use the result.
        differentiated: source of the outputs to differentiate; "": none.
        mutated: the arguments that may be wrong.
        words: words that a message may contain instead of the function or an argument.
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


# Computes gradients of all outputs that have any, with a fixed pattern.
GRADIENTS = """
outputs = [t for t in differentiated if t.requires_grad and not t.is_nested]
if outputs:
    patterns = [torch.linspace(-1, 1, t.numel()).to(t.dtype).view(t.shape) for t in outputs]
    torch.autograd.backward(outputs, patterns)
"""

Maker = Callable[[Choices], Call]
