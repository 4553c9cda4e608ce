"""``load_adapter(..., download=True)`` against a hub on 127.0.0.1, and against the cache in offline mode."""

from __future__ import annotations

import copy
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from support.hub_server import COMMIT, hub
from support.models import answer, llama, refused
from torch import Tensor, nn

from lora_ext import LoraConfig, inject, load_adapter, save_adapter


@pytest.fixture
def repository(tmp_path) -> tuple[nn.Module, Tensor, Path]:
    """A bare model, the logits of the adapted one, and a repository's files."""
    base = llama().eval()
    model = inject(copy.deepcopy(base), LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    directory = tmp_path / "repository"
    save_adapter(model, directory)
    for name in ("README.md", "adapter_model.bin", "modeling.py", "optimizer.pt"):
        (directory / name).write_text("something else")
    return base, answer(model), directory


@pytest.fixture
def online(repository, tmp_path, monkeypatch):
    """A hub, an empty cache, and the settings of a machine that is online."""
    with hub(repository[2]) as (endpoint, fetched):
        template = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        values = {"HF_HUB_CACHE": str(tmp_path / "cache"), "HF_HUB_OFFLINE": False, "ENDPOINT": endpoint}
        for name, value in (values | {"HUGGINGFACE_CO_URL_TEMPLATE": template}).items():
            monkeypatch.setattr(constants, name, value)
        yield fetched


def test_an_adapter_is_downloaded_when_asked_for_and_then_in_the_cache(repository, online, monkeypatch):
    base, expected, directory = repository

    def loaded(name: str, **options) -> nn.Module:
        return load_adapter(copy.deepcopy(base), name, download=True, **options)

    model = inject(copy.deepcopy(base), LoraConfig(r=3, target_modules=["v_proj"], init_lora_weights=False), "b")
    model.save_pretrained(directory / "more")
    torch.testing.assert_close(answer(loaded("org/adapter")), expected)
    torch.testing.assert_close(answer(loaded("org/adapter", subfolder="more/b/")), answer(model))
    wanted = [f"{folder}adapter_{name}" for folder in ("", "more/b/") for name in ("config.json", "model.safetensors")]
    assert sorted(online) == wanted
    loaded("org/adapter", revision=COMMIT)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    torch.testing.assert_close(answer(loaded("org/adapter")), expected)
    with refused(base, OSError, "load_adapter: 'org/other' cannot be downloaded: "):
        load_adapter(base, "org/other", download=True)
    assert sorted(online) == wanted  # nothing more
    torch.testing.assert_close(answer(load_adapter(base, directory, subfolder="more/b")), answer(model))


def test_what_is_not_on_the_hub_is_refused(repository, online):
    base, _, directory = repository
    for name, revision in (("org/nothing", None), ("org/adapter", "v9"), ("../up/and/away", None)):
        where = f"{name!r}" if revision is None else f"{name!r} at {revision!r}"
        with refused(base, OSError, f"load_adapter: {where} cannot be downloaded: "):
            load_adapter(base, name, download=True, revision=revision)
    (directory / "adapter_model.safetensors").unlink()
    with refused(base, FileNotFoundError, "adapter_model.safetensors is missing"):
        load_adapter(base, "org/adapter", download=True)
    with refused(base, FileNotFoundError, "none/adapter_config.json is missing"):
        load_adapter(base, "org/adapter", download=True, subfolder="none")


def test_nothing_is_fetched_unless_asked_for(repository, online, monkeypatch):
    base, _, directory = repository
    missing = "org/adapter/adapter_config.json is missing", "load_adapter(..., download=True)"
    with refused(base, FileNotFoundError, *missing):
        load_adapter(base, "org/adapter")
    with refused(base, ValueError, "revision is 'v1', but nothing is downloaded"):
        load_adapter(base, directory, revision="v1")
    with refused(base, ValueError, "subfolder is '../x', want one within the directory"):
        load_adapter(base, directory, subfolder="../x")
    assert not online
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with refused(base, ImportError, "download=True needs huggingface_hub", "hub"):
        load_adapter(base, "org/adapter", download=True)
    load_adapter(base, directory)
