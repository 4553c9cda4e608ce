"""What does fine-tuning a whole model cost: tokens a second, memory, the loss it reaches, the time to an accuracy?

    python benchmarks/bench_finetune.py [--rank 8] [--dropout 0.1] [--accuracy 0.75] [--device cpu] [--write]

MiniLM on the demo's movie reviews, and a BERT of four layers of BERT-base's widths with random weights and tokens, in
float32 and bfloat16. A step is forward, backward and AdamW; the contestants, each with a copy of the model and the same
initial factors, take their steps in turn. "frozen" is the model without adapters, its backward passing through to the
embeddings all the same; "head only" trains the classifier, and has no backward but its own.

Activations are the bytes that autograd holds for the backward, each storage once, parameters not counted; peak is the
most that a step holds at a time beyond what was there before it. For the loss curves all dropout is off: the two should
be one but for rounding. The time to an accuracy is that of the training steps until the validation accuracy is reached,
with dropout. The demo's data come from the package index if they are not in the cache; without, the BERT alone is
measured, and that is said.
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

from lora_ext.tasks import TaskError
from lora_ext.tasks.finetune import demo
from lora_ext.tasks.finetune.data import label_names, split_examples

Batch = dict[str, Tensor]


class Demo(NamedTuple):
    """The demo's model and tokenised reviews."""

    path: str
    labels: int
    train: list[Batch]
    validation: list[Batch]


def load_demo(batch_size: int, validation_texts: int, device: str) -> Demo:
    """Batches in an order fixed by a seed, texts of like length together; the same for every contestant.

    Raises:
        TaskError: the model's package or the data are missing and cannot be fetched.
    """
    from transformers import AutoTokenizer

    path = str(demo.model_path())
    examples = demo.examples()
    tokenizer, labels = AutoTokenizer.from_pretrained(path), label_names(examples)
    order = random.Random(0)

    def batches(of: list) -> list[Batch]:
        chosen = sorted(of, key=lambda example: len(example.text))
        result = []
        for i in range(0, len(chosen), batch_size):
            part = chosen[i : i + batch_size]
            encoded = tokenizer([example.text for example in part], truncation=True, padding=True, return_tensors="pt")
            encoded["labels"] = torch.tensor([labels.index(example.label) for example in part])
            result.append({key: value.to(device) for key, value in encoded.items()})
        order.shuffle(result)
        return result

    splits = split_examples(examples, 0.1, 0.1)
    return Demo(path, len(labels), batches(splits.train), batches(splits.validation[:validation_texts]))


def random_batches(batch_size: int, length: int, labels: int, device: str, count: int = 8) -> list[Batch]:
    return [
        {
            "input_ids": torch.randint(1, 30000, (batch_size, length), device=device),
            "attention_mask": torch.ones(batch_size, length, dtype=torch.int64, device=device),
            "labels": torch.randint(0, labels, (batch_size,), device=device),
        }
        for _ in range(count)
    ]


class Trainer:
    """One contestant's copy of the model, its optimizer, and its place in the data."""

    def __init__(self, model: nn.Module, batches: list[Batch], learning_rate: float) -> None:
        self.model, self.batches, self.steps = model, batches, 0
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=learning_rate)

    def next_batch(self) -> Batch:
        return self.batches[self.steps % len(self.batches)]

    def forward(self) -> Tensor:
        return self.model(**self.next_batch()).loss

    def step(self) -> Tensor:
        """Returns the loss, ``[]``."""
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.forward()
        loss.backward()
        self.optimizer.step()
        self.steps += 1
        return loss.detach()

    @torch.no_grad()
    def accuracy(self, batches: list[Batch]) -> float:
        self.model.eval()
        right = sum((self.model(**batch).logits.argmax(-1) == batch["labels"]).sum().item() for batch in batches)
        self.model.train()
        return right / sum(len(batch["labels"]) for batch in batches)


def trainers(
    model: nn.Module, batches: list[Batch], run: Report, dropout: float, factors: torch.dtype | None = None
) -> dict[str, Trainer]:
    copies = whole_models.adapted(model.to(run.args.device), run.args.rank, dropout, factors)
    return {name: Trainer(copy, batches, run.args.learning_rate) for name, copy in copies.items()}


def measure_steps(what: str, model: nn.Module, batches: list[Batch], run: Report, **options) -> list[dict]:
    """One row for each contestant."""
    contestants = trainers(model, batches, run, run.args.dropout, **options)
    held = {name: memory.activation_bytes(one.model, one.forward) for name, one in contestants.items()}
    peak = {name: memory.peak_bytes(one.step, run.args.device) for name, one in contestants.items()}
    seconds = run.interleaved({name: one.step for name, one in contestants.items()})
    rounds = len(seconds[FROZEN])
    # All warm up alike, and so see the same batches: the last ones, which their counters have just passed.
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
    """The losses of as many steps, by contestant; ``model`` and adapters are without dropout."""
    contestants = trainers(model, batches, run, 0.0)
    return {
        name: [one.step().item() for _ in range(run.args.steps)]
        for name, one in contestants.items()
        if name in (LORA_EXT, "peft")
    }


def measure_accuracy(model: nn.Module, data: Demo, run: Report) -> dict[str, dict[str, object]]:
    """Steps and seconds of training until the validation accuracy is reached, by contestant, in turn step by step."""
    everyone = trainers(model, data.train, run, run.args.dropout)
    contestants = {name: everyone[name] for name in (LORA_EXT, "peft") if name in everyone}
    results = {name: {"steps": 0, "seconds": 0.0, "reached": False, "accuracy": 0.0} for name in contestants}
    for step in range(1, run.args.most_steps + 1):
        for name, one in contestants.items():
            result = results[name]
            if result["reached"]:
                continue
            result["seconds"] += run.clock(one.step)
            result["steps"] = step
            if step % run.args.evaluate_every == 0 or step == run.args.most_steps:
                result["accuracy"] = one.accuracy(data.validation)
                result["reached"] = result["accuracy"] >= run.args.accuracy
        if all(result["reached"] for result in results.values()):
            break
    return results


# --- tables -----------------------------------------------------------------------------------------------------------


def table(rows: list[dict]) -> str:
    cells = []
    for row in rows:
        spread = "{:.2f} ({:.2f}-{:.2f})"
        cells.append(
            [
                row["what"],
                row["contestant"],
                f"{row['tokens_per_second']:,.0f}",
                spread.format(*row["ratio"]),
                spread.format(*row["of_peft"]) if row["of_peft"] else "",
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
    told = (
        f"{name} {'after' if one['reached'] else 'NOT reached in'} {one['steps']} steps, {one['seconds']:.1f} s "
        f"(at {one['accuracy']:.1%})"
        for name, one in results.items()
    )
    return f"Validation accuracy of {accuracy:.0%}: {'; '.join(told)}."


def cases(data: Demo | None, run: Report) -> Iterator[tuple[str, Callable[[], object]]]:
    """``(key, measurement)``: rows of the table under "rows", everything else under its own key."""
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
        beside = f", {report.dtype_name(factors or torch.float32)} factors" if dtype != torch.float32 else ""
        what = f"BERT, {sizes}, {report.dtype_name(dtype)}{beside}, {args.bert_batch} x {args.length}"
        yield (
            "rows",
            lambda w=what, d=dtype, f=factors: measure_steps(
                w, whole_models.bert(d, args.dropout, args.layers, args.width), batches, run, factors=f
            ),
        )


def main() -> None:
    parser = report.parser(__doc__, "finetune")
    parser.set_defaults(rank=8, rounds=10)
    parser.add_argument("--dropout", type=float, default=0.1, help="of the adapters and of the models' own")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--batch-size", type=int, default=16, help="reviews in a batch")
    parser.add_argument("--bert-batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=128, help="tokens of a text of the BERT")
    parser.add_argument("--layers", type=int, default=4, help="of the BERT")
    parser.add_argument("--width", type=int, default=768, help="of the BERT")
    parser.add_argument("--steps", type=int, default=12, help="of the loss curves")
    parser.add_argument("--accuracy", type=float, default=0.75, help="to be reached on the validation texts")
    parser.add_argument("--most-steps", type=int, default=120, help="after which the accuracy is given up")
    parser.add_argument("--evaluate-every", type=int, default=20, help="steps")
    parser.add_argument("--validation-texts", type=int, default=200)
    parser.add_argument("--no-demo", action="store_true", help="the BERT with random weights only")
    args = parser.parse_args()
    run = Report(args, f"Fine-tuning, adapters on every linear layer, r={args.rank}, dropout {args.dropout}, AdamW")
    try:
        data = None if args.no_demo else load_demo(args.batch_size, args.validation_texts, args.device)
    except TaskError as error:
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
