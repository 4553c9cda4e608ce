"""``lora-ext finetune --task causal-lm`` with TRL's SFTTrainer, on a tiny Llama."""

from __future__ import annotations

import json
import math
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file
from support import tiny_decoder, tiny_gguf
from support.command_lines import Command, metrics_of, mistake
from transformers import AutoModelForCausalLM, AutoTokenizer

from lora_ext.commands import trainer
from lora_ext.commands.language_model import answer_scores

pytestmark = [pytest.mark.cpu_only("the Trainer chooses the device"), pytest.mark.full]


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("decoder")
    tiny_decoder.llama().save_pretrained(path)
    tiny_decoder.tokenizer().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def options(decoder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Options of a decoder that learns 150 chats in seconds."""
    data = tmp_path_factory.mktemp("chats") / "chats.jsonl"
    tiny_decoder.save_rows(data, tiny_decoder.chats(tiny_decoder.questions(150)))
    words = ["--task", "causal-lm", "--model", decoder, "--data", data, "--max_length", "128", "--answers", "8"]
    words += ["--max_new_tokens", "8", "--learning_rate", "2e-2", "--num_train_epochs", "3"]
    return list(map(str, words))


def test_a_run_learns_the_answers_and_peft_loads_it(
    command: Command, options: list[str], decoder: Path, tmp_path: Path
):
    out = tmp_path / "run"
    status, said, messages = command("finetune", *options, "--output_dir", out)
    assert status == 0, messages
    metrics = metrics_of(out)
    assert metrics["test"]["perplexity"] < 0.2 * metrics["before"]["perplexity"]
    assert metrics["test"]["rouge_l"] > metrics["before"]["rouge_l"]
    assert "test perplexity" in said and "What is the colour" in said
    rows = [json.loads(line) for line in (out / "predictions.jsonl").read_text().splitlines()]
    assert len(rows) == 8 and {row["reference"] for row in rows} <= set(tiny_decoder.COLOURS)
    model = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(decoder), out / "adapter").eval()
    tokenizer = AutoTokenizer.from_pretrained(decoder)
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": rows[0]["prompt"]}], add_generation_prompt=True, return_tensors="pt"
    )["input_ids"]
    answer = model.generate(input_ids=ids, max_new_tokens=8, do_sample=False, pad_token_id=0)
    text = tokenizer.decode(answer[0, ids.shape[1] :], skip_special_tokens=True)
    assert text.strip().startswith(rows[0]["after"])


def test_perplexity_counts_the_tokens_of_answers(command: Command, options: list[str], decoder: Path, tmp_path: Path):
    chats = tiny_decoder.chats(tiny_decoder.questions(6, seed=3))
    test = tiny_decoder.save_rows(tmp_path / "test.jsonl", chats)
    out = tmp_path / "run"
    words = ["--test_file", test, "--max_steps", "1", "--answers", "0", "--output_dir", out]
    assert command("finetune", *options, *words)[0] == 0
    model, tokenizer = AutoModelForCausalLM.from_pretrained(decoder).eval(), AutoTokenizer.from_pretrained(decoder)
    total = tokens = 0.0
    for chat in chats:
        question, answer = (message["content"] for message in chat["messages"])
        start = tokenizer(f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n")["input_ids"]
        ids = start + tokenizer(f"{answer}<|im_end|>\n")["input_ids"]
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
        total -= sum(float(logits[at - 1, ids[at]]) for at in range(len(start), len(ids)))
        tokens += len(ids) - len(start)
    assert metrics_of(out)["before"]["perplexity"] == pytest.approx(math.exp(total / tokens), rel=1e-4)


@pytest.mark.parametrize("template", ["plain", "marked"])
def test_the_loss_counts_answers_whether_the_template_marks_them(
    command: Command, options: list[str], tmp_path: Path, template: str
):
    model = tmp_path / "model"
    tiny_decoder.llama().save_pretrained(model)
    text = {"plain": tiny_decoder.TEMPLATE, "marked": tiny_decoder.MARKED}[template]
    tiny_decoder.tokenizer(text).save_pretrained(model)
    out = tmp_path / "run"
    words = ["--model", model, "--max_steps", "1", "--answers", "0", "--output_dir", out]
    status, _, messages = command("finetune", *options, *words)
    assert status == 0, messages
    # Random weights: a loss near log(320) for the first step says that some tokens were counted, and no padding.
    assert metrics_of(out)["history"][0]["loss"] == pytest.approx(math.log(320), rel=0.25)


@pytest.mark.parametrize(
    "more",
    [
        ["--packing"],
        ["--method", "bitfit"],
        ["--method", "adapter-h"],
        ["--method", "full"],
        ["--gradient_checkpointing", "true", "--gradient_accumulation_steps", "2"],
        ["--quantize", "nf4"],
        ["--dtype", "bfloat16", "--bf16", "true"],
    ],
    ids=lambda more: "-".join(word.strip("-") for word in more[:2]),
)
def test_options_of_sft_and_ours(command: Command, options: list[str], tmp_path: Path, more: list[str]):
    out = tmp_path / "run"
    if more[-1] == "bitfit":
        (model := tmp_path / "biased").mkdir()
        tiny_decoder.llama(attention_bias=True).save_pretrained(model)
        tiny_decoder.tokenizer().save_pretrained(model)
        more = [*more, "--model", str(model)]
    status, _, messages = command("finetune", *options, *more, "--max_steps", "4", "--output_dir", out)
    assert status == 0, messages
    assert metrics_of(out)["test"]["perplexity"] < metrics_of(out)["before"]["perplexity"]


@pytest.mark.parametrize("kind", ["completions", "texts", "chat completions"])
def test_formats(command: Command, options: list[str], tmp_path: Path, kind: str):
    pairs = tiny_decoder.questions(60)
    rows = {
        "completions": tiny_decoder.completions(pairs),
        "texts": tiny_decoder.texts(pairs),
        "chat completions": [
            {"prompt": chat["messages"][:1], "completion": chat["messages"][1:]} for chat in tiny_decoder.chats(pairs)
        ],
    }[kind]
    data = tiny_decoder.save_rows(tmp_path / "data.jsonl", rows)
    out = tmp_path / "run"
    status, _, messages = command("finetune", *options, "--data", data, "--max_steps", "4", "--output_dir", out)
    assert status == 0, messages
    assert ("rouge_l" in metrics_of(out)["test"]) == (kind != "texts")
    assert metrics_of(out)["test"]["perplexity"] < metrics_of(out)["before"]["perplexity"]


class Clock(trainer.Clock):
    """A Clock whose process is interrupted after step 7."""

    def on_step_end(self, args, state, control, **kwargs) -> None:
        super().on_step_end(args, state, control)
        if state.global_step == 7:
            raise KeyboardInterrupt


def test_resuming_gives_what_not_stopping_gives(
    command: Command, options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    run = ["finetune", *options, "--packing", "--max_steps", "12", "--save_strategy", "steps", "--save_steps", "5"]
    run += ["--per_device_train_batch_size", "2", "--ema_decay", "0.9", "--answers", "0"]
    assert command(*run, "--output_dir", tmp_path / "whole")[0] == 0
    with monkeypatch.context() as patch:
        patch.setattr(trainer, "Clock", Clock)
        assert command(*run, "--output_dir", tmp_path / "parts")[0] == 130
    resumed = command(*run, "--output_dir", tmp_path / "parts", "--resume_from_checkpoint", "true")
    assert resumed[0] == 0, resumed[2]
    whole, parts = (load_file(tmp_path / out / "adapter/adapter_model.safetensors") for out in ("whole", "parts"))
    for name, value in whole.items():
        assert torch.equal(value, parts[name]), name


def test_a_gguf_file_is_a_model(command: Command, options: list[str], tmp_path: Path):
    path = tiny_gguf.save(tmp_path / "model.gguf", tiny_decoder.llama(intermediate_size=64), tiny_decoder.tokenizer())
    words = ["--model", path, "--max_steps", "2", "--answers", "2", "--output_dir", tmp_path / "run"]
    status, _, messages = command("finetune", *options, *words)
    assert status == 0, messages
    config = json.loads((tmp_path / "run/adapter/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(path)
    line = mistake(command("finetune", *options, *words, "--quantize", "nf4", "--output_dir", tmp_path / "other"))
    assert "is a GGUF file; save it as a directory first" in line


MISTAKES = {
    "method": (
        ["--method", "prefix-embed"],
        "--method prefix-embed is not for language models, want one of full, bitfit",
    ),
    "classifier's option": (["--label_column", "y"], "there is no option --label_column"),
    "task": (["--class_weights", "balanced"], "there is no option --class_weights"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes(command: Command, options: list[str], tmp_path: Path, name: str):
    more, expected = MISTAKES[name]
    assert expected in mistake(command("finetune", *options, *more, "--output_dir", tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_rows_of_no_known_format(command: Command, options: list[str], tmp_path: Path):
    data = tiny_decoder.save_rows(tmp_path / "data.jsonl", [{"question": "Why?", "answer": "So."}] * 9)
    line = mistake(command("finetune", *options, "--data", data, "--output_dir", tmp_path / "out"))
    assert "has the columns question, answer; want messages, or prompt and completion, or 'text'" in line


def test_a_template_that_drops_answers_is_refused(command: Command, options: list[str], tmp_path: Path):
    model = tmp_path / "model"
    tiny_decoder.llama().save_pretrained(model)
    text = "{% for message in messages %}{{ message['content'] }}{{ loop.length }}{% endfor %}"
    tiny_decoder.tokenizer(text).save_pretrained(model)
    line = mistake(command("finetune", *options, "--model", model, "--output_dir", tmp_path / "out"))
    assert "row 1: the chat template does not tell the tokens of message 2; --chat_template_path names" in line


def test_scores_of_answers():
    scores = answer_scores(["the red sky", " blue ", ""], ["a red sky", "blue", "green"])
    assert scores["exact_match"] == pytest.approx(1 / 3)
    # ROUGE-1 by hand: 2 of 3 words shared, all of one word, none
    assert scores["rouge_1"] == pytest.approx((2 / 3 + 1 + 0) / 3)
    assert scores["rouge_2"] == pytest.approx((1 / 2 + 0 + 0) / 3)
