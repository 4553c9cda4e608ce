from __future__ import annotations

import dataclasses
import json
import pickle

import peft
import pytest

from lora_ext import LoraConfig


def peft_file(tmp_path, **settings) -> dict:
    """The adapter_config.json that PEFT writes for these settings."""
    peft.LoraConfig(**settings).save_pretrained(tmp_path)
    return json.loads((tmp_path / "adapter_config.json").read_text())


def test_defaults_are_those_of_peft():
    ours, theirs = LoraConfig(target_modules=["q"]), peft.LoraConfig(target_modules=["q"])
    for field in dataclasses.fields(ours):
        if field.name not in ("metadata", "target_modules"):
            assert getattr(ours, field.name) == getattr(theirs, field.name), field.name


def test_is_frozen_hashable_and_picklable():
    config = LoraConfig(target_modules=["q", "v"], modules_to_save=["head"])
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.r = 4
    assert hash(config) == hash(LoraConfig(target_modules=("q", "v"), modules_to_save=("head",)))
    assert pickle.loads(pickle.dumps(config)) == config
    with pytest.raises(ValueError, match="r is 0"):
        dataclasses.replace(config, r=0)


@pytest.mark.parametrize(
    ("settings", "error", "text"),
    [
        ({"r": 0}, ValueError, "r is 0, want an integer of at least 1"),
        ({"r": -3}, ValueError, "r is -3, want an integer of at least 1"),
        ({"r": 8.0}, TypeError, "r is 8.0 of type float, want an integer"),
        ({"r": True}, TypeError, "r is True of type bool, want an integer"),
        ({"r": "8"}, TypeError, "r is '8' of type str, want an integer"),
        ({"lora_alpha": 0}, ValueError, "lora_alpha is 0, want a positive finite number"),
        ({"lora_alpha": -1.0}, ValueError, "lora_alpha is -1.0, want a positive finite number"),
        ({"lora_alpha": float("nan")}, ValueError, "lora_alpha is nan, want a positive finite number"),
        ({"lora_alpha": float("inf")}, ValueError, "lora_alpha is inf, want a positive finite number"),
        ({"lora_alpha": "16"}, TypeError, "lora_alpha is '16' of type str, want a positive finite number"),
        ({"lora_alpha": True}, TypeError, "lora_alpha is True of type bool"),
        ({"lora_dropout": 1.0}, ValueError, "lora_dropout is 1.0, want 0 <= lora_dropout < 1"),
        ({"lora_dropout": -0.1}, ValueError, "lora_dropout is -0.1, want 0 <= lora_dropout < 1"),
        ({"lora_dropout": float("nan")}, ValueError, "lora_dropout is nan, want 0 <= lora_dropout < 1"),
        ({"lora_dropout": None}, TypeError, "lora_dropout is None of type NoneType"),
        ({"target_modules": None}, ValueError, 'target_modules is None; name the layers to adapt, e.g. ["query"'),
        ({"target_modules": []}, ValueError, "target_modules is empty; name at least one layer"),
        ({"target_modules": ""}, ValueError, "target_modules is empty; name at least one layer"),
        ({"target_modules": 3}, TypeError, "target_modules is 3 of type int, want a list of module names"),
        ({"target_modules": ["q", 3]}, TypeError, "target_modules has the entry 3, want non-empty strings"),
        ({"target_modules": ["q", ""]}, TypeError, "target_modules has the entry '', want non-empty strings"),
        ({"target_modules": "(q"}, ValueError, "target_modules is '(q', not a regular expression"),
        ({"exclude_modules": "(q"}, ValueError, "exclude_modules is '(q', not a regular expression"),
        ({"modules_to_save": "head"}, TypeError, "modules_to_save is the string 'head', want a list of module names"),
        ({"bias": "all"}, ValueError, "bias is 'all'; only bias=\"none\" is supported"),
        ({"fan_in_fan_out": True}, ValueError, "fan_in_fan_out is True, which is for Conv1D"),
        ({"use_rslora": 1}, TypeError, "use_rslora is 1, want True or False"),
        ({"inference_mode": None}, TypeError, "inference_mode is None, want True or False"),
        ({"init_lora_weights": "pissa"}, ValueError, "init_lora_weights is 'pissa', want True, False or \"gaussian\""),
        ({"init_lora_weights": 1}, ValueError, "init_lora_weights is 1, want True, False"),
        ({"task_type": "SEQ_CLASS"}, ValueError, "task_type is 'SEQ_CLASS', want None or one of CAUSAL_LM,"),
    ],
)
def test_bad_values_are_named(settings, error, text):
    with pytest.raises(error) as caught:
        LoraConfig(**{"target_modules": ["q"]} | settings)
    assert text in str(caught.value)


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["q", "v"], "modules_to_save": ["head"], "task_type": "SEQ_CLS", "inference_mode": True},
        {"target_modules": r".*\.q", "exclude_modules": ["a"], "r": 3, "lora_alpha": 1.5, "lora_dropout": 0.25},
        {"target_modules": "all-linear", "use_rslora": True, "init_lora_weights": "gaussian", "revision": "main"},
    ],
)
def test_a_file_of_peft_survives_reading_and_writing(settings, tmp_path):
    theirs = peft_file(tmp_path, **settings)
    config = LoraConfig.from_dict(theirs)
    for key, value in settings.items():
        if key != "revision":
            ours = getattr(config, key)
            assert (sorted(ours) if isinstance(ours, tuple) else ours) == value
    written = config.to_dict()
    assert json.loads(json.dumps(written)) == theirs
    assert LoraConfig.from_dict(written) == config
    assert peft.LoraConfig.from_peft_type(**written).to_dict() == peft.LoraConfig(**settings).to_dict()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("use_dora", True),
        ("rank_pattern", {"q": 4}),
        ("alpha_pattern", {"q": 4}),
        ("layers_to_transform", [0]),
        ("layers_to_transform", 0),
        ("lora_bias", True),
        ("layer_replication", [[0, 1]]),
        ("target_parameters", ["experts.weight"]),
        ("trainable_token_indices", [1]),
        ("invented_by_a_later_release", 0.5),
    ],
)
def test_settings_that_change_the_result_are_refused(key, value, tmp_path):
    theirs = peft_file(tmp_path, target_modules=["q"]) | {key: value}
    with pytest.raises(ValueError) as caught:
        LoraConfig.from_dict(theirs)
    assert f"{key}={value!r} not supported" in str(caught.value)


def test_every_unsupported_setting_is_listed():
    with pytest.raises(ValueError, match="use_dora=True, lora_bias=True not supported"):
        LoraConfig.from_dict({"peft_type": "LORA", "target_modules": ["q"], "use_dora": True, "lora_bias": True})


@pytest.mark.parametrize("value", [None, False, [], {}, ""])
def test_an_unknown_key_that_is_off_is_kept(value):
    config = LoraConfig.from_dict({"peft_type": "LORA", "target_modules": ["q"], "invented_later": value})
    assert config.to_dict()["invented_later"] == value


@pytest.mark.parametrize("peft_type", ["IA3", None])
def test_other_methods_are_refused(peft_type):
    with pytest.raises(ValueError, match=f"peft_type is {peft_type!r}, want 'LORA'"):
        LoraConfig.from_dict({"peft_type": peft_type, "target_modules": ["q"]})


def test_bias_of_a_file_is_refused():
    with pytest.raises(ValueError, match="bias is 'lora_only'"):
        LoraConfig.from_dict({"peft_type": "LORA", "target_modules": ["q"], "bias": "lora_only"})
