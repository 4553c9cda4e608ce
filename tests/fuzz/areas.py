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
    "adapter_files": "adapters and saved methods on disk, with changes in their files",
    "checkpoints": "checkpoints and records of merges on disk, with changes in their files",
    "data_files": "labelled texts as CSV, TSV and JSONL, with changes, as finetune reads them",
}
OF_FILES = [area for area in AREAS if area.endswith("_files") or area == "checkpoints"]
# Number of cases of each area in `make test` and in `make test-full`, from the seeds 0, 1, 2 ...
FIXED_CASES = {
    "ops": (1700, 5000),
    "values": (1250, 2500),
    "models": (130, 400),
    "adapter_files": (350, 350),
    "checkpoints": (350, 350),  # fewer do not read with every function
    "data_files": (250, 800),
}


def make_case(area: str, choices: Choices) -> Case:
    if area in OF_FILES:
        return importlib.import_module("fuzz.area_files").make(area, choices)
    return importlib.import_module(f"fuzz.area_{area}").make(choices)
