"""The code follows the table "Who may use whom" in docs/architecture.md."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "lora_ext"
DOCUMENT = ROOT / "docs" / "architecture.md"
EVERYWHERE = {*sys.stdlib_module_names, "torch"}
CALLS_OPS = ("_ops/", "functional.py", "merging/")
SEE = 'see the table "Who may use whom" in docs/architecture.md'


def table() -> list[tuple[list[str], set[str], set[str]]]:
    """The rows: parts, the parts they import from, other packages."""
    section = DOCUMENT.read_text(encoding="utf-8").split("## Who may use whom")[1].split("\n## ")[0]
    rows = [line.strip("|").split("|") for line in section.splitlines() if line.startswith("| `")]
    names = re.compile(r"`([^`]+)`")
    return [(names.findall(part), set(names.findall(uses)), set(others.split())) for part, _, uses, others in rows]


ROWS = table()
PARTS = {part: number for number, (parts, _, _) in enumerate(ROWS) for part in parts}


def part_of(file: str) -> str:
    """The row's name for a file of the package: itself, or its folder."""
    return file if file in PARTS else f"{file.split('/')[0]}/"


def files_of(module: str, names: list[str]) -> Iterator[str]:
    """The files of the package behind ``from module import names``."""
    path = module.removeprefix("lora_ext").strip(".").replace(".", "/")
    for name in names:
        longer = f"{path}/{name}".strip("/")
        candidates = (f"{longer}.py", f"{longer}/__init__.py", f"{path}.py", f"{path}/__init__.py".strip("/"))
        file = next((candidate for candidate in candidates if (PACKAGE / candidate).is_file()), None)
        if file is not None:
            yield file


def imports(tree: ast.AST) -> Iterator[tuple[str, list[str]]]:
    """Returns ``(module, names)`` for every import that runs, at any depth."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        if isinstance(node, ast.Import):
            yield from ((alias.name, [""]) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "a relative import"
            yield node.module or "", [alias.name for alias in node.names]
        yield from imports(node)


def violations(file: str, source: str) -> list[str]:
    """Returns the imports of ``file`` that the table does not allow."""
    part = part_of(file)
    if part not in PARTS:
        return [f"{file}: {part} has no row"]
    _, uses, others = ROWS[PARTS[part]]
    found = []
    for module, names in imports(ast.parse(source)):
        package = module.split(".")[0]
        if package == "lora_ext":
            used = {part_of(target) for target in files_of(module, names)}
            found += [
                f"{file}: {module} ({name})" for name in used if name not in uses and PARTS.get(name) != PARTS[part]
            ]
        elif package not in EVERYWHERE | others:
            found.append(f"{file}: {module}")
    return found


def sources() -> dict[str, str]:
    """The package's files that hold more than a docstring."""
    files = {path.relative_to(PACKAGE).as_posix(): path.read_text(encoding="utf-8") for path in PACKAGE.rglob("*.py")}
    return {file: source for file, source in sorted(files.items()) if len(ast.parse(source).body) > 1}


SOURCES = sources()


def test_the_table_is_about_this_tree():
    assert len(SOURCES) > 100
    for part in PARTS:
        assert (PACKAGE / part).exists(), f"lora_ext/{part} does not exist; {SEE}"
    without_row = [file for file in SOURCES if part_of(file) not in PARTS]
    assert not without_row, f"give these files or their folders a row; {SEE}"
    assert {part_of(file) for file in SOURCES} == set(PARTS), f"a row is about no file; {SEE}"


def test_every_part_is_below_those_that_use_it():
    for number, (parts, uses, _) in enumerate(ROWS):
        for used in uses:
            assert PARTS[used] < number, f"{parts} uses {used}, which is no row above it"


def test_imports_are_those_of_the_table():
    found = [violation for file, source in SOURCES.items() for violation in violations(file, source)]
    assert not found, f"imports that the row of the importing part does not list; {SEE}"


def circles(files: dict[str, str]) -> set[str]:
    """Returns the folders, and files outside folders, that import themselves by way of others."""
    uses: dict[str, set[str]] = {}
    for file, source in files.items():
        for module, names in imports(ast.parse(source)):
            if module.split(".")[0] == "lora_ext":
                targets = {target.split("/")[0] for target in files_of(module, names)}
                uses.setdefault(file.split("/")[0], set()).update(targets - {file.split("/")[0]})
    while uses:
        ends = {part for part, used in uses.items() if not used & uses.keys()}
        if not ends:
            break
        uses = {part: used for part, used in uses.items() if part not in ends}
    return set(uses)


def test_no_folder_imports_itself_by_way_of_others():
    assert circles(SOURCES) == set()
    planted = SOURCES | {"model/saver.py": "from lora_ext.files.save_load import save_adapter"}
    assert {"model", "files"} <= circles(planted)


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("nn/linear.py", "from lora_ext.injection.inject import inject"),
        ("functional.py", "from lora_ext import nn"),
        ("nn/linear.py", "def f():\n    import lora_ext.commands.results"),
        ("checkpoints/ties.py", "import transformers"),
        ("files/reading.py", "from lora_ext.adapters import set_adapter"),
        ("strange.py", "import os"),
    ],
)
def test_imports_outside_the_table_are_found(file, line):
    assert violations(file, line)


def test_ops_are_called_at_the_bottom():
    callers = [file for file, source in SOURCES.items() if re.search(r"torch\.ops\.lora_ext\.\w", source)]
    others = [file for file in callers if part_of(file) not in CALLS_OPS]
    assert not others, "call the function of lora_ext/functional.py instead of torch.ops.lora_ext"
    assert {part_of(file) for file in callers} == set(CALLS_OPS)


def test_kernels_include_no_torch_header():
    torch_header = re.compile(r'#include [<"](torch|ATen|c10)/')
    folders = {
        path.relative_to(ROOT / "csrc").parts[0]
        for path in (ROOT / "csrc").rglob("*.*")
        if path.is_file() and torch_header.search(path.read_text(encoding="utf-8"))
    }
    assert folders == {"bindings", "library.cpp"}


def maps() -> dict[Path, set[str]]:
    """The folders whose ``__init__.py`` lists their files, and the names in these lists."""
    found = {}
    for init in PACKAGE.rglob("__init__.py"):
        docstring = ast.get_docstring(ast.parse(init.read_text(encoding="utf-8"))) or ""
        lists = [line for line in docstring.splitlines() if line.startswith(("- ", "  "))]
        if any(line.startswith("- ") for line in lists):
            found[init.parent] = set(re.findall(r"``(\w+)``", "\n".join(lists)))
    return found


def test_lists_of_files_are_complete():
    assert maps()
    for folder, named in maps().items():
        modules = {path.stem for path in folder.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
        unlisted = modules - named - {"__init__"}
        assert not unlisted, f"name it, and what it is for, in the docstring of {folder / '__init__.py'}"
