"""Tests ``lora-ext generate`` on a tiny decoder against transformers' generate, PEFT and its own refusals."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from support import tiny_decoder, tiny_gguf
from support.models import bert, shaken
from support.processes import Forked
from support.versions import needs
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from lora_ext import LoraConfig, inject, save_adapter
from lora_ext._common.printable import escaped
from lora_ext.cli import main
from lora_ext.methods import apply_method, new_method, save_method
from lora_ext.tasks.generate.chosen_adapters import named_adapters

pytestmark = [pytest.mark.cpu_only("the command chooses the device"), pytest.mark.full]

PROMPT = "What is the colour of the sea?"


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, the same without a chat template, and three adapters."""
    place = tmp_path_factory.mktemp("tiny")
    tiny_decoder.save(place / "model")
    tiny_decoder.save(place / "plain", template=None)
    for seed, name in enumerate(("first", "second/adapter")):
        model = tiny_decoder.llama()
        torch.manual_seed(seed)
        inject(model, LoraConfig(r=2 + seed, target_modules="all-linear"))
        save_adapter(shaken(model, 0.5), place / name)
    model = inject(bert(), LoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS"))
    save_adapter(model, place / "classifier")
    (place / "method").mkdir()
    (place / "method" / "method.json").write_text("{}")
    two = new_method("lora+adapter-h", r=2, target_modules="all-linear")
    save_method(apply_method(tiny_decoder.llama(), two), place / "two")
    return place


def run(capsys: Any, *arguments: str | Path) -> Any:
    """Runs the command with ``--json``; returns its answers."""
    assert main(["generate", *map(str, arguments), "--json", "--max-new-tokens", "12"]) == 0
    return json.loads(capsys.readouterr().out)["answers"]


def expected(directory: Path, adapter: Path | None, text: str, **options: Any) -> str:
    model = AutoModelForCausalLM.from_pretrained(directory / "model")
    if adapter is not None:
        model = PeftModel.from_pretrained(model, str(adapter))
    tokenizer = AutoTokenizer.from_pretrained(directory / "model")
    batch = tokenizer(text, return_tensors="pt", add_special_tokens=False)
    options = {"do_sample": False, "max_new_tokens": 12, "eos_token_id": [1, 3], "pad_token_id": 0} | options
    output = model.eval().generate(**batch, **options)[0, batch["input_ids"].shape[1] :]
    return tokenizer.decode(output, skip_special_tokens=True)


def test_answers_are_those_of_peft(directory: Path, capsys):
    adapters = [directory / "first", directory / "second" / "adapter"]
    found = run(capsys, "--model", directory / "model", "--adapter", adapters[0], "--adapter", adapters[1], PROMPT)
    assert [answer["adapter"] for answer in found] == ["first", "second"]
    assert [answer["text"] for answer in found] == [expected(directory, one, PROMPT) for one in adapters]
    assert found[0]["text"] != found[1]["text"]
    merged = run(capsys, "--model", directory / "model", "--adapter", adapters[0], f"--adapter=x={adapters[1]}",
                 "--merge", "--base", PROMPT)  # fmt: skip
    assert [answer["adapter"] for answer in merged] == ["base", "first", "x"]
    assert [answer["text"] for answer in merged[1:]] == [answer["text"] for answer in found]
    base = run(capsys, "--model", directory / "model", PROMPT)
    assert merged[0]["text"] == base[0]["text"] == expected(directory, None, PROMPT)
    assert base[0]["adapter"] is None
    for answer in found:
        assert 0 < answer["tokens"] <= 12 and answer["seconds"] > 0 < answer["tokens_per_second"]
        assert answer["prompt"] == PROMPT


def test_a_weighted_sum(directory: Path, capsys):
    adapters = [f"--adapter={directory / name}" for name in ("first", "second/adapter")]
    common = ["--model", directory / "model", *adapters, PROMPT]
    (only,) = run(capsys, *common, "--weights", "1,0")
    assert only["adapter"] == "mix" and only["text"] == expected(directory, directory / "first", PROMPT)
    (mixed,) = run(capsys, *common, "--weights", "0.7,0.6")
    (merged,) = run(capsys, *common, "--weights", "0.7,0.6", "--merge")
    assert mixed["text"] == merged["text"] != only["text"]


def test_chats_and_files(directory: Path, tmp_path: Path, capsys):
    tokenizer = AutoTokenizer.from_pretrained(directory / "model")
    chat = [{"role": "system", "content": "Be short."}, {"role": "user", "content": PROMPT}]
    rows = [{"messages": chat}, {"prompt": PROMPT, "completion": " blue"}, {"prompt": chat[1:], "completion": []}]
    file = tiny_decoder.save_rows(tmp_path / "prompts.jsonl", rows)
    rendered = [
        tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False),
        PROMPT,
        tokenizer.apply_chat_template(chat[1:], add_generation_prompt=True, tokenize=False),
    ]
    texts = [expected(directory, directory / "first", text) for text in rendered]
    common = ["--model", directory / "model", "--adapter", directory / "first"]
    assert [answer["text"] for answer in run(capsys, *common, "--prompts", file)] == texts
    assert run(capsys, *common, PROMPT, "--system", "Be short.")[0]["text"] == texts[0]
    assert run(capsys, *common, PROMPT, "--chat")[0]["text"] == texts[2]

    template = tmp_path / "template.jinja"
    template.write_text("{% for message in messages %}{{ message['content'] }}{% endfor %}")
    other = run(capsys, *common, PROMPT, "--chat", "--chat-template-file", template)
    assert other[0]["text"] == texts[1]
    lines = tmp_path / "prompts.txt"
    lines.write_text(f"{PROMPT}\n\nWhat is red?\n")
    assert [answer["prompt"] for answer in run(capsys, *common, "--prompts", lines)] == [PROMPT, "What is red?"]
    assert [answer["prompt"] for answer in run(capsys, *common, "--prompts", lines, "--whole")] == [
        f"{PROMPT}\n\nWhat is red?"
    ]


def test_standard_input(directory: Path, capsys, monkeypatch):
    def typed(content: str) -> None:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content.encode())))

    typed(f"{PROMPT}\nWhat is red?\n")
    assert len(run(capsys, "--model", directory / "model")) == 2
    typed(json.dumps({"messages": [{"role": "user", "content": PROMPT}]}))
    (answer,) = run(capsys, "--model", directory / "model", "--prompts", "-")
    assert answer["prompt"] == [{"role": "user", "content": PROMPT}]


def test_lines_end_at_line_feeds_and_carriage_returns_alone(directory: Path, tmp_path: Path, capsys, monkeypatch):
    """Form feeds, U+0085 and U+2028 are characters of a text, in JSON's strings, too."""
    texts = ["a\x0cb", "c\x85d", "e\u2028f"]
    lines = {"x.txt": texts, "x.jsonl": [json.dumps({"prompt": text}, ensure_ascii=False) for text in texts]}
    for name, rows in lines.items():
        for end in ("\n", "\r\n", "\r"):
            content = b"\xef\xbb\xbf" + (end.join(rows) + end).encode()
            (tmp_path / name).write_bytes(content)
            monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))
            for source in (tmp_path / name, "-"):
                answers = run(capsys, "--model", directory / "model", "--prompts", source)
                assert [answer["prompt"] for answer in answers] == texts
    (tmp_path / "x.txt").write_bytes(b"one\r\ntwo\r\n")
    (answer,) = run(capsys, "--model", directory / "model", "--prompts", tmp_path / "x.txt", "--whole")
    assert answer["prompt"] == "one\r\ntwo"


def test_an_answer_ends_with_the_turn(directory: Path, capsys, monkeypatch):
    """The tokenizer's eos_token is another one than the chat template's end of a turn."""
    tokenizer = AutoTokenizer.from_pretrained(directory / "model")
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")

    def forced(model: Any) -> Any:
        forward = model.forward

        def with_end(*args: Any, **kwargs: Any) -> Any:
            output = forward(*args, **kwargs)
            output.logits[..., end] = 1e4
            return output

        model.forward = with_end
        return model

    module = __import__("lora_ext.tasks.generate.run", fromlist=["x"])
    load = module.load_decoder

    def loaded(*args: Any) -> Any:
        decoder = load(*args)
        forced(decoder.model)
        return decoder

    monkeypatch.setattr(module, "load_decoder", loaded)
    (chat,) = run(capsys, "--model", directory / "model", "--chat", PROMPT)
    assert (chat["tokens"], chat["ended"], chat["text"]) == (1, True, "")
    (text,) = run(capsys, "--model", directory / "model", PROMPT)
    assert (text["tokens"], text["ended"]) == (12, False)


def test_an_answer_that_the_model_has_no_room_for_is_called_cut(directory: Path, capsys):
    prompt = "sea " * 60
    assert main(["generate", "--model", str(directory / "plain"), prompt, "--json", "--max-new-tokens", "999"]) == 0
    captured = capsys.readouterr()
    (answer,) = json.loads(captured.out)["answers"]
    assert answer["at_the_limit"] and not answer["ended"] and 0 < answer["tokens"] < tiny_decoder.LENGTH
    assert f"this answer is cut: {directory / 'plain'} takes {tiny_decoder.LENGTH} tokens in all" in captured.err
    (answer,) = run(capsys, "--model", directory / "plain", prompt)
    assert not answer["at_the_limit"] and answer["tokens"] == 12


def test_sampling_depends_on_the_seed_alone(directory: Path, capsys):
    common = ["--model", directory / "model", "--temperature", "1.5", "--top-p", "0.9", "--top-k", "50", PROMPT, PROMPT]
    first = [answer["text"] for answer in run(capsys, *common)]
    assert first[0] == first[1] == run(capsys, *common)[1]["text"]  # every answer has the seed
    assert run(capsys, *common, "--seed", "1")[0]["text"] != first[0]


def test_a_gguf_file_and_16_bits(directory: Path, tmp_path: Path, capsys):
    file = tiny_gguf.save(tmp_path / "tiny.gguf", tiny_decoder.llama(), tiny_decoder.tokenizer(), is_quantized=False)
    (answer,) = run(capsys, "--model", file, "--adapter", directory / "first", PROMPT)
    assert answer["text"] == expected(directory, directory / "first", PROMPT)
    (answer,) = run(capsys, "--model", file, "--adapter", directory / "first", "--dtype", "bfloat16", "--merge", PROMPT)
    assert answer["tokens"] > 0


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_quantised_checkpoint(tmp_path: Path, capsys, caplog, kind: str):
    """The answers are those of the model in memory, and nothing is told of 8-bit casts."""
    tiny_decoder.save(tmp_path / "plain", tiny_decoder.llama(hidden_size=64, intermediate_size=128, head_dim=32))
    how = {"load_in_8bit": True} if kind == "int8" else {"load_in_4bit": True, "bnb_4bit_use_double_quant": True}
    config = BitsAndBytesConfig(**how)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", quantization_config=config, dtype=torch.float32)
    model.save_pretrained(tmp_path / "model")
    tiny_decoder.tokenizer().save_pretrained(tmp_path / "model")
    inject(model, LoraConfig(r=2, target_modules="all-linear"))
    save_adapter(shaken(model, 0.5), tmp_path / "first")
    ids = tiny_decoder.tokenizer()(PROMPT, return_tensors="pt")
    caplog.clear()
    answers = run(capsys, "--model", tmp_path / "model", "--adapter", tmp_path / "first", PROMPT)
    with torch.no_grad():
        out = model.eval().generate(**ids, max_new_tokens=12, do_sample=False)[0, ids["input_ids"].shape[1] :]
    assert answers[0]["text"] == tiny_decoder.tokenizer().decode(out, skip_special_tokens=True)
    assert not [one for one in caplog.records if one.name.startswith("bitsandbytes")]


def test_answers_stream(directory: Path, capsys, monkeypatch):
    """Parts of an answer are written before the next token is computed; headings appear with several answers."""
    command = ["generate", "--model", str(directory / "model"), "--max-new-tokens", "12"]
    assert main([*command, PROMPT]) == 0
    captured = capsys.readouterr()
    text = expected(directory, None, PROMPT)
    assert captured.out == f"{escaped(text, keep=chr(10))}\n" != f"{text}\n"  # control characters are not passed on
    assert "tokens/s" in captured.err
    assert main([*command, PROMPT, "What is red?", "--adapter", str(directory / "first"), "--base"]) == 0
    out = capsys.readouterr().out
    assert [line for line in out.splitlines() if line.startswith("--- ")] == [
        f"--- base: {PROMPT}",
        "--- base: What is red?",
        f"--- first: {PROMPT}",
        "--- first: What is red?",
    ]
    parts: list[tuple[str, int]] = []
    module = __import__("lora_ext.tasks.generate.run", fromlist=["x"])
    settings = module.GenerateSettings(model=str(directory / "model"), max_new_tokens=12)
    tokens = []
    put = module._Streamer.put
    monkeypatch.setattr(module._Streamer, "put", lambda self, value: (tokens.append(1), put(self, value)))
    prompts = module.Prompt("prompt 1", text=PROMPT)
    module.generate(settings, [prompts], stream=lambda text: text and parts.append((text, len(tokens))))
    assert len({count for _, count in parts}) > 2  # at several times


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--adapter", "nowhere"], "--adapter nowhere is not a directory; want the directory of an adapter"),
        (["--adapter", "model"], "model holds no adapter_config.json; want the directory of an adapter"),
        (["--adapter", "second"], "want the directory of an adapter in PEFT's format, such as second/adapter"),
        (
            ["--adapter", "method"],
            "want the directory of an adapter in PEFT's format: other methods' generate by lora_",
        ),
        (["--adapter", "classifier"], "classifier is a classifier's (task_type SEQ_CLS), which generates no text"),
        (["--adapter", "two"], "two holds the low-rank part of lora+adapter-h, and the rest would not answer"),
        (["--adapter", "a=first", "--adapter", "a=first"], "the name 'a' is taken"),
        (["--adapter", "base=first"], "the name 'base' is taken"),
        (["--adapter", "first", "--weights", "1,2"], "--weights has 2 numbers for 1 adapters"),
        (["--weights", "1"], "--weights has 1 numbers for 0 adapters"),
        (["--merge"], "--merge goes with --adapter"),
        (["--base"], "--base goes with --adapter"),
        (["--model", "plain", "--chat"], "plain has no chat template, so messages cannot become a text"),
        (["--model", "nowhere"], "--model nowhere cannot be loaded"),
        (
            ["--model", "first"],
            "--model first is an adapter, and no model (it holds adapter_config.json); its base is ",
        ),
        (["--model", "second"], "it holds no config.json, as a model's directory does; did you mean second/adapter?"),
        (["--model", "nowhere.gguf"], "--model nowhere.gguf cannot be read: No such file"),
        (["--temperature", "-1"], "--temperature is -1.0, want a finite number of at least 0"),
        (["--top-p", "0.5"], "--top-p and --top-k go with --temperature above 0"),
        (["--temperature", "1", "--top-p", "0"], "--top-p is 0.0, want 0 < p <= 1"),
        (["--temperature", "1", "--top-k", "-1"], "--top-k is -1, want at least 0"),
        (["--seed", "-1"], "--seed is -1, want 0 <= seed < 2**32"),
        (["--system", " "], "--system is empty"),
        (["--chat", "--chat-template-file", "no.jinja"], "--chat-template-file no.jinja: cannot be read: No such file"),
        (["--chat-template-file", "none.jinja"], "--chat-template-file goes with messages, and the prompts are texts"),
        (["--prompts", "x.txt"], "--prompts names a file, and there are prompts as arguments"),
        (["--whole"], "--whole goes with --prompts or standard input"),
        (["   "], "prompt 2: is empty"),
        (["long " * 300], "prompt 2: has"),
    ],
)
def test_refusals(directory: Path, capsys, monkeypatch, options: list[str], message: str):
    monkeypatch.chdir(directory)
    model = [] if "--model" in options else ["--model", "model"]
    assert main(["generate", PROMPT, *options, *model]) == 2
    captured = capsys.readouterr()
    assert message in captured.err and "Traceback" not in captured.err
    assert captured.out == ""


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.txt", b"", "x.txt: holds no prompts"),
        ("x.txt", b"a\n\xff", "x.txt, line 2: not UTF-8"),
        ("x.jsonl", b'{"prompt": "a"}\n{', "x.jsonl, line 2"),
        (
            "x.jsonl",
            b'{"text": "a"}',
            "x.jsonl, line 1: want 'prompt', a text, or 'messages', a list of objects",
        ),
        ("x.jsonl", b'{"messages": []}', "line 1: has no messages"),
        ("x.jsonl", b'{"messages": [{"role": "user"}]}', 'message 1 is {"role": "user"}, want texts for role and cont'),
        (
            "x.jsonl",
            b'{"messages": [{"role": "users", "content": "a"}]}',
            'line 1: message 1 has the role "users", want one of system, developer, user, assistant, tool',
        ),
        ("x.jsonl", b'{"messages": [{"role": "assistant", "content": "a"}]}', "the last message is the assistant's"),
        ("x.jsonl", b'{"prompt": " "}', "x.jsonl, line 1: is empty"),
        (
            "x.jsonl",
            b'{"messages": [{"role": "user", "content": "a"}], "tools": [{}]}',
            "x.jsonl, line 1: holds tools, which are not supported",
        ),
        (
            "x.jsonl",
            b'{"messages": [{"role": "user", "content": "a", "name": "b"}]}',
            "line 1: message 1 has 'name', which no text shows",
        ),
    ],
)
def test_files_that_are_refused(directory: Path, tmp_path: Path, capsys, name: str, content: bytes, message: str):
    file = tmp_path / name
    file.write_bytes(content)
    assert main(["generate", "--model", str(directory / "model"), "--prompts", str(file)]) == 2
    captured = capsys.readouterr()
    assert message in captured.err and captured.out == ""
    assert main(["generate", "--model", str(directory / "model"), "--prompts", str(tmp_path / "none.txt")]) == 2
    assert "none.txt: cannot be read: No such file" in capsys.readouterr().err


def test_adapters_that_do_not_fit(directory: Path, tmp_path: Path, capsys):
    tiny_decoder.save(tmp_path / "wider", tiny_decoder.llama(hidden_size=48))
    command = ["generate", "--model", str(tmp_path / "wider"), PROMPT, "--adapter", str(directory / "first")]
    assert main(command) == 2
    captured = capsys.readouterr()
    assert "first does not fit the model, or is damaged: " in captured.err and captured.out == ""
    model = inject(tiny_decoder.llama(tie_word_embeddings=True), LoraConfig(r=2, target_modules=["lm_head"]))
    save_adapter(model, tmp_path / "tied")
    tiny_decoder.save(tmp_path / "model", tiny_decoder.llama(tie_word_embeddings=True))
    command = ["generate", "--model", str(tmp_path / "model"), PROMPT, "--merge", "--adapter", str(directory / "first")]
    assert main([*command, "--adapter", str(tmp_path / "tied")]) == 2
    captured = capsys.readouterr()
    assert "--merge: " in captured.err and "leave out --merge" in captured.err and captured.out == ""


def test_names_of_adapters(directory: Path, monkeypatch):
    monkeypatch.chdir(directory)
    names = [adapter.name for adapter in named_adapters(["first", "second/adapter", "first", "y=first"])]
    assert names == ["first", "second", "first-2", "y"]


SLOW = """
import sys, time
from lora_ext.tasks.generate import run
put = run._Streamer.put
def slow(self, value):
    put(self, value)
    time.sleep(0.2)
run._Streamer.put = slow
from lora_ext.cli import main
sys.exit(main())
"""


@needs("transformers", "5.24", "TextStreamer prints a text without spaces at its end")
def test_ctrl_c_ends_it(directory: Path):
    arguments = ["-c", SLOW, "generate", "--model", directory / "model", "--adapter", directory / "first"]
    arguments += ["--merge", PROMPT, "--max-new-tokens", "200"]
    process = Forked(*arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=False)
    assert os.read(process.stdout.fileno(), 1), process.stderr.read()
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    out, error = process.communicate(timeout=60)
    assert process.returncode == 130, error
    assert error.decode().endswith("lora-ext: interrupted\n") and b"Traceback" not in error
    assert out.endswith(b"\n")


def test_the_help_is_about_this_command(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["generate", "--help"])
    assert caught.value.code == 0 and "resume" not in capsys.readouterr().out
