"""TRL's GRPOTrainer: the model answers, a function rewards it, the model learns from that.

    python examples/grpo.py

PEFT adapts the model, and its layers run on our kernels.
With `beta` above 0 the reference is the same model as it was before; no second model.
"""

import tempfile

import peft
from datasets import Dataset
from tiny_chat import COLOURS, model, question, tokenizer
from trl import GRPOConfig, GRPOTrainer

from lora_ext.integrations.peft import accelerate

LORA = {"r": 8, "lora_alpha": 16, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}


def adapted():
    return accelerate(peft.get_peft_model(model(), peft.LoraConfig(**LORA)))


def reward(completions, **columns):
    """The share of an answer's words that are colours."""
    answers = [completion[0]["content"].split() for completion in completions]
    return [sum(word in COLOURS.values() for word in words) / 4 for words in answers]


def main():
    prompts = Dataset.from_list([{"prompt": question(thing)} for thing in COLOURS])
    with tempfile.TemporaryDirectory() as directory:
        arguments = GRPOConfig(
            output_dir=directory,
            beta=0.01,
            num_generations=8,
            max_completion_length=4,
            max_steps=30,
            per_device_train_batch_size=24,
            learning_rate=2e-2,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
            bf16=False,
        )
        trainer = GRPOTrainer(
            adapted(), reward_funcs=reward, args=arguments, train_dataset=prompts, processing_class=tokenizer()
        )
        trainer.train()
    rewards = [entry["reward"] for entry in trainer.state.log_history if "reward" in entry]
    print(f"mean reward of the first steps {sum(rewards[:3]) / 3:.2f}, of the last {sum(rewards[-3:]) / 3:.2f}")
    return rewards


if __name__ == "__main__":
    main()
