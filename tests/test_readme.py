"""README.md and docs/: the Python code runs, the commands have these options, files exist. Links: ``make docs``."""

from __future__ import annotations

import ast
import importlib
import itertools
import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
from support.versions import needs
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from lora_ext import LoraConfig, inject, merge, save_adapter, unmerge
from lora_ext.adapters import adapter_names, lora_modules
from lora_ext.commands import demo
from lora_ext.commands.options import Parser
from lora_ext.integrations.peft import accelerate, report
from lora_ext.methods import method_of

pytestmark = pytest.mark.cpu_only("the documents' lines name no device")

ROOT = Path(__file__).parent.parent
DOCUMENTS = sorted(path.relative_to(ROOT).as_posix() for path in (*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")))
TEXTS = {name: (ROOT / name).read_text(encoding="utf-8") for name in DOCUMENTS}


def python_blocks(name: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", TEXTS[name], re.S)


def indented_lines(text: str) -> list[str]:
    """The commands that a document shows, continued lines joined."""
    return re.findall(r"^    (\S.*)$", re.sub(r"\\\n\s+", "", text), re.M)


def run(code: str, **names: object) -> dict:
    exec(compile(code.replace("path/or/id", demo.classifier()), "document", "exec"), names)
    return names


def bare_model():
    return AutoModelForSequenceClassification.from_pretrained(demo.classifier(), num_labels=3)


@pytest.fixture
def in_tmp_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


# --- Python: a block starts with a bare `model`, in a directory where the README's first block has run ----------------


def test_python_of_the_readme(in_tmp_path):
    first, under_peft = python_blocks("README.md")
    assert '"path/or/id"' in first
    names = run(first)
    assert (in_tmp_path / "my-adapter" / "adapter_model.safetensors").is_file()
    layers = dict(lora_modules(names["model"]))
    assert len(layers) == 12 and all(layer.is_merged for layer in layers.values())
    assert len(names["optimizer"].param_groups[0]["params"]) == 2 * 12 + 2
    assert all(entry.accelerated for entry in report(run(under_peft, model=bare_model())["model"]).layers)


def test_python_of_many_adapters_md(in_tmp_path):
    rows, pooled = python_blocks("docs/many-adapters.md")
    ids = torch.ones(3, 4, dtype=torch.int64)
    assert run(rows, model=bare_model().eval(), ids=ids)["y"].logits.shape == (3, 3)
    for tenant, r in ((4, 4), (5, 8), (17, 16)):
        save_adapter(inject(bare_model(), LoraConfig(r=r, target_modules=["query"])), f"adapters/tenant-{tenant}")
    model = bare_model().eval()
    stats = run(pooled.replace("2 * 2**30", "2**24") + "stats = pool.stats()", model=model, ids=ids)["stats"]
    assert stats.slots == 0 and 2 <= stats.loads <= 3


def test_python_of_the_vietnamese_readme():
    """The same code as in README.md, with other comments."""
    english, vietnamese = (
        [ast.dump(ast.parse(block)) for block in python_blocks(name)] for name in ("README.md", "docs/README.vi.md")
    )
    assert english == vietnamese


@pytest.mark.full
def test_python_of_adapters_md(in_tmp_path, capsys):
    run(python_blocks("README.md")[0])
    finetuned, several, exported = python_blocks("docs/adapters.md")
    shutil.copytree("my-adapter", "my-run/adapter")
    Path("my-run", "metrics.json").write_text('{"labels": ["negative", "neutral", "positive"]}')
    assert adapter_names(run(finetuned)["model"]) == ["default"]
    assert capsys.readouterr().out.strip() in ("negative", "neutral", "positive")
    names = run(several, model=bare_model())
    assert adapter_names(names["model"]) == ["first", "second", "third", "both"]
    names = run(exported, model=bare_model())
    assert "lora_ext.lora_linear" in str(names["program"].graph)
    assert Path("program.pt2").stat().st_size > 1e6
    assert "liblora_ext.so" in capsys.readouterr().out


def test_python_of_peft_md(in_tmp_path):
    block, under_trl = python_blocks("docs/peft.md")
    names = run(block, model=bare_model())
    entries = names["report"](names["model"]).layers
    assert len(entries) == 12 and all(entry.accelerated for entry in entries)
    trainers = dict.fromkeys(["SFTTrainer", "DPOTrainer"], lambda model, args: SimpleNamespace(model=model))
    config = peft.LoraConfig(target_modules=["query"])
    functions = {
        "inject": inject,
        "accelerate": accelerate,
        "get_peft_model": lambda model, c: peft.get_peft_model(bare_model(), c),
    }
    trainer = run(under_trl, model=bare_model(), config=config, args=None, **trainers, **functions)["trainer"]
    assert all(entry.accelerated for entry in report(trainer.model))


@pytest.mark.full
def test_python_of_quantized_md(in_tmp_path):
    (block,) = python_blocks("docs/quantized.md")
    model = run(block)["plain"]
    assert not any(lora_modules(model))
    assert type(AutoModelForSequenceClassification.from_pretrained("plain-model")) is type(model)


def test_python_of_cli_md(in_tmp_path, capsys):
    (block,) = python_blocks("docs/cli.md")
    names = run(block, model=bare_model())
    assert method_of(names["model"]) == names["method"]
    assert capsys.readouterr().out == f"{12 * (2 * 384 * 16 + 16 + 384)}\n"
    assert (in_tmp_path / "my-adapter" / "method.safetensors").is_file()


@needs("transformers", "5.18", "there is no GgufConfig")
@pytest.mark.full
@pytest.mark.filterwarnings("ignore")  # TRL and torchao, which it imports, warn a lot
def test_python_of_the_tutorial(in_tmp_path, capsys, monkeypatch):
    """With a chat model of a few thousand weights in place of SmolLM2."""
    from support import tiny_decoder, tiny_gguf

    original = tiny_decoder.llama(hidden_size=64, intermediate_size=128)  # rows of whole blocks of 64
    tiny_gguf.save(in_tmp_path / "tiny.gguf", original, tiny_decoder.tokenizer())
    tiny_decoder.save_rows(in_tmp_path / "chats.jsonl", tiny_decoder.chats(tiny_decoder.questions(80)))
    monkeypatch.setattr(demo, "language_model", lambda: str(in_tmp_path / "tiny.gguf"))
    monkeypatch.setattr(demo, "chats", lambda: str(in_tmp_path / "chats.jsonl"))
    names: dict[str, Any] = {}
    for block in python_blocks("docs/tutorial.md"):
        more = block.replace("num_train_epochs=2", "num_train_epochs=4").replace("5e-4", "4e-3")
        exec(compile(more, "tutorial", "exec"), names)
    saved = AutoModelForCausalLM.from_pretrained("base")
    assert not hasattr(saved.config, "quantization_config")
    torch.testing.assert_close(saved.state_dict(), original.state_dict())
    assert AutoTokenizer.from_pretrained("base").chat_template == tiny_decoder.TEMPLATE
    model, perplexity = names["model"], names["perplexity"]
    feedback, _ = perplexity(), unmerge(model)
    adapted, _ = perplexity(), merge(model)
    nearest = perplexity()
    said = capsys.readouterr().out
    assert f"adapter {adapted:.1f}, merged to nearest {nearest:.1f}, by error feedback {feedback:.1f}" in said
    assert adapted < 20 and abs(feedback - adapted) < abs(nearest - adapted)


def test_every_page_with_python_is_run():
    run_here = set(re.findall(r'python_blocks\("(.*?)"\)', Path(__file__).read_text(encoding="utf-8")))
    with_python = {name for name in DOCUMENTS if python_blocks(name)}
    assert with_python == run_here | {"docs/README.vi.md"}


# --- commands ---------------------------------------------------------------------------------------------------------


def assert_takes(name: str, options: list[str]) -> None:
    """Runs a command until its options are known; it ends with a message if it does not take them."""

    class Parsed(Exception):
        pass

    def parse(parser: Parser, *arguments: Any) -> None:
        original(parser, *arguments)
        raise Parsed

    original = Parser.parse_args
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Parsed):
        patch.setattr(Parser, "parse_args", parse)
        importlib.import_module(f"lora_ext.commands.{name}").main(options)


def runs_of(line: str) -> Iterator[tuple[str, list[str]]]:
    """Returns the command and its options; for each spec of compare, those of a comparison with this one alone."""
    name, *words = shlex.split(line)[1:]
    specs = list(itertools.takewhile(lambda word: not word.startswith("-"), words)) if name == "compare" else []
    yield from ((name, [spec, *words[len(specs) :]]) for spec in specs) if specs else [(name, words)]


def test_commands_have_the_options_shown():
    shown = [line for text in TEXTS.values() for line in indented_lines(text) if line.startswith("lora-ext ")]
    assert len(shown) > 15
    for line in shown:
        for name, options in runs_of(line):
            assert_takes(name, options)


# --- files ------------------------------------------------------------------------------------------------------------

FOLDERS = "lora_ext|csrc|tests|benchmarks|examples|scripts|docs"


def test_files_named_exist():
    """A path with a part such as <card> stands for several files, and is not looked up."""
    path = re.compile(rf"(?<![\w/.])(?<!\]\()((?:{FOLDERS})/[\w./-]*\w)(?![\w<*]|/?[<*])")
    named = {(name, file) for name, text in TEXTS.items() for file in path.findall(text)}
    assert not [(name, file) for name, file in named if not (ROOT / file).exists()]


# --- the list of public names -----------------------------------------------------------------------------------------


def test_the_api_page_has_every_public_module_and_name():
    page = TEXTS["docs/api.md"]
    shown = dict(re.findall(r"^::: ([\w.]+)\n    options: {members: \[(.*?)\]}$", page, re.M | re.S))
    for path in sorted((ROOT / "lora_ext").rglob("*.py")):
        if "\n__all__ = " in path.read_text(encoding="utf-8"):
            module = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
            names = importlib.import_module(module).__all__
            assert shown.pop(module).replace(",", " ").split() == sorted(names), module
    assert not shown
