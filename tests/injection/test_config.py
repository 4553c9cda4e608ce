"""LoraConfig has the defaults, keys and files of PEFT, and names bad values."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import pickle

import peft
import pytest
from peft.utils.other import get_pattern_key
from support.properties import given, settings, st

from lora_ext import LoraConfig
from lora_ext.config import FrozenDict, exact_patterns

pytestmark = pytest.mark.cpu_only("has no tensors")

# Fields that are no keys of PEFT's files.
NOT_OF_PEFT = ("metadata", "enable_lora")


def peft_file(tmp_path, **settings) -> dict:
    """The adapter_config.json that PEFT writes for these settings."""
    peft.LoraConfig(**settings).save_pretrained(tmp_path)
    return json.loads((tmp_path / "adapter_config.json").read_text())


def test_defaults_are_those_of_peft():
    ours, theirs = LoraConfig(target_modules=["q"]), peft.LoraConfig(target_modules=["q"])
    for field in dataclasses.fields(ours):
        if field.name not in (*NOT_OF_PEFT, "target_modules"):
            assert hasattr(theirs, field.name), f"{field.name}: PEFT has no such key; see NOT_OF_PEFT, and to_dict"
            assert getattr(ours, field.name) == getattr(theirs, field.name), field.name


def test_nested_values_are_frozen_hashable_copyable_and_picklable():
    config = LoraConfig(
        target_modules=["q", "v"],
        rank_pattern={"q": 4},
        alpha_pattern={"v": 2.5},
        trainable_token_indices={"embed": [1, 2]},
        enable_lora={"qkv": [True, False, True]},
        metadata={"revision": "main"},
    )
    for copied in (pickle.loads(pickle.dumps(config)), copy.deepcopy(config), copy.copy(config)):
        assert copied == config and hash(copied) == hash(config)
        assert copied.metadata == {"revision": "main"}
        assert (copied.rank_for("x.q"), copied.rank_for("v"), copied.alpha_for("v")) == (4, 8, 2.5)
        assert type(copied.rank_pattern) is FrozenDict
    assert config.trainable_token_indices == {"embed": (1, 2)} and config.enable_lora == {"qkv": (True, False, True)}
    for change in ("update", "pop", "clear", "setdefault", "popitem", "__setitem__", "__delitem__", "__ior__"):
        with pytest.raises(TypeError, match=r"cannot be changed; build another config with dataclasses\.replace"):
            getattr(config.rank_pattern, change)("q", 8)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.r = 4
    with pytest.raises(ValueError, match="r is 0"):
        dataclasses.replace(config, r=0)


NOT_WITH_DORA = ({"lora_bias": True}, {"target_parameters": ["0"]}, {"enable_lora": {"0": (True,)}})
WRONG = {
    TypeError: [
        ({"r": 8.0}, "r is 8.0 of type float, want an integer"),
        ({"lora_alpha": "16"}, "lora_alpha is '16' of type str, want a positive finite number"),
        ({"target_modules": 3}, "target_modules is 3 of type int, want a list of non-empty strings"),
        ({"target_modules": ["q", 3]}, "target_modules has the entry 3, want non-empty strings"),
        ({"modules_to_save": "head"}, "modules_to_save is 'head' of type str, want a list of non-empty strings"),
        ({"layers_to_transform": [0.0]}, "layers_to_transform has the entry 0.0, want whole numbers"),
        ({"layers_to_transform": True}, "layers_to_transform has the entry True, want whole numbers"),
        ({"rank_pattern": ["q"]}, "rank_pattern is ['q'] of type list, want a dict"),
        ({"rank_pattern": {"q": 2.0}}, "rank_pattern['q'] is 2.0 of type float, want an integer"),
        ({"trainable_token_indices": {"wte": 3}}, "trainable_token_indices['wte'] is 3 of type int, want a list"),
        ({"lora_bias": 1}, "lora_bias is 1, want one of True, False"),
        ({"init_lora_weights": 1}, "init_lora_weights is 1, want one of True, False, 'gaussian'"),
        ({"enable_lora": {"qkv": [1, 0, 1]}}, "enable_lora['qkv'] has the entry 1, want True and False"),
        ({"enable_lora": {"qkv": "TFT"}}, "enable_lora['qkv'] is 'TFT' of type str, want a list of True and False"),
        ({"base_model_name_or_path": 3}, "base_model_name_or_path is 3 of type int, want a string or None"),
        ({"metadata": "peft_version"}, "metadata is 'peft_version' of type str, want a dict"),
        ({"rank": 8}, "unexpected keyword argument 'rank'"),
    ],
    ValueError: [
        ({"r": 0}, "r is 0, want an integer of at least 1"),
        ({"lora_alpha": 0}, "lora_alpha is 0, want a positive finite number"),
        ({"lora_alpha": float("nan")}, "lora_alpha is nan, want a positive finite number"),
        ({"lora_dropout": 1.0}, "lora_dropout is 1.0, want 0 <= lora_dropout < 1"),
        ({"target_modules": None}, 'target_modules is None; name the layers to adapt, e.g. ["query"'),
        ({"target_modules": []}, "target_modules is (); name the layers to adapt"),
        ({"target_modules": ["q", ""]}, "target_modules has the entry '', want non-empty strings"),
        ({"target_modules": "(q"}, "target_modules is '(q', not a regular expression"),
        ({"exclude_modules": "(q"}, "exclude_modules is '(q', not a regular expression"),
        ({"layers_pattern": ["(h"], "layers_to_transform": 0}, "layers_pattern is '(h', not a regular exp"),
        ({"layers_pattern": "h"}, "layers_pattern is 'h', but layers_to_transform is None"),
        ({"layers_to_transform": [-1]}, "layers_to_transform has the entry -1, want whole numbers, at least 0"),
        ({"target_modules": "all-linear", "layers_to_transform": 0}, "layers_to_transform is 0, but target_modules is"),
        ({"target_modules": ["all-linear", "e"]}, 'target_modules lists "all-linear"'),
        ({"target_modules": ".*q", "layers_pattern": "h"}, "layers_pattern is 'h', but target_modules is '.*q'"),
        ({"rank_pattern": {"q": 0}}, "rank_pattern['q'] is 0, want an integer of at least 1"),
        ({"alpha_pattern": {"q": -1}}, "alpha_pattern['q'] is -1, want a positive finite number"),
        ({"trainable_token_indices": [4, 2, 4]}, "trainable_token_indices has [4] more than once"),
        ({"bias": "some"}, "bias is 'some', want one of 'none', 'all', 'lora_only'"),
        ({"lora_bias": True, "init_lora_weights": "gaussian"}, "lora_bias is set, but init_lora_weights is 'gaussian'"),
        ({"init_lora_weights": "orthogonal"}, "init_lora_weights is 'orthogonal', want one of True, False, 'gaussian'"),
        ({"target_parameters": ["w"], "lora_dropout": 0.5}, "target_parameters is set, but lora_dropout is 0.5"),
        ({"target_parameters": ["w"], "lora_bias": True}, "target_parameters is set, but lora_bias is True"),
        ({"target_parameters": ["w"], "fan_in_fan_out": True}, "target_parameters is set, but fan_in_fan_out is True"),
        *(({"use_dora": True} | other, f"use_dora is set, but {next(iter(other))} is") for other in NOT_WITH_DORA),
        ({"enable_lora": {"qkv": [False, False]}}, "enable_lora['qkv'] is (False, False), want at least one True"),
        ({"task_type": "SEQ_CLASS"}, "task_type is 'SEQ_CLASS', want one of None, 'SEQ_CLS'"),
    ],
}


@pytest.mark.parametrize(
    ("settings", "error", "text"), [(settings, error, text) for error in WRONG for settings, text in WRONG[error]]
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
        {"target_modules": ["q"], "layers_to_transform": [0, 2], "layers_pattern": ["h", "layers"]},
        {"target_modules": ["q"], "layers_to_transform": 1, "layers_pattern": "h"},
        {"target_modules": ["q"], "rank_pattern": {"^a.q": 4, "b": 2}, "alpha_pattern": {"q": 1.5}},
        {"target_modules": ["q"], "trainable_token_indices": [3, 1], "use_dora": True},
        {"target_modules": ["q"], "trainable_token_indices": {"wte": [3, 1], "head": [0]}},
        {"target_modules": ["q"], "bias": "all", "lora_bias": True, "init_lora_weights": False},
        {"target_modules": ["q"], "bias": "lora_only", "fan_in_fan_out": True, "init_lora_weights": "gaussian"},
        {"target_modules": [], "target_parameters": ["experts.down"], "base_model_name_or_path": "here"},
    ],
    ids=lambda settings: "-".join(settings),
)
def test_a_peft_file_survives_reading_and_writing(settings, tmp_path):
    theirs = peft_file(tmp_path, **settings)
    config = LoraConfig.from_dict(theirs)
    written = json.loads(json.dumps(config.to_dict()))
    assert written == theirs
    assert LoraConfig.from_dict(written) == config
    for key, value in settings.items():
        # PEFT stores these two lists as sets and loses their order.
        unordered = isinstance(value, list) and key in ("target_modules", "exclude_modules")
        assert (sorted(written[key]) if unordered else written[key]) == value
    assert peft.LoraConfig.from_peft_type(**written).to_dict() == peft.LoraConfig(**settings).to_dict()


def test_no_modules_next_to_parameters_are_written_as_a_list():
    """For null, PEFT would adapt modules that it chooses by the model's type."""
    config = LoraConfig(target_parameters=["experts.down"])
    assert config.target_modules is None and config.to_dict()["target_modules"] == []
    theirs = peft.LoraConfig(target_parameters=["experts.down"])
    for chosen_by_type in (theirs, peft.LoraConfig()):
        with pytest.raises(ValueError, match=r"target_modules is None, .* by the model's type; .*target_modules=\[\]"):
            LoraConfig.from_peft(chosen_by_type)
    theirs.target_modules = []
    assert LoraConfig.from_peft(theirs).target_parameters == ("experts.down",)


@pytest.mark.parametrize(("theirs", "ours"), [("Gaussian", "gaussian"), (None, False)])
def test_spellings_of_initialisations_that_peft_takes(theirs, ours, tmp_path):
    assert (
        LoraConfig.from_peft(peft.LoraConfig(target_modules=["q"], init_lora_weights=theirs)).init_lora_weights == ours
    )
    file = peft_file(tmp_path, target_modules=["q"], init_lora_weights=theirs)
    assert LoraConfig.from_dict(file).init_lora_weights == ours


# Keys that a release of PEFT writes and that are no fields: an error names the key once it has this value,
# or it has no effect on what an adapter computes and is written back as it was read.
REFUSED = {
    "alora_invocation_tokens": [1, 2],
    "arrow_config": {"top_k": 3},
    "ensure_weight_tying": True,
    "kasa_config": {"beta": 1e-4},
    "layer_replication": [[0, 2], [1, 3]],
    "megatron_config": {"hidden_size": 4},
    "monteclora_config": {"num_samples": 8},
    "use_bdlora": {"nblocks": 2},
    "use_qalora": True,
    "velora_config": {"num_groups": 64},
    "invented_later": 0.5,
}
KEPT = {
    "auto_mapping": {"base_model_class": "Net", "parent_library": "models"},
    "corda_config": {"corda_method": "ipm"},
    "eva_config": {"rho": 2.0},
    "loftq_config": {"loftq_bits": 4},
    "lora_ga_config": {"scale": "stable"},
    "megatron_core": "megatron.core",
    "peft_version": "0.21.2",
    "qalora_group_size": 16,
    "revision": "main",
    "runtime_config": {"ephemeral_gpu_offload": True},
    **{f"invented later, {value!r}": value for value in (None, False, [], "")},  # off
}


def test_every_key_of_the_installed_peft_is_decided():
    ours = {field.name for field in dataclasses.fields(LoraConfig)} - {*NOT_OF_PEFT}
    theirs = {field.name for field in dataclasses.fields(peft.LoraConfig)} - {"peft_type"}
    assert theirs - REFUSED.keys() - KEPT.keys() == ours, "decide about a key"


@pytest.mark.parametrize("key", [*REFUSED, *KEPT])
def test_every_other_key_of_peft_is_kept_or_refused(key):
    values = {"peft_type": "LORA", "target_modules": ["q"], key: (REFUSED | KEPT)[key]}
    if key in REFUSED:
        with pytest.raises(ValueError) as caught:
            LoraConfig.from_dict(values)
        assert f"{key}={REFUSED[key]!r} not supported" in str(caught.value)
    else:
        config = LoraConfig.from_dict(values)
        assert json.loads(json.dumps(config.to_dict()))[key] == KEPT[key] == config.metadata[key]


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"use_qalora": True, "layer_replication": [[0, 1]]}, "use_qalora=True, layer_replication=[[0, 1]] not supp"),
        ({"use_qalora": True}, "Use PEFT for it, with lora_ext.integrations.peft.accelerate"),
        ({"peft_type": "IA3"}, "peft_type is 'IA3', want 'LORA'"),
        ({"peft_type": None}, "peft_type is None, want 'LORA'"),
    ],
)
def test_files_of_other_methods_and_options_are_refused(values, text):
    with pytest.raises(TypeError, match="LoraConfig: the values are of type list, want a dict"):
        LoraConfig.from_dict([])
    with pytest.raises(ValueError) as caught:
        LoraConfig.from_dict({"peft_type": "LORA", "target_modules": ["q"]} | values)
    assert text in str(caught.value)


def test_enable_lora_stays_out_of_the_file():
    config = LoraConfig(target_modules=["qkv"], enable_lora={"attn.qkv": (True, False, True)})
    assert "enable_lora" not in config.to_dict()
    assert config.enable_lora_for("layers.0.attn.qkv") == (True, False, True)
    assert config.enable_lora_for("layers.0.battn.qkv") is None
    assert LoraConfig(target_modules=["qkv"]).enable_lora_for("attn.qkv") is None


NAMES = st.sampled_from(["q", "v", "a", "0", "1", "layers"])
PATHS = st.lists(NAMES, min_size=1, max_size=4).map(".".join)
PATTERNS = st.one_of(
    PATHS, PATHS.map("^{}".format), PATHS.map("{}$".format), st.sampled_from(["q|v", r".*\.0\..*", "[qa]"])
)


@settings(deadline=None)
@given(st.dictionaries(PATTERNS, st.integers(1, 9)), st.dictionaries(PATTERNS, st.integers(1, 9)), PATHS, st.booleans())
def test_patterns_decide_as_in_peft(ranks, alphas, path, use_rslora):
    config = LoraConfig(
        target_modules=["q"], r=16, lora_alpha=32, rank_pattern=ranks, alpha_pattern=alphas, use_rslora=use_rslora
    )
    rank = ranks.get(get_pattern_key(ranks.keys(), path), 16)
    alpha = alphas.get(get_pattern_key(alphas.keys(), path), 32)
    assert (config.rank_for(path), config.alpha_for(path)) == (rank, alpha)
    assert config.scaling_for(path) == (alpha / math.sqrt(rank) if use_rslora else alpha / rank)


PATHS = st.lists(st.sampled_from(["a", "b", "a+"]), min_size=1, max_size=3).map(".".join)


@settings(deadline=None)
@given(st.dictionaries(PATHS, st.integers(1, 3), min_size=1))
def test_exact_patterns_mean_the_same_here_and_in_peft(ranks):
    patterns = exact_patterns(ranks, 2)
    config = LoraConfig(r=2, target_modules=["a"], rank_pattern=patterns)
    for path, rank in ranks.items():
        assert config.rank_for(path) == rank
        assert patterns.get(get_pattern_key(patterns, path), 2) == rank
