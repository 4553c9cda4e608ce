"""LoraEmbedding against PEFT and against the definition."""

from __future__ import annotations

import copy
import warnings

import peft
import pytest
import torch
from safetensors.torch import load_file
from support.merging import same_bits
from support.models import VOCABULARY, llama, refused, token_ids
from torch import Tensor, nn
from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding

from lora_ext import LoraConfig, inject, load_adapter, merge, save_adapter
from lora_ext.nn import EmbeddingAdapter, LoraEmbedding

ALIVE = {"r": 3, "lora_alpha": 6, "init_lora_weights": False}


class Scaled(nn.Embedding):
    """An embedding that scales its rows by a number, like BART's."""

    embed_scale = 4.0

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids) * self.embed_scale


class TextNet(nn.Module):
    """Embeddings of three kinds and a linear head."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = Gemma3TextScaledWordEmbedding(VOCABULARY, 8, 0, embed_scale=8**0.5)
        self.positions = nn.Embedding(10, 8)
        self.kinds = Scaled(2, 8)
        self.head = nn.Linear(8, 5)

    def forward(self, ids: Tensor) -> Tensor:
        positions = torch.arange(ids.shape[-1]).expand(ids.shape)
        return self.head(torch.tanh(self.tokens(ids) + self.positions(positions) + self.kinds(positions % 2)))


def ids_with_padding() -> Tensor:
    ids = token_ids()
    ids[:, -2:] = 0
    return ids


def factors(model: nn.Module) -> dict[str, Tensor]:
    """The factors' gradients by key, in our model or PEFT's."""
    names = {".adapters.default.": ".", ".default": "", "base_model.model.": "", "lora_embedding_": "lora_"}
    gradients = {}
    for path, parameter in model.named_parameters():
        if parameter.requires_grad:
            for old, new in names.items():
                path = path.replace(old, new)
            is_pefts_A = path.endswith("lora_A") and parameter.shape[0] < parameter.shape[1]  # [r, num_embeddings]
            gradients[path.removesuffix(".weight")] = parameter.grad.T if is_pefts_A else parameter.grad
    return gradients


# --- against PEFT -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings", [{}, {"use_rslora": True, "rank_pattern": {"positions": 2}}, {"lora_dropout": 0.5}]
)
def test_peft_computes_the_same_from_our_file(settings, tmp_path):
    base, ids = TextNet().double(), ids_with_padding()
    ours = inject(copy.deepcopy(base), LoraConfig(target_modules=["tokens", "positions", "kinds"], **ALIVE | settings))
    save_adapter(ours, tmp_path)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(missing|unexpected|adapter|key).*")
        theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path, is_trainable=True).train()
    expected, actual = theirs(ids), ours(ids)
    torch.testing.assert_close(actual, expected)
    assert (actual - base(ids)).abs().max() > 1e-2
    for y in (expected, actual):
        y.square().sum().backward()
    gradients = factors(theirs)
    assert gradients.keys() == factors(ours).keys() and len(gradients) == 6
    for path, gradient in factors(ours).items():
        torch.testing.assert_close(gradient, gradients[path])
    assert not ours.tokens.adapters.default.lora_A.grad[0].any()  # padding

    theirs.merge_adapter()
    merge(ours.eval())
    for path in ("tokens", "positions", "kinds"):
        torch.testing.assert_close(getattr(ours, path).weight, getattr(theirs.base_model.model, path).weight)
    torch.testing.assert_close(ours(ids), actual)  # the scale of an embedding applies to both


def test_we_compute_the_same_from_pefts_file(tmp_path):
    base, ids = llama().double().eval(), token_ids()
    theirs = peft.get_peft_model(
        copy.deepcopy(base), peft.LoraConfig(target_modules=["embed_tokens", "q_proj"], **ALIVE)
    ).eval()
    with pytest.warns(UserWarning, match="save_embedding_layers"):
        theirs.save_pretrained(tmp_path)
    ours = load_adapter(copy.deepcopy(base), tmp_path)
    torch.testing.assert_close(ours(ids).logits, theirs(ids).logits)
    save_adapter(ours, tmp_path / "again")
    again, first = (
        load_file(tmp_path / "again" / "adapter_model.safetensors"),
        load_file(tmp_path / "adapter_model.safetensors"),
    )
    assert again.keys() == first.keys()  # the frozen table, too
    assert all(same_bits(tensor, first[key]) for key, tensor in again.items())


@pytest.mark.parametrize("init", [True, "gaussian", "orthogonal", False])
def test_starts_as_pefts(init):
    torch.manual_seed(0)
    config = {"r": 64, "lora_alpha": 8, "init_lora_weights": init, "target_modules": ["tokens"]}
    theirs = peft.get_peft_model(TextNet(), peft.LoraConfig(**config)).base_model.model.tokens
    ours = inject(TextNet(), LoraConfig(**config)).tokens.adapters.default
    for mine, yours in ((ours.file_A, theirs.lora_embedding_A.default), (ours.lora_B, theirs.lora_embedding_B.default)):
        assert mine.shape == yours.shape and mine.std().item() == pytest.approx(yours.std().item(), rel=0.15)


# --- without PEFT -----------------------------------------------------------------------------------------------------


def test_a_model_reads_the_sizes_of_its_embedding():
    """Udop clamps ids by the number of embeddings."""
    model = inject(TextNet(), LoraConfig(target_modules=["tokens"]))
    assert (model.tokens.num_embeddings, model.tokens.embedding_dim, model.tokens.padding_idx) == (VOCABULARY, 8, 0)
    assert model.tokens.embed_scale == 8**0.5


def test_a_hook_on_the_base_layer_runs_and_its_output_is_not_overwritten():
    model, ids, seen = TextNet(), token_ids(), []
    model.tokens.register_forward_hook(lambda *args: args[2].requires_grad_())  # enable_input_require_grads
    model.tokens.register_forward_hook(lambda *args: seen.append(args[2]))
    bare = model.tokens(ids).detach()
    inject(model, LoraConfig(target_modules=["tokens"], **ALIVE))
    y = model.tokens(ids)
    y.sum().backward()
    assert torch.equal(seen[1], bare) and not torch.equal(y, bare)
    assert seen[1].grad is not None and model.tokens.adapters.default.lora_A.grad is not None


def test_gradients_are_dense_on_a_sparse_base_layer():
    base, ids = nn.Embedding(30, 16, sparse=True), torch.tensor([3, 3, 7])
    layer = LoraEmbedding(base, EmbeddingAdapter(30, 16, 4, 8, init_lora_weights=False))
    with pytest.raises(ValueError, match=r"LoraEmbedding: lora_A has shape \[31, 4\], want \[30, 4\]"):
        layer.add_adapter("other", EmbeddingAdapter(31, 16, 4, 8))
    layer(ids).sum().backward()
    gradient = layer.adapters.default.lora_A.grad
    assert gradient.layout == torch.strided and gradient.any(1).nonzero().flatten().tolist() == [3, 7]
    for A in (gradient, copy.deepcopy(layer).adapters.default.lora_A):  # a token's row is contiguous
        assert A.shape == (30, 4) and A.is_contiguous()


# --- bad input --------------------------------------------------------------------------------------------------------


class Positions(nn.Embedding):
    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids + 2)


@pytest.mark.parametrize(
    ("embedding", "settings", "reason"),
    [
        (nn.Embedding(10, 8, max_norm=1.0), {}, "it has max_norm, which changes the frozen weight in every forward"),
        (Positions(12, 8), {}, "its forward is not nn.Embedding's"),
        (nn.Embedding(10, 8), {"lora_bias": True}, "an embedding's adapter has no bias; set lora_bias=False"),
        (nn.EmbeddingBag(10, 8), {}, "no LoRA layer adapts EmbeddingBag"),
    ],
)
def test_embeddings_that_cannot_be_adapted(embedding, settings, reason):
    model = TextNet()
    model.positions = embedding
    with refused(model, TypeError, f"positions ({type(embedding).__name__}): {reason}", "an nn.Embedding"):
        inject(model, LoraConfig(target_modules=["positions", "head"], **settings))
