"""The base model's checkpoint by the name that an adapter gives it: a directory, or an id in the local cache."""

from __future__ import annotations

from pathlib import Path

from lora_ext.checkpoints import INDEX_FILE, SINGLE_FILE, Checkpoint

__all__ = ["open_base"]


def open_base(name: str, revision: str | None = None) -> Checkpoint:
    """Opens the safetensors checkpoint ``name``, of which no tensor is read and nothing is downloaded.

    Args:
        name: a directory, a safetensors file, or a Hugging Face id, which is looked up where ``from_pretrained`` keeps
            what it downloaded (``HF_HUB_CACHE``, ``HF_HOME``).
        revision: of an id; None: ``main``.

    Raises:
        FileNotFoundError: there is no such directory, and no such id in the cache.
        ValueError: a file is corrupted.
    """
    if Path(name).exists():
        return Checkpoint.open(name)
    wanted = f"{name} is no directory with a checkpoint, and no id whose safetensors are in the Hugging Face cache"
    try:
        from huggingface_hub import try_to_load_from_cache
        from huggingface_hub.errors import HFValidationError
    except ImportError as error:
        raise FileNotFoundError(f"{wanted} (huggingface_hub is not installed)") from error
    for file in (INDEX_FILE, SINGLE_FILE):
        try:
            found = try_to_load_from_cache(name, file, revision=revision)
        except HFValidationError as error:  # a path that is not there
            raise FileNotFoundError(wanted) from error
        if isinstance(found, str):
            return Checkpoint.open(Path(found).parent)
    raise FileNotFoundError(f"{wanted}; `hf download {name}` puts it there")
