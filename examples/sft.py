"""TRL's SFTTrainer on chat data: packed documents, loss on the assistant's words only.

    python examples/sft.py [inject|peft]

`inject` adapts the model itself, which SFTTrainer takes as it is; `peft` is PEFT's model on our kernels.
"""

import sys
import tempfile

import peft
from datasets import Dataset
from tiny_chat import COLOURS, answer, answers, model, question, tokenizer
from trl import SFTConfig, SFTTrainer

from lora_ext import LoraConfig, inject
from lora_ext.integrations.peft import accelerate

LORA = {"r": 8, "lora_alpha": 16, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}


def adapted(way):
    if way == "inject":
        return inject(model(), LoraConfig(**LORA))
    return accelerate(peft.get_peft_model(model(), peft.LoraConfig(**LORA)))


def main(way="inject"):
    chats = [{"messages": question(thing) + answer(colour)} for thing, colour in COLOURS.items()]
    with tempfile.TemporaryDirectory() as directory:
        arguments = SFTConfig(
            output_dir=directory,
            num_train_epochs=60,
            per_device_train_batch_size=1,
            learning_rate=2e-2,
            packing=True,  # several chats in a row of 32 tokens; none sees another
            max_length=32,
            assistant_only_loss=True,
            logging_steps=20,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
            bf16=False,
        )
        data = Dataset.from_list(chats)
        trainer = SFTTrainer(adapted(way), arguments, train_dataset=data, processing_class=tokenizer())
        trainer.train()
    said = answers(trainer.model)
    print(said)
    return said


if __name__ == "__main__":
    main(*sys.argv[1:])
