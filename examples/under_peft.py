"""Keep PEFT, and let its LoRA layers run on these kernels.

    python examples/under_peft.py

Needs `pip install 'lora_ext[peft]'`. The model is a Llama of a few thousand weights that learns to count, so that this
runs in seconds without a network.
"""

import tempfile

import peft
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from lora_ext.integrations.peft import accelerate, report


def new_model():
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
    return LlamaForCausalLM(LlamaConfig(vocab_size=32, max_position_embeddings=64, **sizes))


def batch(size=32):
    first = torch.randint(32, (size, 1))
    return (first + torch.arange(16)) % 32  # 5, 6, 7, ...


def main():
    config = peft.LoraConfig(r=8, lora_alpha=16, lora_dropout=0.05, target_modules="all-linear", task_type="CAUSAL_LM")
    model = peft.get_peft_model(new_model(), config)
    accelerate(model)  # the one line that is not PEFT's
    print(report(model))  # which layers run on our kernels, and why others do not

    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model.train()
    for step in range(150):
        words = batch()
        loss = model(input_ids=words, labels=words).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 50 == 0:
            print(f"step {step}: loss {loss:.3f}")

    # PEFT's own methods work as before. Merging goes through our kernels, and unmerging restores every bit.
    model.eval()
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    model.merge_adapter()
    model.unmerge_adapter()
    unchanged = all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
    print(f"merged and unmerged: every bit is {'as before' if unchanged else 'NOT as before'}")

    with tempfile.TemporaryDirectory() as directory:
        model.save_pretrained(directory)
        again = accelerate(peft.PeftModel.from_pretrained(new_model(), directory)).eval()
    prompt = torch.tensor([[3, 4, 5, 6]])
    words = again.generate(input_ids=prompt, max_new_tokens=6, do_sample=False, pad_token_id=0)[0].tolist()
    print("loaded again, it counts:", *words)
    return unchanged, words


if __name__ == "__main__":
    main()
