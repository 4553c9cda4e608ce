"""Adapts a model in place: its target layers are replaced by layers that hold adapters.

Everything that can fail happens while planning, before the model is touched; applying a plan only swaps modules and
sets ``requires_grad``. lora_ext/targets.py has the rules by which a config names layers, which are PEFT's.
"""

from __future__ import annotations

import copy
import dataclasses
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import TypeVar

from torch import nn

from .adapter_set import Adapter, AdapterSet, Part, adapter_set, attach_adapter_set, forget_adapter_set, located
from .bare_model import BareModel, adapter_layers, file_path, root_module
from .config import ALL_LINEAR, LoraConfig
from .nn import LORA_LAYERS, ActiveAdapters, AdapterLayer, LoraLayer, LoraLinear, LoraMergedLinear, LoraParameter
from .nn.attention import LoraMultiheadAttention
from .nn.tied import TiedAdapter
from .nn.trainable_tokens import TiedRows, TokenRows, TrainableTokens
from .nn.trained import TrainedModule
from .targets import Targets, find_targets, is_inside
from .trained_biases import TrainedBiases

ModelT = TypeVar("ModelT", bound=nn.Module)


def inject(model: ModelT, config: LoraConfig, adapter_name: str = "default") -> ModelT:
    """Adapts ``model`` in place: every targeted layer becomes one that holds a low-rank adapter.

    Linear layers, embeddings, convolutions, attention and single parameters can be targets: lora_ext/nn has a module
    for each. The first call freezes all parameters; trainable are the adapter's, and those of
    ``config.modules_to_save`` and ``config.bias``. The model computes what it computed before until the adapter is
    trained. Adapters live on their base layer's device, in its dtype, or in float32 where that is a 16-bit one. A layer
    that the model holds in several places is replaced in all of them by the same one; the first path names it.

    With ``config.ensure_weight_tying``, modules that share the input embedding's weight have one adapter with it: both
    compute with the same updated weight, and merging changes it once. Without, each named module has an adapter of its
    own, and merging a weight that is in another module too is refused.

    Called again with another name, it adds another adapter, on the same or on other layers, and makes it the active
    one; :func:`lora_ext.adapters.set_adapter` switches back.

    ``nn.TransformerEncoder``'s inference fast path reads its layers' weights without calling them; it is switched off
    in the encoders that hold an adapter. With it goes its habit of zeroing the outputs at padded positions.

    Reentrant gradient checkpointing passes no gradient unless its input requires one; with frozen embeddings that takes
    ``model.enable_input_require_grads()``, which recent Transformers call by themselves.

    Args:
        model: any module; weights may be on the meta device.
        config: what to adapt.
        adapter_name: the adapter's name in the model.

    Returns:
        ``model``, the same object.

    Raises:
        ValueError: nothing matches ``target_modules`` or ``modules_to_save`` (names close matches), the model has an
            adapter of that name, adapters are merged, a module to save shares a parameter with the rest of the model,
            a second adapter would train biases, or a token whose row is to be trained does not exist.
        TypeError: a target is not of a kind that can be adapted (names every such target).
        ValueError: another adapter has a module as one of ``target_modules`` that this one has in
            ``target_parameters``, or the other way round.
        The model is then unchanged.

    Warns:
        UserWarning: an entry of ``target_modules``, ``exclude_modules`` or ``modules_to_save`` matches nothing while
            others do.
    """
    apply_injection(model, plan_injection(model, config, adapter_name))
    return model


def plan_injection(model: nn.Module, config: LoraConfig, adapter_name: str = "default") -> Adapter:
    """Finds and checks all targets and builds the adapter, without touching ``model``. Errors as :func:`inject`."""
    root, adapters = root_module(model), adapter_set(model)
    if not isinstance(config, LoraConfig):
        raise TypeError(f"inject: config is a {type(config).__name__}, want a LoraConfig")
    check_adapter_name("inject", adapter_name, adapters)
    _check_state(root, adapters, config)

    bare = BareModel(root)
    targets = find_targets(config, type(root).__name__, bare.modules, bare.head, bare.embedding)
    _check_kinds(bare, targets, config)
    _check_tokens(bare, targets)
    _check_parameters(bare, targets)
    if isinstance(config.target_modules, str) and config.target_modules.lower() == ALL_LINEAR:
        # Like PEFT, remember the layers, not the rule: it would find others once the model has changed.
        config = dataclasses.replace(config, target_modules=tuple(targets.modules))

    into = AdapterSet() if adapters is None else adapters
    planner = _Planner(bare, config, into.active)
    parts = planner.parts(targets)
    return Adapter(adapter_name, config, into, parts, planner.biases(parts))


def apply_injection(model: nn.Module, adapter: Adapter) -> None:
    """Carries out a plan: the adapter is attached, and active."""
    root = root_module(model)
    replace_modules(root, {old: new for part in adapter.parts for old, new in part.replaced.items()})
    if adapter_set(model) is None:
        root.requires_grad_(False)
        attach_adapter_set(model, adapter.into)
    for part in adapter.parts:
        part.layer.add_adapter(adapter.name, part.adapter)
    adapter.into.add(adapter)
    adapter.into.switch((adapter.name,))
    _switch_off_fast_path(root)


def forget_injection(model: nn.Module) -> None:
    """Clears what :func:`apply_injection` left on ``model`` beside the layers themselves."""
    for module in model.modules():
        forget_adapter_set(module)
        _restore_fast_path(module)


def lora_modules(model: nn.Module) -> Iterator[tuple[str, LoraLayer]]:
    """``(path, layer)`` of every LoRA layer in ``model``, each layer once."""
    for path, layer in adapter_layers(model):
        if isinstance(layer, LoraLayer):
            yield path, layer


def replace_modules(model: nn.Module, replacements: Mapping[nn.Module, nn.Module]) -> None:
    """Swaps each key for its value wherever ``model`` holds it."""
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if child in replacements and replacements[child] is not parent:
                setattr(parent, name, replacements[child])


def check_adapter_name(caller: str, name: str, adapters: AdapterSet | None) -> None:
    """A name for a new adapter: ValueError if it is taken, or cannot be one."""
    if not isinstance(name, str) or not name or "." in name or hasattr(nn.ModuleDict, name):
        raise ValueError(f"{caller}: adapter_name is {name!r}, want a name without dots, such as 'default'")
    if adapters is not None and name in adapters.configs:
        raise ValueError(
            f"{caller}: there is an adapter {name!r} already; the adapters are {sorted(adapters.configs)}. Choose "
            "another name, or delete_adapter(model, ...) first"
        )


# --- planning ---------------------------------------------------------------------------------------------------------


def _check_state(root: nn.Module, adapters: AdapterSet | None, config: LoraConfig) -> None:
    for path, layer in lora_modules(root):
        if adapters is None:
            raise ValueError(
                f"inject: {type(root).__name__} has LoRA layers already ({path!r}), which were not injected into it as "
                "a whole; call lora_ext.adapters.merge_and_unload(model) first, or inject into a fresh model"
            )
        if layer.is_merged:
            raise ValueError(f"inject: adapters are merged into {path!r}; call unmerge(model) first")
    if adapters is not None and adapters.biases and config.bias != "none":
        (owner,) = adapters.biases
        raise ValueError(
            f"inject: bias is {config.bias!r}, but the adapter {owner!r} trains the model's biases; only one can. Use "
            'bias="none", or lora_bias=True, which every adapter has of its own'
        )


def lora_layer_for(module: nn.Module, config: LoraConfig, path: str) -> type[LoraLayer] | None:
    """The class of LoRA layer that adapts modules like this one, or None."""
    if config.enable_lora_for(path) is not None:
        return LoraMergedLinear if LoraMergedLinear.adapts(module) else None
    return next((kind for kind in LORA_LAYERS if kind.adapts(module)), None)


def _adapted(bare: BareModel, targets: Targets, config: LoraConfig) -> Iterator[tuple[str, nn.Module, str]]:
    """The modules to adapt, those adapted along with them, and those tied to one, with the path that sets the rank."""
    seen = set()
    for path, module in targets.modules.items():
        along = getattr(lora_layer_for(module, config, path), "adapted_along", ())
        for whole in (path, *(f"{path}.{name}" for name in along)):
            if whole not in seen and not is_inside(whole, targets.trained):
                seen.add(whole)
                yield whole, bare.modules[whole], path
    for path, source in targets.tied.items():
        if source in targets.modules:
            yield path, bare.modules[path], source


def _check_kinds(bare: BareModel, targets: Targets, config: LoraConfig) -> None:
    problems = []
    for path, module, setting in _adapted(bare, targets, config):
        kind = lora_layer_for(module, config, setting)
        if targets.tied.get(path) in targets.modules and not _can_follow(module, bare.modules[setting]):
            problem = f"its weight is that of {setting!r}, but it is no nn.Linear or nn.Embedding tied to an embedding"
            problems.append(f"{path} ({type(module).__name__}): {problem}; set ensure_weight_tying=False")
            continue
        problem = f"no LoRA layer adapts {type(module).__name__}" if kind is None else kind.why_not(module, config)
        if kind is None and config.enable_lora_for(setting) is not None:
            problem = f"enable_lora names it, and is for {LoraMergedLinear.base_kinds}"
        if problem is None and (attention := _attention_around(bare, path)) is not None:
            problem = LoraMultiheadAttention.why_not(attention, config)
            if problem is None and attention is bare.root:
                problem = "it is the model itself; put it into another module"
            problem = problem and f"nn.MultiheadAttention reads its weight and never calls it, and {problem}"
        if problem:
            problems.append(f"{path} ({type(module).__name__}): {problem}")
    if problems:
        kinds = ", ".join(kind.base_kinds for kind in LORA_LAYERS)
        raise TypeError(
            f"inject: target_modules matches what cannot be adapted; these can be: {kinds}. Narrow target_modules, or "
            "add to exclude_modules:\n  " + "\n  ".join(problems)
        )


def _can_follow(module: nn.Module, source: nn.Module) -> bool:
    """Whether a module can have a :class:`TiedAdapter` of the adapter of ``source``."""
    return isinstance(module, nn.Linear | nn.Embedding) and isinstance(source, nn.Embedding)


def _check_tokens(bare: BareModel, targets: Targets) -> None:
    for path in (*targets.tokens, *(path for path, source in targets.tied.items() if source in targets.tokens)):
        module = bare.modules[path]
        if problem := TrainableTokens.why_not(module):
            raise TypeError(
                f"inject: trainable_token_indices cannot train rows of {path!r} ({type(module).__name__}): {problem}"
            )
        if path in targets.tokens and not targets.tokens[path]:
            raise ValueError(f"inject: trainable_token_indices names no token of {path!r}; leave it out")
        wrong = [token for token in targets.tokens.get(path, ()) if not 0 <= token < len(module.weight)]
        if wrong:
            raise ValueError(
                f"inject: trainable_token_indices names the tokens {wrong}, but {path!r} has {len(module.weight)}; "
                "resize the embedding first (resize_token_embeddings)"
            )


def _check_parameters(bare: BareModel, targets: Targets) -> None:
    problems = []
    for path, names in targets.parameters.items():
        for name in names:
            if (reason := LoraParameter.why_not_parameter(bare.modules[path], name)) is not None:
                problems.append(f"{path}.{name}: {reason}")
            elif _attention_around(bare, path) is not None:
                problems.append(
                    f"{path}.{name}: nn.MultiheadAttention reads it and never calls its module; name {path!r} in "
                    "target_modules"
                )
    if problems:
        raise TypeError("inject: target_parameters matches what cannot be adapted:\n  " + "\n  ".join(problems))

    for path in (*targets.modules, *targets.parameters):
        for layer in bare.layers.get(path, ()):
            if isinstance(layer, LoraLayer) and isinstance(layer, LoraParameter) != (path in targets.parameters):
                raise ValueError(
                    f"inject: {path!r} is adapted by {list(layer.adapters)} as a target of "
                    f"{'target_parameters' if isinstance(layer, LoraParameter) else 'target_modules'}; it cannot be a "
                    "target of the other kind too. Adapt it in the same way, or delete_adapter(model, ...) first"
                )


def _attention_around(bare: BareModel, path: str) -> nn.MultiheadAttention | None:
    """The attention whose ``out_proj`` is at ``path``."""
    parent, _, name = path.rpartition(".")
    module = bare.modules[parent] if parent else bare.root
    return module if isinstance(module, nn.MultiheadAttention) and name == "out_proj" else None


class _Planner:
    """Builds the parts of one adapter."""

    def __init__(self, bare: BareModel, config: LoraConfig, active: ActiveAdapters) -> None:
        self.bare, self.config, self.active = bare, config, active
        self.made: dict[tuple[str, Callable], AdapterLayer] = {}

    def parts(self, targets: Targets) -> tuple[Part, ...]:
        parts = [*self.lora_parts(targets), *self.parameter_parts(targets), *self.trained_parts(targets)]
        replaced = {old: new for part in parts for old, new in part.replaced.items()}
        return located((*parts, *self.token_parts(targets, replaced)))

    def lora_parts(self, targets: Targets) -> Iterator[Part]:
        adapters = {}
        for path, module, setting in _adapted(self.bare, targets, self.config):
            kind = lora_layer_for(module, self.config, setting)
            if targets.tied.get(path) in targets.modules:
                adapter = TiedAdapter(adapters[setting], transposed=isinstance(module, nn.Linear))
            else:
                adapter = adapters[path] = kind.new_adapter(module, self.config, setting)
            if kind is LoraMergedLinear:
                layer, replaced = self._merged_linear(path, module, len(self.config.enable_lora_for(setting)))
            else:
                layer, replaced = self._layer(path, module, kind)
            if (attention := _attention_around(self.bare, path)) is not None:  # which calls it, once in such a layer
                replaced |= self._layer(path.rpartition(".")[0], attention, LoraMultiheadAttention)[1]
            yield Part(path, path, layer, adapter, replaced)

    def parameter_parts(self, targets: Targets) -> Iterator[Part]:
        for path, names in targets.parameters.items():
            module = self.bare.modules[path]
            there = [layer for layer in self.bare.layers.get(path, ()) if isinstance(layer, LoraParameter)]
            layers = {layer.parameter_name: layer for layer in there}
            outermost = before = there[0] if there else module
            for name in names:
                if name not in layers:
                    outermost = layers[name] = LoraParameter(outermost, name, active=self.active)
            for name in names:
                adapter = LoraParameter.new_adapter_of(module, name, self.config, f"{path}.{name}")
                replaced = {} if outermost is before else {before: outermost}
                yield Part(path, path, layers[name], adapter, replaced)

    def trained_parts(self, targets: Targets) -> Iterator[Part]:
        copied: dict = {}  # shared, so that the copies of tied modules are tied
        tied = [path for path, source in targets.tied.items() if source in targets.trained]
        for path in (*targets.trained, *tied):
            layer, replaced = self._layer(path, self.bare.modules[path], TrainedModule)
            yield Part(path, path, layer, copy.deepcopy(self.bare.modules[path], copied), replaced)

    def token_parts(self, targets: Targets, replaced: Mapping[nn.Module, nn.Module]) -> Iterator[Part]:
        """``replaced``: what is put in the place of which module for other parts."""
        rows: dict[str, TokenRows | TiedRows] = {
            path: TokenRows(self.bare.modules[path].weight, tokens) for path, tokens in targets.tokens.items()
        }
        rows |= {path: TiedRows(rows[source]) for path, source in targets.tied.items() if source in rows}
        for path, adapter in rows.items():
            around = self.bare.layers.get(path, ())
            layer = next((layer for layer in around if isinstance(layer, TrainableTokens)), None)
            if layer is not None:
                yield Part(path, path, layer, adapter)
            else:
                outermost = around[0] if around else self.bare.modules[path]
                layer = TrainableTokens(replaced.get(outermost, outermost), active=self.active)
                yield Part(path, path, layer, adapter, {outermost: layer})

    def _layer(
        self, path: str, module: nn.Module, kind: type[AdapterLayer]
    ) -> tuple[AdapterLayer, dict[nn.Module, nn.Module]]:
        """The layer of this kind that is around the module, or a new one, and what that replaces."""
        for layer in self.bare.layers.get(path, ()):
            if isinstance(layer, kind):
                return layer, {}
        if (path, kind) not in self.made:
            self.made[path, kind] = kind(module, active=self.active)
        layer = self.made[path, kind]
        return layer, {module: layer}

    def _merged_linear(
        self, path: str, module: nn.Module, num_parts: int
    ) -> tuple[LoraMergedLinear, dict[nn.Module, nn.Module]]:
        """As :meth:`_layer`; a new one takes the place of a plain layer, whose adapters it then has too."""
        made = LoraMergedLinear(module, num_parts, active=self.active)
        for layer in self.bare.layers.get(path, ()):
            if isinstance(layer, LoraMergedLinear):
                if layer.num_parts != num_parts:
                    raise ValueError(
                        f"inject: enable_lora has {num_parts} parts for {path!r}, but other adapters have "
                        f"{layer.num_parts} there; give it as many"
                    )
                return layer, {}
            if isinstance(layer, LoraLinear):
                made.adapters = layer.adapters
                return made, {layer: made}
        return made, {module: made}

    def biases(self, parts: tuple[Part, ...]) -> TrainedBiases | None:
        if self.config.bias == "none":
            return None
        wrapped = Counter(part.path for part in parts if isinstance(part.layer, LoraLayer))
        trained = {part.path for part in parts if isinstance(part.layer, TrainedModule)}
        owners = {}
        for path, module in self.bare.modules.items():
            if module._parameters.get("bias") is None or any(path == p or path.startswith(f"{p}.") for p in trained):
                continue
            if self.config.bias == "all" or path in wrapped:
                owners[file_path(path, wrapped) + ".base_layer" * wrapped[path]] = module
        return TrainedBiases(owners)


# --- nn.TransformerEncoder's fast path --------------------------------------------------------------------------------

# In eval mode these modules pass linear1.weight and linear2.weight to one fused kernel, unless this attribute is off.
_FAST_PATH: tuple[tuple[type[nn.Module], str, int | bool], ...] = (
    (nn.TransformerEncoderLayer, "activation_relu_or_gelu", 0),
    (nn.TransformerEncoder, "use_nested_tensor", False),  # only that kernel takes the nested tensors it makes
)


def _switch_off_fast_path(root: nn.Module) -> None:
    for module in root.modules():
        for kind, attribute, off in _FAST_PATH:
            kept = f"_{attribute}_before_lora"
            if isinstance(module, kind) and kept not in vars(module) and any(adapter_layers(module)):
                setattr(module, kept, getattr(module, attribute))
                setattr(module, attribute, off)


def _restore_fast_path(module: nn.Module) -> None:
    for _, attribute, _ in _FAST_PATH:
        if (before := vars(module).pop(f"_{attribute}_before_lora", None)) is not None:
            setattr(module, attribute, before)
