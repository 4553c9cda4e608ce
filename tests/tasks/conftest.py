"""Settings of a run of seconds, for test files without their own; and what makes all runs shorter."""

from __future__ import annotations

from collections.abc import Iterator
from sys import modules

import pytest
from support import tiny_classifier

from lora_ext.tasks.finetune.settings import Settings
from lora_ext.tasks.shared.whole_files import write_whole


@pytest.fixture(scope="module", autouse=True)
def few_rounds_and_no_curves(request: pytest.FixtureRequest) -> Iterator[None]:
    """Times models in few rounds, and draws loss curves in files with ``DRAWS`` only: both take a quarter of a run."""
    with pytest.MonkeyPatch.context() as patch:
        if "lora_ext.tasks.finetune.run" in modules:  # its import takes seconds
            patch.setattr("lora_ext.tasks.finetune.run._SECONDS", 0.0)
            if not hasattr(request.module, "DRAWS"):
                draw = lambda path, figure: write_whole(path, b"a picture")  # noqa: E731
                patch.setattr("lora_ext.tasks.finetune.results.write_picture", draw)
        yield


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


@pytest.fixture
def every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Writes a checkpoint after every step and keeps them all."""
    for name, value in (("SECONDS", 0.0), ("_SHARE", 0.0), ("_KEPT", 100)):
        monkeypatch.setattr(f"lora_ext.tasks.finetune.run_checkpoints.{name}", value)
