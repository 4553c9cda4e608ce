"""A model seen without the adapter layers that it holds."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping

from torch import nn

from lora_ext.nn import AdapterLayer, LoraLayer


def root_module(model: nn.Module) -> nn.Module:
    """What ``torch.compile`` wrapped, or ``model``: paths and files must not depend on compilation."""
    return getattr(model, "_orig_mod", model)


def adapter_layers(model: nn.Module) -> Iterator[tuple[str, AdapterLayer]]:
    """``(path, layer)`` of everything in ``model`` that holds adapters, each layer once."""
    for path, module in root_module(model).named_modules():
        if isinstance(module, AdapterLayer):
            yield path, module


def parameter_paths(modules: Iterable[tuple[str, nn.Module]]) -> dict[int, list[str]]:
    """``id(parameter)`` -> the paths of those of ``modules``, each with its path, that hold it."""
    paths: dict[int, list[str]] = defaultdict(list)
    for path, module in modules:
        for parameter in module._parameters.values():
            if parameter is not None:
                paths[id(parameter)].append(path)
    return paths


class BareModel:
    """The modules of a model as they were before anything was adapted.

    Attributes:
        root: the model.
        modules: by path, the root left out; a module in several places under its first path.
        layers: by the same paths, the adapter layers around a module, the outermost first.
        head, embedding: the output and input embeddings of a Transformers model, or None.
    """

    def __init__(self, root: nn.Module) -> None:
        self.root = root
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


def file_paths(layers: Iterable[tuple[str, AdapterLayer]]) -> dict[AdapterLayer, str]:
    """Where PEFT's files have the layers that hold an adapter.

    That depends on nothing else that the model holds: behind every module that has the adapter itself, PEFT puts
    ``.base_layer``. Where several layers are around one module, it does so behind each but the innermost.

    Args:
        layers: all of them, each with its path in the bare model.
    """
    around: dict[str, list[AdapterLayer]] = defaultdict(list)
    for path, layer in layers:
        around[path].append(layer)
    lora = {path: sum(isinstance(layer, LoraLayer) for layer in own) for path, own in around.items()}
    return {
        layer: file_path(path, lora) + ".base_layer" * depth
        for path, own in around.items()
        for depth, layer in enumerate(sorted(own, key=lambda layer: layer.place, reverse=True))
    }


def file_path(path: str, layers: Mapping[str, int]) -> str:
    """``path`` in keys of files, with so many LoRA layers around the modules at these paths."""
    parts, names = [], path.split(".")
    for i, name in enumerate(names):
        parts.append(name)
        if i + 1 < len(names):
            parts += ["base_layer"] * layers.get(".".join(names[: i + 1]), 0)
    return ".".join(parts)
