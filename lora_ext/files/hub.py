"""Downloads an adapter from the Hugging Face hub, when asked to."""

from __future__ import annotations

import glob
from pathlib import Path

from lora_ext._common.printable import install_hint
from lora_ext.files.adapter_file import ADAPTER_FILES


def download_adapter(name: str, revision: str | None, subfolder: str, *, caller: str) -> Path:
    """Fetches the adapter's two files of the hub's repository ``name`` into huggingface_hub's cache, or finds them.

    Offline mode (``HF_HUB_OFFLINE=1``), the endpoint, the cache's place and the token are huggingface_hub's. Returns
    the directory of the repository in the cache.

    Raises:
        ImportError: huggingface_hub is not installed.
        OSError: the download failed, or in offline mode the repository is not in the cache.
    """
    try:
        from huggingface_hub import snapshot_download
    except ModuleNotFoundError as error:
        raise ImportError(f"{caller}: download=True needs huggingface_hub ({error}): {install_hint('hub')}") from error
    prefix = f"{glob.escape(subfolder.strip('/'))}/" if subfolder else ""
    try:
        return Path(
            snapshot_download(name, revision=revision, allow_patterns=[prefix + file for file in ADAPTER_FILES])
        )
    except Exception as error:  # of the name, the hub, the connection, the cache
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        where = f"{name!r}" if revision is None else f"{name!r} at {revision!r}"
        raise OSError(f"{caller}: {where} cannot be downloaded: {reason}") from error
