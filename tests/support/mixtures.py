"""Makes small mixtures of experts of Transformers, and watches for tensors as large as a stack of experts."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from support.models import VOCABULARY
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 32,
    "num_experts_per_tok": 2,
    "eos_token_id": None,
    "pad_token_id": None,
}
_LATENT = {"kv_lora_rank": 4, "q_lora_rank": 4, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8}
_DEEPSEEK = {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "n_shared_experts": 1, "moe_intermediate_size": 24}


# The class of a family, and its sizes. gpt_oss stores its experts transposed and has biases.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("Mixtral", {"num_local_experts": 4}),
    "qwen2": ("Qwen2Moe", {"num_experts": 4, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 8}),
    "qwen3": ("Qwen3Moe", {"head_dim": 8, "num_experts": 4, "moe_intermediate_size": 24}),
    "gpt_oss": ("GptOss", {"head_dim": 8, "num_local_experts": 4, "layer_types": ["full_attention"] * 2}),
    "deepseek_v2": ("DeepseekV2", {**_LATENT, **_DEEPSEEK, "first_k_dense_replace": 0}),
    "deepseek_v3": ("DeepseekV3", {**_LATENT, **_DEEPSEEK, "first_k_dense_replace": 0}),
}
ROUTERS_RETURN_TUPLES: dict[str, tuple[str, dict[str, Any]]] = {
    "phimoe": ("Phimoe", {"num_local_experts": 4}),
    "llama4": (
        "Llama4",
        {"head_dim": 8, "num_local_experts": 4, "intermediate_size_mlp": 24, "num_experts_per_tok": 1}
        | {"interleave_moe_layer_step": 1},
    ),
}
IMPLEMENTATIONS = ("eager", "batched_mm", "grouped_mm")


def mixture(family: str, implementation: str = "eager", **options) -> nn.Module:
    """A model of two layers with four experts of 16 x 24, in evaluation mode."""
    name, sizes = (FAMILIES | ROUTERS_RETURN_TUPLES)[family]
    kind = getattr(transformers, f"{name}TextConfig", None) or getattr(transformers, f"{name}Config")
    config = kind(**_SIZES | sizes | {"experts_implementation": implementation} | options)
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    with torch.no_grad():  # some are initialised to zero
        for name, parameter in model.named_parameters():
            if "experts." in name or name.endswith(("router.weight", "gate.weight")):
                parameter.normal_(std=0.2)
    return model


class LargestTensor(TorchDispatchMode):
    """Records in ``numel`` the size of the largest tensor that PyTorch's functions make, views aside."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        results = func(*args, **(kwargs or {}))
        if not func.is_view:
            sizes = [leaf.numel() for leaf in tree_leaves(results) if isinstance(leaf, torch.Tensor)]
            self.numel = max([self.numel, *sizes])
        return results
