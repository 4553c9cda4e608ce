"""Opens the base model's checkpoint by the name in an adapter's config: a directory, or an id in the local cache."""

from __future__ import annotations

from pathlib import Path

from lora_ext.checkpoints import INDEX_FILE, SINGLE_FILE, Checkpoint


def open_base(name: str, revision: str | None = None) -> Checkpoint:
    """Opens the safetensors checkpoint ``name``. Reads no tensor and downloads nothing.

    Args:
        name: a directory, a safetensors file, or a Hugging Face id, which is looked up in the download cache of
            ``from_pretrained`` (``HF_HUB_CACHE``, ``HF_HOME``).
        revision: revision of the id; None: ``main``.

    Raises:
        FileNotFoundError: ``name`` is no existing directory and no id in the cache.
        ValueError: a file is corrupted.
    """
    if Path(name).exists():
        return Checkpoint.open(name)
    wanted = f"{name} is neither a checkpoint directory nor an id with safetensors in the Hugging Face cache"
    try:
        from huggingface_hub import try_to_load_from_cache
        from huggingface_hub.errors import HFValidationError
    except ImportError as error:
        raise FileNotFoundError(f"{wanted} (huggingface_hub is not installed)") from error
    for file in (INDEX_FILE, SINGLE_FILE):
        try:
            found = try_to_load_from_cache(name, file, revision=revision)
        except HFValidationError as error:  # a path that does not exist
            raise FileNotFoundError(wanted) from error
        if isinstance(found, str):
            return Checkpoint.open(Path(found).parent)
    raise FileNotFoundError(f"{wanted}; `hf download {name}` fetches it")
