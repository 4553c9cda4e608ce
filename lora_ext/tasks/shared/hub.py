"""Loads models by path or id; ids without a network from the cache or not at all, and at once."""

from __future__ import annotations

import functools
import re
from pathlib import Path
from typing import Any

from lora_ext.files import read_json_object
from lora_ext.tasks import TaskError

_SECONDS = 5.0  # for the hub to answer


_ADAPTER_CONFIGS = ("adapter_config.json", "method.json")


def check_no_adapter(model: str) -> None:
    """Refuses the directory of an adapter: Transformers would load its base, with or without the adapter, or nothing.

    TaskError: names the base.
    """
    for name in _ADAPTER_CONFIGS:
        path = Path(model) / name
        if not path.is_file():
            continue
        try:
            base = read_json_object(path, "", 10_000_000).get("base_model_name_or_path")
        except (OSError, ValueError):
            base = None
        raise TaskError(
            f"--model {model} is an adapter, and no model (it holds {name}); its base is "
            f"{base or 'not named there'}. Name the base by --model, and the adapter by the --adapter of generate; "
            "or merge the two and name the result (docs/checkpoints.md)"
        )


def loading_options(model: str) -> dict[str, Any]:
    """Returns the options of ``from_pretrained`` for a directory or an id.

    If the hub does not answer, an id is looked up in the cache only: huggingface_hub would retry for a minute, and no
    setting prevents that.
    """
    return {} if Path(model).exists() or _answers() else {"local_files_only": True}


def why_not_loaded(model: str, error: BaseException) -> str:
    """Explains the error; for an id, and for a file or a directory that is no model's, adds a remedy."""
    if Path(model).is_file():
        if model.lower().endswith(".gguf"):
            return (
                "it is a GGUF file, which only generate and finetune --task causal-lm read; save it as a directory "
                "first (docs/language-models.md, Model)"
            )
        if not model.endswith(".json"):
            return "it is a file; name the directory of the model, which holds its config.json, too"
    if Path(model).is_dir() and not (Path(model) / "config.json").is_file():
        inside = sorted(
            path.parent for name in ("config.json", *_ADAPTER_CONFIGS) for path in Path(model).glob(f"*/{name}")
        )
        return "it holds no config.json, as a model's directory does" + (
            f"; did you mean {inside[0]}?" if inside else ""
        )
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
