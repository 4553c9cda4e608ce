"""Settings of a run of seconds, for test files without their own."""

from __future__ import annotations

import pytest
from support import tiny_classifier

from lora_ext.tasks.finetune.settings import Settings


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    return Settings(
        **tiny_classifier.save(tmp_path_factory.mktemp("tiny")),
        target_modules="query,value",
        r=4,
        lora_alpha=8,
        epochs=6,
        batch_size=16,
        learning_rate=2e-2,
        max_length=32,
    )
