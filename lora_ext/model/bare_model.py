"""A view of a model without its adapter layers."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping

from torch import nn

from lora_ext._common.modules import COMPILED, DATA_PARALLEL, KEY_PREFIX, embeddings_of, root_module, without_wrapper
from lora_ext._common.sharded import is_fully_sharded, is_managed, is_partitioned, is_sharded
from lora_ext.nn import AdapterLayer, LoraLayer


def check_not_parallel(caller: str, model: nn.Module) -> None:
    """Checks that no wrapper keeps a list of the parameters that train now. ValueError: one does."""
    model = getattr(model, COMPILED, model)
    if isinstance(model, DATA_PARALLEL):
        kind = type(model).__name__
        raise ValueError(
            f"{caller}: the model is wrapped by {kind}, which knows only the parameters that trained when it was made; "
            f"call {caller} on model.module, and wrap that again"
        )


def check_not_managed(caller: str, model: nn.Module, remedy: str) -> None:
    """Checks that no DeepSpeed engine with ZeRO-3 manages the parameters of ``model``. ValueError: one does."""
    if is_managed(model):
        raise ValueError(
            f"{caller}: DeepSpeed's ZeRO-3 has partitioned the model, and manages the parameters it had; {remedy}"
        )


def check_not_sharded(
    caller: str, model: nn.Module, remedy: str, *, fsdp_may: bool = False, split_may: bool = False
) -> None:
    """Checks that ranks do not hold parts of the parameters of ``model``. ValueError: they do.

    ``fsdp_may``: FSDP2's are allowed; ``split_may``: those of tensor parallelism.
    """
    if any(map(is_partitioned, model.parameters())):
        how = "DeepSpeed's ZeRO-3 has partitioned parameters of the model"
    elif not fsdp_may and any(map(is_fully_sharded, model.modules())):
        how = "the model is sharded (fully_shard), which manages the parameters it had"
    elif not split_may and any(map(is_sharded, model.parameters())):
        how = "layers of the model are split over devices (tensor parallelism)"
    else:
        return
    raise ValueError(f"{caller}: {how}; {remedy}")


def adapter_layers(model: nn.Module) -> Iterator[tuple[str, AdapterLayer]]:
    """Yields ``(path, layer)`` of every adapter layer in ``model``, each layer once."""
    for path, module in root_module(model).named_modules():
        if isinstance(module, AdapterLayer):
            yield path, module


def parameter_paths(modules: Iterable[tuple[str, nn.Module]]) -> dict[int, list[str]]:
    """Maps ``id(parameter)`` to the paths of the modules that hold it. ``modules`` yields ``(path, module)``."""
    paths: dict[int, list[str]] = defaultdict(list)
    for path, module in modules:
        for parameter in module._parameters.values():
            if parameter is not None:
                paths[id(parameter)].append(path)
    return paths


class BareModel:
    """The modules of a model as they were before injection, without wrappers around parts (compiled, checkpointed).

    Attributes:
        root: the model.
        modules: by path, without the root; a module in several places is under its first path.
        layers: by the same paths, the adapter layers around a module, the outermost first.
        head, embedding: the output and input embeddings of a Transformers model, without layers, or None.
    """

    def __init__(self, root: nn.Module) -> None:
        self.root = root
        self.modules: dict[str, nn.Module] = {}
        self.layers: dict[str, list[AdapterLayer]] = {}
        self._visit("", root, set())
        self.head, self.embedding = (
            None if module is None else _unwrapped(module)[1]
            for module in (embeddings_of(root, "output"), embeddings_of(root, "input"))
        )

    def _visit(self, path: str, module: nn.Module, seen: set[int]) -> None:
        layers, module = _unwrapped(module)
        if id(module) in seen:
            return
        seen.add(id(module))
        if path:
            self.modules[path] = module
        if layers:
            self.layers[path] = layers
        for name, child in module._modules.items():
            if child is not None:
                self._visit(f"{path}.{name}" if path else name, child, seen)

    def parent(self, path: str) -> nn.Module:
        """Returns the module around the one at ``path``."""
        above = path.rpartition(".")[0]
        return self.modules[above] if above else self.root


def _unwrapped(module: nn.Module) -> tuple[list[AdapterLayer], nn.Module]:
    """Returns the adapter layers around a module, the outermost first, and the module without wrappers."""
    layers: list[AdapterLayer] = []
    while True:
        if isinstance(module, AdapterLayer):
            layers.append(module)
            module = module.base_layer
        elif (inner := without_wrapper(module)) is not None:
            module = inner
        else:
            return layers, module


def file_paths(layers: Iterable[tuple[str, AdapterLayer]]) -> dict[AdapterLayer, str]:
    """Maps the layers of one adapter to their paths in PEFT's files.

    The paths depend on this adapter's layers only: PEFT adds ``.base_layer`` after every module with a LoRA layer. If
    several layers are around one module, it adds one for each of them except the innermost.

    Args:
        layers: all layers of the adapter, with their paths in the bare model.
    """
    around: dict[str, list[AdapterLayer]] = defaultdict(list)
    for path, layer in layers:
        around[path].append(layer)
    counts = {path: sum(isinstance(layer, LoraLayer) for layer in nested) for path, nested in around.items()}
    return {
        layer: file_path(path, counts) + ".base_layer" * depth
        for path, nested in around.items()
        for depth, layer in enumerate(sorted(nested, key=lambda layer: layer.place, reverse=True))
    }


def file_path(path: str, layers: Mapping[str, int]) -> str:
    """Returns what the keys in files of the tensors at ``path`` begin with.

    ``layers``: the number of LoRA layers at each path.
    """
    parts, names = [], path.split(".")
    for i, name in enumerate(names):
        parts.append(name)
        if i + 1 < len(names):
            parts += ["base_layer"] * layers.get(".".join(names[: i + 1]), 0)
    return KEY_PREFIX + ".".join(parts)
