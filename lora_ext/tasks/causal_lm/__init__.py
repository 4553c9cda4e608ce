"""``lora-ext finetune --task causal-lm``: trains a decoder on chats, prompts with completions, or plain text."""
