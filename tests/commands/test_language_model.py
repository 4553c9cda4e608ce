"""``lora-ext finetune --task causal-lm`` with TRL's SFTTrainer, on a tiny Llama."""

from __future__ import annotations

import json
import math
from pathlib import Path

import peft
import pytest
import torch
from support import tiny_decoder, tiny_gguf
from support.command_lines import mistake
from transformers import AutoModelForCausalLM, AutoTokenizer

from lora_ext.commands.language_model import answer_scores

pytestmark = [pytest.mark.cpu_only("the Trainer chooses the device"), pytest.mark.full]


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_decoder.save(tmp_path_factory.mktemp("decoder"))


@pytest.fixture(scope="module")
def options(decoder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Options of a decoder that learns 150 chats in seconds."""
    data = tmp_path_factory.mktemp("chats") / "chats.jsonl"
    tiny_decoder.save_rows(data, tiny_decoder.chats(tiny_decoder.questions(150)))
    words = ["--task", "causal-lm", "--model", decoder, "--data", data, "--max_length", "128", "--answers", "8"]
    words += ["--max_new_tokens", "8", "--learning_rate", "2e-2", "--num_train_epochs", "3"]
    return list(map(str, words))


def test_a_run_learns_the_answers_and_peft_loads_it(finetune, options, decoder):
    run = finetune(*options)
    before, test = run.metrics["before"], run.metrics["test"]
    assert test["perplexity"] < 0.2 * before["perplexity"] and test["rouge_l"] > before["rouge_l"]
    assert "test perplexity" in run.said and "What is the colour" in run.said
    rows = run.predictions
    assert len(rows) == 8 and {row["reference"] for row in rows} <= set(tiny_decoder.COLOURS)
    model = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(decoder), run.out / "adapter").eval()
    tokenizer, question = AutoTokenizer.from_pretrained(decoder), [{"role": "user", "content": rows[0]["prompt"]}]
    ids = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt")["input_ids"]
    answer = model.generate(input_ids=ids, max_new_tokens=8, do_sample=False, pad_token_id=0)
    text = tokenizer.decode(answer[0, ids.shape[1] :], skip_special_tokens=True)
    assert text.strip().startswith(rows[0]["after"])


def test_perplexity_counts_the_tokens_of_answers(finetune, options, decoder, tmp_path):
    chats = tiny_decoder.chats(tiny_decoder.questions(6, seed=3))
    test = tiny_decoder.save_rows(tmp_path / "test.jsonl", chats)
    run = finetune(*options, "--test_file", test, "--max_steps", "1", "--answers", "0")
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
    assert run.metrics["before"]["perplexity"] == pytest.approx(math.exp(total / tokens), rel=1e-4)


@pytest.mark.parametrize("template", [tiny_decoder.TEMPLATE, tiny_decoder.MARKED], ids=["plain", "marked"])
def test_the_loss_counts_answers_whether_the_template_marks_them(finetune, options, tmp_path, template):
    model = tiny_decoder.save(tmp_path / "model", template=template)
    run = finetune(*options, "--model", model, "--max_steps", "1", "--answers", "0")
    # Random weights: a loss near log(320) for the first step says that some tokens were counted, and no padding.
    assert run.losses[0] == pytest.approx(math.log(320), rel=0.25)


@pytest.mark.parametrize(
    "more",
    [
        "--packing --method full",
        "--method bitfit --dtype bfloat16 --bf16 true",
        "--method adapter-h --gradient_checkpointing true --gradient_accumulation_steps 2",
        "--quantize nf4",
    ],
)
def test_options_of_sft_and_ours(finetune, options, tmp_path, more):
    model = tiny_decoder.save(tmp_path / "model", tiny_decoder.llama(attention_bias="bitfit" in more))
    metrics = finetune(*options, *more.split(), "--model", model, "--max_steps", "4").metrics
    assert metrics["test"]["perplexity"] < metrics["before"]["perplexity"]


@pytest.mark.filterwarnings("ignore:.*were quantised again", "ignore:.*rounding to 16 bits keeps less than")
@pytest.mark.parametrize("more", ["", "--quantize nf4", "--quantize int8", "--dtype bfloat16 --packing"])
def test_a_merged_model_is_written_and_scored(finetune, options, tmp_path, more):
    model = tiny_decoder.llama(hidden_size=64, intermediate_size=64, head_dim=32)  # NF4 has blocks of 64 columns
    wide = tiny_decoder.save(tmp_path / "wide", model)
    run = finetune(*options, *more.split(), "--model", wide, "--merged", "true", "--answers", "0", "--max_steps", "8")
    merged = AutoModelForCausalLM.from_pretrained(run.out / "merged", dtype="auto")
    assert not any("lora" in name for name, _ in merged.named_parameters())
    assert getattr(merged.config, "quantization_config", None) is None or "quantize" in more
    scores = run.metrics["merged"], run.metrics["test"], run.metrics["before"]
    merged_, test, before = (one["perplexity"] for one in scores)
    assert abs(math.log(merged_ / test)) < 0.25 * math.log(before / test), "the merge keeps most of what was learned"
    assert "merged: perplexity" in run.said
    ids = torch.tensor([tiny_decoder.tokenizer()("Why is the sky blue?")["input_ids"]])
    with torch.no_grad():
        assert merged(ids).logits.isfinite().all()


@pytest.mark.parametrize("kind", ["completions", "texts", "chat completions"])
def test_formats(finetune, options, tmp_path, kind):
    pairs = tiny_decoder.questions(60)
    rows = {
        "completions": tiny_decoder.completions(pairs),
        "texts": tiny_decoder.texts(pairs),
        "chat completions": [
            {"prompt": chat["messages"][:1], "completion": chat["messages"][1:]} for chat in tiny_decoder.chats(pairs)
        ],
    }[kind]
    metrics = finetune(
        *options, "--data", tiny_decoder.save_rows(tmp_path / "data.jsonl", rows), "--max_steps", "4"
    ).metrics
    assert ("rouge_l" in metrics["test"]) == (kind != "texts")
    assert metrics["test"]["perplexity"] < metrics["before"]["perplexity"]


def test_a_gguf_file_is_a_model(command, finetune, options, tmp_path):
    path = tiny_gguf.save(tmp_path / "model.gguf", tiny_decoder.llama(intermediate_size=64), tiny_decoder.tokenizer())
    words = [*options, "--model", path, "--max_steps", "2", "--answers", "2"]
    config = json.loads((finetune(*words).out / "adapter/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(path)
    line = mistake(command("finetune", *words, "--quantize", "nf4", "--output_dir", tmp_path / "other"))
    assert "is a GGUF file; save it as a directory first" in line


def test_scores_of_answers():
    scores = answer_scores(["the red sky", " blue ", ""], ["a red sky", "blue", "green"])
    assert scores["exact_match"] == pytest.approx(1 / 3)
    # ROUGE-1 by hand: 2 of 3 words shared, all of one word, none
    assert scores["rouge_1"] == pytest.approx((2 / 3 + 1 + 0) / 3)
    assert scores["rouge_2"] == pytest.approx((1 / 2 + 0 + 0) / 3)
