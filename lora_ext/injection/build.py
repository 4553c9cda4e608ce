"""An injection: finds the targets in a model, refuses those that cannot be adapted, and builds layers and adapters."""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager

import torch
from torch import nn

from lora_ext._common.matching import Parents
from lora_ext._common.messages import listed, shown
from lora_ext._common.sharded import gathered, prepare_shards
from lora_ext.config import LoraConfig
from lora_ext.injection.all_linear import expand_all_linear, is_all_linear, warn_of_parts_left_out, why_bypassed_at
from lora_ext.injection.targets import find_targets
from lora_ext.model.adapter_set import (
    Adapter,
    AdapterSet,
    Part,
    TrainedBiases,
    adapter_set,
    check_new_name,
    check_unmerged,
    complete_parts,
)
from lora_ext.model.bare_model import BareModel, check_not_managed, check_not_parallel, file_path, root_module
from lora_ext.nn import LORA_LAYERS, AdapterLayer, DoraLinear, LoraLayer, LoraPackedLinear, LoraParameter
from lora_ext.nn.adapter_layer import innermost, is_of_peft
from lora_ext.nn.attention import LoraMultiheadAttention
from lora_ext.nn.base_layer import execution_device, is_offloaded
from lora_ext.nn.linear import is_linear
from lora_ext.nn.trainable_tokens import TiedRows, TokenRows, TrainableTokens
from lora_ext.nn.trained import TrainedModule
from lora_ext.quantized import quantized_weight, why_unsupported


class Injection:
    """A new adapter for a model: its targets are found and checked, nothing is built. Errors are those of inject."""

    def __init__(self, model: nn.Module, config: LoraConfig, adapter_name: str) -> None:
        check_not_parallel("inject", model)
        check_not_managed("inject", model, "inject before deepspeed.initialize (before Trainer.train)")
        prepare_shards("inject", model)
        root, adapters = root_module(model), adapter_set(model)
        check_new_name("inject", adapter_name, adapters)
        _check_state(root, adapters, config)

        self.bare, self.name = BareModel(root), adapter_name
        self.config = expand_all_linear(config, self.bare)
        self.targets = find_targets(self.config, self.bare)
        self.trained = Parents(self.targets.trained)
        with self.values_gathered():
            self._check_targets()
            self._check_present_adapters()
        if is_all_linear(config):
            warn_of_parts_left_out(config, self.bare, self.targets)
            # Like PEFT, store the layers, not the rule: it would find other layers after the model changes.
            self.config = dataclasses.replace(self.config, target_modules=tuple(self.targets.modules))
        self.into = AdapterSet() if adapters is None else adapters

    def values_gathered(self) -> AbstractContextManager[None]:
        """Gathers the values that are copied, or may be read, if ZeRO-3 partitioned them as they were loaded.

        The weights of linear layers and embeddings stay partitioned: only their shapes are read.
        """
        targets, modules = self.targets, self.bare.modules
        read = {path for path, m in targets.modules.items() if not (is_linear(m) or isinstance(m, nn.Embedding))}
        read |= {*targets.parameters, *targets.trained, *targets.tokens, *targets.tied}
        parameters = [parameter for path in read for parameter in modules[path].parameters()]
        if self.config.bias != "none":
            parameters += [bias for module in modules.values() if (bias := module._parameters.get("bias")) is not None]
        return gathered(parameters)

    def _kind(self, path: str, setting: str) -> type[LoraLayer] | None:
        """The class of LoRA layer that adapts the module at ``path``, whose rank is set by ``setting``, or None."""
        module = self.bare.modules[path]
        kinds: tuple[type[LoraLayer], ...] = LORA_LAYERS
        if self.config.enable_lora_for(setting) is not None:
            kinds = (LoraPackedLinear,)
        elif self.config.use_dora:
            kinds = (DoraLinear,)
        return next((kind for kind in kinds if kind.adapts(module)), None)

    @functools.cached_property
    def _adapted(self) -> list[tuple[str, str, type[LoraLayer] | None]]:
        """``(path, path that sets the rank, class of layer)`` of the targets and of modules adapted along."""
        found: dict[str, tuple[str, type[LoraLayer] | None]] = {}
        for target in self.targets.modules:
            kinds = {target: self._kind(target, target)}
            for path in (f"{target}.{name}" for name in getattr(kinds[target], "adapted_along", ())):
                kinds[path] = self._kind(path, target)
            for path, kind in kinds.items():
                if path not in self.trained:
                    found.setdefault(path, (target, kind))
        return [(path, target, kind) for path, (target, kind) in found.items()]

    def _attention_around(self, path: str) -> nn.MultiheadAttention | None:
        """The attention whose ``out_proj`` is at ``path``, or None."""
        parent = self.bare.parent(path)
        return parent if isinstance(parent, nn.MultiheadAttention) and path.endswith("out_proj") else None

    # --- checks -------------------------------------------------------------------------------------------------------

    def _check_targets(self) -> None:
        """Raises a TypeError that lists all parts that cannot be adapted or trained as the config asks."""
        whys = [*self._of_layers(), *self._of_parameters(), *self._of_trained_values(), *self._of_tokens()]
        if problems := [f"{part}: {why}" for part, why in whys if why is not None]:
            kinds = ", ".join(kind.base_kinds for kind in LORA_LAYERS)
            raise TypeError(
                f"inject: the config names parts that cannot be adapted; supported are {kinds}, and parameters. Narrow "
                f"the settings that name them, or add to exclude_modules:{listed(problems)}"
            )

    def _of_layers(self) -> Iterator[tuple[str, str | None]]:
        for path, setting, kind in self._adapted:
            yield f"{path} ({type(self.bare.modules[path]).__name__})", self._why_not(path, setting, kind)

    def _why_not(self, path: str, setting: str, kind: type[LoraLayer] | None) -> str | None:
        module = self.bare.modules[path]
        only_linear = f"use_dora supports only {DoraLinear.base_kinds}"
        if quantized_weight(module) is None:
            if kind is None and self.config.enable_lora_for(setting) is not None:
                return f"enable_lora names it, but supports only {LoraPackedLinear.base_kinds}"
            if kind is None and self.config.use_dora:
                return only_linear
            if (why := why_unsupported(module)) is not None:
                return why
        if kind is None:
            return f"no LoRA layer adapts {type(module).__name__}"
        attention = self._attention_around(path)
        if attention is None or (why := kind.why_not(module, self.config)) is not None:
            return kind.why_not(module, self.config) or why_bypassed_at(self.bare, path)
        why = only_linear if self.config.use_dora else LoraMultiheadAttention.why_not(attention, self.config)
        if why is None and attention is self.bare.root:
            why = "it is the model itself; put it into another module"
        return why and f"nn.MultiheadAttention reads its weight and never calls it, and {why}"

    def _of_parameters(self) -> Iterator[tuple[str, str | None]]:
        for path, name in ((path, name) for path, names in self.targets.parameters.items() for name in names):
            why = LoraParameter.why_not_parameter(self.bare.modules[path], name) or why_bypassed_at(self.bare, path)
            if why is None and self._attention_around(path) is not None:
                why = f"nn.MultiheadAttention reads it and never calls its module; name {path!r} in target_modules"
            yield f"{path}.{name}", why

    def _of_trained_values(self) -> Iterator[tuple[str, str]]:
        """Yields the modules whose values cannot be copied to train them, or their biases."""
        for path, module in self.bare.modules.items():
            is_trained = path in self.trained
            if is_trained and (quantized_weight(module, any_kind=True) or why_unsupported(module)) is not None:
                yield (
                    f"{path} ({type(module).__name__})",
                    "modules_to_save would train its quantised weight; adapt it by target_modules, or leave it "
                    "unquantised (llm_int8_skip_modules, modules_to_not_convert)",
                )
            for name in module._parameters if is_trained or self.config.bias != "none" else ():
                if (is_trained or name == "bias") and is_offloaded(module, name):
                    key = "modules_to_save" if is_trained else "bias"
                    yield f"{path}.{name}", f"{key} trains it, but it is offloaded; keep it on a device (device_map)"

    def _of_tokens(self) -> Iterator[tuple[str, str | None]]:
        for path in (*self.targets.tokens, *self.targets.tied):
            module, tokens = self.bare.modules[path], self.targets.tokens.get(path)
            if (why := TrainableTokens.why_not(module)) is not None:
                yield f"{path} ({type(module).__name__})", f"trainable_token_indices cannot train its rows: {why}"
            elif tokens == ():
                yield path, "trainable_token_indices names none of its tokens; leave it out"
            elif wrong := [token for token in tokens or () if token >= len(module.weight)]:
                yield (
                    path,
                    f"trainable_token_indices names the tokens {shown(wrong)}, but it has {len(module.weight)}; "
                    "resize the embedding first (resize_token_embeddings)",
                )

    def _check_present_adapters(self) -> None:
        """Refuses targets whose layers hold adapters of a kind that the new one cannot join."""
        for path in (*self.targets.modules, *self.targets.parameters):
            for layer in (layer for layer in self.bare.layers.get(path, ()) if isinstance(layer, LoraLayer)):
                kind = LoraParameter if path in self.targets.parameters else self._kind(path, path)
                parts = len(self.config.enable_lora_for(path) or ())
                if type(layer) is not kind or getattr(layer, "num_parts", parts) != parts:
                    raise ValueError(
                        f"inject: {path!r} has adapters ({list(layer.adapters) or 'those of an AdapterPool'}) in a "
                        f"{type(layer).__name__}, which the new one cannot join; adapt it in the same way (use_dora, "
                        "enable_lora, target_parameters), or remove them (delete_adapter(model, ...), pool.close())"
                    )

    # --- layers and adapters ------------------------------------------------------------------------------------------

    @torch.inference_mode(False)  # autograd would refuse parameters that are made there, also later
    def build(self, device: torch.device | None = None) -> Adapter:
        """Builds the initialised adapter; low-rank factors on ``device``, or where their base layers are.

        On the meta device they take no memory until :func:`give_memory`.
        """
        self._made: dict[tuple[str, type], AdapterLayer] = {}
        parts = [*self._lora_parts(device), *self._parameter_parts(device), *self._trained_parts()]
        replaced = {old: new for part in parts for old, new in part.replaced.items()}
        parts = complete_parts((*parts, *self._token_parts(replaced)))
        return Adapter(self.name, self.config, self.into, parts, self._biases(parts))

    def _lora_parts(self, device: torch.device | None) -> Iterator[Part]:
        for path, setting, kind in self._adapted:
            module = self.bare.modules[path]
            adapter = kind.new_adapter(module, self.config, setting, device or execution_device(module))
            packed = {"num_parts": len(self.config.enable_lora_for(setting))} if kind is LoraPackedLinear else {}
            layer, replaced = self._layer(path, module, kind, **packed)
            if (attention := self._attention_around(path)) is not None:  # only our layer calls out_proj
                replaced |= self._layer(path.rpartition(".")[0], attention, LoraMultiheadAttention)[1]
            yield Part(path, layer, adapter, replaced)

    def _parameter_parts(self, device: torch.device | None) -> Iterator[Part]:
        for path, names in self.targets.parameters.items():
            module = self.bare.modules[path]
            existing = [layer for layer in self.bare.layers.get(path, ()) if isinstance(layer, LoraParameter)]
            layers = {layer.parameter_name: layer for layer in existing}
            outermost = before = existing[0] if existing else module
            for name in names:
                if name not in layers:
                    outermost = layers[name] = LoraParameter(outermost, name, active=self.into.active)
            for name in names:
                adapter = LoraParameter.new_adapter_of(module, name, self.config, f"{path}.{name}", device)
                yield Part(path, layers[name], adapter, {} if outermost is before else {before: outermost})

    def _trained_parts(self) -> Iterator[Part]:
        # A shared deepcopy memo: copies of tied modules stay tied. Biases that another adapter trains are as before.
        copied: dict = {key: bias for biases in self.into.biases.values() for key, bias in biases.originals().items()}
        for path, around in reversed(self.bare.layers.items()):  # copies must not contain other adapters
            if path in self.trained:
                copied |= dict.fromkeys(map(id, around), copy.deepcopy(self.bare.modules[path], copied))
        for path in self.targets.trained:
            outermost = next(iter(self.bare.layers.get(path, ())), self.bare.modules[path])
            layer, replaced = self._layer(path, outermost, TrainedModule)
            yield Part(path, layer, copy.deepcopy(self.bare.modules[path], copied), replaced)

    def _token_parts(self, replaced: Mapping[nn.Module, nn.Module]) -> Iterator[Part]:
        """Builds the parts that train token rows. ``replaced``: the modules that other parts replace, and by what."""
        rows: dict[str, TokenRows | TiedRows] = {
            path: TokenRows(self.bare.modules[path].weight, tokens) for path, tokens in self.targets.tokens.items()
        }
        rows |= {path: TiedRows(rows[source]) for path, source in self.targets.tied.items()}
        for path, adapter in rows.items():
            lora = (layer for layer in self.bare.layers.get(path, ()) if not isinstance(layer, TrainedModule))
            outermost = next(lora, self.bare.modules[path])  # inside copies trained in full, which take no rows
            layer, put = self._layer(path, replaced.get(outermost, outermost), TrainableTokens)
            yield Part(path, layer, adapter, {outermost: layer} if put else {})

    def _layer(
        self, path: str, module: nn.Module, kind: type[AdapterLayer], **options: int
    ) -> tuple[AdapterLayer, dict[nn.Module, nn.Module]]:
        """The existing layer of this kind around the module, or a new one; and the replacement that it needs."""
        for layer in self.bare.layers.get(path, ()):
            if isinstance(layer, kind):
                return layer, {}
        if (path, kind) not in self._made:
            self._made[path, kind] = kind(module, active=self.into.active, **options)
        layer = self._made[path, kind]
        return layer, {module: layer}

    def _biases(self, parts: tuple[Part, ...]) -> TrainedBiases | None:
        if self.config.bias == "none":
            return None
        num_layers = Counter(part.path for part in parts if isinstance(part.layer, LoraLayer))
        owners = {}
        for path, module in self.bare.modules.items():
            if module._parameters.get("bias") is None or path in self.trained:
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


def _check_state(root: nn.Module, adapters: AdapterSet | None, config: LoraConfig) -> None:
    if adapters is not None:
        adapters.check_enabled("inject")
    for path, module in root.named_modules():
        if is_of_peft(module):  # its factors would be targets, and frozen
            raise ValueError(
                f"inject: {path!r} is a layer of PEFT ({type(module).__name__}); merge or remove PEFT's adapters first "
                "(peft_model.merge_and_unload()), or run PEFT's layers on lora_ext's kernels: "
                "lora_ext.integrations.peft.accelerate(peft_model)"
            )
        if adapters is None and isinstance(module, LoraLayer):
            raise ValueError(
                f"inject: {type(root).__name__} has LoRA layers already ({path!r}), but was not injected as a whole; "
                "call lora_ext.adapters.merge_and_unload(model) first, or inject into a fresh model"
            )
    check_unmerged("inject", root)  # a new adapter becomes active and would come on top
    if adapters is not None and adapters.biases and config.bias != "none":
        (owner,) = adapters.biases
        raise ValueError(
            f"inject: bias is {config.bias!r}, but the adapter {owner!r} trains the model's biases already; use "
            'bias="none", or lora_bias=True, a bias per adapter'
        )
