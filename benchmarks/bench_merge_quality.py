"""Measures how much of an adapter's effect survives a merge: the distance of the merged model from the unmerged one.

    python benchmarks/bench_merge_quality.py [--model DIR_OR_GGUF] [--steps 160] [--packs 12] [--write]

An adapter on every linear layer of the demo's SmolLM2-135M is trained on its conversations, and merged into the same
base in bfloat16, NF4 and int8, in every way there is. Reference: the adapter unmerged on that base, in float32
arithmetic. KL(reference || merged) per token and perplexities are those of held-out conversations, or of film reviews,
which the adapter was not trained for. The share of the gain that is kept compares mean losses: 1 for the unmerged
adapter, 0 for the base. A part of the conversations calibrates the error feedback.
"""

from __future__ import annotations

import copy
import csv
import math
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
from bench_language_model import batches
from datasets import Dataset, disable_progress_bars, load_dataset
from harness import report
from harness.report import Report
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel

from lora_ext import LoraConfig, inject
from lora_ext.adapters import merge, merge_errors, unload
from lora_ext.commands import demo
from lora_ext.commands.language_model import IGNORED, load_decoder
from lora_ext.commands.training_options import LanguageModelOptions

Pack = dict[str, Tensor]
FORMATS = {
    "NF4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float32},
    "int8": {"load_in_8bit": True},
}


class Adapter:
    """The trained factors, to be put on copies of the base."""

    def __init__(self, base: PreTrainedModel, packs: list[Pack], steps: int, rank: int) -> None:
        self.config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear")
        model = inject(copy.deepcopy(base), self.config).train()
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        optimizer = torch.optim.AdamW(trained.values(), lr=5e-4)
        for step in range(steps):
            loss = model(**packs[step % len(packs)]).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if step % 20 == 0:
                print(f"step {step}: loss {loss.item():.3f}", flush=True)
        self.factors = {name: p.detach().clone() for name, p in trained.items()}

    def on(self, base: PreTrainedModel, scale: float) -> nn.Module:
        """Injects the adapter, its update times ``scale``, into ``base`` itself."""
        model = inject(base, self.config).eval()
        for name, p in model.named_parameters():
            if name in self.factors:
                p.data.copy_(self.factors[name] * (scale if "lora_B" in name else 1.0))
        return model


@torch.no_grad()
def log_probabilities(model: nn.Module, packs: list[Pack]) -> Iterator[Tensor]:
    for pack in packs:
        inputs = {name: value for name, value in pack.items() if name != "labels"}
        yield model(**inputs).logits[0].float().log_softmax(-1)


def loss_and_divergence(model: nn.Module, packs: list[Pack], reference: list[Tensor]) -> tuple[float, float]:
    """Returns the mean loss of the labels, and KL(reference || model) per token."""
    loss = divergence = labels = tokens = 0.0
    for pack, found, wanted in zip(packs, log_probabilities(model, packs), reference, strict=True):
        divergence += (wanted.exp() * (wanted - found)).sum().item()
        tokens += len(wanted)
        target = pack["labels"][0, 1:]
        chosen = found[:-1][target != IGNORED].gather(-1, target[target != IGNORED].unsqueeze(-1))
        loss -= chosen.sum().item()
        labels += chosen.numel()
    return loss / labels, divergence / tokens


def ways(format: str, calibration: list[Pack]) -> dict[str, dict]:
    if format == "bfloat16":
        return {"nearest": {}, "stochastic": {"rounding": "stochastic"}}
    inputs = [{name: value for name, value in pack.items() if name != "labels"} for pack in calibration]
    return {"nearest": {}, "error feedback": {"calibration": inputs}}


def rows_of(
    format: str, base: PreTrainedModel, adapter: Adapter, scale: float, texts: dict[str, list[Pack]]
) -> Iterator[dict]:
    """Yields a row for each way to merge into ``base``, on each kind of texts."""
    in_float = (lambda model: model.float()) if format == "bfloat16" else (lambda model: model)
    unmerged = in_float(adapter.on(copy.deepcopy(base), scale))
    references = {kind: list(log_probabilities(unmerged, packs)) for kind, packs in texts.items() if kind != "train"}
    known = {}
    for kind, reference in references.items():
        bare = loss_and_divergence(unload(copy.deepcopy(unmerged)), texts[kind], reference)[0]
        known[kind] = bare, loss_and_divergence(unmerged, texts[kind], reference)[0]
    for way, options in ways(format, texts["train"]).items():
        merged = adapter.on(copy.deepcopy(base), scale)
        with warnings.catch_warnings():
            for text in ("were quantised again", "rounding to 16 bits keeps"):  # the errors that are measured here
                warnings.filterwarnings("ignore", f"merge: .*{text}")
            merge(merged, **options)
        kept = sorted(error.kept for error in merge_errors(merged).values())
        for arithmetic in ["float32", "bfloat16"] if format == "bfloat16" else ["float32"]:
            model = merged if arithmetic == "bfloat16" else in_float(copy.deepcopy(merged))
            for kind, reference in references.items():
                loss, divergence = loss_and_divergence(model, texts[kind], reference)
                bare, full = known[kind]
                yield {
                    "format": format,
                    "scale": scale,
                    "way": way,
                    "arithmetic": arithmetic,
                    "texts": kind,
                    "divergence": divergence,
                    "perplexity": math.exp(loss),
                    "of_unmerged": math.exp(full),
                    "of_base": math.exp(bare),
                    "gain_kept": (bare - loss) / (bare - full),
                    "update_kept": kept[len(kept) // 2],
                }


def table(rows: list[dict]) -> str:
    heading = ["merged into", "scaling x", "by", "arithmetic", "texts", "KL per token", "perplexity"]
    heading += ["unmerged, base", "gain kept", "update kept, median layer"]
    cells = [
        [row["format"], f"{row['scale']:g}", row["way"], row["arithmetic"], row["texts"]]
        + [f"{row['divergence']:.2g}", f"{row['perplexity']:.2f}", f"{row['of_unmerged']:.2f}, {row['of_base']:.2f}"]
        + [f"{row['gain_kept']:.2f}", f"{row['update_kept']:.2f}"]
        for row in rows
    ]
    return report.markdown(heading, cells)


def reviews(tokenizer, number: int, max_length: int) -> list[Pack]:
    """Texts of another domain: reviews, packed."""
    with open(demo.reviews(), encoding="utf-8") as file:
        ids = tokenizer("\n".join(row["text"] for row in csv.DictReader(file)))["input_ids"]
    parts = torch.tensor(ids[: number * max_length]).view(number, 1, max_length)
    return [{"input_ids": part, "labels": part} for part in parts]


def main() -> None:
    parser = report.parser(__doc__, "merge_quality")
    parser.add_argument("--model", help="a directory or a GGUF file; default: the demo's")
    parser.add_argument("--steps", type=report.at_least(1), default=160)
    parser.add_argument("--packs", type=report.at_least(1), default=12, help="held-out packs")
    parser.add_argument("--max-length", type=int, default=256, help="tokens of a pack")
    args = parser.parse_args()
    run = Report(args, f"Merged models against the unmerged adapter, r={args.rank}, {args.steps} steps of training")
    disable_progress_bars()
    tokenizer, base, _ = load_decoder(LanguageModelOptions(model=args.model or demo.language_model(), dtype="float32"))
    base.config.use_cache = False
    chats: Dataset = load_dataset("json", data_files=demo.chats(), split="train")
    packs = batches(tokenizer, chats, args.max_length, 1)
    held_out, train = packs[: args.packs], packs[args.packs :]
    texts = {"train": train[:4], "held out": held_out, "reviews": reviews(tokenizer, args.packs, args.max_length)}
    adapter = Adapter(base, train, args.steps, args.rank)
    rows: list[dict] = []
    with tempfile.TemporaryDirectory() as directory:
        half = base.to(torch.bfloat16)
        half.save_pretrained(Path(directory))
        for scale in (1.0, 0.1):
            rows += rows_of("bfloat16", half, adapter, scale, texts)
            print(table(rows), flush=True)
        for format, options in FORMATS.items():
            quantized = AutoModelForCausalLM.from_pretrained(
                directory, quantization_config=BitsAndBytesConfig(**options), dtype=torch.float32
            )
            rows += rows_of(format, quantized, adapter, 1.0, texts)
            print(table(rows), flush=True)
    run.finish(rows, table(rows))


if __name__ == "__main__":
    main()
