"""Tests errors of libraries that write to a full disk; tests/faults has the rest."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.models import BPE

from lora_ext.tasks import WriteError
from lora_ext.tasks.shared.whole_files import writing

FULL = Path("/dev/full")
WRITERS = {
    "Python": lambda: FULL.write_text("a"),
    "safetensors": lambda: save_file({"a": torch.zeros(2)}, FULL / "a"),
    "tokenizers": lambda: Tokenizer(BPE()).save(str(FULL)),  # raises a plain Exception
}


@pytest.mark.skipif(not FULL.exists(), reason="the system has no /dev/full")
@pytest.mark.parametrize("writer", WRITERS)
def test_a_full_disk_is_a_write_error(writer):
    with (
        pytest.raises(WriteError, match=r"^x cannot be written: .*(No space left|Not a directory)"),
        writing(Path("x")),
    ):
        WRITERS[writer]()


def test_other_errors_are_none():
    with pytest.raises(KeyError), writing(Path("x")):
        raise KeyError("a")
