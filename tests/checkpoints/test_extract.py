from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
from support.checkpoint_files import assert_same_bits, merged_by_peft, peft_adapter, save_checkpoint, tensors_of
from support.models import IDS, bert, gpt2, llama, refused
from torch import nn
from transformers import BertConfig, BertForMaskedLM, T5Config, T5ForConditionalGeneration

from lora_ext import load_adapter
from lora_ext.checkpoints import extract, merge, open_adapter
from lora_ext.checkpoints.extraction import approximate

pytestmark = pytest.mark.cpu_only("is about files, which hold CPU tensors")


def tuned_by_adapter(model: nn.Module, folder: Path, **settings) -> None:
    """Saves ``base`` and ``tuned``, which differ by an adapter, in ``folder``."""
    model.save_pretrained(folder / "base", max_shard_size="8KB")
    tuned = copy.deepcopy(model)
    tuned.load_state_dict(merged_by_peft(peft_adapter(model, folder / "made", **settings)))
    tuned.save_pretrained(folder / "tuned", max_shard_size="8KB")


def logits_by_peft(model: nn.Module, adapter: Path) -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(missing|unexpected|adapter key).*")
        return peft.PeftModel.from_pretrained(copy.deepcopy(model), adapter).eval()(IDS).logits


@pytest.mark.parametrize("shape", [(30, 50), (600, 1100)])
def test_the_error_is_that_of_the_best_approximation(shape):
    rank = 8
    U, _ = torch.linalg.qr(torch.randn(shape[0], min(shape)))
    V, _ = torch.linalg.qr(torch.randn(shape[1], min(shape)))
    singular = (torch.arange(min(shape)) + 1.0) ** -0.5  # falls slowly
    delta = (U * singular) @ V.T
    A, B, best = approximate(delta.clone(), rank)
    assert A.shape == (rank, shape[1]) and B.shape == (shape[0], rank) and best.r == rank
    optimal = (singular[rank:].norm() / singular.norm()).item()
    assert optimal * (1 - 1e-4) <= best.error <= optimal * 1.01
    left = delta - B @ A
    torch.testing.assert_close(left.norm() / delta.norm(), torch.tensor(best.error), rtol=1e-4, atol=1e-6)
    exact = torch.randn(shape[0], 3) @ torch.randn(3, shape[1])
    assert approximate(exact, 4)[2].error < 1e-5  # a rank that suffices leaves nothing


# --- against PEFT -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "settings", "options"),
    [
        (llama, {"target_modules": "all-linear"}, {}),
        (llama, {"target_modules": ["q_proj", "lm_head"], "rank_pattern": {"lm_head": 5}}, {}),
        (bert, {"target_modules": ["query", "dense"], "bias": "lora_only", "task_type": "SEQ_CLS"}, {}),
        (gpt2, {"target_modules": ["c_attn", "c_proj"]}, {"fan_in_fan_out": True}),
    ],
)
def test_the_update_of_an_adapter_is_extracted(family, settings, options, tmp_path):
    model = family().eval()
    tuned_by_adapter(model, tmp_path, **settings)
    report = extract(tmp_path / "base", tmp_path / "tuned", tmp_path / "out", rank=8, **options)
    assert report.error < 1e-5
    assert all(layer.error < 1e-5 < layer.norm for layer in report.layers.values())
    expected = type(model).from_pretrained(tmp_path / "tuned").eval()(IDS).logits
    assert (expected - model(IDS).logits).abs().max() > 1e-2
    torch.testing.assert_close(logits_by_peft(model, tmp_path / "out"), expected, rtol=1e-3, atol=1e-4)

    merge(tmp_path / "base", [tmp_path / "out"], tmp_path / "merged")
    merged, tuned = (tensors_of(tmp_path / name) for name in ("merged", "tuned"))
    torch.testing.assert_close(merged, tuned, rtol=1e-4, atol=1e-5)


def test_the_same_files_give_the_same_adapter(tmp_path):
    weight = torch.randn(600, 520)
    save_checkpoint({"a.weight": weight}, tmp_path / "base", shards=1)
    save_checkpoint({"a.weight": weight + torch.randn(600, 520)}, tmp_path / "tuned", shards=1)
    for out in ("x", "y"):
        torch.rand(3)
        extract(tmp_path / "base", tmp_path / "tuned", tmp_path / out, rank=4)
    assert_same_bits(tensors_of(tmp_path / "x"), tensors_of(tmp_path / "y"))


def test_normalised_layers_have_one_rank(tmp_path):
    """The 16 x 16 and 8 x 16 weights cannot have rank 20; zeros fill it up."""
    model = llama()
    tuned_by_adapter(model, tmp_path, target_modules="all-linear")
    for name, normalise in (("plain", False), ("normal", True)):
        extract(tmp_path / "base", tmp_path / "tuned", tmp_path / name, rank=20, normalise=normalise)
    ranks = {name: {update.r for update in open_adapter(tmp_path / name).updates} for name in ("plain", "normal")}
    assert len(ranks["plain"]) > 1 and ranks["normal"] == {20}
    torch.testing.assert_close(logits_by_peft(model, tmp_path / "normal"), logits_by_peft(model, tmp_path / "plain"))


def test_changes_that_no_adapter_can_express_are_listed(tmp_path):
    tensors = {"a.weight": torch.ones(4, 4), "b.weight": torch.ones(4, 4), "c.weight": torch.ones(3)}
    save_checkpoint(tensors | {"gone.weight": torch.ones(1), "top": torch.ones(2)}, tmp_path / "base")
    changed = {"a.weight": torch.ones(4, 4) * 2, "b.weight": torch.ones(5, 4), "c.weight": torch.ones(3)}
    save_checkpoint(changed | {"a.extra": torch.ones(2), "top": torch.zeros(2)}, tmp_path / "tuned")
    problems = (
        "only in the base: gone.weight",
        "shape of b.weight: [4, 4] in the base, [5, 4] in the other",
        "differs, next to the adapted weight of its module: a.extra",
        "differs: top",
    )
    with refused(tmp_path, ValueError, *problems):
        extract(tmp_path / "base", tmp_path / "tuned", tmp_path / "out")
    for tuned, message, options in (
        ("tuned", "rank is 0, want at least 1", {"rank": 0}),
        ("base", "no tensor differs", {}),
    ):
        with refused(tmp_path, ValueError, message):
            extract(tmp_path / "base", tmp_path / tuned, tmp_path / "out", **options)


# --- tied weights -----------------------------------------------------------------------------------------------------

BERT = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16, "vocab_size": 50}
T5 = T5Config(vocab_size=50, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, decoder_start_token_id=0)
TIED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "untied": (llama, "q_proj"),
    "llama": (lambda: llama(tied=True), "q_proj"),
    "gpt2": (gpt2, "c_attn"),
    "bert": (lambda: BertForMaskedLM(BertConfig(**BERT)), "query"),
    "t5": (lambda: T5ForConditionalGeneration(T5), ".q"),
}


def save_tuned(base: nn.Module, layer: str, folder: Path) -> nn.Module:
    """Saves ``base`` and ``tuned``, which differ in one kind of layer, the embedding and a norm."""
    base.save_pretrained(folder / "base")
    tuned = copy.deepcopy(base)
    with torch.no_grad():
        for path, parameter in tuned.named_parameters():
            if path.endswith(f"{layer}.weight"):
                parameter.add_(0.1 * torch.randn(len(parameter), 1) @ torch.randn(1, parameter.shape[1]))
        norm = next(p for path, p in tuned.named_parameters() if "norm" in path.lower() or "ln_1" in path)
        for parameter in (tuned.get_input_embeddings().weight, norm):
            parameter.add_(0.1 * torch.randn_like(parameter))
    tuned.save_pretrained(folder / "tuned")
    return tuned


@pytest.mark.parametrize("name", ["untied", "llama", "gpt2"])
def test_other_modules_are_saved_in_full_and_a_tied_head_follows_its_embedding(name: str, tmp_path: Path):
    make, layer = TIED[name]
    base = make().eval()
    expected = save_tuned(base, layer, tmp_path).eval()(IDS).logits
    assert (expected - base(IDS).logits).abs().max() > 0.1
    report = extract(tmp_path / "base", tmp_path / "tuned", tmp_path / "out", rank=4, fan_in_fan_out=name == "gpt2")
    assert len(report.saved) == 2 + (name != "untied")
    near = {"rtol": 1e-4, "atol": 1e-5}
    loaded = load_adapter(copy.deepcopy(base), tmp_path / "out")
    torch.testing.assert_close(loaded(IDS).logits, expected, **near)
    torch.testing.assert_close(logits_by_peft(base, tmp_path / "out"), expected, **near)
    merge(tmp_path / "base", [tmp_path / "out"], tmp_path / "merged")
    merged = type(base).from_pretrained(tmp_path / "merged")
    assert (merged.lm_head.weight is merged.get_input_embeddings().weight) == (name != "untied")
    torch.testing.assert_close(merged(IDS).logits, expected, **near)


@pytest.mark.parametrize(
    ("name", "shared"), [("bert", "cls.predictions.decoder.weight"), ("t5", "the embeddings of the encoder and the de")]
)
def test_other_modules_that_share_the_embedding_are_refused(name: str, shared: str, tmp_path: Path):
    make, layer = TIED[name]
    save_tuned(make(), layer, tmp_path)
    with refused(tmp_path, ValueError, f"is shared with {shared}", "no adapter can express"):
        extract(tmp_path / "base", tmp_path / "tuned", tmp_path / "out")


def test_another_dtype_is_no_difference(tmp_path: Path):
    """Training saves in float32 what was loaded from bfloat16."""
    base = llama().bfloat16()
    base.save_pretrained(tmp_path / "base")
    tuned = copy.deepcopy(base).float()
    tuned.save_pretrained(tmp_path / "same")
    with pytest.raises(ValueError, match="extract: no tensor differs between"):
        extract(tmp_path / "base", tmp_path / "same", tmp_path / "out")
    weight = tuned.model.layers[0].self_attn.q_proj.weight
    with torch.no_grad():
        weight[3, 4] += 1e-5  # less than bfloat16 can say
    tuned.save_pretrained(tmp_path / "tuned")
    report = extract(tmp_path / "base", tmp_path / "tuned", tmp_path / "out", rank=1)
    assert list(report.layers) == ["model.layers.0.self_attn.q_proj"] and report.saved == []
    assert report.layers["model.layers.0.self_attn.q_proj"].norm == pytest.approx(1e-5, rel=0.01)
