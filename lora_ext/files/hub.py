"""Downloads an adapter from the Hugging Face hub, when asked to."""

from __future__ import annotations

import glob
from pathlib import Path

from lora_ext._common.printable import install_hint
from lora_ext.files.adapter_file import ADAPTER_FILES


def download_adapter(name: str, revision: str | None = None, subfolder: str = "", *, caller: str) -> Path:
    """Downloads the adapter's two files of the hub's repository ``name`` into huggingface_hub's cache, or finds them.

    Offline mode (``HF_HUB_OFFLINE=1``), the endpoint, the cache's place and the token are huggingface_hub's.

    Args:
        revision: a branch, tag or commit; None: the main branch.
        subfolder: of the repository, which has the files; "": they are at its top.
        caller: prefix of error messages.

    Returns:
        The directory of the repository, in the cache.

    Raises:
        ImportError: huggingface_hub is not installed.
        ValueError: ``name`` cannot be the name of a repository.
        OSError: the download failed, or in offline mode the repository is not in the cache.
    """
    try:
        from huggingface_hub import constants, snapshot_download
        from huggingface_hub.errors import HFValidationError
    except ModuleNotFoundError as error:
        raise ImportError(f"{caller}: download=True needs huggingface_hub ({error}): {install_hint('hub')}") from error
    prefix = f"{glob.escape(subfolder.strip('/'))}/" if subfolder else ""
    try:
        patterns = [f"{prefix}{pattern}" for pattern in ADAPTER_FILES]
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
    except HFValidationError as error:
        raise ValueError(f"{caller}: {name!r} is not a repository's name: {_first_line(error)}") from error
    except Exception as error:  # of the hub, the connection, the cache
        where = f"{name!r}" if revision is None else f"{name!r} at {revision!r}"
        offline = " (HF_HUB_OFFLINE is set)" if constants.HF_HUB_OFFLINE else ""
        raise OSError(f"{caller}: {where} cannot be downloaded{offline}: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
