"""Reinforcement learning's loop: merge, sample from the merged model, unmerge, train; again and again, in bfloat16.

    python examples/merge_in_a_loop.py [STEPS]

Needs `pip install 'lora_ext[peft]'`. Compares PEFT's merges with ours, to nearest and stochastic: how far the frozen
weights have drifted after the last unmerge, and how far what is sampled is from the policy that is trained.
"""

import sys

import peft
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from lora_ext.integrations.peft import accelerate

WAYS = {
    "PEFT": lambda model, step: model,
    "accelerate": lambda model, step: accelerate(model),
    "accelerate, stochastic": lambda model, step: accelerate(model, merge_rounding="stochastic", merge_seed=step),
}


def policy():
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=32, max_position_embeddings=64, **sizes))
    config = peft.LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    return peft.get_peft_model(model.to(torch.bfloat16), config)


def frozen(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}


def log_probabilities(model, words):
    return model(input_ids=words).logits[:, :-1].float().log_softmax(-1)


def run(way, steps):
    """Returns the mean relative drift of the frozen weights, and the mean KL(policy || sampled) per token."""
    model = policy()
    before = frozen(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    divergence = 0.0
    for step in range(steps):
        WAYS[way](model, step).eval()
        prompts = torch.randint(1, 32, (8, 4))  # 0 would be padding
        model.merge_adapter()
        with torch.no_grad():
            options = {"max_new_tokens": 8, "do_sample": True, "pad_token_id": 0, "min_new_tokens": 8}
            words = model.generate(input_ids=prompts, **options)
            sampled = log_probabilities(model, words)
        model.unmerge_adapter()
        trained = log_probabilities(model, words)
        divergence += (trained.exp() * (trained - sampled)).sum(-1).mean().item()
        # The reward is for counting: each word one more than the last. REINFORCE, with the mean as the baseline.
        rewards = (words[:, 1:] == (words[:, :-1] + 1) % 32).float()
        chosen = trained.gather(-1, words[:, 1:].unsqueeze(-1)).squeeze(-1)
        loss = -((rewards - rewards.mean()) * chosen)[:, 3:].mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    after = frozen(model)
    drifts = [(after[name] - old).float().abs().mean() / old.float().abs().mean() for name, old in before.items()]
    return sum(drifts).item() / len(drifts), divergence / steps


def main(steps=1000):
    results = {}
    for way in WAYS:
        torch.manual_seed(1)
        results[way] = run(way, steps)
        drift, divergence = results[way]
        print(f"{way}: the frozen weights drifted by {drift:.2g} of their size; KL to the policy {divergence:.2g}")
    return results


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
