"""The parts of a model that a config names are the same as in PEFT."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from peft.tuners.lora.layer import LoraLayer, ParamWrapper
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import ModulesToSaveWrapper, TrainableTokensWrapper
from support.models import VOCABULARY, Net, bert, gpt2, llama, refused, roberta
from support.properties import given, settings, st
from torch import nn
from transformers import T5Config, T5ForConditionalGeneration

from lora_ext import LoraConfig
from lora_ext.injection.targets import Targets, find_targets
from lora_ext.model.bare_model import BareModel


def t5() -> T5ForConditionalGeneration:
    return T5ForConditionalGeneration(
        T5Config(vocab_size=VOCABULARY, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, num_decoder_layers=1)
    )


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(3, 4, 6))
        self.down = nn.Parameter(torch.randn(3, 6, 4))
        self.gate = nn.Linear(4, 3)


class Mixture(nn.Module):
    """Experts as bare parameters; numbers nested in numbers; a parameter of the root."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(4, 4))
        self.embed = nn.Embedding(8, 4)
        self.body = nn.ModuleDict({"layers": nn.ModuleList([self.layer(), self.layer()])})

    @staticmethod
    def layer() -> nn.Module:
        heads = nn.ModuleList([nn.ModuleDict({"proj": nn.Linear(4, 4)}) for _ in range(2)])
        return nn.ModuleDict({"experts": Experts(), "heads": heads, "attention": nn.MultiheadAttention(4, 2)})


MODELS: dict[str, Callable[[], nn.Module]] = {
    "bert": bert,
    "roberta": roberta,
    "llama": llama,
    "tied": lambda: llama(tied=True),
    "gpt2": gpt2,
    "t5": t5,
    "net": Net,
    "mixture": Mixture,
}


def ours(model: nn.Module, config: LoraConfig) -> Targets:
    return find_targets(config, BareModel(model))


def theirs(model: nn.Module, settings: dict[str, Any]) -> dict[str, Any]:
    """The parts that PEFT adapts, trains and ties."""
    config = peft.LoraConfig(**settings)
    root = peft.get_peft_model(model, config).base_model.model
    found: dict[str, Any] = {"modules": set(), "parameters": {}, "trained": set(), "tokens": {}, "tied": set()}
    done: list[str] = []
    for path, module in root.named_modules():
        if any(path.startswith(f"{other}.") for other in done):
            continue
        if isinstance(module, ParamWrapper):  # nested: the outermost first
            path = path.replace(".base_layer", "")
            found["parameters"][path] = (module.parameter_name, *found["parameters"].get(path, ()))
            continue
        if isinstance(module, LoraLayer):
            found["modules"].add(path)
        elif isinstance(module, ModulesToSaveWrapper):
            found["trained"].add(path)
        elif isinstance(module, TrainableTokensWrapper):
            if module.token_adapter.tied_adapter is not None:
                found["tied"].add(path)
            else:
                found["tokens"][path] = tuple(module.token_adapter.token_indices["default"])
        else:
            continue
        done.append(path)
    return found


ATTENTION = ["query", "value"]
CASES: list[tuple[str, dict[str, Any]]] = [
    *((family, {"target_modules": "all-linear"}) for family in MODELS if family != "mixture"),
    *((family, {"target_modules": "ALL-linear", "task_type": "SEQ_CLS"}) for family in ("bert", "roberta", "net")),
    ("bert", {"target_modules": ATTENTION, "exclude_modules": r".*\.1\..*"}),
    ("bert", {"target_modules": ATTENTION, "layers_to_transform": [1], "layers_pattern": ["block", "lay.r"]}),
    ("bert", {"target_modules": ["query", "bert.encoder.layer.0.attention.self.value"], "layers_to_transform": 1}),
    ("bert", {"target_modules": ["query"], "modules_to_save": ["LayerNorm", "classifier"]}),
    ("roberta", {"target_modules": ["dense", "out_proj"], "modules_to_save": ["classifier.out_proj"]}),
    ("bert", {"target_modules": ["query"], "trainable_token_indices": [3, 1]}),
    ("bert", {"target_modules": ["query"], "trainable_token_indices": {"position_embeddings": [0]}}),
    ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["norm"], "exclude_modules": ["layers.0.self_attn"]}),
    ("llama", {"target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [0], "lm_head": [1]}}),
    ("tied", {"target_modules": ["q_proj", "embed_tokens"]}),
    ("tied", {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]}),
    ("tied", {"target_modules": ["q_proj"], "trainable_token_indices": [2]}),
    ("tied", {"target_modules": ["q_proj"], "trainable_token_indices": {"lm_head": [2]}}),
    ("tied", {"target_modules": ["q_proj"], "trainable_token_indices": {"lm_head": [2], "embed_tokens": [1]}}),
    ("t5", {"target_modules": ["q", "wi", "shared"], "exclude_modules": ["EncDecAttention.q"]}),
    ("t5", {"target_modules": r"decoder.*\.k", "modules_to_save": ["final_layer_norm"]}),
    ("net", {"target_modules": ["up"], "modules_to_save": ["ead"]}),
    ("mixture", {"target_modules": [], "target_parameters": ["experts.up", "experts.down"]}),
    ("mixture", {"target_modules": ["proj"], "target_parameters": ["layers.1.experts.down", "up"]}),
    ("mixture", {"target_modules": ["attention"], "target_parameters": ["heads.0.proj.weight", "up"]}),
    ("mixture", {"target_modules": ["proj"], "exclude_modules": ["1.proj"], "layers_to_transform": [1]}),
    ("mixture", {"target_modules": ["gate"], "trainable_token_indices": {"embed": [1, 0]}}),
    ("mixture", {"target_modules": ["gate", "embed"], "target_parameters": ["0.heads.0.proj.weight"]}),
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("family", "settings"), CASES, ids=[f"{family}-{i}" for i, (family, _) in enumerate(CASES)])
def test_the_same_parts_as_in_peft(family, settings):
    model = MODELS[family]()
    targets = ours(model, LoraConfig(**settings))
    assert all(model.get_submodule(path) is module for path, module in (targets.modules | targets.trained).items())
    assert theirs(model, settings) == {
        "modules": targets.modules.keys(),
        "parameters": targets.parameters,
        "trained": targets.trained.keys(),
        "tokens": targets.tokens,
        "tied": targets.tied.keys(),
    }


NAMES = st.sampled_from(["layers", "heads", "q", "v", "0", "1", "2"])
SUFFIXES = st.lists(NAMES, min_size=1, max_size=3).map(".".join)
TREES = st.lists(st.lists(NAMES, min_size=1, max_size=6), min_size=1, max_size=8).map(
    lambda paths: sorted({".".join(path[: i + 1]) for path in paths for i in range(len(path))})
)


def tree(paths: list[str]) -> nn.Module:
    root = nn.Module()
    for path in paths:
        parent, _, name = path.rpartition(".")
        root.get_submodule(parent).add_module(name, nn.Identity())
    return root


@pytest.mark.full
@settings(deadline=None, max_examples=300)
@given(
    TREES,
    st.fixed_dictionaries(
        {"target_modules": st.lists(SUFFIXES, min_size=1, max_size=4)},
        optional={
            "exclude_modules": st.one_of(st.lists(SUFFIXES, max_size=2), SUFFIXES),
            "modules_to_save": st.lists(SUFFIXES.filter(lambda name: "." not in name), max_size=2),
            "layers_to_transform": st.one_of(st.integers(0, 2), st.lists(st.integers(0, 2), max_size=2)),
        },
    ),
    st.sampled_from([None, "layers", "heads", ["heads", "layers"], "[a-z]+", r"l\w+s", "heads|layers", [], ""]),
)
def test_any_names_match_as_in_peft(paths, options, layers_pattern):
    if "layers_to_transform" in options:
        options["layers_pattern"] = layers_pattern
    theirs = peft.LoraConfig(**options)
    expected = {path for path in paths if check_target_module_exists(theirs, path)}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            targets = ours(tree(paths), LoraConfig(**options))
    except ValueError as refusal:
        # A missing target is an error in PEFT too; a missing module to save is not.
        assert not expected or "modules_to_save" in str(refusal)
    else:
        assert targets.modules.keys() == expected


TOKENS = "trainable_token_indices"
LEFT = "nothing is left to adapt in BertForSequenceClassification"
REFUSED: list[tuple[str, dict[str, Any], str]] = [
    (
        "bert",
        {"target_modules": ["querry", "valeu"]},
        "target_modules ['querry', 'valeu'] matches no module of BertForSequenceClassification; "
        "close matches: 'query', 'self.query', 'value'",
    ),
    ("bert", {"target_modules": "query"}, "a string is an expression for whole paths, write names as a list"),
    ("bert", {"target_modules": ["uery"]}, "target_modules ['uery'] matches no module of"),
    ("bert", {"modules_to_save": ["clasifier"]}, "modules_to_save ['clasifier'] matches no module"),
    ("bert", {"exclude_modules": ".*query"}, f"{LEFT}: target_modules matches ['bert.encoder.la"),
    ("bert", {"target_modules": ["classifier"], "modules_to_save": ["classifier"]}, "without those of exclude_modules"),
    (
        "mixture",
        {"target_modules": [], "target_parameters": ["experts.upp"]},
        "target_parameters ['experts.upp'] matches no parameter of Mixture; close matches: 'experts.up'",
    ),
    ("mixture", {TOKENS: {"embedd": [0]}}, f"{TOKENS} ['embedd'] matches no ... close matches: 'embed'"),
    ("bert", {"layers_to_transform": [3], "layers_pattern": "layer"}, f"{LEFT} ... other layers_to_transform"),
    ("mixture", {"target_parameters": ["gate.weight"]}, "names 'body.layers.0.experts.gate', and so does target_modul"),
    (
        "mixture",
        {"target_modules": [], "target_parameters": ["up"], "modules_to_save": ["experts"]},
        "target_parameters names 'body.layers.0.experts.up', and so does modules_to_save",
    ),
    (
        "tied",
        {TOKENS: [1], "modules_to_save": ["embed_tokens", "head"]},
        f"{TOKENS} names 'model.embed_tokens', and so",
    ),
    ("llama", {TOKENS: [1], "target_modules": ["embed_tokens"]}, "'model.embed_tokens', and so does target_modules"),
    ("llama", {TOKENS: {"embed_tokens": [1], "model.embed_tokens": [2]}}, "twice, with different tokens"),
    ("tied", {TOKENS: [1], "modules_to_save": ["lm_head"]}, "it follows, names 'lm_head', and so does modules_to_save"),
]
ONE = {"bert": "query", "llama": "q_proj", "tied": "q_proj", "mixture": "gate", "net": "up"}


@pytest.mark.parametrize(("family", "settings", "text"), REFUSED)
def test_impossible_targets_are_refused(family, settings, text):
    model = MODELS[family]()
    with refused(model, ValueError, *text.split(" ... ")):
        ours(model, LoraConfig(**{"target_modules": [ONE[family]]} | settings))


@pytest.mark.parametrize(
    ("family", "settings", "text"),
    [
        ("net", {"rank_pattern": {"upp": 2}}, "rank_pattern ['upp'] matches nothing adapted in"),
        ("net", {"alpha_pattern": {"p": 2}}, "alpha_pattern ['p'] matches nothing adapted in"),
        ("net", {"enable_lora": {"down": (True, False)}}, "enable_lora ['down'] matches"),
        ("mixture", {"target_parameters": ["experts.upp"]}, "target_parameters ['experts.upp'] matches no parameter o"),
        (
            "mixture",
            {"target_modules": ["gat"], "target_parameters": ["up"]},
            "target_modules ['gat'] matches no module of Mixture; close matches: 'gate'",
        ),
    ],
)
def test_settings_without_effect_are_warned_about(family, settings, text):
    with pytest.warns(UserWarning) as caught:
        ours(MODELS[family](), LoraConfig(**{"target_modules": [ONE[family]]} | settings))
    assert text in str(caught[0].message) and len(caught) == 1
