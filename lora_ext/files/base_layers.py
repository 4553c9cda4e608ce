"""Base layers in adapter files: a resized or trained embedding, the output head, and what PEFT saves of adapted ones.

Their keys are ``base_model.model.<path>.weight``, or ``base_model.model.<path>.base_layer.weight`` of an adapted layer.
"""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor, nn

from lora_ext._common.printable import shown
from lora_ext._common.warnings import warn_user
from lora_ext.model.adapter_set import Adapter
from lora_ext.model.bare_model import BareModel, root_module

SaveEmbeddings = bool | Literal["auto"]


def base_tensors(model: nn.Module, adapter: Adapter) -> dict[str, Tensor]:
    """The live tensors of base layers that a file of ``adapter`` may hold, by their keys without the common prefix."""
    tensors = adapter.base_tensors()
    bare, adapted = BareModel(root_module(model)), {part.path for part in adapter.parts}
    for path, module in bare.modules.items():
        if path not in adapted and (module is bare.embedding or module is bare.head):
            tensors |= {f"{path}.{name}": tensor for name, tensor in module.state_dict(keep_vars=True).items()}
    in_adapter = adapter.tensors()
    return {key: tensor for key, tensor in tensors.items() if key not in in_adapter}


def base_tensors_to_save(
    caller: str, model: nn.Module, adapter: Adapter, save_embedding_layers: SaveEmbeddings = "auto"
) -> dict[str, Tensor]:
    """The tensors of base layers that belong into a file of ``adapter``; see :func:`~lora_ext.save_adapter`.

    RuntimeError: an adapter is merged into one of them, or it is offloaded.
    """
    if save_embedding_layers is False:
        return {}
    tensors, bare = base_tensors(model, adapter), BareModel(root_module(model))
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
        if any(key.startswith(f"{path}.") for path in merged) or tensors[key].is_meta:
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
