"""Answer prompts with several adapters of one decoder: one at a time, all in one batch, and merged.

    python examples/generate.py [DIRECTORY]

The model is a tiny chat model that examples/tiny_chat.py makes, and each adapter has learnt other answers, so that this
runs in seconds without a network. With a model of yours: AutoModelForCausalLM.from_pretrained(path), and load_adapter
for each directory that `lora-ext finetune --task causal-lm` or PEFT has written.
"""

import sys
import tempfile
from pathlib import Path

import tiny_chat
import torch

from lora_ext import LoraConfig, add_weighted_adapter, inject, load_adapter, merge, save_adapter, set_adapter, unmerge
from lora_ext.adapters import unload

OTHER = {"sky": "black", "grass": "yellow", "snow": "rose", "coal": "white", "sun": "blue", "rose": "green"}


def learn(model, colours, directory):
    """The input of this example: an adapter that has learnt some answers."""
    torch.manual_seed(0)
    inject(model, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", exclude_modules=["lm_head"]))
    words = tiny_chat.tokenizer()
    chats = [tiny_chat.question(thing) + tiny_chat.answer(colour) for thing, colour in colours.items()]
    batch = words.apply_chat_template(chats, padding=True, return_tensors="pt", return_dict=True)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(120):
        model.train()(**batch, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    save_adapter(model, directory)
    unload(model)


def ask(model, things, **options):
    """Answers greedily; ``adapter_names=[...]`` names the adapter of each prompt."""
    words = tiny_chat.tokenizer()
    words.padding_side = "left"
    chats = [tiny_chat.question(thing) for thing in things]
    prompts = words.apply_chat_template(
        chats, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
    )
    out = model.eval().generate(**prompts, max_new_tokens=4, do_sample=False, **options)
    return words.batch_decode(out[:, prompts["input_ids"].shape[1] :], skip_special_tokens=True)


def main(directory):
    model, things = tiny_chat.model(), list(tiny_chat.COLOURS)
    for name, colours in (("day", tiny_chat.COLOURS), ("night", OTHER)):
        learn(model, colours, Path(directory, name))

    for name in ("day", "night"):
        load_adapter(model, Path(directory, name), adapter_name=name)
    for name in ("day", "night"):
        set_adapter(model, name)
        print(f"{name}: {ask(model, things)}")

    names = ["day", "night"] * 3  # one batch, an adapter for each row; "__base__" is none
    mixed = ask(model, things, adapter_names=names)
    print(f"mixed: {mixed}")

    set_adapter(model, "day")
    merge(model)  # into the weights: inference at the base model's speed
    merged = ask(model, things)
    unmerge(model)  # every bit as before
    print(f"merged: {merged}")

    add_weighted_adapter(model, ["day", "night"], [0.9, 0.1], "dusk", combination_type="cat")
    set_adapter(model, "dusk")
    print(f"nine parts day, one part night: {ask(model, things)}")
    return mixed, merged


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        main(sys.argv[1] if len(sys.argv) > 1 else scratch)
