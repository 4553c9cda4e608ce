"""A fine-tuning run and hashes of its results. As a process: ``python -m support.hashed_run MODEL DATA OUT``."""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path

import torch

from lora_ext.tasks.finetune.run import finetune
from lora_ext.tasks.finetune.settings import Settings

TARGETS, SAVED = ["value", "query", "dense"], ["pooler", "intermediate"]


def run(model: str, data: str, out: str) -> list:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    options = {"target_modules": ",".join(TARGETS), "modules_to_save": ",".join(SAVED), "r": 2}
    settings = Settings(model=model, data=data, epochs=1, max_length=32, **options)
    metrics = finetune(settings, Path(out), measure=False, say=lambda line: None)
    torch.set_num_threads(threads)
    adapter = sorted(Path(out, "adapter").iterdir())
    hashes = [hashlib.sha256(file.read_bytes()).hexdigest() for file in adapter]
    return [metrics["id2label"], metrics["data_sha256"], metrics["after"], hashes]


if __name__ == "__main__":
    print(json.dumps(run(*sys.argv[1:])))
