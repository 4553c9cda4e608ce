"""The content of an adapter's files: its config and tensors in PEFT's form, and base layers where they are saved, too.

``enable_lora`` is an option that PEFT does not support. Such an adapter is saved so that PEFT can load it: the stacked
``lora_A`` and the block-diagonal ``lora_B`` of the enabled parts are the factors of one update of the whole layer, of
rank ``r * num_enabled``; ``rank_pattern`` and ``alpha_pattern`` say so. The safetensors metadata hold the original
options, so that the file loads as it was saved. PEFT drops them when it saves the adapter again.
"""

from __future__ import annotations

import json
import math
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lora_ext._common.messages import shown, warn_user
from lora_ext._common.modules import KEY_PREFIX
from lora_ext._common.sharded import class_of, gathered, whole
from lora_ext.config import exact_patterns
from lora_ext.files.adapter_file import OWN_KEY, OWN_OPTIONS, AdapterFile
from lora_ext.files.misfits import VERSION_KEY, has_present_layout, stacked_experts
from lora_ext.model.adapter_set import Adapter
from lora_ext.model.bare_model import BareModel, root_module
from lora_ext.nn import LoraLayer
from lora_ext.nn.packed_linear import PackedAdapter, spread_blocks

SaveEmbeddings = bool | Literal["auto"]


def adapter_content(
    caller: str, model: nn.Module, adapter: Adapter, save_embedding_layers: SaveEmbeddings = "auto"
) -> tuple[AdapterFile, list[Tensor]]:
    """Returns what the files of an adapter hold, and the live tensors of base layers among it.

    All ranks of a sharded model must call it.

    Args:
        save_embedding_layers: see :func:`~lora_ext.save_adapter`.

    RuntimeError: an adapter is merged into a base layer that belongs into the file, or that is offloaded.
    """
    values = adapter.config.to_dict() | {"inference_mode": True}  # as PEFT writes it
    if values["base_model_name_or_path"] is None:
        values["base_model_name_or_path"] = base_name(model)
    if values["task_type"] is None:  # PEFT's AutoPeftModel classes then ask for the base model's class
        kind = class_of(root_module(model))
        values["auto_mapping"] = {"base_model_class": kind.__name__, "parent_library": kind.__module__}
    if any(stacked_experts(adapter)) and not has_present_layout(values.get(VERSION_KEY)):
        values[VERSION_KEY] = "0.19.1"
    with gathered(adapter.parameters()):
        base = _base_tensors(caller, root_module(model), adapter, save_embedding_layers)
        # Copies, because tied modules share memory and the tensors of a file must not.
        with gathered(base.values()):
            tensors = {
                key: whole(tensor).detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
                for key, tensor in (adapter.tensors() | base).items()
            }
    for key, scale in adapter.file_scales().items():
        tensors[key] *= scale
    metadata = _to_peft_form(adapter, values, tensors)
    return AdapterFile(values, tensors, metadata), [*base.values()]


def base_name(model: nn.Module) -> str | None:
    """Returns the name of the base model, if it has one; parts that are not Unicode, as in paths, are escaped."""
    name = getattr(root_module(model), "name_or_path", None)
    return name.encode("utf-8", "backslashreplace").decode() if isinstance(name, str) and name else None


# --- enable_lora ------------------------------------------------------------------------------------------------------


def _to_peft_form(adapter: Adapter, config: dict[str, Any], tensors: dict[str, Tensor]) -> dict[str, str]:
    """Changes the config and the tensors of an adapter with packed projections; returns the file's metadata."""
    metadata = {"format": "pt"}
    packed = [part for part in adapter.parts if isinstance(part.adapter, PackedAdapter)]
    if not packed:
        return metadata
    ranks, alphas = {}, {}
    for part in adapter.parts:  # every layer by name: a user's pattern may cover packed ones and others
        if isinstance(part.layer, LoraLayer):
            r = part.adapter.r * sum(getattr(part.adapter, "enable_lora", (True,)))
            ranks[part.target] = r
            alphas[part.target] = part.adapter.scaling * (math.sqrt(r) if config["use_rslora"] else r)
    config["rank_pattern"] = exact_patterns(ranks, config["r"])
    config["alpha_pattern"] = exact_patterns(alphas, config["lora_alpha"])
    for key, part in ((f"{part.file_path}.lora_B.weight", part) for part in packed):
        tensors[key] = spread_blocks(tensors[key], part.adapter.enable_lora)
    metadata[OWN_KEY] = json.dumps({"config": {key: getattr(adapter.config, key) for key in OWN_OPTIONS}})
    return metadata


# --- base layers ------------------------------------------------------------------------------------------------------


def _base_tensors(
    caller: str, root: nn.Module, adapter: Adapter, save_embedding_layers: SaveEmbeddings
) -> dict[str, Tensor]:
    """Returns the tensors of base layers that belong into a file of ``adapter``, by their keys."""
    if save_embedding_layers is False:
        return {}
    tensors, bare = adapter.base_tensors(root), BareModel(root)
    wanted = tensors.keys() & adapter.into.loaded_base.get(adapter.name, ())
    resized = _resizing(bare.root) if save_embedding_layers == "auto" else ""
    if resized or save_embedding_layers is True:
        modules = [module for module in (bare.embedding, bare.head) if module is not None]
        vocabulary = {id(tensor) for module in modules for tensor in module.state_dict(keep_vars=True).values()}
        wanted |= {key for key, tensor in tensors.items() if id(tensor) in vocabulary}
    if resized and wanted:
        warn_user(
            f"{caller}: {resized}, so the file holds the embedding and the output head, too; "
            "save_adapter(..., save_embedding_layers=False) leaves them out"
        )
    merged = [path for path, around in bare.layers.items() for layer in around if getattr(layer, "is_merged", False)]
    for key in sorted(wanted):
        if any(key.startswith(f"{KEY_PREFIX}{path}.") for path in merged) or tensors[key].is_meta:
            raise RuntimeError(
                f"{caller}: the file holds {key!r} of the base, which contains a merged adapter or is offloaded; call "
                "unmerge(model), or keep the layer on a device"
            )
    return {key: tensors[key] for key in sorted(wanted)}


def _resizing(root: nn.Module) -> str:
    """Compares the vocabulary's size with that in the base model's config; "" if it is the same or unknown."""
    config, name = getattr(root, "config", None), getattr(root, "name_or_path", None)
    kind, now = type(config), _vocabulary(config)
    if not name or now is None:
        return ""
    try:
        values, _ = kind.get_config_dict(name, local_files_only=True)  # never asks the network
        # A directory without a config (of a GGUF file) has no values, which would become the defaults.
        before = _vocabulary(kind.from_pretrained(name, local_files_only=True)) if values else None
    except Exception:  # not of Transformers, no such directory, or a config that this class refuses in a way of its own
        return ""
    if before is None or before == now:
        return ""
    return f"the vocabulary of {shown(name)} was resized ({before:,} -> {now:,})"


def _vocabulary(config: Any) -> int | None:
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    size = getattr(text, "vocab_size", None)
    return size if isinstance(size, int) else None
