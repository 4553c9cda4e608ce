"""Tests the whole task on tiny decoders: results, files, resumption bit for bit, and PEFT's losses."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM, get_peft_model
from peft import LoraConfig as PeftConfig
from safetensors.torch import load_file
from support import tiny_decoder, tiny_gguf
from support.command_lines import silent
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

from lora_ext import cli, load_adapter
from lora_ext.adapters import trainable_parameter_counts
from lora_ext.tasks import TaskError
from lora_ext.tasks.causal_lm.conversations import read_conversations
from lora_ext.tasks.causal_lm.evaluating import answer_scores
from lora_ext.tasks.causal_lm.packing import Collator, pack
from lora_ext.tasks.causal_lm.rendering import Renderer
from lora_ext.tasks.causal_lm.run import finetune
from lora_ext.tasks.causal_lm.settings import CausalSettings, command_line
from lora_ext.tasks.finetune.settings import Settings
from lora_ext.tasks.finetune.trainer import Interrupted

pytestmark = [pytest.mark.cpu_only("the Trainer chooses the device"), pytest.mark.full]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tiny")
    tiny_decoder.save(directory / "llama")
    tiny_decoder.save(directory / "gemma3", tiny_decoder.gemma3(), tiny_decoder.MARKED)
    tiny_decoder.save(directory / "mixtral", tiny_decoder.mixtral())
    pairs = tiny_decoder.questions(80)
    for name in ("chats", "completions", "texts"):
        tiny_decoder.save_rows(directory / f"{name}.jsonl", getattr(tiny_decoder, name)(pairs))
    return directory


@pytest.fixture(scope="module")
def settings(files: Path) -> CausalSettings:
    return CausalSettings(
        model=str(files / "llama"),
        data=str(files / "chats.jsonl"),
        r=4,
        lora_dropout=0.1,
        packing=True,
        epochs=12,
        batch_size=4,
        learning_rate=2e-2,
        max_length=128,
        validation_split=0.2,
        answers=6,
        max_new_tokens=8,
    )


@pytest.fixture(scope="module")
def run(settings: CausalSettings, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, dict, list[str]]]:
    out, said = tmp_path_factory.mktemp("run"), []
    metrics = finetune(settings, out, say=said.append)
    return out, metrics, said


def test_a_run_learns_and_says_so(run):
    out, metrics, said = run
    assert json.loads((out / "metrics.json").read_text()) == metrics
    before, after = metrics["before"], metrics["after"]
    assert after["perplexity"] < 0.2 * before["perplexity"] and after["rougeL"] > before["rougeL"] + 0.3
    assert before["exact_match"] == 0 and before["cut"] == 6 and after["cut"] == 0 and after["answers"] == 6
    assert metrics["validation"]["perplexity"] < 0.2 * before["perplexity"]
    assert metrics["rows"] < metrics["examples"]["train"] == 56 and metrics["examples"]["test"] == 8
    assert metrics["merged"]["perplexity"] == pytest.approx(after["perplexity"], rel=1e-3)
    rows = [json.loads(line) for line in (out / "predictions.jsonl").read_text().splitlines()]
    assert len(rows) == 6 and rows[:5] == metrics["samples"]
    assert answer_scores([row["after"] for row in rows], [row["expected"] for row in rows]) == {
        name: after[name] for name in ("exact_match", "rouge1", "rouge2", "rougeL")
    }
    text = "\n".join(said)
    for part in ("  before    ", f"after     {rows[0]['after']}", "test perplexity", "exact match"):
        assert part in text


def test_scores_are_rouge_scores():
    found = answer_scores(["the cat sat", " Paris\n", ""], ["the cat lay down", "Paris", "something"])
    assert found["exact_match"] == pytest.approx(1 / 3)
    assert found["rouge1"] == pytest.approx((2 * 2 / 7 + 1 + 0) / 3)
    assert found["rouge2"] == pytest.approx((2 * 1 / 5 + 0 + 0) / 3)


def test_the_adapter_is_peft_s(run, files: Path):
    out = run[0]
    model = AutoPeftModelForCausalLM.from_pretrained(out / "adapter").eval()
    tokenizer = AutoTokenizer.from_pretrained(files / "llama")
    by = Renderer(tokenizer, "llama")
    row = next(json.loads(line) for line in (out / "predictions.jsonl").read_text().splitlines())
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": row["prompt"]}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    new = model.generate(**prompt, max_new_tokens=8, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert by.tokenizer.decode(new).startswith(row["after"] + "<|im_end|>")


FORMATS = {
    "accumulated in 16 bits": {
        "accumulation_steps": 2,
        "gradient_checkpointing": "reentrant",
        "dtype": "bfloat16",
        "set": "weight_decay=0.01",
    },
    "completions": {"packing": False},
    "texts": {"answers": 2},
    "average in bfloat16": {"ema_decay": 0.9, "precision": "bfloat16", "schedule": "constant"},
    "marked gemma3": {"model": "gemma3"},
    "full": {"method": "full", "learning_rate": 5e-3},
    "adapter-h": {"method": "adapter-h", "learning_rate": 5e-3},
}


def changed(settings: CausalSettings, files: Path, name: str, changes: dict[str, Any]) -> CausalSettings:
    if (files / f"{name}.jsonl").exists():
        changes = {**changes, "data": str(files / f"{name}.jsonl")}
    if "model" in changes:
        changes = {**changes, "model": str(files / changes["model"])}
    if "method" in changes:
        changes |= {"r": 8, "lora_dropout": CausalSettings.lora_dropout}
    return replace(settings, **changes)


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_and_method_learns(settings: CausalSettings, files: Path, tmp_path: Path, name: str):
    changes = {"epochs": 6, **FORMATS[name]}
    metrics = finetune(changed(settings, files, name, changes), tmp_path / "out", measure=False, say=silent)
    assert metrics["after"]["perplexity"] < 0.5 * metrics["before"]["perplexity"]
    assert ("exact_match" in metrics["after"]) == (name != "texts")
    assert len((tmp_path / "out" / "predictions.jsonl").read_text().splitlines()) == metrics["settings"]["answers"]
    if name == "full":
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "model")
        assert model.config.use_cache


def result_of(out: Path) -> dict[str, Any]:
    """Reads the results that must not depend on how often a run was stopped."""
    metrics = json.loads((out / "metrics.json").read_text())
    last = max(out.glob("checkpoints/*"), key=lambda path: int(path.name.rpartition("-")[2]))
    history = json.loads((last / "trainer_state.json").read_text())["log_history"]
    weights = [*out.glob("adapter/*.safetensors"), *out.glob("model/*.safetensors")]
    return {
        "weights": {path.name: {n: v.tolist() for n, v in load_file(path).items()} for path in weights},
        "metrics": {name: metrics[name] for name in ("before", "validation", "after", "trained_tokens", "samples")},
        "history": history,
        "predictions": (out / "predictions.jsonl").read_bytes(),
        "last": last.name,
    }


RESUMED = {
    "accumulated": {"accumulation_steps": 2, "gradient_checkpointing": "non-reentrant", "packing": False},
    "packed chats": {},
    "completions": {"packing": False, "epochs": 1.5},
    "average in bfloat16": {"ema_decay": 0.9, "precision": "bfloat16"},
    "full": {"method": "full", "learning_rate": 5e-3},
    "full mixtral": {"method": "full", "learning_rate": 5e-3, "model": "mixtral"},
}


@pytest.mark.parametrize("name", RESUMED)
def test_killed_after_any_checkpoint_and_resumed(
    settings: CausalSettings, files: Path, every_step: None, tmp_path: Path, name: str
):
    settings = changed(settings, files, name, {"epochs": 2, **RESUMED[name]})
    whole = tmp_path / "whole"
    finetune(settings, whole, measure=False, say=silent)
    expected = result_of(whole)
    steps = sorted(int(path.name.rpartition("-")[2]) for path in whole.glob("checkpoints/*"))
    assert steps == list(range(1, len(steps) + 1)) and len(steps) > 3
    for step in {2, steps[-1]} if RESUMED[name] else {0, 2, steps[-1] - 1, steps[-1]}:
        out = tmp_path / str(step)
        shutil.copytree(whole, out, ignore=shutil.ignore_patterns("adapter", "model", "metrics.json", "*.jsonl"))
        if step == 0:
            (out / "before.json").unlink()  # killed while the bare model was evaluated
        for later in steps[step:]:
            shutil.rmtree(out / "checkpoints" / f"checkpoint-{later}")
        finetune(settings, out, measure=False, say=silent, resume=True)
        assert result_of(out) == expected, f"after {step}"


def test_interrupted_and_resumed(settings: CausalSettings, files: Path, tmp_path: Path):
    """Ctrl-C writes a checkpoint; the bare model is not measured again."""
    settings = changed(settings, files, "texts", {"epochs": 3, "answers": 2})
    whole, out = tmp_path / "whole", tmp_path / "out"
    finetune(settings, whole, measure=False, say=silent)
    stops = [0.5]

    def interrupt(part: float) -> None:
        if stops and part >= stops[0]:
            stops.clear()
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(Interrupted):
        finetune(settings, out, measure=False, say=silent, on_progress=interrupt)
    assert not (out / "metrics.json").exists() and len([*out.glob("checkpoints/*")]) == 1
    written = (out / "before.json").stat().st_mtime_ns
    finetune(settings, out, measure=False, say=silent, resume=True)
    assert result_of(out) == result_of(whole) and (out / "before.json").stat().st_mtime_ns == written


def test_a_resumed_run_reads_the_same_texts(run, settings: CausalSettings, files: Path, tmp_path: Path):
    out = tmp_path / "out"
    shutil.copytree(run[0], out)
    with pytest.raises(TaskError, match="--resume: the texts are not those"):
        finetune(replace(settings, data=str(files / "completions.jsonl")), out, resume=True, say=silent)
    (out / "before.json").write_text("{}")
    with pytest.raises(TaskError, match="before.json is damaged; delete it"):
        finetune(settings, out, resume=True, say=silent)


def test_a_gguf_model_is_adapted(settings: CausalSettings, tmp_path: Path):
    model = tiny_decoder.llama(intermediate_size=64)
    path = tiny_gguf.save(tmp_path / "tiny.gguf", model, tiny_decoder.tokenizer())
    metrics = finetune(replace(settings, model=str(path), epochs=6), tmp_path / "out", say=silent)
    assert metrics["after"]["perplexity"] < 0.3 * metrics["before"]["perplexity"]
    config = json.loads((tmp_path / "out" / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(path)


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_losses_are_peft_s(files: Path, tmp_path: Path, name: str):
    """The same data, order, factors and optimizer, no dropout: packed on our side, one by one on PEFT's."""
    tokenizer = AutoTokenizer.from_pretrained(files / name)
    by = Renderer(tokenizer, name)
    rows = [by.row(example) for example in read_conversations(files / "chats.jsonl")]
    theirs = AutoModelForCausalLM.from_pretrained(files / name)
    theirs = get_peft_model(theirs, PeftConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM"))
    theirs.save_pretrained(tmp_path)
    ours = load_adapter(AutoModelForCausalLM.from_pretrained(files / name), tmp_path, trainable=True)
    assert trainable_parameter_counts(ours)[0] == sum(p.numel() for p in theirs.parameters() if p.requires_grad)
    losses: dict[str, list[float]] = {"ours": [], "theirs": []}
    for who, model in (("ours", ours), ("theirs", theirs)):
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3)
        for at in range(0, 80, 8):
            batch = rows[at : at + 8]
            inputs = Collator(0)(pack(batch, 256) if who == "ours" else batch)
            loss = model(**inputs, use_cache=False).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses[who].append(float(loss.detach()))
    assert losses["ours"][-1] < losses["ours"][0] - 0.5
    assert max(abs(a - b) for a, b in zip(losses["ours"], losses["theirs"], strict=True)) < 2e-3


def test_methods_that_do_not_fit_are_named(settings: CausalSettings, tmp_path: Path):
    for method in ("prefix-embed", "prefix-layer", "head-only", "lora+prefix-embed"):
        bad = method.rpartition("+")[2]
        with pytest.raises(
            TaskError, match=f"--task causal-lm: --method {bad} is not for language models, want one of"
        ):
            CausalSettings(method=method)
    with pytest.raises(TaskError, match="--method bitfit: .*bias"):  # a Llama has none
        finetune(replace(settings, method="bitfit", r=8, lora_dropout=0.05), tmp_path / "out", say=silent)
    assert not (tmp_path / "out").exists()


BAD = {
    "max_length": ({"max_length": 4096}, "--max-length is 4096, but .*llama takes at most 256 tokens"),
    "long": ({"max_length": 16}, r"chats.jsonl, line \d+: \d+ tokens, above --max-length 16, and \d+ more lines"),
    "nothing left": ({"max_length": 16, "long_texts": "drop"}, "no text is left for training"),
    "no test": ({"test_split": 0.0}, "no text is left for testing; raise --test-split"),
    "template": ({"chat_template_file": "/nowhere"}, "--chat-template-file /nowhere: cannot be read"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused_before_anything_is_written(settings: CausalSettings, tmp_path: Path, name: str):
    changes, message = BAD[name]
    with pytest.raises(TaskError, match=message):
        finetune(replace(settings, **changes), tmp_path / "out", say=silent)
    assert not (tmp_path / "out").exists()


def test_a_template_without_chats_is_refused(settings: CausalSettings, tmp_path: Path):
    data = tiny_decoder.save_rows(tmp_path / "x.jsonl", tiny_decoder.completions(tiny_decoder.questions(30)))
    template = replace(settings, data=str(data), chat_template_file=str(tmp_path / "any"))
    with pytest.raises(TaskError, match="--chat-template-file goes with messages, and .*x.jsonl has none"):
        finetune(template, tmp_path / "out", say=silent)
    assert not (tmp_path / "out").exists()


def test_bad_settings_are_named():
    for changes, message in (
        ({"long_texts": "cut"}, "--long-texts is 'cut', want one of refuse, drop, truncate"),
        ({"answers": -1}, "--answers is -1"),
        ({"max_new_tokens": 0}, "--max-new-tokens is 0"),
        ({"label_column": "l"}, "--label-column goes with classification"),
        ({"task": "other"}, "--task is 'other'"),
    ):
        with pytest.raises(TaskError, match=message):
            CausalSettings(**changes)


def test_accumulated_batches_count_by_their_tokens(settings: CausalSettings, files: Path, tmp_path: Path):
    """Texts of unlike lengths: a step of four batches is that of one batch with all their texts."""
    rows = [{"text": "What is the colour of the sea? " * (1 + index % 3 * 3)} for index in range(8)]
    rows = [{"text": f"{index} {row['text']}"} for index, row in enumerate(rows)]
    data = str(tiny_decoder.save_rows(tmp_path / "texts.jsonl", rows))
    changes = {"data": data, "packing": False, "lora_dropout": 0.0, "epochs": 1, "answers": 0, "max_length": 256}
    settings = replace(settings, **changes, validation_split=0.0, test_split=0.1)
    losses = {}
    for size, steps in ((8, 1), (2, 4)):
        out = tmp_path / str(size)
        finetune(replace(settings, batch_size=size, accumulation_steps=steps), out, measure=False, say=silent)
        (last,) = out.glob("checkpoints/*")
        losses[size] = [entry["loss"] for entry in json.loads((last / "trainer_state.json").read_text())["log_history"]]
    assert losses[2] == pytest.approx(losses[8], rel=1e-5)


def test_answers_end_where_the_model_does(settings: CausalSettings, files: Path, tmp_path: Path):
    """GPT-2 has a table of positions; reading behind its end would fail."""
    config = GPT2Config(vocab_size=320, n_positions=64, n_embd=32, n_layer=1, n_head=2, eos_token_id=1, bos_token_id=1)
    tiny_decoder.save(tmp_path / "gpt2", GPT2LMHeadModel(config))
    changes = {"model": str(tmp_path / "gpt2"), "max_length": 64, "max_new_tokens": 500, "epochs": 1}
    metrics = finetune(replace(settings, **changes), tmp_path / "out", measure=False, say=silent)
    assert metrics["before"]["cut"] == 6 and metrics["settings"]["packing"]


def test_the_default_length_is_at_most_the_models(settings: CausalSettings, tmp_path: Path):
    said: list[str] = []
    lengths = replace(settings, max_length=CausalSettings.max_length, epochs=1, answers=0)
    metrics = finetune(lengths, tmp_path / "out", measure=False, say=said.append)
    assert metrics["settings"]["max_length"] == tiny_decoder.LENGTH < CausalSettings.max_length
    assert any(line.startswith(f"--max-length is {tiny_decoder.LENGTH}: ") for line in said)
    assert CausalSettings.load(tmp_path / "out").max_length == tiny_decoder.LENGTH


def test_the_command_line(files: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    out, held = tmp_path / "out", tmp_path / "held.jsonl"
    lines = (files / "chats.jsonl").read_text().splitlines(keepends=True)
    held.write_text("".join(lines[:10]))
    arguments = [
        "finetune",
        "--task",
        "causal-lm",
        "--model",
        str(files / "llama"),
        "--data",
        str(files / "chats.jsonl"),
    ]
    arguments += ["--test-file", str(held), "--packing", "--max-length", "128", "--epochs", "1", "--no-measure"]
    arguments += ["--answers", "2", "--max-new-tokens", "4", "--threads", "2", "--out", str(out)]
    assert cli.main(arguments) == 0
    shown = capsys.readouterr().out
    assert "10 prompts are left out, because" in shown and "10 for test" in shown and "test perplexity" in shown
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["task"] == "causal-lm" and metrics["settings"]["packing"] is True
    assert metrics["command"][:5] == ["lora-ext", "finetune", "--task", "causal-lm", "--model"]
    assert "--packing" in metrics["command"] and "True" not in metrics["command"]
    (out / "metrics.json").unlink()
    assert cli.main(["finetune", "--resume", "--no-measure", "--out", str(out)]) == 0
    again = json.loads((out / "metrics.json").read_text())
    assert again["after"] == metrics["after"]
    capsys.readouterr()
    assert cli.main(["finetune", "--resume", "--max-length", "64", "--out", str(out)]) == 2
    assert "was started with --max-length 128, now 64" in capsys.readouterr().err
    assert cli.main(["finetune", "--resume", "--task", "classification", "--out", str(out)]) == 2
    assert "was started with --task causal-lm, now classification" in capsys.readouterr().err
    assert cli.main(["finetune", "--packing", "--out", str(tmp_path / "other")]) == 2
    assert "--packing goes with --task causal-lm" in capsys.readouterr().err


def test_the_command_repeats_a_run(settings: CausalSettings, tmp_path: Path):
    assert command_line(CausalSettings(), tmp_path) == [
        "lora-ext",
        "finetune",
        "--task",
        "causal-lm",
        "--out",
        str(tmp_path),
    ]
    assert Settings.max_length != CausalSettings.max_length
    assert "--max-length" in command_line(settings, tmp_path)
