"""A bare training loop with Hugging Face's accelerate: gradient accumulation, a checkpoint, and going on from it.

    python examples/accelerate_loop.py [inject|peft]

`inject` adapts the model itself; `peft` is PEFT's model with its layers on our kernels. `accelerate launch` runs the
same file on several processes.
"""

import sys
import tempfile

import peft
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from tiny_chat import COLOURS, answer, answers, model, question, tokenizer

from lora_ext import LoraConfig, inject
from lora_ext.integrations.peft import accelerate

LORA = {"r": 8, "lora_alpha": 16, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}


def adapted(way):
    if way == "inject":
        return inject(model(), LoraConfig(**LORA))
    return accelerate(peft.get_peft_model(model(), peft.LoraConfig(**LORA)))


def prepared(accelerator, way):
    lora = adapted(way)
    optimizer = torch.optim.AdamW([p for p in lora.parameters() if p.requires_grad], lr=2e-2)
    chats = [question(thing) + answer(colour) for thing, colour in COLOURS.items()]
    rows = [tokenizer().apply_chat_template(chat, return_dict=True)["input_ids"] for chat in chats]
    return accelerator.prepare(lora, optimizer, torch.utils.data.DataLoader(torch.tensor(rows), batch_size=2))


def train(accelerator, lora, optimizer, loader, epochs):
    losses = []
    for _ in range(epochs):
        for ids in loader:
            with accelerator.accumulate(lora):
                loss = lora(input_ids=ids, labels=ids).loss
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def main(way="inject"):
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    with tempfile.TemporaryDirectory() as directory:
        directory = broadcast_object_list([directory])[0]  # all processes use that of the first
        parts = prepared(accelerator, way)
        train(accelerator, *parts, epochs=10)
        accelerator.save_state(directory)
        whole = train(accelerator, *parts, epochs=30)

        accelerator.free_memory()
        parts = prepared(accelerator, way)  # another day: a fresh model
        accelerator.load_state(directory)
        resumed = train(accelerator, *parts, epochs=30)
        accelerator.unwrap_model(parts[0]).save_pretrained(directory + "/adapter")  # the adapter alone
        accelerator.wait_for_everyone()  # before the directory is removed
    accelerator.print(f"loss {whole[-1]:.4f}; resumed from epoch 10 {resumed[-1]:.4f}")
    said = answers(accelerator.unwrap_model(parts[0]))
    accelerator.print(said)
    return said, whole, resumed


if __name__ == "__main__":
    main(*sys.argv[1:])
