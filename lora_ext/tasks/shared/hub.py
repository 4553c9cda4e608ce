"""Loads models by id; without a network, from the cache or not at all, and at once."""

from __future__ import annotations

import functools
import re
from pathlib import Path
from typing import Any

_SECONDS = 5.0  # for the hub to answer


def loading_options(model: str) -> dict[str, Any]:
    """Returns the options of ``from_pretrained`` for a directory or an id.

    If the hub does not answer, an id is looked up in the cache only: huggingface_hub would retry for a minute, and no
    setting prevents that.
    """
    return {} if Path(model).exists() or _answers() else {"local_files_only": True}


def why_not_loaded(model: str, error: BaseException) -> str:
    """Explains the error; for an id, adds a remedy."""
    if Path(model).exists() or _answers():
        return str(error)
    from huggingface_hub import constants

    silent = "is not asked (HF_HUB_OFFLINE)" if constants.HF_HUB_OFFLINE else "does not answer"
    is_id = re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", model)
    download = f", or run `hf download {model}` where there is a network" if is_id else ""
    return (
        f"there is no such directory, the hub ({constants.ENDPOINT}) {silent}, and its cache "
        f"({constants.HF_HUB_CACHE}) does not have the whole model; name a directory with its files{download}"
    )


@functools.cache
def _answers() -> bool:
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    if constants.HF_HUB_OFFLINE:
        return False
    try:
        get_session().head(constants.ENDPOINT, timeout=_SECONDS)  # through the library's proxies
    except Exception:  # the HTTP library depends on huggingface_hub's release
        return False
    return True
