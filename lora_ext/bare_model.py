"""A model seen without the adapter layers that it holds."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping

from torch import nn

from .nn import AdapterLayer


def root_module(model: nn.Module) -> nn.Module:
    """What ``torch.compile`` wrapped, or ``model``: paths and files must not depend on compilation."""
    return getattr(model, "_orig_mod", model)


def adapter_layers(model: nn.Module) -> Iterator[tuple[str, AdapterLayer]]:
    """``(path, layer)`` of everything in ``model`` that holds adapters, each layer once."""
    for path, module in root_module(model).named_modules():
        if isinstance(module, AdapterLayer):
            yield path, module


def parameter_paths(model: nn.Module) -> dict[int, list[str]]:
    """``id(parameter)`` -> the paths of the modules that hold it; a module in several places counts once."""
    paths: dict[int, list[str]] = defaultdict(list)
    for path, module in model.named_modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                paths[id(parameter)].append(path)
    return paths


class BareModel:
    """The modules of a model as they were before anything was adapted.

    Attributes:
        modules: by path, the root left out; a module in several places under its first path.
        layers: by the same paths, the adapter layers around a module, the outermost first.
        head, embedding: the output and input embeddings of a Transformers model, or None.
    """

    def __init__(self, root: nn.Module) -> None:
        self.modules: dict[str, nn.Module] = {}
        self.layers: dict[str, list[AdapterLayer]] = {}
        self._visit("", root, set())
        self.head = self._ask(root, "get_output_embeddings")
        self.embedding = self._ask(root, "get_input_embeddings")

    def _visit(self, path: str, module: nn.Module, seen: set[int]) -> None:
        around = []
        while isinstance(module, AdapterLayer):
            around.append(module)
            module = module.base_layer
        if id(module) in seen:
            return
        seen.add(id(module))
        if path:
            self.modules[path] = module
        if around:
            self.layers[path] = around
        for name, child in module._modules.items():
            if child is not None:
                self._visit(f"{path}.{name}" if path else name, child, seen)

    @staticmethod
    def _ask(root: nn.Module, method: str) -> nn.Module | None:
        ask = getattr(root, method, None)
        try:
            answer = ask() if callable(ask) else None
        except NotImplementedError:  # Transformers' answer for models without one
            return None
        while isinstance(answer, AdapterLayer):
            answer = answer.base_layer
        return answer

    def file_path(self, path: str, wrapped: Mapping[str, object]) -> str:
        """``path`` in keys of files, once the modules at ``wrapped`` are in adapter layers too."""
        parts, names = [], path.split(".")
        for i, name in enumerate(names):
            parts.append(name)
            prefix = ".".join(names[: i + 1])
            if i + 1 < len(names) and (prefix in wrapped or prefix in self.layers):
                parts.append("base_layer")
        return ".".join(parts)
