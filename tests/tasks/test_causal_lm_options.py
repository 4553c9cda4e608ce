"""Tests ``--task causal-lm`` with the options that all tasks share: quantised weights, 16 bits, files for the sides."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support import tiny_decoder, tiny_gguf
from support.command_lines import silent

from lora_ext import cli
from lora_ext.tasks import TaskError
from lora_ext.tasks.causal_lm import run
from lora_ext.tasks.causal_lm.decoder import check_packing, load_decoder
from lora_ext.tasks.causal_lm.run import finetune
from lora_ext.tasks.causal_lm.settings import CausalSettings
from lora_ext.tasks.finetune.quantize import Quantization

pytestmark = [pytest.mark.cpu_only("the Trainer chooses the device"), pytest.mark.full]


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> CausalSettings:
    """64 features: bitsandbytes rounds narrower weights badly."""
    directory = tmp_path_factory.mktemp("tiny")
    model = tiny_decoder.llama(hidden_size=64, intermediate_size=128, num_hidden_layers=1, head_dim=32)
    tiny_decoder.save(directory / "llama", model)
    pairs = tiny_decoder.questions(100)
    sides = {"train": pairs[:60], "validation": pairs[55:80], "test": pairs[75:]}
    for name, side in sides.items():
        tiny_decoder.save_rows(directory / f"{name}.jsonl", tiny_decoder.chats(side))
    return CausalSettings(
        model=str(directory / "llama"),
        data=str(directory / "train.jsonl"),
        validation_file=str(directory / "validation.jsonl"),
        test_file=str(directory / "test.jsonl"),
        packing=True,
        epochs=4,
        batch_size=2,
        max_length=128,
        answers=0,
        learning_rate=1e-2,
    )


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_adapters_of_a_quantised_decoder_learn_and_load(settings: CausalSettings, tmp_path: Path, kind: str):
    metrics = finetune(replace(settings, quantize=kind), tmp_path / "out", say=silent)
    assert metrics["after"]["perplexity"] < 0.5 * metrics["before"]["perplexity"]
    plain = finetune(settings, tmp_path / "plain", say=silent)
    assert metrics["full_checkpoint_bytes"] < 0.8 * plain["full_checkpoint_bytes"]
    assert metrics["before"]["perplexity"] == pytest.approx(plain["before"]["perplexity"], rel=0.1)
    # Merged into dequantised weights: quantising the sum again would hide much of the update. int8 rounds inputs, too.
    close = pytest.approx(metrics["after"]["perplexity"], rel=1e-4 if kind == "nf4" else 2e-2)
    assert metrics["merged"]["perplexity"] == close
    adapter = load_file(tmp_path / "out" / "adapter" / "adapter_model.safetensors")
    assert adapter.keys() == load_file(tmp_path / "plain" / "adapter" / "adapter_model.safetensors").keys()


def test_outliers_of_a_token_do_not_look_like_reading_ahead(tmp_path: Path):
    """LLM.int8 computes the features in which any token is an outlier in 16 bits, for all tokens."""
    llama = tiny_decoder.llama(hidden_size=64, intermediate_size=128, head_dim=32)
    for name, parameter in llama.named_parameters():
        if "layernorm" in name:
            parameter.data[:8] *= 8  # some tokens have features above the threshold of 6, others do not
    tiny_decoder.save(tmp_path / "llama", llama)
    model = load_decoder(str(tmp_path / "llama"), quantization=Quantization("int8", torch.float32, ())).model
    check_packing(model)
    with torch.no_grad():
        first, second = (model(torch.tensor([[11, 18, 25, last]])).logits[0, :-1] for last in (32, 33))
    assert (first - second).abs().max() > 1e-3 * first.abs().max()


def test_evaluations_leave_the_weights_and_gradients_of_a_quantised_decoder(
    settings: CausalSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """On CPUs with AVX512-BF16 bitsandbytes packs 4-bit weights in an evaluation; they pass no gradient then."""
    two = replace(settings, model=str(tmp_path / "two"), quantize="nf4", epochs=0.2, answers=1, max_new_tokens=2)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 32}
    tiny_decoder.save(tmp_path / "two", tiny_decoder.llama(**sizes))
    found = []
    for name in ("packing", "never packing"):
        metrics = finetune(two, tmp_path / name, say=silent)
        scores = {key: value for key, value in metrics["after"].items() if key != "seconds"}
        found.append((scores, (tmp_path / name / "adapter" / "adapter_model.safetensors").read_bytes()))
        monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: False)
    assert found[0] == found[1]


def test_a_quantised_decoder_has_any_width(settings: CausalSettings, tmp_path: Path):
    """bitsandbytes' packed layout for CPUs with AVX512-BF16 takes rows of whole blocks, and 32 rows at a time."""
    tiny_decoder.save(tmp_path / "narrow", tiny_decoder.llama(num_hidden_layers=1, head_dim=8))
    narrow = replace(settings, model=str(tmp_path / "narrow"), quantize="nf4", epochs=0.2, answers=1, max_new_tokens=2)
    assert finetune(narrow, tmp_path / "out", say=silent)["after"]["perplexity"] > 1


def test_texts_are_on_one_side(settings: CausalSettings, tmp_path: Path):
    said: list[str] = []
    metrics = finetune(settings, tmp_path / "out", say=said.append)
    assert metrics["examples"] == {"train": 55, "validation": 20, "test": 25}
    assert sum("5 prompts are left out" in line for line in said) == 2


def test_a_large_batch_in_parts_and_layers_computed_again(settings: CausalSettings, tmp_path: Path):
    """The same numbers up to rounding, without dropout: four rows at once, or in parts and with checkpointing."""
    whole = replace(settings, batch_size=4, lora_dropout=0.0)
    parts = replace(whole, batch_size=2, accumulation_steps=2, gradient_checkpointing="non-reentrant")
    scores = [
        finetune(one, tmp_path / str(i), say=silent)["after"]["perplexity"] for i, one in enumerate([whole, parts])
    ]
    assert scores[0] == pytest.approx(scores[1], rel=2e-3)


def test_sixteen_bits_and_fields_of_the_trainer(
    settings: CausalSettings, tmp_path: Path, capsys: pytest.CaptureFixture
):
    config = tmp_path / "run.yaml"
    lines = [
        f"{name}: {getattr(settings, name)}"
        for name in ("model", "data", "test_file", "epochs", "answers", "max_length")
    ]
    config.write_text("\n".join(["task: causal-lm", "packing: true", *lines, "set:", "  weight_decay: 0.1"]))
    arguments = ["finetune", "--config", str(config), "--dtype", "bfloat16", "--out", str(tmp_path / "out")]
    assert cli.main([*arguments, "--no-measure"]) == 0, capsys.readouterr().err
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert metrics["settings"]["dtype"] == "bfloat16" and metrics["settings"]["set"] == "weight_decay=0.1"
    assert metrics["after"]["perplexity"] < metrics["before"]["perplexity"]


def test_a_resumed_run_has_the_same_chat_template(settings: CausalSettings, tmp_path: Path):
    template = tmp_path / "template.jinja"
    template.write_text(tiny_decoder.TEMPLATE)
    one = replace(settings, chat_template_file=str(template), epochs=0.1)
    metrics = finetune(one, tmp_path / "out", measure=False, say=silent)
    again = finetune(one, tmp_path / "out", measure=False, say=silent, resume=True)
    assert again["after"] == metrics["after"]
    template.write_text(tiny_decoder.MARKED)
    with pytest.raises(TaskError, match="--resume: the texts or the chat template are not those that the run"):
        finetune(one, tmp_path / "out", measure=False, say=silent, resume=True)


def test_an_output_that_shows_ascii_alone_gets_each_line_at_once(
    settings: CausalSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Answers of an untrained model hold any character."""
    data = tiny_decoder.save_rows(tmp_path / "\u00e9.jsonl", tiny_decoder.chats(tiny_decoder.questions(30)))
    log, before = tmp_path / "log", []
    with log.open("w", encoding="ascii") as file:
        monkeypatch.setattr(sys, "stdout", file)
        monkeypatch.setattr(run, "use_template", lambda *_: before.append(log.read_text()))
        command = ["finetune", "--task", "causal-lm", "--model", settings.model, "--data", str(data), "--answers", "2"]
        (tmp_path / "template").write_text(tiny_decoder.TEMPLATE)
        options = ["--epochs", "0.1", "--max-new-tokens", "9", "--chat-template-file", str(tmp_path / "template")]
        assert cli.main([*command, *options, "--no-measure", "--out", str(tmp_path / "out")]) == 0
    assert before[0].splitlines()[0].endswith("\\xe9.jsonl: 24 for train, 3 for validation, 3 for test")
    assert "perplexity" in log.read_text()


def test_a_field_of_the_trainer_is_checked_before_the_model_is_loaded(settings: CausalSettings, tmp_path: Path):
    with pytest.raises(TaskError, match="--set weigth_decay: .*no such field; close matches: 'weight_decay'"):
        finetune(replace(settings, model="/no/model", set="weigth_decay=0.1"), tmp_path / "out", say=silent)


def test_a_gguf_file_is_not_quantised_again(settings: CausalSettings, tmp_path: Path):
    path = tiny_gguf.save(tmp_path / "model.gguf", tiny_decoder.llama(intermediate_size=64), tiny_decoder.tokenizer())
    with pytest.raises(TaskError, match="--quantize nf4 goes with a directory or an id, and --model .* is a GGUF file"):
        finetune(replace(settings, model=str(path), quantize="nf4"), tmp_path / "out", say=silent)
    assert not (tmp_path / "out").exists()
