"""The fuzzers' areas by name. An area makes a case from choices and runs it."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass

from .choices import Choices
from .outcomes import Outcome


@dataclass
class Case:
    """A case that is ready to run: the function under test, the case as a program, and its run."""

    function: str
    source: str
    run: Callable[[], Outcome]


AREAS = {
    "ops": "every compiled op, and lora_ext.functional",
    "values": "LoraConfig, the layers of lora_ext.nn, lora_ext.analysis, methods' options",
    "models": "operations on whole models, and every public function of models and files",
    "files": "adapters and checkpoints on disk, with changes in their files",
}
# Number of cases of each area in `make test` and in `make test-full`, from the seeds 0, 1, 2 ...
FIXED_CASES = {
    "ops": (1700, 5000),
    "values": (1250, 2500),
    "models": (130, 400),
    "files": (350, 800),
}


def make_case(area: str, choices: Choices) -> Case:
    return importlib.import_module(f"fuzz.area_{area}").make(choices)
