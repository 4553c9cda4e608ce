"""TRL's DPOTrainer: prefer one answer to another. The reference is the same model as it was before; no second model.

    python examples/dpo.py [inject|peft]

`inject` adapts the model itself, and `for_trl` hands it to TRL; `peft` is PEFT's model with its layers on our kernels.
"""

import sys
import tempfile

import peft
from datasets import Dataset
from tiny_chat import COLOURS, answer, model, question, tokenizer
from trl import DPOConfig, DPOTrainer

from lora_ext import LoraConfig, inject
from lora_ext.integrations.peft import accelerate
from lora_ext.integrations.trl import for_trl

LORA = {"r": 8, "lora_alpha": 16, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}


def adapted(way):
    if way == "inject":
        return for_trl(inject(model(), LoraConfig(**LORA)))
    return accelerate(peft.get_peft_model(model(), peft.LoraConfig(**LORA)))


def main(way="inject"):
    colours = list(COLOURS.values())
    pairs = [
        {"prompt": question(thing), "chosen": answer(colour), "rejected": answer(wrong)}
        for thing, colour in COLOURS.items()
        for wrong in colours
        if wrong != colour
    ]
    with tempfile.TemporaryDirectory() as directory:
        arguments = DPOConfig(
            output_dir=directory,
            beta=0.5,
            num_train_epochs=6,
            per_device_train_batch_size=6,
            learning_rate=1e-2,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
            bf16=False,
        )
        data = Dataset.from_list(pairs)
        trainer = DPOTrainer(adapted(way), args=arguments, train_dataset=data, processing_class=tokenizer())
        trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    print(f"loss from {losses[0]:.4f} (ln 2) to {losses[-1]:.4f}")
    return losses


if __name__ == "__main__":
    main(*sys.argv[1:])
