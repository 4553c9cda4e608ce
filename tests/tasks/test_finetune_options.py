"""Tests what ``plan`` recommends to ``finetune``, ``--set``, and files for validation and test."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support import tiny_classifier
from support.command_lines import parsed, silent
from transformers import BertForSequenceClassification, GPT2Config, GPT2Model

from lora_ext import cli
from lora_ext.tasks import TaskError
from lora_ext.tasks.comparison.costs import measure_costs
from lora_ext.tasks.comparison.method_spec import MethodSpec
from lora_ext.tasks.finetune import extra_arguments
from lora_ext.tasks.finetune.data import read_examples
from lora_ext.tasks.finetune.run import finetune
from lora_ext.tasks.finetune.settings import Settings, checked_options, command_line
from lora_ext.tasks.finetune.task_data import load_data
from lora_ext.tasks.finetune.task_model import adapt, load_model
from lora_ext.tasks.finetune.training_arguments import training_arguments

pytestmark = [pytest.mark.cpu_only("the Trainer chooses the device"), pytest.mark.full]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    """Settings of runs whose model has no dropout; 64 texts are for training."""
    directory = tmp_path_factory.mktemp("tiny")
    rows = list(dict(tiny_classifier.reviews(200)).items())[:80]
    return Settings(
        model=str(tiny_classifier.save_model(directory / "model", **tiny_classifier.NO_DROPOUT)),
        data=str(tiny_classifier.save_reviews(directory / "reviews.csv", rows)),
        target_modules="query,value",
        r=4,
        lora_dropout=0.0,
        epochs=2,
        batch_size=16,
        learning_rate=1e-2,
        max_length=32,
    )


def trained(settings: Settings, out: Path) -> dict[str, torch.Tensor]:
    finetune(settings, out, measure=False, say=silent)
    (file,) = [*out.glob("adapter/*.safetensors"), *out.glob("model/*.safetensors")]
    return load_file(file)


def history(out: Path) -> list[dict[str, float]]:
    last = max(out.glob("checkpoints/*"), key=lambda path: int(path.name.rpartition("-")[2]))
    return json.loads((last / "trainer_state.json").read_text())["log_history"]


# --- accumulation, checkpointing, 16-bit weights ----------------------------------------------------------------------


def test_accumulated_batches_are_one_larger_batch(tiny: Settings, tmp_path: Path):
    whole = trained(tiny, tmp_path / "whole")
    parts = trained(replace(tiny, batch_size=4, accumulation_steps=4), tmp_path / "parts")
    torch.testing.assert_close(parts, whole, rtol=1e-3, atol=1e-5)
    for one, other in zip(history(tmp_path / "whole"), history(tmp_path / "parts"), strict=True):
        assert one["step"] == other["step"] and one.keys() == other.keys()  # evaluated after the same steps
        for key in {"loss", "eval_loss", "learning_rate"} & one.keys():
            assert other[key] == pytest.approx(one[key], rel=1e-4)
    whole, parts = (json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("whole", "parts"))
    assert parts["after"] == whole["after"]


def test_the_last_step_of_an_epoch_has_the_rest(tiny: Settings, tmp_path: Path):
    """64 texts in batches of 5, three a step: 13 batches, 5 steps; the last has one batch of 4."""
    metrics = finetune(replace(tiny, batch_size=5, accumulation_steps=3), tmp_path, measure=False, say=silent)
    assert metrics["examples"]["train"] == 64
    evaluated = [entry["step"] for entry in history(tmp_path) if "eval_loss" in entry]
    assert evaluated == [5, 10]


@pytest.mark.parametrize("method", ["lora", "full", "bitfit", "adapter-h+prefix-layer", "prefix-embed"])
def test_checkpointing_changes_no_bit(tiny: Settings, tmp_path: Path, method: str):
    settings = replace(tiny.with_method(method), epochs=1)
    if method == "lora":
        settings = replace(settings, lora_dropout=0.3)  # the second computation draws the same masks
    plain = trained(settings, tmp_path / "no")
    for kind in ("non-reentrant", "reentrant"):
        again = trained(replace(settings, gradient_checkpointing=kind), tmp_path / kind)
        assert all(torch.equal(again[name], plain[name]) for name in plain), kind


@pytest.mark.parametrize("kind", ["no", "non-reentrant", "reentrant"])
def test_checkpointed_layers_are_computed_twice(tiny: Settings, kind: str):
    model = load_model(tiny.model, ["neg", "pos"], 32).model
    adapt(model, replace(tiny, gradient_checkpointing=kind), tiny.model)
    calls = []
    model.bert.encoder.layer[0].attention.register_forward_hook(lambda *args: calls.append(1))
    ids = torch.randint(4, 10, (2, 5))
    model.train()(input_ids=ids, labels=torch.tensor([0, 1])).loss.backward()
    assert len(calls) == (1 if kind == "no" else 2)
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    assert model.base_model.encoder.layer[0].attention.self.query.adapters["default"].lora_B.grad.abs().max() > 0


def test_a_model_without_checkpointing_is_refused(tiny: Settings, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(BertForSequenceClassification, "supports_gradient_checkpointing", False)
    with pytest.raises(TaskError, match="--gradient-checkpointing: BertForSequenceClassification does not support it"):
        finetune(replace(tiny, gradient_checkpointing="reentrant"), tmp_path / "out", say=silent)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("method", ["lora", "full", "bitfit", "adapter-h+prefix-layer", "prefix-embed", "head-only"])
def test_weights_of_16_bits(tiny: Settings, tmp_path: Path, method: str):
    settings = tiny.with_method(method)
    plain = trained(settings, tmp_path / "plain")
    for precision in ("float32", "bfloat16"):
        weights = trained(replace(settings, dtype="bfloat16", precision=precision), tmp_path / precision)
        assert weights.keys() == plain.keys()
        new = {"lora": "lora_", "adapter-h+prefix-layer": "adapter_"}.get(method, "classifier")
        dtypes = {name: tensor.dtype for name, tensor in weights.items() if new in name or "classifier" in name}
        assert dtypes and set(dtypes.values()) == {torch.float32}
        losses = [
            [entry[key] for entry in history(tmp_path / out) for key in ("loss", "eval_loss") if key in entry]
            for out in ("plain", precision)
        ]
        assert losses[1] == pytest.approx(losses[0], rel=0.02), precision
        assert losses[1] != losses[0], precision


def test_frozen_weights_have_the_dtype_and_the_run_measures_and_resumes(tiny: Settings, tmp_path: Path):
    model = load_model(tiny.model, ["neg", "pos"], 32, "bfloat16").model
    adapt(model, tiny, tiny.model)
    frozen = {p.dtype for name, p in model.named_parameters() if not p.requires_grad and "classifier" not in name}
    assert frozen == {torch.bfloat16}
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    settings = replace(tiny, dtype="bfloat16", modules_to_save="pooler")
    metrics = finetune(settings, tmp_path / "out", say=silent)
    assert metrics["merged"]["same_answers"] == metrics["merged"]["texts"]
    assert finetune(settings, tmp_path / "out", resume=True, measure=False, say=silent)["after"] == metrics["after"]


def test_a_decoder_with_all_of_them(tiny: Settings, tmp_path: Path):
    tiny_classifier.save_tokenizer(tmp_path / "model")
    words = len(tiny_classifier.VOCABULARY)
    GPT2Model(GPT2Config(vocab_size=words, n_positions=32, n_embd=16, n_layer=2, n_head=2)).save_pretrained(
        tmp_path / "model"
    )
    settings = replace(
        tiny,
        model=str(tmp_path / "model"),
        target_modules="all-linear",
        dtype="bfloat16",
        precision="bfloat16",
        batch_size=8,
        accumulation_steps=8,  # a step is an epoch: the losses are those of all texts
        epochs=8,
        gradient_checkpointing="reentrant",
    )
    trained(settings, tmp_path / "out")
    losses = [entry["loss"] for entry in history(tmp_path / "out") if "loss" in entry]
    assert losses[-1] < losses[0] - 0.05


# --- --set ------------------------------------------------------------------------------------------------------------


def test_values_get_the_types_of_the_fields(tiny: Settings, tmp_path: Path):
    text = extra_arguments.merged(
        "weight_decay=0.5",
        "weight_decay=0.25",
        "adam_beta2=0.95",
        "max_grad_norm=0",
        "optim=adamw_torch",
        "lr_scheduler_type=cosine",
        'lr_scheduler_kwargs={"num_cycles": 0.25}',
        "neftune_noise_alpha=none",
        "torch_compile=false",
        "max_steps=7",
    )
    arguments = training_arguments(replace(tiny, set=text), tmp_path, 64)
    assert (arguments.weight_decay, arguments.adam_beta2, arguments.max_grad_norm) == (0.25, 0.95, 0.0)
    assert arguments.lr_scheduler_type == "cosine" and arguments.lr_scheduler_kwargs == {"num_cycles": 0.25}
    assert arguments.neftune_noise_alpha is None and arguments.torch_compile is False
    assert (arguments.max_steps, arguments.warmup_steps) == (7, 1)  # a tenth of the steps


def test_set_reaches_the_run(tiny: Settings, tmp_path: Path):
    plain = trained(tiny, tmp_path / "plain")
    decayed = trained(replace(tiny, set="weight_decay=5.0"), tmp_path / "decayed")
    name = next(name for name in plain if "lora_A" in name)
    assert decayed[name].norm() < 0.9 * plain[name].norm()
    metrics = finetune(replace(tiny, set="max_steps=3"), tmp_path / "short", measure=False, say=silent)
    assert [entry["step"] for entry in history(tmp_path / "short") if "loss" in entry] == [1, 2, 3]
    at = metrics["command"].index("--set")
    assert metrics["command"][at : at + 2] == ["--set", "max_steps=3"]


@pytest.mark.parametrize(
    ("item", "message"),
    [
        ("weight_decay", "--set 'weight_decay', want NAME=VALUE, such as weight_decay=0.01"),
        ("=3", "--set '=3', want NAME=VALUE"),
        ("weigth_decay=0.1", "no such field; close matches: 'weight_decay'"),
        ("weight_decay=much", "--set weight_decay is 'much', want a number"),
        ("weight_decay=nan", "--set weight_decay is 'nan', want at least 0"),
        ("neftune_noise_alpha=-5", "--set neftune_noise_alpha is '-5', want at least 0"),
        ("max_steps=-5", "--set max_steps is '-5', want at least 1"),
        ("max_steps=0", "--set max_steps is '0', want at least 1"),
        ("adam_beta1=2", "--set adam_beta1=2: Invalid beta parameter"),
        (
            "dataloader_persistent_workers=true",
            "persistent_workers option needs num_workers > 0",
        ),
        ("eval_accumulation_steps=0", "--set eval_accumulation_steps is '0', want at least 1"),
        ("per_device_eval_batch_size=0", "--set per_device_eval_batch_size=0: batch_size should be a positive integer"),
        ("torch_compile_backend=quick", "--set torch_compile_backend=quick: .*[Ii]nvalid backend"),
        ("torch_compile_mode=quick", "--set torch_compile_mode=quick: Unrecognized mode=quick"),
        ("max_steps=1.5", "--set max_steps is '1.5', want an integer"),
        ("torch_compile=perhaps", "--set torch_compile is 'perhaps', want true or false"),
        ("lr_scheduler_kwargs={", "--set lr_scheduler_kwargs is '{', which is not JSON"),
        ("optim=adamm", "adamm is not a valid OptimizerNames"),
        ("optim=galore_adamw", "--set optim=galore_adamw: .*install.*galore_torch"),
        ("lr_scheduler_type=wavy", "wavy is not a valid SchedulerType"),
        ("lr_scheduler_type=reduce_lr_on_plateau", "--set lr_scheduler_type=reduce_lr_on_plateau: "),
        ("learning_rate=0.1", "--set learning_rate: use --learning-rate"),
        ("gradient_accumulation_steps=2", "--set gradient_accumulation_steps: use --accumulation-steps"),
        ("gradient_checkpointing=true", "--set gradient_checkpointing: use --gradient-checkpointing"),
        ("bf16=true", "--set bf16: use --precision bfloat16"),
        ("output_dir=x", "--set output_dir: use --out"),
        ("save_strategy=epoch", "--set save_strategy: not possible, because a run writes, keeps and resumes"),
        ("save_total_limit=1", "--set save_total_limit: not possible, because a run writes"),
        ("logging_steps=1", "--set logging_steps: not possible, because a run decides itself when it evaluates"),
        ("load_best_model_at_end=true", "--set load_best_model_at_end: use --best-metric"),
        ("bf16_full_eval=true", "--set bf16_full_eval: not possible, because an evaluation would round"),
        ("train_sampling_strategy=random", "not possible, because a run groups texts of similar lengths itself"),
        ("dataloader_drop_last=true", "--set dataloader_drop_last: not possible, because the scores need all texts"),
        ("fsdp=full_shard", "--set fsdp: not possible, because a run is one process, or as many as torchrun starts"),
        ("ddp_backend=gloo", "--set ddp_backend: not possible, because a run is one process"),
    ],
)
def test_what_set_refuses(tiny: Settings, tmp_path: Path, capsys, item: str, message: str):
    options = ["--model", tiny.model, "--data", tiny.data, "--max-length", "32", "--out", str(tmp_path / "out")]
    assert cli.main(["finetune", *options, "--set", item]) == 2
    error = " ".join(capsys.readouterr().err.split())
    assert error.startswith("lora-ext: error: ") and "Traceback" not in error
    assert re.search(message.replace("{", "\\{"), error), error
    assert not (tmp_path / "out").exists()


def test_two_schedules_contradict(tiny: Settings, tmp_path: Path):
    with pytest.raises(TaskError, match="--set lr_scheduler_type and --schedule constant contradict"):
        finetune(replace(tiny, schedule="constant", set="lr_scheduler_type=cosine"), tmp_path / "out", say=silent)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"accumulation_steps": 0}, "--accumulation-steps is 0, want a finite number above 0"),
        ({"gradient_checkpointing": "yes"}, "--gradient-checkpointing is 'yes', want one of no, non-reentrant, reent"),
        ({"dtype": "float16"}, "--dtype is 'float16', want one of float32, bfloat16: gradients in float16 underflow"),
        ({"dtype": "int4"}, "--dtype is 'int4', want one of float32, bfloat16$"),
        ({"data": None, "test_file": "x.csv"}, "--test-file goes with --data"),
        ({"data": None, "validation_file": "x.csv"}, "--validation-file goes with --data"),
        ({"set": "a='b"}, "--set a='b: No closing quotation"),
    ],
)
def test_what_settings_refuse(tiny: Settings, changes: dict[str, Any], message: str):
    with pytest.raises(TaskError, match=message):
        replace(tiny, **changes)


def test_the_recorded_command_starts_the_same_run(tiny: Settings):
    settings = replace(
        tiny,
        accumulation_steps=4,
        gradient_checkpointing="reentrant",
        dtype="bfloat16",
        validation_file="v.csv",
        test_file="t.csv",
        set=extra_arguments.merged("", 'lr_scheduler_kwargs={"a b": 1}', "weight_decay=0.1"),
    )
    command = command_line("finetune", asdict(settings), Path("some where"))
    again = cli.training.options_of(parsed(*command[2:]))
    inputs = {name: str(Path(getattr(settings, name)).resolve()) for name in ("validation_file", "test_file")}
    assert Settings(**again) == replace(settings, **inputs)
    assert cli.training.options_of(parsed("--gradient-checkpointing", "--out", "x"))["gradient_checkpointing"] == (
        "non-reentrant"
    )


def test_settings_of_earlier_releases(tiny: Settings):
    old = {name: value for name, value in asdict(tiny).items() if name in ("model", "data", "r")}
    assert checked_options(old | {"eval_file": "x.csv"}) == old | {"test_file": "x.csv"}


def test_compare_takes_them_by_method(tiny: Settings):
    spec = MethodSpec.parse("lora:accumulation-steps=2:set=adam_beta2=0.9:set=optim=adamw_torch:batch-size=4")
    options = {"model": tiny.model, "set": "weight_decay=0.1 adam_beta2=0.99"}
    settings = spec.settings(options, 0)
    assert (settings.accumulation_steps, settings.texts_per_step) == (2, 8)
    assert extra_arguments.items(settings.set) == ["weight_decay=0.1", "adam_beta2=0.9", "optim=adamw_torch"]
    with pytest.raises(TaskError, match="dtype is the same for all; give --dtype"):
        MethodSpec.parse("lora:dtype=bfloat16")
    accumulated = replace(tiny, batch_size=2, accumulation_steps=3, gradient_checkpointing="reentrant")
    costs = measure_costs({"plain": tiny, "accumulated": accumulated})
    assert costs["accumulated"]["step_ms"]["median"] > 0 < costs["plain"]["step_ms"]["median"]


@pytest.mark.parametrize("command", [["compare", "--methods", "lora"], ["sweep", "--ranks", "1", "--targets", "query"]])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--set", "weigth_decay=1"], "no such field; close matches: 'weight_decay'"),
        (["--set", "optim=adamm"], "adamm is not a valid OptimizerNames"),
        (["--set", "save_steps=1"], "--set save_steps: not possible"),
        (["--gradient-checkpointing"], "BertForSequenceClassification does not support it"),
    ],
)
def test_mistakes_are_found_before_the_first_run(tiny, tmp_path, capsys, monkeypatch, command, options, message):
    monkeypatch.setattr(BertForSequenceClassification, "supports_gradient_checkpointing", False)
    inputs = ["--model", tiny.model, "--data", tiny.data, "--max-length", "32", "--out", str(tmp_path / "out")]
    assert cli.main([*command, *inputs, *options]) == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "out").exists()


# --- files for validation and test ------------------------------------------------------------------------------------


def test_files_for_validation_and_test_share_no_text(tiny: Settings, tmp_path: Path):
    rows = list(dict(tiny_classifier.reviews(200, seed=3)).items())[:60]
    train = tiny_classifier.save_reviews(tmp_path / "train.csv", [*rows[:40], (rows[0][0].upper(), rows[0][1])])
    validation = tiny_classifier.save_reviews(tmp_path / "validation.csv", rows[30:50])
    test = tiny_classifier.save_reviews(tmp_path / "test.csv", [rows[0], *rows[45:60]])
    settings = replace(tiny, data=str(train), validation_file=str(validation), test_file=str(test))
    said: list[str] = []
    splits = load_data(settings, said.append)
    texts = [{" ".join(example.text.lower().split()) for example in split} for split in splits]
    assert not (texts[0] & texts[1] or texts[0] & texts[2] or texts[1] & texts[2])
    assert [len(split) for split in splits] == [29, 15, 16]  # test keeps all, validation the rest of its own
    assert said[:3] == [
        f"{train}: 2 texts are left out, because {test} has them, too",
        f"{validation}: 5 texts are left out, because {test} has them, too",
        f"{train}: 10 texts are left out, because {validation} has them, too",
    ]
    metrics = finetune(replace(settings, epochs=1), tmp_path / "out", measure=False, say=silent)
    assert metrics["examples"] == {"train": 29, "validation": 15, "test": 16}
    assert metrics["validation"] is not None

    only = load_data(replace(settings, test_file=None, test_split=0.25), silent)
    assert len(only.validation) == 20 and len(only.train) + len(only.test) == 31 and len(only.test) in (8, 9)
    same = replace(settings, validation_file=str(test))
    with pytest.raises(TaskError, match=r"test.csv: .*test.csv has all its texts; want others"):
        load_data(same, silent)
    with pytest.raises(TaskError, match=r"nowhere.csv: cannot be read"):
        load_data(replace(settings, validation_file="nowhere.csv"), silent)
    other = tiny_classifier.save_reviews(tmp_path / "other.csv", [("a film", "unknown")])
    with pytest.raises(TaskError, match=r"labels \[unknown\] occur in the validation texts only"):
        load_data(replace(settings, validation_file=str(other)), silent)
    assert len(read_examples(train)) == 41


def test_inputs_are_kept_from_overwriting_and_found_from_elsewhere(tiny: Settings, tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = cli.training.options_of(parsed("--validation-file", "v.csv", "--eval-file", "t.csv", "--out", "x"))
    assert (options["validation_file"], options["test_file"]) == (str(tmp_path / "v.csv"), str(tmp_path / "t.csv"))
