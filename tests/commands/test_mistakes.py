"""A mistake on the command line is told in one line and by status 2, and changes no file. A new one is a row here."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from support import results, tiny_classifier, tiny_decoder
from support.analyzed import save_misfits
from support.command_lines import mistake
from support.models import snapshot
from transformers import GPT2Config, T5Config

pytestmark = pytest.mark.cpu_only("is about files, and the Trainer chooses the device")

ROWS = "".join(f"the film {i} is {word},{label}\n" for i in range(20) for word, label in (("good", 1), ("bad", 0)))
DATA = {
    "empty.csv": "",
    "header.csv": "text,label\n",
    "separator.csv": "text;label\na film;1\n",
    "data.xlsx": "text,label\n",
    "no-label.csv": f"text,label\na film,\n{ROWS}",
    "one-label.csv": f"text,label\n{ROWS}".replace(",0", ",1"),
    "two-spellings.csv": f"text,label\n{ROWS}the plot is fine,01\n",
    "columns.csv": f"text,label\n{ROWS}a film, two, three,1\n",
    "new-label.csv": "text,label\na film,pos\nthe story,mixed\n",
    "broken.jsonl": '{"text": "a film", "label": 1}\n{"text": \n',
    "questions.jsonl": '{"question": "Why?", "answer": "So."}\n' * 9,
    "letter.html": "mine",
    "notes/letter.txt": "mine",
    "results/metrics.json": json.dumps(results.classification()),
    "nothing/letter.txt": "mine",
    "half/compare.json": "{",
    "deep/compare.json": "[" * 100_000,
    "list/compare.json": "[1]",
    "other/compare.json": "{}",
    "no-checkpoint/pytorch_model\x1b[31m.bin": "",
    "text-file": "text",
}
TEMPLATE = "{% for message in messages %}{{ message['content'] }}{{ loop.length }}{% endfor %}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints, adapters and bases that do not fit them, models and data, and what is none of these."""
    folder = save_misfits(tmp_path_factory.mktemp("mistakes") / "here")
    (folder / "tiny").mkdir()
    tiny_classifier.save(folder / "tiny")
    tiny_decoder.save(folder / "chat")
    tiny_decoder.save(folder / "untold", template=TEMPLATE)
    tiny_decoder.save_rows(folder / "chats.jsonl", tiny_decoder.chats(tiny_decoder.questions(30)))
    gpt2 = GPT2Config(vocab_size=50, n_positions=64, n_embd=32, n_layer=3, n_head=4)
    gpt2.architectures = ["GPT2LMHeadModel"]
    gpt2.save_pretrained(folder / "gpt2")
    T5Config(vocab_size=50, d_model=16, d_kv=4, d_ff=24, num_layers=2, num_heads=4).save_pretrained(folder / "t5")
    for name, content in DATA.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(content)
    for name, content in {"latin.csv": b"text,label\ncaf\xe9,1\n", "utf-16/compare.json": b"\xff\xfe"}.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)
    (folder / "two-files").mkdir()
    for name in "xy":
        save_file({"a": torch.ones(1)}, folder / "two-files" / f"{name}.safetensors")
    return folder


COMMANDS = {  # what a row of the command has in front
    "finetune": "--model tiny/model --data tiny/reviews.csv --max_length 32 --output_dir new",
    "causal-lm": "--task causal-lm --model chat --data chats.jsonl --max_length 128 --output_dir new",
    "analyze": "--out new",
    "compare": "",
    "plan": "--model gpt2 --seq-len 32 --batch-size 4",
    "report": "",
    "merge": "--base base --adapter four",
    "extract": "--base base --out new",
    "normalise": "--adapter four --out new",
    "inspect": "",
    "info": "",
}
NO_CHECKPOINTS = {
    "nowhere": "is missing; want ",
    "nothing": "has no model.safetensors",
    "no-checkpoint": "is there: save it again as safetensors",
    "two-files": "has 2 safetensors files and no index",
    "text-file": "is corrupted or not a safetensors file",
}
PLAN = "want M,K,N or M,K,N,RANK: positive numbers"
MISTAKES = {
    "finetune": [
        ("--lora-rank 4", "there is no option --lora-rank; did you mean"),
        ("--method lorra", "there is no method 'lorra'; did you mean lora?"),
        ("--method bitfit --lora_r 4", "--lora_r goes with lora, not with --method bitf"),
        ("--lora_r 0", "LoraConfig: r is 0"),
        ("--lora_targets qeury", "close matches: 'query'"),
        ("--model /nowhere/model", "--model /nowhere/model: there is no such file or directory"),
        ("--model four", "is an adapter (it holds adapter_con"),
        ("--data nowhere.csv", "--data nowhere.csv: there is no such file or directory"),
        ("--text_column body", "no column 'body' but 'text', 'label'"),
        ("--max_length 64", "--max_length is 64, but"),
        ("--method prefix-embed --prefix_length 26", "--max_length is 32, but"),
        ("--test_split 0", "no text is left for test"),
        ("--test_split 1.5", "--test_split is 1.5, want 0 <= test_split < 1"),
        ("--learning_rate fast", "argument --learning_rate/--learning-rate: invalid float value: 'fast'"),
        ("--early_stopping 2", "--early_stopping goes with --load_best_model_at_end"),
        ("--method full --quantize nf4", "--quantize nf4 freezes the weights, and --method full"),
        ("--method bitfit --merged true", "--merged goes with --method lora, not with bitfit"),
        ("--pooling mean --merged true", "a checkpoint does not say --pooling mean"),
        ("--ema_decay 1", "--ema_decay is 1.0, want 0 <= ema_decay < 1"),
        ("--config nowhere.yaml", "--config nowhere.yaml: nowhere.yaml: No such file or directory"),
        ("--task translation", "--task is 'translation', want classification or causal-lm"),
        ("--output_dir notes", "is not empty, and holds no run"),
        ("--data empty.csv", "the file is empty"),
        ("--data header.csv", "holds no rows after its header"),
        ("--data separator.csv", "want commas between columns"),
        ("--data data.xlsx", "want a file with the suffix .csv, .tsv or .jsonl"),
        ("--data no-label.csv", "row 1 has no 'label'"),
        ("--data one-label.csv", "every training text has the label '1'"),
        ("--data two-spellings.csv", "the labels '01' and '1' are two"),
        ("--data columns.csv", "columns.csv"),
        ("--data broken.jsonl", "broken.jsonl"),
        ("--data latin.csv", "latin.csv"),
        (
            "--test_file new-label.csv",
            "row 2 of test has the label 'mixed', which no training text has; labels are",
        ),
    ],
    "causal-lm": [
        ("--method prefix-embed", "--method prefix-embed is not for language models, want one of full, bitfit"),
        ("--label_column y", "there is no option --label_column"),
        ("--class_weights balanced", "there is no option --class_weights"),
        (
            "--data questions.jsonl",
            "has the columns question, answer; want messages, or prompt and completion",
        ),
        (
            "--model untold",
            "row 1: the chat template does not tell the tokens of message 2; --chat_template_path",
        ),
    ],
    "analyze": [
        ("", "the following arguments are required: --adapter"),
        ("--adapter nowhere", "nowhere/adapter_config.json is missing"),
        ("--adapter four --base four", "has no model.safetensors"),
        ("--adapter four --base base --no-base", "argument --no-base: not allowed with argument --base"),
        ("--adapter four --layers (", "--layers '(' is no regular expression"),
        ("--adapter four --layers k_proj", "--layers 'k_proj' matches none of the 4 layers: model.layers.0"),
        ("--adapter four --out four/adapter_config.json", "adapter_config.json is a file; choose a directory"),
        ("--adapter four --resume", "there is no option --resume"),
        ("--adapter four --base bert", "not in the base: model.layers.0.mlp.up_proj.weight; not in the base: "),
        ("--adapter four --base bert", "and 1 more; --base names another checkpoint, and --no-base goes without one"),
        ("--adapter four query --no-base", "have no layer in common; analyze each by itself"),
        ("--adapter four wide --no-base", "not of one model: model.layers.0.self_attn.q_proj has the shapes"),
        ("--adapter broken --no-base", "model.layers.1.mlp.up_proj in broken: factored_svd: "),
        ("--adapter four --base infinite", "model.layers.0.mlp.up_proj.weight of infinite: "),
        ("--adapter dora --no-base", "is a DoRA adapter (use_dora), which rescales the weights"),
    ],
    "compare": [
        ("--out out", "want specs first"),
        ("lorra", "lorra: --method lorra: there is no method 'lorra'; did you mean lora?"),
        ("lora:rank=3", "lora:rank=3: there is no option --rank; did you mean"),
        ("lora:seed=3", "--seeds has the seeds"),
        ("lora --seeds one", "--seeds one: invalid literal"),
        ("lora:r=1 lora:r=1", "have one directory"),
        ("lora --baseline full", "--baseline full: there is no such label; want one of lora"),
        ("lora --jobs 0", "--jobs is 0, want at least 1"),
        ("lora --launcher ssh", "argument --launcher: invalid choice: 'ssh'"),
        ("lora --launcher submitit --launcher_set gpus=1", "--launcher_set: "),
    ],
    "plan": [
        ("--optimizer lion", "--optimizer", "lion", "adamw", "adamw-master", "adamw8bit"),
        ("--dtype fp8", "--dtype", "fp8", "float32", "nf4"),
        ("--method magic", "magic", "bitfit"),
        ("--task poetry", "poetry", "causal-lm"),
        ("--seq-len 0", "--seq_len", "'0'", "at least 1"),
        ("--seq-len 65", "--max_length is 65", "at most 64 tokens"),
        ("--gpu-memory 1GB", "--reserve takes all of --gpu_memory"),
        ("--method full --dtype int8", "--quantize int8 freezes the weights"),
        ("--method full --lora_r 3", "--lora_r goes with lora, not with --method full"),
        ("--method head-only", "--method head-only", "no new head to train"),
        ("--method bitfit --task classification --model chat", "has no biases"),
        ("--target-modules query", "--method lora", "matches no module"),
        ("--num-labels 3", "--num_labels goes with --task classification; a language model has none"),
        ("--model no/thing", "no/thing is neither a config", "gpt3-175b"),
        ("--rank 3", "there is no option --rank"),
        ("--optimize sgd", "there is no option --optimize; did you mean --optimizer?"),  # no abbreviations
        ("--gpu-memory 0", "'0', want a size such as 5GB or 500MB"),
        ("--model t5 --task causal-lm", "Unrecognized configuration class"),
    ],
    "report": [
        ("none", "none is no directory; name the --out of a command"),
        ("nothing", "hold none of compare.json, analysis.json, plan.json, metrics.json; run a command first"),
        ("results --out nothing", "nothing exists and is no report; name another file"),
        ("results --out letter.html", "letter.html exists and is no report; name another file"),
        ("results --out results/metrics.json/page.html", "--out: "),
        *((name, "compare.json holds no JSON: ", "remove it, or make it again") for name in ("half", "deep", "utf-16")),
        ("list", "compare.json holds no JSON object; remove it, or make it again"),
        ("other", "compare.json is not what the command writes: KeyError('rows'); make it again"),
    ],
    "merge": [
        ("", "the following arguments are required: --out"),
        ("--out base", "base exists; choose a new directory, or remove it first"),
        ("--base bert --out new", "does not fit", "not in the base: model.layers.0", "more"),
        ("--out new --dtype int8", "'int8', want one of float64, float32, bfloat16, float16"),
        ("--out new --weight 1", "no option --weight; did you mean --weights?"),
        *((f"--base {name} --out new", words) for name, words in NO_CHECKPOINTS.items()),
    ],
    "extract": [
        ("--tuned base", "no tensor differs between base and base"),
        ("--tuned infinite --r 0", "is 0"),
        *((f"--tuned {name}", words) for name, words in NO_CHECKPOINTS.items()),
    ],
    "normalise": [
        ("--out six", "six exists; choose a new directory"),
        ("--adapter nowhere", "is missing"),
    ],
    "inspect": [
        ("", "the following arguments are required: path"),
        *NO_CHECKPOINTS.items(),
        *(("x" * length, "x" * 255) for length in (300, 5000)),
        ("no\x1b[31msuch", r"no\x1b[31msuch"),
        ("\udcff\udcfe", r"\udcff\udcfe"),
    ],
    "info": [
        *((f"--plan {plan}", f"--plan is '{plan}', {PLAN}") for plan in ("1,2", "1,2,x", "0,8,8", "1,2,3,4,5")),
        ("--plan 1,4096,4096 --sms 0", "--sms is '0', want a positive number"),
        ("--plan", "argument --plan: expected one argument"),
        ("--jason", "there is no option --jason; did you mean --json?"),
        ("--xyz=1", "there is no option --xyz"),
        ("here", "there is no option here"),
    ],
}
SLOW = ("finetune", "causal-lm", "analyze", "compare")  # to import
CASES = [
    pytest.param(command, *row[:1], row[1:], marks=[pytest.mark.full] * (command in SLOW))
    for command, rows in MISTAKES.items()
    for row in rows
]


@pytest.mark.parametrize(("name", "arguments", "words"), CASES)
def test_mistakes(folder, command, monkeypatch, name, arguments, words):
    monkeypatch.chdir(folder)
    before, called = snapshot(folder), "finetune" if name == "causal-lm" else name
    options = COMMANDS[name].split() + (arguments.split(" ") if arguments else [])
    result = command(called, *options)
    line = mistake(result)
    assert all(word in line for word in words) and line.isprintable() and len(line) < 6000, line
    assert name in SLOW or (result[1] == "" and result[2] == f"lora-ext {called}: error: {line}\n")
    assert snapshot(folder) == before
