"""``--task causal-lm``: a decoder trained by TRL's SFTTrainer; perplexity and answers before and after."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import PartialState
from accelerate.utils import gather_object
from datasets import Dataset
from rouge_score.rouge_scorer import RougeScorer
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, Trainer, pipeline
from trl import SFTConfig, SFTTrainer
from trl.chat_template_utils import get_training_chat_template

from lora_ext.commands import demo
from lora_ext.commands.adapting import adapt, checkpoint_bytes, load_model
from lora_ext.commands.data import load_rows, split_rows
from lora_ext.commands.options import CommandError, check_installed, refusing
from lora_ext.commands.results import write_text
from lora_ext.commands.trainer import LoraTrainerMixin
from lora_ext.commands.training_options import LanguageModelOptions

IGNORED = -100  # a label that the loss does not count
ROUGE = ("rouge1", "rouge2", "rougeL")

_AT_ONCE = 16  # answers that are generated together
_SAMPLES = 10  # answers in metrics.json; predictions.jsonl has all


def load(options: LanguageModelOptions) -> dict[str, Dataset]:
    """Reads and splits chats, prompts with completions, or texts, in TRL's formats; equal prompts land on one side."""
    data = options.data or demo.chats()
    names = load_rows(data, ())["train"].column_names
    columns = next((wanted for wanted in (("messages",), ("prompt", "completion")) if {*wanted} <= {*names}), None)
    if columns is None and options.text_column not in names:
        raise CommandError(
            f"{data}: has the columns {', '.join(names)}; want messages, or prompt and completion, or "
            f"{options.text_column!r} (--text_column)"
        )
    return split_rows(options, data, columns or (options.text_column,), lambda row: prompt_of(row, options.text_column))


def prompt_of(row: dict[str, Any], text_column: str) -> str:
    """Returns what precedes the answer, as one string; a plain text whole."""
    prompt = _before_answer(row) if {"messages", "prompt"} & row.keys() else row[text_column]
    return prompt if isinstance(prompt, str) else "\n".join(str(message["content"]) for message in prompt)


def _before_answer(row: dict[str, Any]) -> Any:
    return row["messages"][:-1] if "messages" in row else row["prompt"]


class LanguageModelTrainer(LoraTrainerMixin, SFTTrainer):
    """An SFTTrainer whose loss on the CPU is the model's own."""

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Returns the loss. TRL's head also computes entropies in chunks: on the CPU a step takes 1.4 times as long."""
        if not self.args.use_cpu:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        return Trainer.compute_loss(self, model, {**inputs, "use_cache": False}, return_outputs, num_items_in_batch)


class Run:
    """The adapted model and its trainer.

    Attributes:
        trainer: ready to train.
        about: a line on the data.
        full_checkpoint_bytes: of the whole model.
        head_parameters: 0, as a language model has no new head.
    """

    head_parameters = 0

    def __init__(self, options: LanguageModelOptions, training: SFTConfig, sides: dict[str, Dataset]) -> None:
        self.options = options
        options.model = options.model or demo.language_model()
        self.tokenizer, model, drawn = load_decoder(options)
        self.full_checkpoint_bytes = checkpoint_bytes(model)
        adapt(model, options, drawn)
        asked = [row for row in sides["test"] if _answer(row)][: options.answers]
        self.prompts = [_before_answer(row) for row in asked]
        self.references = [_answer(row) for row in asked]
        training.dataset_text_field = options.text_column
        rows = dict(sides)
        if "messages" in sides["train"].column_names and not self._template_marks_answers(training):
            rows = {side: self._marked(part) for side, part in sides.items()}
        with refusing("", RuntimeError, TypeError, KeyError):
            self.trainer = LanguageModelTrainer(
                model,
                training,
                train_dataset=rows["train"],
                eval_dataset={side: rows[side] for side in ("validation", "test") if len(rows[side])},
                processing_class=self.tokenizer,
            )
        self.test_rows = self.trainer.eval_dataset["test"]
        self.trainer.eval_dataset = self.trainer.eval_dataset.get("validation")
        self.trainer.set_options(options)
        lengths = [len(ids) for ids in self.test_rows["input_ids"]]
        cut = sum(length == training.max_length for length in lengths)
        self.about = f"{len(self.trainer.train_dataset):,} rows to train on" + (" (packs)" if training.packing else "")
        self.about += f"; {cut:,} test texts have --max_length tokens or more, and are cut" if cut else ""

    def _template_marks_answers(self, training: SFTConfig) -> bool:
        """Returns whether TRL knows which tokens of a chat are answers; it then masks the others.

        It knows templates with ``{% generation %}``, and some others by their exact text.
        """
        try:
            training.assistant_only_loss = training.chat_template_path is not None or bool(
                get_training_chat_template(self.tokenizer)
            )
        except ValueError:
            return False
        return True

    def _marked(self, rows: Dataset) -> Dataset:
        """Tokenises chats; labels are the tokens that follow each prompt's.

        CommandError: the tokens of a prompt are not the beginning of the whole, so answers cannot be told.
        """

        def encode(row: dict[str, Any], at: int) -> dict[str, list[int]]:
            with refusing(f"row {at + 1}: the chat template", TypeError, KeyError, AttributeError):
                ids = self._chat(row["messages"])
                labels = [IGNORED] * len(ids)
                for number, message in enumerate(row["messages"]):
                    if message["role"] == "assistant":
                        start = self._chat(row["messages"][:number], add_generation_prompt=True)
                        end = self._chat(row["messages"][: number + 1])
                        if ids[: len(start)] != start or ids[: len(end)] != end:
                            raise CommandError(
                                f"row {at + 1}: the chat template does not tell the tokens of message {number + 1}; "
                                "--chat_template_path names a template with {% generation %} around the answers"
                            )
                        labels[len(start) : len(end)] = ids[len(start) : len(end)]
            return {"input_ids": ids, "labels": labels}

        return rows.map(encode, with_indices=True, remove_columns=rows.column_names) if len(rows) else rows

    def _chat(self, messages: list[dict[str, str]], **options: Any) -> list[int]:
        return self.tokenizer.apply_chat_template(messages, return_dict=False, **options)

    def before(self) -> dict[str, Any]:
        """Returns the entries of metrics.json on the time before training: every method begins as the bare model."""
        self.answers_before = self._generate()
        return {"before": self._scores(self.answers_before)}

    def after(self) -> tuple[dict[str, Any], Any]:
        """Returns the entries of metrics.json on the trained model, and the answers."""
        answers = self._generate()
        predictions = [
            dict(zip(("prompt", "reference", "before", "after"), one, strict=True))
            for one in zip(map(_last, self.prompts), self.references, self.answers_before, answers, strict=True)
        ]
        return {"test": self._scores(answers), "samples": predictions[:_SAMPLES]}, predictions

    def scores(self) -> dict[str, float]:
        """Returns the scores of the model as it is now that need no answers."""
        return {"perplexity": self.perplexity()}

    def _scores(self, answers: list[str]) -> dict[str, float]:
        return {**self.scores(), **(answer_scores(answers, self.references) if answers else {})}

    @torch.no_grad()
    def perplexity(self) -> float:
        """Returns exp of the mean loss over all counted tokens of the test texts; Trainer's is a mean over batches."""
        model, device = self.trainer.model.eval(), self.trainer.args.device
        sums = torch.zeros(2, dtype=torch.float64, device=device)
        for batch in self.trainer.get_eval_dataloader(self.test_rows):
            labels = batch.pop("labels").to(device)[:, 1:]
            inputs = {name: value.to(device) for name, value in batch.items() if isinstance(value, torch.Tensor)}
            with self.trainer.accelerator.autocast():
                logits = model(**inputs, use_cache=False).logits[:, :-1]
            counted = labels != IGNORED  # only these rows become float32
            loss = F.cross_entropy(logits[counted].float(), labels[counted], reduction="sum")
            sums += torch.stack([loss.double(), counted.sum().double()])
        total, tokens = self.trainer.accelerator.reduce(sums).tolist()
        return math.exp(min(total / tokens, 700.0))

    def _generate(self) -> list[str]:
        """Answers the test prompts greedily, in batches of similar length; processes share them."""
        answer = pipeline("text-generation", model=self.trainer.model.eval(), tokenizer=self.tokenizer)
        how = {"do_sample": False, "max_new_tokens": self.options.max_new_tokens, "return_full_text": False}
        how["eos_token_id"] = sorted(self._ends())
        order = sorted(range(len(self.prompts)), key=lambda at: len(str(self.prompts[at])))
        found: list[tuple[int, str]] = []
        with PartialState().split_between_processes(order) as part:
            outs = answer([self.prompts[at] for at in part], batch_size=_AT_ONCE, **how) if part else []
            for at, (out,) in zip(part, outs, strict=True):
                found.append((at, out["generated_text"].strip()))
        everything = dict(gather_object(found))
        return [everything[at] for at in range(len(self.prompts))]

    def _ends(self) -> set[int]:
        """Returns the tokens that end an answer: the model's, the tokenizer's, and the last special one of a label."""
        known = self.trainer.model.generation_config.eos_token_id
        ends = {self.tokenizer.eos_token_id, *(known if isinstance(known, list) else [known])} - {None}
        special = {*self.tokenizer.all_special_ids}
        return ends | {*[label for label in self.test_rows[0]["labels"][-8:] if label in special][-1:]}

    def write_predictions(self, path: Path, predictions: list[dict[str, str]]) -> None:
        """Writes one JSON object per answered prompt."""
        write_text(path, "".join(json.dumps(one, ensure_ascii=False) + "\n" for one in predictions))

    @staticmethod
    def figures(metrics: dict[str, Any]) -> list[tuple[str, str]]:
        """Returns name and text of the scores before and after, and two answers, for the terminal."""
        before, after = metrics["before"], metrics["test"]
        rows = [("test perplexity", f"{before['perplexity']:.2f} -> {after['perplexity']:.2f}")]
        if "rouge_l" in after:
            names = {"exact_match": "exact match", "rouge_1": "ROUGE-1", "rouge_2": "ROUGE-2", "rouge_l": "ROUGE-L"}
            rows += [(name, f"{before[key]:.1%} -> {after[key]:.1%}") for key, name in names.items()]
        for sample in metrics["samples"][:2]:
            rows += [(name, " ".join(sample[name].split())[:100]) for name in ("prompt", "before", "after")]
        return rows


def load_decoder(options: LanguageModelOptions) -> tuple[Any, PreTrainedModel, set[str]]:
    """Returns the tokenizer, the bare decoder, and the parameters that the checkpoint lacks.

    Of a GGUF file Transformers dequantises the weights.
    """
    source: dict[str, Any] = {"pretrained_model_name_or_path": options.model}
    path, more = Path(options.model), {}
    if path.suffix == ".gguf":
        check_installed("gguf", "gguf")
        if options.quantize != "none":
            raise CommandError(f"--quantize {options.quantize}: {path} is a GGUF file; save it as a directory first")
        source = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
        if hasattr(transformers, "GgufConfig"):  # earlier releases always dequantise
            more = {"quantization_config": transformers.GgufConfig(dequantize=True)}
    with refusing(f"--model {options.model}", KeyError):
        tokenizer = AutoTokenizer.from_pretrained(**source)
    model, drawn = load_model(AutoModelForCausalLM, options, source, **more)
    if model.config.is_encoder_decoder or not model.can_generate():
        raise CommandError(f"--model {options.model}: {type(model).__name__} is no decoder")
    return tokenizer, model, drawn


def _answer(row: dict[str, Any]) -> str | None:
    """Returns the last turn if it is an answer; None for a plain text, or a chat that ends with a question."""
    if "messages" in row:
        return row["messages"][-1]["content"] if row["messages"][-1]["role"] == "assistant" else None
    return None if row.get("completion") is None else _last(row["completion"])


def _last(turns: Any) -> str:
    return turns if isinstance(turns, str) else turns[-1]["content"]


def answer_scores(answers: list[str], expected: list[str]) -> dict[str, float]:
    """Returns the means of exact match, ignoring white space at the ends, and of ROUGE's F-measures, all in [0, 1].

    ROUGE is rouge-score's, with stemming; its tokens are the letters a-z and digits, so texts in other scripts score 0.
    """
    scorer = RougeScorer(list(ROUGE), use_stemmer=True)
    scores = [scorer.score(want, got) for want, got in zip(expected, answers, strict=True)]
    equal = sum(want.strip() == got.strip() for want, got in zip(expected, answers, strict=True))
    means = {f"rouge_{name[-1].lower()}": sum(s[name].fmeasure for s in scores) / len(scores) for name in ROUGE}
    return {"exact_match": equal / len(answers), **means}
