"""A pytest plugin that hides every installed package that a GPU machine may lack: ``pytest -p support.gpu_machine``.

It leaves :data:`INSTALLED`, what they require, and the wheels of CUDA. Imports of other packages fail, and
their metadata is not found, as if they were not installed.
"""

from __future__ import annotations

import importlib.metadata
import re
import sys

INSTALLED = ("torch", "setuptools", "ninja", "pybind11", "pytest", "pytest-xdist", "peft", "transformers")
INSTALLED_MODULES = {"lora_ext", "nvidia"}  # nvidia: the wheels of CUDA


def _key(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def with_requirements(names: tuple[str, ...]) -> set[str]:
    """Returns the names of these distributions and of all that they require, without extras."""
    found, waiting = set(), [_key(name) for name in names]
    while waiting:
        if (name := waiting.pop()) in found:
            continue
        found.add(name)
        try:
            requirements = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            continue
        waiting += [_key(re.match(r"[\w.-]+", r)[0]) for r in requirements if not re.search(r"\bextra\s*==", r)]
    return found


class Hiding:
    """A finder of modules and metadata that does not find the hidden ones."""

    def __init__(self, finder, modules: set[str], installed: set[str]) -> None:
        self.finder, self.modules, self.installed = finder, modules, installed

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in self.modules:
            return None
        return self.finder.find_spec(name, path, target)

    def find_distributions(self, *args, **kwargs):
        find = getattr(self.finder, "find_distributions", lambda *args, **kwargs: ())
        return (found for found in find(*args, **kwargs) if _key(found.name) in self.installed)

    def __getattr__(self, name: str):
        return getattr(self.finder, name)


def hide() -> set[str]:
    """Hides the packages from here on; returns the names of the hidden modules."""
    installed = with_requirements(INSTALLED)
    modules = {
        module
        for module, names in importlib.metadata.packages_distributions().items()
        if module not in INSTALLED_MODULES and not {_key(name) for name in names} & installed
    }
    sys.meta_path[:] = [Hiding(finder, modules, installed) for finder in sys.meta_path]
    return modules


hide()
