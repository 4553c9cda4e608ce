"""Serve batches of requests that name one of many adapters.

    python examples/many_adapters.py [DIRECTORY]

Each request has a prompt and a tenant, whose adapter is a directory of PEFT's files. The pool has fewer slots than
there are tenants: an adapter is read when a batch names it. The same requests run with one adapter for all, and on the
bare model, to compare. The model is a Llama made from its config and the adapters are random, so that this runs in
seconds without a network.
"""

import random
import sys
import tempfile
import time
from pathlib import Path

import torch
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from lora_ext import AdapterPool, LoraConfig, inject, save_adapter
from lora_ext.adapters import unload

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TENANTS, SLOTS, BATCH, NEW_TOKENS = 40, 24, 16, 8
GENERATION = GenerationConfig(max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=-1, pad_token_id=0)


def make_model_and_adapters(directory):
    """The input of this example: a model, and one directory for each tenant."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 688}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=1000, pad_token_id=0, eos_token_id=None, **sizes)).eval()
    for i in range(TENANTS):
        inject(model, LoraConfig(r=4 + 4 * (i % 4), target_modules=TARGETS, init_lora_weights=False))
        save_adapter(model, Path(directory, f"tenant-{i}"))
        unload(model)
    return model


def stream(number):
    """Requests as they come: a tenant, and a prompt of 4 to 12 tokens."""
    draw = random.Random(0)
    for _ in range(number):
        yield f"tenant-{draw.randrange(TENANTS)}", [draw.randrange(1, 1000) for _ in range(draw.randint(4, 12))]


def serve(model, requests):
    """Answers all requests in batches, padded on the left; returns the answers and the tokens per second."""
    begin, answers = time.perf_counter(), []
    for i in range(0, len(requests), BATCH):
        tenants, prompts = zip(*requests[i : i + BATCH], strict=True)
        length = max(map(len, prompts))
        ids = torch.tensor([[0] * (length - len(prompt)) + prompt for prompt in prompts])
        tokens = model.generate(
            ids, attention_mask=(ids != 0).long(), generation_config=GENERATION, adapter_names=list(tenants)
        )
        answers += tokens[:, -NEW_TOKENS:].tolist()
    return answers, NEW_TOKENS * len(requests) / (time.perf_counter() - begin)


def main(directory, number=64):
    model, requests = make_model_and_adapters(directory), list(stream(number))
    slot_bytes = 4 * (256 * 4 * 2 + 3 * (256 + 688)) * 16 * 4 + 4 * 7 * 16
    with AdapterPool(model, directory, target_modules=TARGETS, r=16, max_bytes=SLOTS * slot_bytes) as pool:
        _, bare = serve(model, [("__base__", prompt) for _, prompt in requests])
        _, one = serve(model, [("tenant-0", prompt) for _, prompt in requests])
        mixed, throughput = serve(model, requests)
        stats = pool.stats()
        alone = [serve(model, [request])[0][0] for request in requests[:4]]
    print(f"mixed adapters: {throughput:.0f} tokens/s; one adapter: {one:.0f}; bare model: {bare:.0f}")
    print(
        f"{stats.loads} adapters were read into {stats.slots} slots, {stats.evictions} of them in place of another one"
    )
    return mixed[:4], alone, stats


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        main(sys.argv[1] if len(sys.argv) > 1 else scratch)
