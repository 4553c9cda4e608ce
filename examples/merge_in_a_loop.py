"""Reinforcement learning's loop: merge, sample from the merged model, unmerge, train; again and again, in bfloat16.

    python examples/merge_in_a_loop.py [STEPS [LEARNING_RATE [MODEL]]]

Needs `pip install 'lora_ext[peft]'`. MODEL is the directory of a language model; without it, a tiny one is made.
Compares PEFT's merges with ours, to nearest and stochastic: how far the frozen weights have drifted after the last
unmerge, and how far the merged weights, from which words are sampled, are from the policy that is trained:
KL(policy || merged) per token, both computed in float32, so that only the weights differ.
"""

import copy
import sys

import peft
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from lora_ext.integrations.peft import accelerate

WAYS = {
    "PEFT": lambda model, step: model,
    "accelerate": lambda model, step: accelerate(model),
    "accelerate, stochastic": lambda model, step: accelerate(model, merge_rounding="stochastic", merge_seed=step),
}


def policy(directory):
    torch.manual_seed(0)
    if directory is None:
        sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
        model = LlamaForCausalLM(LlamaConfig(vocab_size=32, max_position_embeddings=64, **sizes))
    else:
        model = AutoModelForCausalLM.from_pretrained(directory)
    config = peft.LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    return peft.get_peft_model(model.to(torch.bfloat16), config)


def frozen(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}


def log_probabilities(model, words):
    return model(input_ids=words).logits[:, :-1].float().log_softmax(-1)


@torch.no_grad()
def exact_log_probabilities(model, words):
    return log_probabilities(copy.deepcopy(model).float(), words)


def run(way, steps, rate, directory):
    """Returns the mean relative drift of the frozen weights, and the mean KL(policy || merged) per token."""
    model = policy(directory)
    before, vocabulary = frozen(model), model.config.vocab_size
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate)
    divergence = 0.0
    for step in range(steps):
        WAYS[way](model, step).eval()
        prompts = torch.randint(1, vocabulary, (8, 4))  # 0 would be padding
        model.merge_adapter()
        with torch.no_grad():
            options = {"max_new_tokens": 8, "do_sample": True, "pad_token_id": 0, "min_new_tokens": 8}
            words = model.generate(input_ids=prompts, **options)
        merged = exact_log_probabilities(model, words)
        model.unmerge_adapter()
        exact = exact_log_probabilities(model, words)
        divergence += (exact.exp() * (exact - merged)).sum(-1).mean().item()
        # The reward is for even words. REINFORCE, with the mean as the baseline.
        rewards = (words[:, 1:] % 2 == 0).float()
        chosen = log_probabilities(model, words).gather(-1, words[:, 1:].unsqueeze(-1)).squeeze(-1)
        loss = -((rewards - rewards.mean()) * chosen)[:, 3:].mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    after = frozen(model)
    drifts = [(after[name] - old).float().abs().mean() / old.float().abs().mean() for name, old in before.items()]
    return sum(drifts).item() / len(drifts), divergence / steps


def main(steps=1000, rate=1e-4, directory=None):
    results = {}
    for way in WAYS:
        torch.manual_seed(1)
        results[way] = run(way, steps, rate, directory)
        drift, divergence = results[way]
        print(f"{way}: the frozen weights drifted by {drift:.2g} of their size; KL of the merged ones {divergence:.2g}")
    return results


if __name__ == "__main__":
    converters = (int, float, str)
    main(*(convert(text) for convert, text in zip(converters, sys.argv[1:], strict=False)))
