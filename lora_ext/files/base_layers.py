"""Base layers in adapter files: a resized or trained embedding, the output head, and what PEFT saves of adapted ones.

Their keys are ``base_model.model.<path>.weight``, or ``base_model.model.<path>.base_layer.weight`` of an adapted layer.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
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
    for path, module in _embeddings(BareModel(root_module(model))):
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
    sizes = _resized(bare.root) if save_embedding_layers == "auto" else None
    if sizes is not None or save_embedding_layers is True:
        for path, module in _embeddings(bare):
            if around := [part for part in adapter.parts if part.path == path]:
                inner = around[-1]
                wanted |= tensors.keys() & inner.layer.file_tensors_of_base(inner.file_path, inner.adapter)
            else:
                wanted |= tensors.keys() & {f"{path}.{name}" for name in module.state_dict()}
    if sizes is not None and wanted:
        warn_user(
            f"{caller}: {_resizing(bare.root, sizes)}, so the file holds the embedding and the output head, too; "
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


def warn_of_resized_vocabulary(caller: str, model: nn.Module, held: Iterable[Tensor]) -> None:
    """Warns if the vocabulary was resized and the embedding is not among the tensors ``held`` by the files."""
    bare = BareModel(root_module(model))
    held = {id(tensor) for tensor in held}
    lacks_it = bare.embedding is not None and any(id(p) not in held for p in bare.embedding.parameters())
    if lacks_it and (sizes := _resized(bare.root)) is not None:
        warn_user(
            f"{caller}: {_resizing(bare.root, sizes)}, and the files do not hold the embedding and the output "
            "head: save the base model, too"
        )


def _embeddings(bare: BareModel) -> Iterator[tuple[str, nn.Module]]:
    for path, module in bare.modules.items():
        if module is bare.embedding or module is bare.head:
            yield path, module


def _resized(root: nn.Module) -> tuple[int, int] | None:
    """The vocabulary's sizes in the base model's config and in ``root``, if they differ. Never asks the network."""
    config, name = getattr(root, "config", None), getattr(root, "name_or_path", None)
    kind, now = type(config), _vocabulary(config)
    if not name or now is None or not hasattr(kind, "get_config_dict"):
        return None
    try:
        values, _ = kind.get_config_dict(name, local_files_only=True)
        # A directory without a config (of a GGUF file) has no values, which would become the defaults.
        before = _vocabulary(kind.from_pretrained(name, local_files_only=True)) if values else None
    except Exception:  # no such directory, or a config that this class refuses in a way of its own
        return None
    return None if before is None or before == now else (before, now)


def _resizing(root: nn.Module, sizes: tuple[int, int]) -> str:
    return f"the vocabulary of {shown(root.name_or_path)} was resized ({sizes[0]:,} -> {sizes[1]:,})"


def _vocabulary(config: Any) -> int | None:
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    size = getattr(text, "vocab_size", None)
    return size if isinstance(size, int) else None
