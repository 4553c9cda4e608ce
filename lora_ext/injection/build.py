"""Builds the layers and adapters of an injection."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import nn

from lora_ext._common.matching import Parents
from lora_ext.config import LoraConfig
from lora_ext.injection.targets import Targets
from lora_ext.model.adapter_set import Adapter, AdapterSet, Part, TrainedBiases, complete_parts
from lora_ext.model.bare_model import BareModel, file_path
from lora_ext.nn import LORA_LAYERS, AdapterLayer, DoraLinear, LoraLayer, LoraPackedLinear, LoraParameter
from lora_ext.nn.adapter_layer import innermost
from lora_ext.nn.attention import LoraMultiheadAttention
from lora_ext.nn.base_layer import execution_device
from lora_ext.nn.trainable_tokens import TiedRows, TokenRows, TrainableTokens
from lora_ext.nn.trained import TrainedModule


def lora_layer_for(module: nn.Module, config: LoraConfig, path: str) -> type[LoraLayer] | None:
    """The class of LoRA layer that adapts ``module``, or None."""
    if config.enable_lora_for(path) is not None:
        return LoraPackedLinear if LoraPackedLinear.adapts(module) else None
    if config.use_dora:
        return DoraLinear if DoraLinear.adapts(module) else None
    return next((kind for kind in LORA_LAYERS if kind.adapts(module)), None)


Kind = type[LoraLayer] | None


def adapted_modules(bare: BareModel, targets: Targets, config: LoraConfig) -> Iterator[tuple[str, str, Kind]]:
    """Yields ``(path, path that sets the rank, class of layer)`` of the targets and of modules adapted along."""
    seen, trained = set(), Parents(targets.trained)
    for target, module in targets.modules.items():
        along = getattr(lora_layer_for(module, config, target), "adapted_along", ())
        for path in (target, *(f"{target}.{name}" for name in along)):
            if path not in seen and path not in trained:
                seen.add(path)
                yield path, target, lora_layer_for(bare.modules[path], config, target)


def attention_around(bare: BareModel, path: str) -> nn.MultiheadAttention | None:
    """The attention whose ``out_proj`` is at ``path``, or None."""
    parent = bare.parent(path)
    return parent if isinstance(parent, nn.MultiheadAttention) and path.endswith("out_proj") else None


class PartsBuilder:
    """Builds the parts of one adapter for a model that holds the adapters ``into`` already.

    Its low-rank factors are on ``device`` if given: on the meta device they take no memory until :func:`give_memory`.
    """

    def __init__(
        self, bare: BareModel, config: LoraConfig, into: AdapterSet, device: torch.device | None = None
    ) -> None:
        self.bare, self.config, self.active, self.device = bare, config, into.active, device
        self.untrained = {key: bias for biases in into.biases.values() for key, bias in biases.originals().items()}
        self.made: dict[tuple[str, Callable], AdapterLayer] = {}

    def parts(self, targets: Targets) -> tuple[Part, ...]:
        parts = [*self.lora_parts(targets), *self.parameter_parts(targets), *self.trained_parts(targets)]
        replaced = {old: new for part in parts for old, new in part.replaced.items()}
        return complete_parts((*parts, *self.token_parts(targets, replaced)))

    def lora_parts(self, targets: Targets) -> Iterator[Part]:
        for path, setting, kind in adapted_modules(self.bare, targets, self.config):
            module = self.bare.modules[path]
            adapter = kind.new_adapter(module, self.config, setting, self.device or execution_device(module))
            packed = {"num_parts": len(self.config.enable_lora_for(setting))} if kind is LoraPackedLinear else {}
            layer, replaced = self._layer(path, module, kind, **packed)
            if (attention := attention_around(self.bare, path)) is not None:  # only our layer calls out_proj
                replaced |= self._layer(path.rpartition(".")[0], attention, LoraMultiheadAttention)[1]
            yield Part(path, path, layer, adapter, replaced)

    def parameter_parts(self, targets: Targets) -> Iterator[Part]:
        for path, names in targets.parameters.items():
            module = self.bare.modules[path]
            existing = [layer for layer in self.bare.layers.get(path, ()) if isinstance(layer, LoraParameter)]
            layers = {layer.parameter_name: layer for layer in existing}
            outermost = before = existing[0] if existing else module
            for name in names:
                if name not in layers:
                    outermost = layers[name] = LoraParameter(outermost, name, active=self.active)
            for name in names:
                adapter = LoraParameter.new_adapter_of(module, name, self.config, f"{path}.{name}", self.device)
                replaced = {} if outermost is before else {before: outermost}
                yield Part(path, path, layers[name], adapter, replaced)

    def trained_parts(self, targets: Targets) -> Iterator[Part]:
        copied: dict = dict(self.untrained)  # a shared deepcopy memo: copies of tied modules stay tied
        inside = Parents(targets.trained)
        for path, around in reversed(self.bare.layers.items()):  # copies must not contain other adapters
            if path in inside:
                copied |= dict.fromkeys(map(id, around), copy.deepcopy(self.bare.modules[path], copied))
        for path in targets.trained:
            outermost = next(iter(self.bare.layers.get(path, ())), self.bare.modules[path])
            layer, replaced = self._layer(path, outermost, TrainedModule)
            yield Part(path, path, layer, copy.deepcopy(self.bare.modules[path], copied), replaced)

    def token_parts(self, targets: Targets, replaced: Mapping[nn.Module, nn.Module]) -> Iterator[Part]:
        """Builds the parts that train token rows. ``replaced``: the modules that other parts replace, and by what."""
        rows: dict[str, TokenRows | TiedRows] = {
            path: TokenRows(self.bare.modules[path].weight, tokens) for path, tokens in targets.tokens.items()
        }
        rows |= {path: TiedRows(rows[source]) for path, source in targets.tied.items()}
        for path, adapter in rows.items():
            around = self.bare.layers.get(path, ())
            layer = next((layer for layer in around if isinstance(layer, TrainableTokens)), None)
            if layer is not None:
                yield Part(path, path, layer, adapter)
            else:
                lora = (layer for layer in around if not isinstance(layer, TrainedModule))
                outermost = next(lora, self.bare.modules[path])  # inside copies trained in full, which take no rows
                layer = TrainableTokens(replaced.get(outermost, outermost), active=self.active)
                yield Part(path, path, layer, adapter, {outermost: layer})

    def _layer(
        self, path: str, module: nn.Module, kind: type[AdapterLayer], **options: int
    ) -> tuple[AdapterLayer, dict[nn.Module, nn.Module]]:
        """The existing layer of this kind around the module, or a new one; and the replacement that it needs."""
        for layer in self.bare.layers.get(path, ()):
            if isinstance(layer, kind):
                return layer, {}
        if (path, kind) not in self.made:
            self.made[path, kind] = kind(module, active=self.active, **options)
        layer = self.made[path, kind]
        return layer, {module: layer}

    def biases(self, parts: tuple[Part, ...]) -> TrainedBiases | None:
        if self.config.bias == "none":
            return None
        num_layers = Counter(part.path for part in parts if isinstance(part.layer, LoraLayer))
        trained = Parents(part.path for part in parts if isinstance(part.layer, TrainedModule))
        owners = {}
        for path, module in self.bare.modules.items():
            if module._parameters.get("bias") is None or path in trained:
                continue
            if self.config.bias == "all" or path in num_layers:
                owners[file_path(path, num_layers) + ".base_layer" * num_layers[path]] = module
        return TrainedBiases(owners)


@torch.inference_mode(False)
def give_memory(adapter: Adapter) -> None:
    """Allocates the factors that are on the meta device on their base layers' devices, uninitialised, in place."""
    for part in adapter.parts:
        if isinstance(part.layer, LoraLayer):
            part.adapter.to_empty(device=execution_device(innermost(part.layer)) or part.layer.weight.device)
