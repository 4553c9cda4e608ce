"""Serve a stream of requests that name one of many adapters, in batches that mix them.

    python examples/many_adapters.py [DIRECTORY]

Each request has a prompt and a tenant, whose adapter is a directory of PEFT's files. The pool has fewer slots than
there are tenants: adapters are read when a batch names them, and those of the next batch in the background. The same
requests run with one adapter for all, and on the bare model, to compare. The model is a Llama made from its config and
the adapters are random, so that this runs in seconds without a network.
"""

import random
import sys
import tempfile
import time
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from lora_ext import AdapterPool, LoraConfig, inject, save_adapter
from lora_ext.adapters import unload

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TENANTS, SLOTS, BATCH, NEW_TOKENS = 40, 24, 16, 8


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


def padded(prompts):
    """Left-padded ids and their mask."""
    length = max(map(len, prompts))
    ids = torch.tensor([[0] * (length - len(prompt)) + prompt for prompt in prompts])
    return {"input_ids": ids, "attention_mask": (ids != 0).long()}


def serve(model, requests, prefetch=None, name_of=lambda tenant: tenant):
    """Answers all requests in batches; returns the answers and the tokens per second."""
    batches = [requests[i : i + BATCH] for i in range(0, len(requests), BATCH)]
    answers, begin = [], time.perf_counter()
    for i, batch in enumerate(batches):
        if prefetch is not None and i + 1 < len(batches):
            prefetch({tenant for tenant, _ in batches[i + 1]})
        prompts = padded([prompt for _, prompt in batch])
        names = {} if name_of is None else {"adapter_names": [name_of(tenant) for tenant, _ in batch]}
        tokens = model.generate(**prompts, **names, max_new_tokens=NEW_TOKENS, do_sample=False)
        answers += tokens[:, -NEW_TOKENS:].tolist()
    return answers, NEW_TOKENS * len(requests) / (time.perf_counter() - begin)


def main(directory, number=64):
    model, requests = make_model_and_adapters(directory), list(stream(number))
    serve(model, requests[:BATCH], name_of=None)  # warms up
    _, bare = serve(model, requests, name_of=None)
    slot_bytes = 4 * (256 * 4 * 2 + 3 * (256 + 688)) * 16 * 4 + 4 * 7 * 16
    with AdapterPool(model, directory, target_modules=TARGETS, r=16, max_bytes=SLOTS * slot_bytes) as pool:
        mixed, throughput = serve(model, requests, pool.prefetch)
        stats = pool.stats()
        _, one = serve(model, requests, name_of=lambda _: "tenant-0")
        # A request alone gets the same answer as in its batch.
        alone = [serve(model, [request])[0][0] for request in requests[:4]]
    print(f"mixed adapters: {throughput:.0f} tokens/s; one adapter: {one:.0f}; bare model: {bare:.0f}")
    print(
        f"{stats.loads} adapters were read into {stats.slots} slots, {stats.evictions} of them in place of another one"
    )
    return mixed[:4], alone, stats


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        main(sys.argv[1] if len(sys.argv) > 1 else scratch)
