"""A backend of ``torch.compile`` that lets layers share inputs, and calls the backend that compiles the result."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx
from torch._dynamo import lookup_backend

from lora_ext._common.arguments import checked
from lora_ext.compiling.shared_calls import share
from lora_ext.nn.input_groups import InputGroup, InputGroups


class SharingBackend:
    """A backend of ``torch.compile``, made by :func:`share_inputs`.

    PyTorch compiles a model again for another backend, but not for a copy of the same one.

    Attributes:
        backend: the name or function of the backend that compiles the changed graphs.
        groups: the layers that read one tensor: computed together, or the reason why not. ``print`` shows a summary.
            Of several graphs with a layer of one path, the last counts.
    """

    def __init__(self, backend: str | Callable[..., Any]) -> None:
        lookup_backend(backend)  # refuses unknown names
        self.backend = backend
        self._groups: dict[str, InputGroup] = {}  # by the layers' paths
        self._compilers: list[Callable[..., Any]] = []

    def __call__(
        self,
        graph: fx.GraphModule,
        inputs: list[Tensor],
        *,
        mode: str | None = None,
        options: dict[str, Any] | None = None,
    ) -> Callable[..., Any]:
        """Compiles a graph of Dynamo's. ``mode`` and ``options`` are those given to ``torch.compile``."""
        self._groups |= {path: group for group in share(graph) for path in group.paths}
        # As in torch.compile: inductor's function does not take a mode and options.
        if self.backend == "inductor":
            compiler = torch._TorchCompileInductorWrapper(mode, options, None)
        else:
            compiler = torch._TorchCompileWrapper(self.backend, mode, options, None)
        if compiler not in self._compilers:
            self._compilers.append(compiler)
        return compiler(graph, inputs)

    @property
    def groups(self) -> InputGroups:
        groups = [*self._groups.values()]  # at once: another thread may compile
        return InputGroups(tuple({id(group): group for group in groups}.values()))

    def reset(self) -> None:
        """Frees what the backends keep; ``torch.compiler.reset`` calls it."""
        for compiler in self._compilers:
            compiler.reset()

    def __deepcopy__(self, memo: dict) -> SharingBackend:
        return self  # generate copies its CompileConfig for every call

    def __repr__(self) -> str:
        return f"share_inputs({self.backend!r})"


@checked
def share_inputs(backend: str | Callable = "inductor") -> SharingBackend:
    """Returns a backend for ``torch.compile`` whose graphs compute layers that read one tensor together.

    ``torch.compile(model, backend=share_inputs())``. Each graph is changed before ``backend`` compiles it: calls of
    ``lora_linear`` by layers of one module with the same tensor (q/k/v, gate/up) become one call of
    ``lora_linear_siblings``. So the backward, which is derived from the changed graph, shares its passes, too.

    Args:
        backend: the backend that compiles the changed graphs, by its name or as a function.

    Raises:
        TypeError: ``backend`` is neither a string nor a function.
        torch._dynamo.exc.InvalidBackend: PyTorch knows no backend of that name.
    """
    return SharingBackend(backend)
