"""Transformers' Trainer: evaluate and save every epoch, go on from a checkpoint, end with the best adapter.

    python examples/trainer.py [inject|peft]

`inject` adapts the model itself; `peft` is PEFT's model with its layers on our kernels.
"""

import sys
import tempfile

import peft
from tiny_chat import COLOURS, answer, answers, model, question, tokenizer
from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments

from lora_ext import LoraConfig, inject
from lora_ext.integrations.peft import accelerate

LORA = {"r": 8, "lora_alpha": 16, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}


def adapted(way):
    if way == "inject":
        return inject(model(), LoraConfig(**LORA))
    return accelerate(peft.get_peft_model(model(), peft.LoraConfig(**LORA)))


def row(thing, colour):
    messages = question(thing) + answer(colour)
    ids = tokenizer().apply_chat_template(messages, return_dict=True)["input_ids"]
    return {"input_ids": ids, "labels": ids}


def trainer(way, directory, epochs):
    rows = [row(*pair) for pair in COLOURS.items()]
    arguments = TrainingArguments(
        output_dir=directory,
        num_train_epochs=epochs,
        per_device_train_batch_size=3,
        learning_rate=2e-2,
        lr_scheduler_type="constant",
        eval_strategy="epoch",
        save_strategy="epoch",
        load_best_model_at_end=True,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    collator = DataCollatorForSeq2Seq(tokenizer())
    return Trainer(adapted(way), arguments, train_dataset=rows, eval_dataset=rows, data_collator=collator)


def main(way="inject"):
    with tempfile.TemporaryDirectory() as directory:
        trainer(way, directory, epochs=10).train()  # checkpoints hold the adapter, not the model
        second = trainer(way, directory, epochs=30)  # another day: a fresh model
        second.train(resume_from_checkpoint=True)  # goes on after epoch 10
    losses = [entry["eval_loss"] for entry in second.state.log_history if "eval_loss" in entry]
    loss = second.evaluate()["eval_loss"]
    print(f"{len(losses)} epochs, loss from {losses[0]:.4f} to {losses[-1]:.4f}, the best {min(losses):.4f}")
    said = answers(second.model)
    print(f"the trained model has {loss:.4f} and says {said}")
    return said, losses, loss


if __name__ == "__main__":
    main(*sys.argv[1:])
