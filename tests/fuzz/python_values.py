"""Makes calls with plain values and modules: LoraConfig, layers of lora_ext.nn, methods."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import lora_ext.methods
from lora_ext import LoraConfig

from .calls import Call, Maker
from .choices import Choices
from .compare import WrongResult
from .values import Source, Value

VALUES: dict[str, Maker] = {}


def maker(name: str) -> Callable[[Maker], Maker]:
    def register(function: Maker) -> Maker:
        VALUES[name] = function
        return function

    return register


def picked(choices: Choices, pools: Mapping[str, Sequence[str]], always: Sequence[str] = ()) -> dict[str, Value]:
    """Picks some of the arguments, and for each one an expression of its pool."""
    return {name: Source(choices.pick(pool)) for name, pool in pools.items() if name in always or choices.chance(25)}


# --- LoraConfig -------------------------------------------------------------------------------------------------------

_NAMES = ('["query"]', '["query", "value"]', '("a", "b.c")', '{"x", "y"}')
CONFIG = {
    "r": ("8", "1", "2", "64", "1000"),
    "lora_alpha": ("8", "16", "0.5", "1", "1e-9"),
    "lora_dropout": ("0.0", "0.1", "0.999", "0"),
    "target_modules": (*_NAMES, '"all-linear"', 'r".*\\.(q|v)_proj"'),
    "exclude_modules": ("None", '["a"]', 'r"layers\\.0\\..*"'),
    "layers_to_transform": ("None", "[0, 1]", "3", "[]"),
    "rank_pattern": ("{}", '{"a": 4}', '{r"layers\\.0\\..*": 2, "b": 16}'),
    "alpha_pattern": ("{}", '{"a": 4.5}', '{".*": 1}'),
    "modules_to_save": ("None", '["classifier"]', '["a", "b"]'),
    "trainable_token_indices": ("None", "[0, 5]", '{"embed": [1, 2]}', "[]"),
    "ensure_weight_tying": ("False", "True"),
    "bias": ('"none"', '"all"', '"lora_only"'),
    "lora_bias": ("False", "True"),
    "use_rslora": ("False", "True"),
    "fan_in_fan_out": ("False", "True"),
    "init_lora_weights": ("True", "False"),
    "enable_lora": ("None", '{"c_attn": (True, False, True)}', '{"a": [True]}'),
    "task_type": ("None", '"SEQ_CLS"', '"CAUSAL_LM"'),
    "base_model_name_or_path": ("None", '"a/b"'),
    "inference_mode": ("False", "True"),
    "metadata": ("{}", '{"peft_version": "0.18.0"}'),
}


@maker("lora_ext.LoraConfig")
def lora_config(choices: Choices) -> Call:
    values = picked(choices, CONFIG, ("target_modules",))
    if values["target_modules"].text.startswith(('"', "r")):
        values.pop("layers_to_transform", None)

    def oracle(before, result, after):
        if result.enable_lora is None and not result.metadata:  # PEFT's files do not hold these, or not every key
            again = LoraConfig.from_dict(result.to_dict())
            if again != result:
                raise WrongResult(f"from_dict(to_dict()) is {again}, the config {result}")
        if hash(after["copied"]) != hash(result) or after["copied"] != result:
            raise WrongResult(f"the copy by pickle is {after['copied']}, the config {result}")

    after = """
import copy, json, pickle
copied = pickle.loads(pickle.dumps(result))
copy.deepcopy(result), repr(result), json.dumps(result.to_dict())
result.rank_for("model.layers.0.a"), result.alpha_for("b"), result.scaling_for("a"), result.enable_lora_for("c_attn")
"""
    return Call("lora_ext.LoraConfig", values, oracle, after=after)


@maker("lora_ext.LoraConfig.from_dict")
def config_from_dict(choices: Choices) -> Call:
    keys = picked(choices, {key: pool for key, pool in CONFIG.items() if key not in ("metadata", "enable_lora")})
    extra = {
        "peft_type": ('"LORA"',),
        "peft_version": ('"0.18.0"', "None"),
        "use_dora": ("False", "None"),
        "megatron_config": ("None",),
        "layer_replication": ("None", "[]"),
        "auto_mapping": ("None", "{}", '{"base_model_class": "X"}'),
        "target_modules": _NAMES,
    }
    values = {**keys, **picked(choices, extra, ("peft_type", "target_modules"))}
    if choices.chance(40):
        name = choices.pick(list(values))
        values[name] = Source(choices.pick(JSON))
    items = ", ".join(f'"{name}": {value.text}' for name, value in values.items())
    after = "again = lora_ext.LoraConfig.from_dict(result.to_dict())\n"

    def oracle(before, result, after):
        if after["again"] != result:
            raise WrongResult(f"read again it is {after['again']}, the config {result}")

    call = Call("lora_ext.LoraConfig.from_dict", {"values": Source(f"{{{items}}}")}, oracle, after=after)
    call.words = [*values, "LoraConfig"]
    return call


# JSON values that a reader does not expect.
JSON = (
    "None",
    "True",
    "0",
    "-1",
    "3",
    "1.5",
    "1e308",
    'float("nan")',
    'float("inf")',
    "10 ** 30",
    '""',
    '"x"',
    '"("',
    '"(a+)+$"',
    '"\\ud800"',
    "[]",
    "[None]",
    "[[1]]",
    "[1, 1]",
    '["a", "a"]',
    '[""]',
    "[-1]",
    "[1.0]",
    "{}",
    '{"a": 1}',
    '{"a": None}',
    '{"(": 1}',
    '{"a": {"a": {}}}',
    '{"a": [1, 1]}',
    "[True]",
    "list(range(5000))",
    '["a" * 20000]',
)


# --- lora_ext.nn ------------------------------------------------------------------------------------------------------

_ADAPTER = {
    "lora_dropout": ("0.0", "0.1", "0.999"),
    "use_rslora": ("False", "True"),
    "init_lora_weights": ("True", "False", '"gaussian"'),
    "lora_bias": ("False", "True"),
    "dtype": ("torch.float32", "torch.float64", "torch.bfloat16", "None"),
    "device": ("None", '"cpu"', '"meta"'),
}


def _adapter_values(choices: Choices, sizes: Sequence[str]) -> dict[str, Value]:
    always = {"r": ("2", "1", "4", "16", "70"), "lora_alpha": ("4", "1", "0.5", "0")}
    first = {name: Source(choices.pick(("6", "1", "10", "33"))) for name in sizes}
    return {**first, **picked(choices, always, tuple(always)), **picked(choices, _ADAPTER)}


@maker("lora_ext.nn.LoraAdapter")
def lora_adapter(choices: Choices) -> Call:
    values = _adapter_values(choices, ("in_features", "out_features"))
    return Call("lora_ext.nn.LoraAdapter", values, after="repr(result), result.has_plain_rank\n")


def _adapter_without_bias(choices: Choices, name: str, sizes: tuple[str, str]) -> Call:
    values = _adapter_values(choices, sizes)
    values.pop("lora_bias", None)
    call = Call(name, values, after="repr(result), result()\n")
    call.words = ["LoraAdapter"]  # most arguments are its
    return call


@maker("lora_ext.nn.DoraAdapter")
def dora_adapter(choices: Choices) -> Call:
    return _adapter_without_bias(choices, "lora_ext.nn.DoraAdapter", ("in_features", "out_features"))


@maker("lora_ext.nn.EmbeddingAdapter")
def embedding_adapter(choices: Choices) -> Call:
    return _adapter_without_bias(choices, "lora_ext.nn.EmbeddingAdapter", ("num_embeddings", "embedding_dim"))


@maker("lora_ext.nn.PackedAdapter")
def merged_adapter(choices: Choices) -> Call:
    values = _adapter_values(choices, ("in_features",)) | {"out_features": Source("6")}
    values.pop("lora_bias", None)
    enabled = choices.pick(("(True, False, True)", "[True]", "(False, True)"))
    values["enable_lora"] = Source(enabled)
    call = Call("lora_ext.nn.PackedAdapter", values, after="repr(result), result.parts(), result.block_diagonal()\n")
    call.words = ["LoraAdapter"]
    return call


@maker("lora_ext.nn.ActiveAdapters")
def active_adapters(choices: Choices) -> Call:
    return Call("lora_ext.nn.ActiveAdapters", {"names": Source(choices.pick(("()", '("a",)', '["a", "b"]')))})


_LINEAR = ("torch.nn.Linear(6, 4)", "torch.nn.Linear(6, 4, bias=False)", "torch.nn.Linear(6, 4).requires_grad_(False)")
# kind of layer -> base layers, adapters, an input
LAYERS = {
    "LoraLinear": (_LINEAR, ("lora_ext.nn.LoraAdapter(6, 4, 2, 4)",), "torch.randn(3, 6)"),
    "DoraLinear": (_LINEAR, ("lora_ext.nn.DoraAdapter(6, 4, 2, 4)",), "torch.randn(3, 6)"),
    "LoraEmbedding": (
        (
            "torch.nn.Embedding(9, 5)",
            "torch.nn.Embedding(9, 5, padding_idx=0)",
            "torch.nn.Embedding(9, 5, max_norm=1.0)",
        ),
        ("lora_ext.nn.EmbeddingAdapter(9, 5, 2, 4)",),
        "torch.arange(9)",
    ),
    "LoraConv": (
        (
            "torch.nn.Conv1d(4, 6, 3)",
            "torch.nn.Conv1d(4, 6, 3, groups=2, padding=1)",
            "torch.nn.Conv1d(4, 6, 1, stride=2)",
        ),
        ("lora_ext.nn.LoraAdapter(4, 6, 2, 4, shapes=((2, 4, 3), (6, 2, 1)))",),
        "torch.randn(2, 4, 8)",
    ),
    "LoraPackedLinear": (
        ("torch.nn.Linear(6, 9)",),
        (
            "lora_ext.nn.PackedAdapter(6, 9, 2, 4, enable_lora=(True, False, True))",
            "lora_ext.nn.LoraAdapter(6, 9, 2, 4)",
        ),
        "torch.randn(3, 6)",
    ),
    "LoraMultiheadAttention": (
        ("torch.nn.MultiheadAttention(4, 2)", "torch.nn.MultiheadAttention(4, 2, batch_first=True)"),
        ("None",),
        "torch.randn(3, 2, 4)",
    ),
    "LoraParameter": (
        ("torch.nn.Linear(6, 4)", "torch.nn.Bilinear(3, 4, 5)"),
        ("None", "lora_ext.nn.LoraAdapter(6, 4, 2, 4)"),
        "torch.randn(3, 6)",
    ),
}
_USES = (
    'result.add_adapter("second", lora_ext.nn.LoraAdapter(6, 4, 2, 4))',
    'result.set_active("default")',
    'result.set_active("no such")',
    "result.set_active()",
    "result.merge()",
    'result.merge("default")',
    'result.merge("default", "default")',
    "result.unmerge()",
    'result.unmerge("default")',
    "result.forget_merge()",
    "result.delta_weight()",
    'result.delta_weight("default")',
    'result.delta_weight("default", "bias")',
    "result.eval()(INPUT)",
    "result.train()(INPUT)",
    "result.merge_record_bytes, result.merged_adapters, result.active_adapters, repr(result)",
    "result.state_dict()",
    "__import__('copy').deepcopy(result)(INPUT)",
)


def _layer(kind: str) -> Maker:
    def make(choices: Choices) -> Call:
        bases, adapters, argument = LAYERS[kind]
        values: dict[str, Value] = {"base_layer": Source(choices.pick(bases))}
        if kind == "LoraPackedLinear":
            values["num_parts"] = Source("3")
        if kind == "LoraParameter":
            values["parameter_name"] = Source('"weight"')
        if choices.chance(80):
            values["adapter"] = Source(choices.pick(adapters))
            if choices.chance(20):
                values["adapter_name"] = Source('"other"')
        if choices.chance(15):
            values["active"] = Source('lora_ext.nn.ActiveAdapters(("default",))')
        if kind == "LoraMultiheadAttention":
            argument = f"*[{argument}] * 3"
        uses = [choices.pick(_USES).replace("INPUT", argument) for _ in range(choices.between(0, 4))]
        call = Call(f"lora_ext.nn.{kind}", values, after="".join(f"{use}\n" for use in uses))
        call.words = [*LAYERS, "adapter", "base_layer", "lora", "forward"]
        return call

    return make


for _kind in LAYERS:
    VALUES[f"lora_ext.nn.{_kind}"] = _layer(_kind)


# --- methods ----------------------------------------------------------------------------------------------------------

OPTIONS = {
    "bottleneck_size": ("16", "1"),
    "activation": ('"relu"', '"gelu"'),
    "prefix_length": ("4", "1"),
    "infix_length": ("2", "0"),
    "r": ("2",),
    "target_modules": ('["query"]',),
}


@maker("lora_ext.methods.new_method")
def new_method(choices: Choices) -> Call:
    names = ("lora", "full", "bitfit", "adapter-h", "adapter-l", "adapter-p", "adapter-drop", "prefix-embed")
    name = choices.pick((*names, "prefix-layer", "head-only", "lora+prefix-embed", "no such"))
    known = lora_ext.methods.option_names(name) if name in names or name in ("prefix-layer", "head-only") else []
    values = {"name": Source(repr(name))}
    values |= picked(choices, {key: pool for key, pool in OPTIONS.items() if key in known}, ("target_modules",))
    call = Call(
        "lora_ext.methods.new_method",
        values,
        after="repr(result), result.options(), result.parts, lora_ext.methods.new_method('full').options()\n",
    )
    call.words = ["method", *name.split("+"), *OPTIONS, *known]
    return call


@maker("lora_ext.methods.option_names")
def option_names(choices: Choices) -> Call:
    return Call("lora_ext.methods.option_names", {"name": Source(choices.pick(('"lora"', '"bitfit"', '"adapter-h"')))})
