"""``lora-ext finetune --task causal-lm``: trains a decoder; reports perplexity, answers and costs."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, set_seed

from lora_ext.adapters import trainable_parameter_counts
from lora_ext.files import read_json_object
from lora_ext.tasks import TaskError
from lora_ext.tasks.causal_lm import demo, results
from lora_ext.tasks.causal_lm.causal_data import load_conversations
from lora_ext.tasks.causal_lm.decoder import Decoder, check_packing, load_decoder
from lora_ext.tasks.causal_lm.evaluating import answer_scores, answered, batches_of, generated, perplexity
from lora_ext.tasks.causal_lm.packing import Collator, pack
from lora_ext.tasks.causal_lm.rendering import Encoded, Renderer, encode, read_template, use_template
from lora_ext.tasks.causal_lm.settings import TASK, CausalSettings, command_line
from lora_ext.tasks.causal_lm.trainer import CausalTrainer, build_causal_trainer
from lora_ext.tasks.finetune.data import DATA_FILE, Splits, fingerprint, resumed_fingerprint, save_fingerprint
from lora_ext.tasks.finetune.quantize import quantization_of
from lora_ext.tasks.finetune.results import plot_loss
from lora_ext.tasks.finetune.run_checkpoints import last_checkpoint, tidy
from lora_ext.tasks.finetune.selection import best_of, check_has_validation, kept_validation
from lora_ext.tasks.finetune.settings import SETTINGS_FILE
from lora_ext.tasks.finetune.task_model import adapt, check_tokens, merged_with, sharing
from lora_ext.tasks.finetune.trained_files import save_trained
from lora_ext.tasks.finetune.trainer import forward_of, train
from lora_ext.tasks.finetune.training_arguments import check_training_arguments
from lora_ext.tasks.shared import measuring, provenance, team
from lora_ext.tasks.shared.run_directory import alone_in_out, check_out, prepare_out, shown_files
from lora_ext.tasks.shared.whole_files import write_json

BEFORE_FILE = "before.json"  # scores of the bare model, so that a resumed run need not measure them again

_OUTPUTS = ("checkpoints", "adapter", "model", "metrics.json", "loss_curve.png", "predictions.jsonl", BEFORE_FILE)
_OUTPUTS += (DATA_FILE, SETTINGS_FILE)  # the last: it marks the other files as a run's


@alone_in_out
def finetune(
    settings: CausalSettings,
    out: Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    measure: bool = True,
    say: Callable[[str], None] = print,
    on_progress: Callable[[float], None] | None = None,
) -> dict[str, Any]:
    """Runs the whole task and leaves adapter/, metrics.json, loss_curve.png and predictions.jsonl in ``out``.

    The arguments, the errors and the guarantees are those of :func:`lora_ext.tasks.finetune.run.finetune`.

    Returns:
        The content of metrics.json.
    """
    inputs = [getattr(settings, name) for name in settings.INPUTS]
    marks = {"marker": SETTINGS_FILE, "key": "method", "what": "a fine-tuning run"}
    check_out(out, resume, overwrite, **marks, outputs=_OUTPUTS, inputs=inputs)
    checkpoint = last_checkpoint(out) if resume else None
    splits = load_conversations(settings, say)
    template = () if settings.chat_template_file is None else (read_template(settings.chat_template_file),)
    texts = resumed_fingerprint(splits, out, *template) if resume else fingerprint(splits, *template)
    check_training_arguments(settings, len(splits.train))
    check_has_validation(settings, len(splits.validation))
    if resume and checkpoint is None:
        say(f"{out} has no checkpoint yet: the run starts from the beginning")
    path = model_path_of(settings.model, say)
    say(f"loading {path} ...")
    set_seed(settings.seed)
    decoder = load_decoder(path, getattr(torch, settings.dtype), quantization_of(settings))
    model, tokenizer = decoder.model, decoder.tokenizer
    if settings.chat_template_file is not None:
        use_template(tokenizer, settings.chat_template_file)
    settings = _within(decoder, settings, say)
    renderer = Renderer(tokenizer, path)
    say("tokenising ...")
    encoded = _encoded(splits, renderer, settings, say)
    check_tokens(model, (row for side in encoded.values() for row in side.rows), path)
    if settings.packing:
        check_packing(model)
    if torch.cuda.is_available():
        model.to("cuda")  # here, because the bare model is evaluated before the Trainer moves it
    most = decoder.most_tokens  # of the bare model
    full_bytes = measuring.tensor_bytes(model)
    base = sharing(model) if settings.method != "full" else None
    collator = Collator(tokenizer.pad_token_id)
    kept_cache = model.config.use_cache

    adapt(model, settings, path)  # refuses a method that does not fit, before anything is written
    trainable, total = trainable_parameter_counts(model)

    def save(out: Path) -> None:
        settings.save(out, threads=torch.get_num_threads())
        save_fingerprint(out, texts)
        tidy(out / "checkpoints")

    prepare_out(out, _OUTPUTS, resume, save)
    test = encoded["test"]
    chosen = answered(splits.test, test, settings.answers)
    before = _saved_before(out) if resume else None
    if before is None:
        say(f"evaluating the {len(test.rows):,} test texts before training ...")
        # A method begins as the bare model, but full fine-tuning has no other model to ask.
        bare = model if base is None else base.to(model.device)
        before = _evaluate(bare, test, chosen, renderer, settings, collator, model.device, most)
        write_json(out / BEFORE_FILE, before)

    rows = encoded["train"].rows
    packed = pack(rows, settings.max_length) if settings.packing else rows
    trainer = build_causal_trainer(model, settings, out, packed, encoded["validation"].rows, collator)
    tokens = f"{encoded['train'].trained_tokens:,} of {sum(len(row['input_ids']) for row in rows):,} tokens"
    inside = f" in {len(packed):,} packs" if settings.packing else ""
    say(f"training {trainable:,} of {total:,} parameters on {tokens} of {len(rows):,} texts{inside} ...")
    progress = train(trainer, checkpoint, on_progress)
    peak_memory = measuring.peak_memory_bytes(model.device)
    model.config.use_cache = kept_cache
    say(f"evaluating the {len(test.rows):,} test texts ...")
    after = _evaluate(model, test, chosen, renderer, settings, collator, model.device, most)

    metrics: dict[str, Any] = {
        **provenance.made_by(command_line(settings, out)),
        "task": TASK,
        "machine": provenance.machine(),
        "settings": asdict(settings),
        "examples": {name: len(side.rows) for name, side in encoded.items()},
        "trained_tokens": encoded["train"].trained_tokens,
        "rows": len(packed),
        "data_sha256": texts,
        "trainable_parameters": trainable,
        "total_parameters": total,
        "full_checkpoint_bytes": full_bytes,
        "before": before["scores"],
        "validation": kept_validation(trainer.state, ("loss", "perplexity")),
        **best_of(trainer, settings.best_metric),
        "after": after["scores"],
        "processes": team.processes(),
        "train_seconds": progress.seconds,
        "tokens_per_second": progress.tokens / progress.seconds if progress.seconds else 0.0,
        "peak_memory_bytes": peak_memory,
    }
    predictions = results.predictions(chosen, before["answers"], after["answers"])
    metrics["samples"] = predictions[: results.SAMPLES]
    metrics |= save_trained(model, tokenizer, settings.method, out)
    results.write_predictions(out / "predictions.jsonl", predictions)
    plot_loss(out / "loss_curve.png", trainer.state.log_history, f"{settings.method}, {len(rows):,} texts")
    write_json(out / "metrics.json", metrics)
    if measure and base is not None:
        say("measuring next to the base model ...")
        metrics |= _measure(base, out / "adapter", trainer, test, say)
        write_json(out / "metrics.json", metrics)
    say(results.sample_text(predictions))
    say(f"\n{results.table(metrics)}\n\nin {out}: {', '.join(shown_files(out))}")
    for line in demo.credits(settings.model, settings.data):
        say(line)
    return metrics


def model_path_of(model: str | None, say: Callable[[str], None] = print) -> str:
    """Returns a local path as an absolute one, because the adapter's config names its base model by it."""
    if model is None:
        return str(demo.model_path(say))
    return str(Path(model).resolve()) if Path(model).exists() else model


def _within(decoder: Decoder, settings: CausalSettings, say: Callable[[str], None]) -> CausalSettings:
    """Lowers the default ``max_length`` to what the model takes; refuses another one above it."""
    most = decoder.most_tokens
    if most is None or settings.max_length <= most:
        return settings
    if settings.max_length != CausalSettings.max_length:
        raise TaskError(f"--max-length is {settings.max_length}, but {decoder.path} takes at most {most} tokens")
    say(f"--max-length is {most}: {decoder.path} takes no more tokens")
    return replace(settings, max_length=most)


def _encoded(
    splits: Splits, renderer: Renderer, settings: CausalSettings, say: Callable[[str], None]
) -> dict[str, Encoded]:
    data = settings.data or demo.DATA
    files = {"train": data, "validation": settings.validation_file or data, "test": settings.test_file or data}
    sides = {
        side: encode(examples, renderer, settings, files[side], say) for side, examples in splits._asdict().items()
    }
    for side in ("train", "test"):
        if not sides[side].rows:
            purpose = {"train": "training", "test": "testing"}[side]
            raise TaskError(
                f"{files[side]}: no text is left for {purpose}: all are longer than --max-length {settings.max_length}"
            )
    return sides


def _saved_before(out: Path) -> dict[str, Any] | None:
    path = out / BEFORE_FILE
    try:
        content = read_json_object(path, "--resume", 1_000_000_000)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise TaskError(f"{error}; delete the file to measure the model again") from error
    if content.keys() != {"scores", "answers"}:
        raise TaskError(f"--resume: {path} is damaged; delete it to measure the model again")
    return content


def _evaluate(
    model: PreTrainedModel,
    test: Encoded,
    chosen: list[Any],
    renderer: Renderer,
    settings: CausalSettings,
    collator: Collator,
    device: torch.device,
    most_tokens: int | None,
) -> dict[str, Any]:
    """Returns ``{"scores": {...}, "answers": [...]}`` of the test texts."""
    model.eval()
    forward = forward_of(model, settings)
    scores = perplexity(forward, team.part_of(batches_of(test.rows, settings)), collator, device, is_part=True)
    answers = generated(model, chosen, renderer, settings.max_new_tokens, most_tokens) if chosen else []
    if answers and chosen[0].answer is not None:
        scores |= answer_scores([one["answer"] for one in answers], [example.answer for example in chosen])
        scores |= {"answers": len(answers), "cut": sum(one["cut"] for one in answers)}
    return {"scores": scores, "answers": answers}


_SECONDS = 5.0  # time spent on timing; at least three rounds


def _measure(
    base: PreTrainedModel, adapter: Path, trainer: CausalTrainer, test: Encoded, say: Callable[[str], None]
) -> dict[str, Any]:
    """Measures median seconds of a forward of the longest texts and, for LoRA, the merged model's perplexity.

    The models take turns, so that a busy machine slows them equally.
    """
    settings, device = trainer.settings, trainer.model.device
    models = {"base": base.to(device), "adapted": trainer.model}
    found: dict[str, Any] = {}
    if settings.method == "lora" and (plain := merged_with(base, adapter, say)) is not None:
        models["merged"] = plain
    forwards = {name: forward_of(model.eval(), settings) for name, model in models.items()}
    last = batches_of(test.rows, settings)[-1]
    batch = {name: tensor.to(device) for name, tensor in trainer.data_collator(last).items() if name != "labels"}
    if "merged" in models:
        with torch.inference_mode():
            # Without autocast, whose rounding is larger than the difference.
            merged, adapted = (models[name](**batch).logits.float() for name in ("merged", "adapted"))
        found["merged"] = {
            "max_logit_difference": float((merged - adapted).abs().max()),
            "perplexity": perplexity(
                forwards["merged"], batches_of(test.rows, settings), trainer.data_collator, device
            )["perplexity"],
        }
    seconds = measuring.latencies(forwards, batch, seconds=_SECONDS)
    return found | {"latency": {f"{name}_seconds": statistics.median(values) for name, values in seconds.items()}}
