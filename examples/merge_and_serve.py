"""Merge an adapter into a checkpoint on disk, and use the result in code that does not support LoRA.

    python examples/merge_and_serve.py [DIRECTORY]

The checkpoint is a Llama of a few thousand weights and the adapter is random, so that this runs in seconds without a
network. Merging reads and writes block by block: a checkpoint of any size takes the memory of a part of one tensor.
"""

import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from lora_ext import LoraConfig, inject, save_adapter


def make_checkpoint_and_adapter(base, adapter):
    """Saves the input of this example: a model saved by transformers, an adapter saved by PEFT or lora_ext."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=100, **sizes))
    model.save_pretrained(base)
    inject(model, LoraConfig(r=4, lora_alpha=32, target_modules="all-linear", init_lora_weights=False))
    save_adapter(model, adapter)
    return model


def lora_ext(*arguments):
    """`lora-ext ...` on the command line."""
    print("$ lora-ext", *arguments, flush=True)
    return subprocess.run([sys.executable, "-m", "lora_ext", *map(str, arguments)], check=False).returncode


def generate(model):
    prompt = torch.tensor([[1, 2, 3, 4]])
    return model.eval().generate(prompt, max_new_tokens=12, do_sample=False, pad_token_id=0)[0].tolist()


def main(directory):
    base, adapter, merged = (Path(directory, name) for name in ("base", "adapter", "merged"))
    adapted = make_checkpoint_and_adapter(base, adapter)

    lora_ext("merge", "--base", base, "--adapter", adapter, "--out", merged)

    # A plain checkpoint: all code that reads the base can read it, here transformers.
    served = AutoModelForCausalLM.from_pretrained(merged)
    print("with the adapter:", *generate(adapted))
    print("merged:          ", *generate(served))

    return lora_ext("inspect", merged)  # keep the base to get the old weights back


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        main(sys.argv[1] if len(sys.argv) > 1 else scratch)
