"""``lora-ext finetune --task causal-lm``: trains a decoder on chats, prompts with completions, or plain text.

- ``run`` is the whole task, with its ``settings``; it shares what it can with lora_ext/tasks/finetune.
- Data: ``conversations`` reads files, ``causal_data`` splits them, ``rendering`` makes tokens, ``packing`` fills rows;
  ``demo`` has the demo's.
- The model: ``decoder`` loads it, ``trainer`` trains it.
- Results: ``evaluating``, ``results``.
"""
