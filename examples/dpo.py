"""TRL's DPOTrainer: prefer one answer to another. The reference is the same model as it was before; no second model.

    python examples/dpo.py

PEFT adapts the model, and its layers run on our kernels.
"""

import tempfile

import peft
from datasets import Dataset
from tiny_chat import COLOURS, answer, model, question, tokenizer
from trl import DPOConfig, DPOTrainer

from lora_ext.integrations.peft import accelerate

LORA = {"r": 8, "lora_alpha": 16, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}


def adapted():
    return accelerate(peft.get_peft_model(model(), peft.LoraConfig(**LORA)))


def main():
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
        trainer = DPOTrainer(adapted(), args=arguments, train_dataset=data, processing_class=tokenizer())
        trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    print(f"loss from {losses[0]:.4f} (ln 2) to {losses[-1]:.4f}")
    return losses


if __name__ == "__main__":
    main()
