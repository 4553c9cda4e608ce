"""The README's Python, run as printed but for the model's path."""

import re
from pathlib import Path

import pytest
from transformers import AutoModelForSequenceClassification

from lora_ext.adapters import adapter_names, lora_modules
from lora_ext.methods import method_of
from lora_ext.tasks.finetune import demo

pytestmark = pytest.mark.cpu_only("the README's lines name no device")

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
FIRST, SEVERAL, PEFT, METHODS = re.findall(r"```python\n(.*?)```", README, re.S)


def run(code: str, **names: object) -> dict:
    exec(compile(code.replace("path/or/id", str(demo.model_path())), "README.md", "exec"), names)
    return names


def bare_model():
    return AutoModelForSequenceClassification.from_pretrained(demo.model_path(), num_labels=3)


@pytest.fixture
def in_tmp_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_one_adapter(in_tmp_path):
    assert '"path/or/id"' in FIRST
    names = run(FIRST)
    assert (in_tmp_path / "my-adapter" / "adapter_model.safetensors").is_file()
    layers = dict(lora_modules(names["model"]))
    assert len(layers) == 12 and all(layer.is_merged for layer in layers.values())
    assert len(names["optimizer"].param_groups[0]["params"]) == 2 * 12 + 2


def test_several_adapters(in_tmp_path):
    run(FIRST)
    names = run(SEVERAL, model=bare_model())
    assert adapter_names(names["model"]) == ["first", "second", "both"]


def test_peft():
    names = run(PEFT, model=bare_model())
    entries = names["report"](names["model"]).layers
    assert len(entries) == 12 and all(entry.accelerated for entry in entries)


def test_the_other_methods(in_tmp_path, capsys):
    names = run(METHODS, model=bare_model())
    assert method_of(names["model"]) == names["method"]
    assert capsys.readouterr().out == f"{12 * (2 * 384 * 16 + 16 + 384)}\n"
    assert (in_tmp_path / "my-adapter" / "method.safetensors").is_file()
