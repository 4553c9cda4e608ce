"""lora_ext/tasks uses the library as a user does: what it imports of it is public."""

from __future__ import annotations

import ast
import importlib
from collections.abc import Iterator
from pathlib import Path

from support.processes import run_python

import lora_ext

PACKAGE = Path(lora_ext.__file__).parent
EXCEPTIONS = {
    "lora_ext._common.embeddings": "what a model answers is asked in one place",
    "lora_ext._common.install_hint": "how to install what a command needs",
    "lora_ext._common.printable": "messages name foreign things in one way",
    "lora_ext._common.progress": "one display for all commands",
    "lora_ext.info": "a public module: what was built",
    "lora_ext.methods.prefix_embed": "isinstance of a module whose tokens take positions from the text",
}


def imported(path: Path) -> Iterator[tuple[str, str]]:
    """``(module, name)`` for each import from lora_ext in a file."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "lora_ext":
            yield from ((node.module, alias.name) for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names if alias.name.split(".")[0] == "lora_ext")


def test_tasks_import_public_names_only():
    used, wrong = set(), []
    for path in sorted((PACKAGE / "tasks").rglob("*.py")):
        for module, name in imported(path):
            if module.startswith("lora_ext.tasks"):
                continue
            full = module if module in EXCEPTIONS else f"{module}.{name}"
            if full in EXCEPTIONS:
                used.add(full)
            elif name not in getattr(importlib.import_module(module), "__all__", ()) or "._" in module:
                wrong.append(f"{path.relative_to(PACKAGE)}: {module}.{name}")
            elif module != "lora_ext" and not hasattr(importlib.import_module(module), "__path__"):
                wrong.append(f"{path.relative_to(PACKAGE)}: {module} is no package")
    assert not wrong
    assert used == EXCEPTIONS.keys()


def test_the_library_and_its_reading_interface_import_nothing_heavy():
    heavy = {"transformers", "matplotlib", "torch._dynamo", "torch.distributed.tensor"}
    code = f"import sys, lora_ext, lora_ext.checkpoints; print({heavy} & {{*sys.modules}})"
    done = run_python("-c", code)
    assert done.stdout == "set()\n", done.stderr
