"""Mistakes of finetune are found before anything is written, and directories are guarded."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support import tiny_classifier

from lora_ext.tasks import TaskError, WriteError
from lora_ext.tasks.finetune.run import finetune
from lora_ext.tasks.finetune.settings import Settings

pytestmark = [pytest.mark.cpu_only("the Trainer chooses the device"), pytest.mark.full]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"target_modules": "qeury,value_proj"}, "close matches: 'query'"),
        ({"r": 0}, "LoraConfig: r is 0"),
        ({"lora_dropout": 1.0}, "LoraConfig: lora_dropout is 1.0"),
        ({"max_length": 64}, "--max-length is 64, but .* takes at most 32 tokens"),
        ({"text_column": "body"}, "no column 'body' but text, label"),
        ({"test_split": 0.0}, "no text is left for testing; raise --test-split, or name a --test-file"),
        ({"model": "/nowhere/model"}, "--model /nowhere/model cannot be loaded"),
    ],
)
def test_mistakes_are_found_before_anything_is_written(
    tiny: Settings, tmp_path: Path, changes: dict[str, Any], message: str
):
    with pytest.raises(TaskError, match=message):
        finetune(replace(tiny, **changes), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([("a film", "pos"), ("a plot", "pos")] * 10, "has the label 'pos'; a classifier needs at least two"),
        ([], "holds no examples"),
    ],
)
def test_data_that_cannot_train_a_classifier(tiny: Settings, tmp_path: Path, rows: list[tuple[str, str]], message: str):
    data = tiny_classifier.save_reviews(tmp_path / "data.csv", [(f"{text} {i}", y) for i, (text, y) in enumerate(rows)])
    with pytest.raises(TaskError, match=message):
        finetune(replace(tiny, data=str(data)), tmp_path / "out")


def test_texts_that_leave_no_room_for_special_tokens(tiny: Settings, tmp_path: Path):
    settings = replace(tiny.with_method("prefix-embed"), prefix_length=26, infix_length=1)
    message = r"a text has \d+ tokens, but the model has 32 positions .* takes 27 of them; want --max-length 5, or"
    with pytest.raises(TaskError, match=message):
        finetune(settings, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["adapter_config.json", "method.json"])
def test_an_adapter_is_no_model(tiny: Settings, tmp_path: Path, name: str):
    (tmp_path / name).write_text('{"base_model_name_or_path": "the/base"}')
    tiny_classifier.save_tokenizer(tmp_path)  # with it, Transformers loads the base and the adapter
    with pytest.raises(TaskError, match=f"is an adapter, and no model .it holds {name}.; its base is the/base. Name"):
        finetune(replace(tiny, model=str(tmp_path)), tmp_path / "out")


def test_labels_that_only_the_test_file_has(tiny: Settings, tmp_path: Path):
    test_file = tiny_classifier.save_reviews(tmp_path / "test.csv", [("the plot is fine", "positive")])
    with pytest.raises(
        TaskError,
        match=r"labels \[positive\] occur in the test texts only, first in line 2; for training there are neg, pos",
    ):
        finetune(replace(tiny, test_file=str(test_file)), tmp_path / "out")


def test_the_output_directory_is_guarded(tiny: Settings, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory):
    finished = tmp_path_factory.mktemp("finished")
    finetune(replace(tiny, epochs=0.1), finished)
    with pytest.raises(TaskError, match="holds a run already; --resume continues it, --overwrite replaces it"):
        finetune(tiny, finished)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(
        TaskError, match="holds files that do not belong to a fine-tuning run; choose another directory"
    ):
        finetune(tiny, tmp_path, overwrite=True)
    (tmp_path / "project" / "model").mkdir(parents=True)
    (tmp_path / "project" / "model" / "weights").write_text("mine")
    for text in ('{"editor.fontSize": 12}', "[]", "// no JSON"):  # another program's, with a name like ours
        (tmp_path / "project" / "settings.json").write_text(text)
        for overwrite in (False, True):
            with pytest.raises(TaskError, match="project holds files that do not belong to a fine-tuning run; choose"):
                finetune(tiny, tmp_path / "project", overwrite=overwrite)
    assert (tmp_path / "project" / "model" / "weights").read_text() == "mine"
    shutil.rmtree(tmp_path / "project")
    with pytest.raises(TaskError, match="file is not a directory"):
        finetune(tiny, tmp_path / "file")
    with pytest.raises(WriteError, match=r"file/out cannot be written: Not a directory"):
        finetune(tiny, tmp_path / "file" / "out")
    with pytest.raises(TaskError, match="holds no run to continue: there is no settings.json"):
        finetune(tiny, tmp_path / "new", resume=True)
    with pytest.raises(TaskError, match="give one of them"):
        finetune(tiny, tmp_path, resume=True, overwrite=True)
    assert (tmp_path / "file").read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file"]


def test_resuming_with_other_texts_is_refused(tiny: Settings, tmp_path: Path):
    rows = tiny_classifier.reviews(60)
    data = tiny_classifier.save_reviews(tmp_path / "reviews.csv", rows)
    settings = replace(tiny, data=str(data), epochs=1)
    out = tmp_path / "out"
    metrics = finetune(settings, out)
    tiny_classifier.save_reviews(data, [*rows[:-1], ("the plot is fine", "neg")])
    with pytest.raises(TaskError, match=r"--resume: the texts are not those that the run in .*out was started with"):
        finetune(settings, out, resume=True)
    tiny_classifier.save_reviews(data, rows[::-1])  # the same ones
    assert finetune(settings, out, resume=True)["after"] == metrics["after"]


def test_overwrite_replaces_a_run_and_keeps_other_files(tiny: Settings, tmp_path: Path):
    finetune(replace(tiny.with_method("full"), epochs=1), tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    finetune(replace(tiny, epochs=1), tmp_path, overwrite=True)
    assert (tmp_path / "adapter").is_dir()
    assert not (tmp_path / "model").exists()
    assert (tmp_path / "notes.txt").read_text() == "mine"
