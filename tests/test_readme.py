"""The README's Python, run as printed but for the model's path."""

import re
from pathlib import Path

from lora_ext.adapters import lora_modules
from lora_ext.tasks import demo

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")


def test_the_python_of_the_readme_runs(tmp_path, monkeypatch):
    (code,) = re.findall(r"```python\n(.*?)```", README, re.S)
    assert '"path/or/id"' in code
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(compile(code.replace("path/or/id", str(demo.model_path())), "README.md", "exec"), names)
    assert (tmp_path / "my-adapter" / "adapter_model.safetensors").is_file()
    layers = dict(lora_modules(names["model"]))
    assert len(layers) == 12 and all(layer.is_merged for layer in layers.values())
    assert len(names["optimizer"].param_groups[0]["params"]) == 2 * 12 + 2
