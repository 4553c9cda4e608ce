"""Inject adapters into a model, train them in a plain loop, save them, and load them into a fresh copy of the model.

    python examples/train_and_save.py [OUT]

The model is a BERT of a few thousand weights and the task is made up (does word 7 occur?), so that this runs in seconds
without a network. With a model of your own, only the lines above "inject" change.
"""

import sys
import tempfile

import torch
from transformers import BertConfig, BertForSequenceClassification

from lora_ext import LoraConfig, inject, load_adapter, save_adapter


def new_model():
    torch.manual_seed(0)  # the "pretrained" weights: the same ones every time
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 128}
    return BertForSequenceClassification(BertConfig(vocab_size=50, num_labels=2, **sizes))


def batch(size=64):
    words = torch.randint(8, 50, (size, 16))
    labels = torch.randint(2, (size,))
    words[labels == 1, 5] = 7
    return words, labels


def accuracy(model, words, labels):
    with torch.no_grad():
        return (model.eval()(words).logits.argmax(-1) == labels).float().mean().item()


def main(out):
    model = new_model()
    # Rank-8 adapters on every linear layer. The new head ("classifier") is trained in full and saved with them.
    inject(model, LoraConfig(r=8, lora_alpha=16, lora_dropout=0.1, target_modules="all-linear", task_type="SEQ_CLS"))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    total = sum(parameter.numel() for parameter in model.parameters())
    print(f"{sum(parameter.numel() for parameter in trained):,} of {total:,} parameters are trained")

    optimizer = torch.optim.AdamW(trained, lr=5e-3)
    model.train()
    for step in range(100):
        words, labels = batch()
        loss = model(words, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 25 == 0:
            print(f"step {step}: loss {loss:.3f}")

    save_adapter(model, out)  # adapter_config.json and adapter_model.safetensors: PEFT reads them, too

    # Somebody else, another day: the base model, and the adapter's directory.
    again = load_adapter(new_model(), out)
    words, labels = batch(1000)
    print(f"test accuracy {accuracy(model, words, labels):.3f}, loaded again {accuracy(again, words, labels):.3f}")
    return accuracy(again, words, labels)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        main(sys.argv[1] if len(sys.argv) > 1 else scratch)
