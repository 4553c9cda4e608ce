"""The table of public functions: a valid call of each one, and calls that it refuses.

``tests/test_refusals.py`` makes the calls, gives every argument a wrong type, and checks that no public function is
missing. Refusals that a file of tests has for its own area are not here.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
from accelerate import cpu_offload
from support.models import Net, adapter_of_net, bert, llama
from support.public_calls import NAN, Call
from support.small_nets import ConvNet
from torch import nn

from lora_ext import (
    AdapterPool,
    LoraConfig,
    adapters,
    analysis,
    inject,
    load_adapter,
    merge,
    methods,
    save_adapter,
    unmerge,
)
from lora_ext import nn as layers
from lora_ext.integrations import peft as integration

CONFIG = LoraConfig(r=2, target_modules=["up", "down"], init_lora_weights=False)
BIASED = LoraConfig(r=2, target_modules=["up"], bias="all")

# --- models and files -------------------------------------------------------------------------------------------------


def injected() -> Net:
    return inject(inject(Net().eval(), CONFIG, "a"), CONFIG, "b")


NEAREST = {"rounding": "nearest", "seed": 0}


def merged() -> Net:
    return merge(injected(), ["a"])


def adapting(make: Callable[[], nn.Module], *targets: str, **options: Any) -> Callable[[], nn.Module]:
    """Makes a model with the adapter "a"."""
    return lambda: inject(make().eval(), LoraConfig(r=2, target_modules=targets, **options), "a")


def with_biases() -> Net:
    """Makes a model in which "a" would change a bias that "b" trains."""
    return adapting(lambda: inject(Net(), BIASED, "b"), "up", lora_bias=True)()


def of_two_sets_of_rows() -> nn.Module:
    rows = LoraConfig(target_modules=["q_proj"], trainable_token_indices=[1, 2])
    return adapters.set_adapter(inject(inject(llama(), rows, "a"), rows, "b"), ["a", "b"])


def with_a_layer() -> Net:
    model = Net()
    model.head = layers.LoraLinear(model.head)
    return model


def offloaded(model: nn.Module) -> nn.Module:
    return cpu_offload(model, execution_device="cpu")


def disabled() -> Net:
    """Makes a model in a disable_adapters context that is never left."""
    model = injected()
    model.context = adapters.disable_adapters(model)  # ends when it is collected
    model.context.__enter__()
    return model


def with_nan() -> Net:
    model = injected()
    with torch.no_grad():
        model.blocks[1].up.adapters["b"].lora_B[0, 0] = NAN
    return model


def parametrized(model: Net) -> Net:
    torch.nn.utils.parametrizations.weight_norm(model.blocks[0].up.base_layer)
    return model


def overflowing() -> Net:
    model = adapting(lambda: Net().half(), "up", use_dora=True)()
    with torch.no_grad():
        model.blocks[0].up.adapters["a"].lora_magnitude_vector[3] = 1e9
    return model


def tied_while_merged() -> Net:
    model = merged()
    model.other = nn.Linear(6, 10)
    model.other.weight = model.blocks[0].up.weight
    return model


def sharing_memory() -> Net:
    model = injected()
    model.blocks[1].up.base_layer.weight = nn.Parameter(model.blocks[0].up.weight[:], requires_grad=False)
    return model


def tied() -> Net:
    model = Net()
    model.blocks[1].up.weight = model.blocks[0].up.weight
    return inject(model, LoraConfig(r=2, target_modules=["blocks.0.up"], init_lora_weights=False), "b")


def saved(directory: Path) -> Path:
    save_adapter(injected(), directory / "adapter", "a")
    return directory / "adapter"


def damaged(directory: Path, name: str, content: bytes) -> Path:
    (saved(directory) / name).write_bytes(content)
    return directory / "adapter"


def adapted(name: str = "adapter-h", **options: Any) -> nn.Module:
    return methods.apply_method(bert(), methods.new_method(name, **options))


def saved_method(directory: Path) -> Path:
    methods.save_method(adapted(), directory / "method")
    return directory / "method"


def peft_model() -> peft.PeftModel:
    return peft.get_peft_model(Net(), peft.LoraConfig(r=2, target_modules=["up"]))


def part_of_peft() -> Net:
    """Makes a model in which PEFT only trains a module in full."""
    config = peft.LoraConfig(target_modules=["up"], modules_to_save=["head"])
    model = peft.get_peft_model(Net(), config).base_model.model
    model.blocks = nn.ModuleList()
    return model


def merged_peft_model() -> peft.PeftModel:
    model = integration.accelerate(peft_model())
    model.merge_adapter()
    return model


def factors() -> dict[str, Any]:
    return {"lora_A": torch.randn(2, 6), "lora_B": torch.randn(4, 2), "scaling": 0.5}


# --- a valid call of each function: all its named arguments, made with files in a directory ---------------------------

SIZES = {"in_features": 6, "out_features": 6, "r": 2, "lora_alpha": 4.0}
MORE = {
    **{"lora_dropout": 0.1, "use_rslora": False, "init_lora_weights": True, "lora_bias": False, "shapes": None},
    **{"dtype": torch.float32, "device": "cpu"},
}
OF_AN_INJECTED_MODEL = (
    *(adapters.adapter_names, adapters.adapter_status, adapters.lora_modules, adapters.input_groups, adapters.unload),
    *(adapters.trainable_parameter_counts, adapters.merge_errors, adapters.disable_adapters),
)
BASES = {
    layers.LoraLinear: nn.Linear(6, 4),
    layers.DoraLinear: nn.Linear(6, 4),
    layers.LoraEmbedding: nn.Embedding(6, 4),
    layers.LoraConv: nn.Conv1d(6, 4, 3),
    layers.LoraMultiheadAttention: nn.MultiheadAttention(6, 2),
}
SPECTRA = (analysis.effective_rank, analysis.stable_rank, analysis.numerical_rank, analysis.energy_rank)
SIMILARITIES = (analysis.expected_random_similarity, analysis.random_similarity_std)


def around(base: nn.Module, **options: Any) -> Callable[[Path], dict[str, Any]]:
    """Makes the arguments of a LoRA layer around a copy of ``base``."""

    def arguments(_: Path) -> dict[str, Any]:
        layer = {"base_layer": copy.deepcopy(base), "adapter": None, "adapter_name": "a"}
        return layer | {"active": layers.ActiveAdapters()} | options

    return arguments


GOOD: dict[Callable[..., Any], Callable[[Path], dict[str, Any]]] = {
    # injection
    inject: lambda _: {"model": Net(), "config": CONFIG, "adapter_name": "a", "share_inputs": False},
    save_adapter: lambda path: {
        "model": injected(),
        "directory": path / "out",
        "adapter_name": "a",
        "save_embedding_layers": False,
        "normalise": False,
    },
    load_adapter: lambda path: {
        "model": Net(),
        "directory": saved(path),
        "trainable": True,
        "adapter_name": "c",
        "activate": False,
    },
    AdapterPool: lambda path: {
        "model": Net(),
        "directory": saved(path).parent,
        "target_modules": ["up", "down"],
        "r": 2,
        "max_bytes": 4096,
        "dtype": None,
    },
    # adapters
    **{function: lambda _: {"model": injected()} for function in OF_AN_INJECTED_MODEL},
    adapters.merge_record_bytes: lambda _: {"model": merged()},
    adapters.set_adapter: lambda _: {"model": injected(), "names": ["a"], "trainable": False},
    adapters.add_weighted_adapter: lambda _: {
        "model": injected(),
        "adapters": ["a", "b"],
        "weights": [1.0, 0.5],
        "adapter_name": "c",
        "combination_type": "svd",
        "svd_rank": 2,
    },
    adapters.delete_adapter: lambda _: {"model": injected(), "name": "a"},
    adapters.rename_adapter: lambda _: {"model": injected(), "old": "a", "new": "c"},
    adapters.hotswap_adapter: lambda path: {"model": injected(), "directory": saved(path), "adapter_name": "a"},
    adapters.prepare_hotswap: lambda _: {"model": injected(), "r": 4, "adapter_name": "a"},
    # merging
    merge: lambda _: {"model": injected(), "adapter_names": ["a"], "calibration": None} | NEAREST,
    unmerge: lambda _: {"model": merged(), "adapter_names": ["a"]},
    adapters.merge_and_unload: lambda _: {"model": injected(), "adapter_names": ["a"], "calibration": None} | NEAREST,
    # methods
    methods.new_method: lambda _: {"name": "adapter-h", "bottleneck_size": 4},
    methods.option_names: lambda _: {"name": "adapter-h"},
    methods.apply_method: lambda _: {"model": bert(), "method": methods.new_method("adapter-h")},
    methods.prepare_method: lambda _: {"model": bert(), "method": methods.new_method("adapter-h")},
    methods.set_pooling: lambda _: {"model": bert(), "pooling": "mean"},
    methods.pooling_of: lambda _: {"model": bert()},
    methods.method_of: lambda _: {"model": adapted()},
    methods.head_parameters: lambda _: {"model": bert()},
    methods.head_parameter_count: lambda _: {"model": bert()},
    methods.remove_method: lambda _: {"model": adapted()},
    methods.save_method: lambda path: {"model": adapted(), "directory": path / "out"},
    methods.load_method: lambda path: {"model": bert(), "directory": saved_method(path), "trainable": False},
    methods.read_method: lambda path: {"directory": saved_method(path)},
    integration.accelerate: lambda _: {
        "model": peft_model(),
        "share_inputs": True,
        "merge_rounding": "nearest",
        "merge_seed": 0,
    },
    integration.restore: lambda _: {"model": integration.accelerate(peft_model())},
    integration.report: lambda _: {"model": peft_model()},
    # layers
    layers.LoraAdapter: lambda _: SIZES | MORE,
    layers.EmbeddingAdapter: lambda _: {"num_embeddings": 6, "embedding_dim": 4, "r": 2, "lora_alpha": 4.0},
    layers.PackedAdapter: lambda _: SIZES | {"enable_lora": [True, False, True]},
    layers.DoraAdapter: lambda _: dict(SIZES),
    layers.ActiveAdapters: lambda _: {"names": ["a"]},
    # analysis
    analysis.factored_svd: lambda _: factors(),
    analysis.block_krylov_svd: lambda _: {"weight": torch.randn(6, 4), "rank": 2, "seed": 0},
    analysis.project: lambda _: {"weight": torch.randn(6, 4), "U": torch.randn(6, 2), "V": torch.randn(4, 2)},
    analysis.projection_table: lambda _: {
        "weight": torch.randn(4, 6),
        "update": analysis.factored_svd(**factors()),
        "seed": 0,
        "weight_svd": None,
    },
    analysis.expected_random_norm: lambda _: {"weight_norm": 2.0, "out_features": 6, "in_features": 4, "r": 2},
    analysis.leading_ranks: lambda _: {"count": 5},
    analysis.singular_basis: lambda _: {"matrix": torch.randn(2, 6)},
    analysis.subspace_similarity: lambda _: {"first": torch.eye(4)[:, :2], "second": torch.eye(4)[:, 1:]},
    analysis.orthonormal_columns: lambda _: {"dim": 4, "count": 2, "generator": torch.Generator()},
    **{kind: around(base) for kind, base in BASES.items()},
    layers.LoraPackedLinear: around(nn.Linear(6, 6), num_parts=3),
    layers.LoraParameter: around(nn.Linear(6, 4), parameter_name="weight"),
    **{function: lambda _: {"singular_values": torch.tensor([2.0, 1.0])} for function in SPECTRA},
    analysis.energy_rank: lambda _: {"singular_values": torch.tensor([2.0, 1.0]), "energy": 0.5},
    **{function: lambda _: {"i_max": 2, "j_max": 3, "dim": 4} for function in SIMILARITIES},
}
CALLS = [Call(function, arguments) for function, arguments in GOOD.items()]

# --- refused calls: the function, changes of its arguments, the error, words of its message ---------------------------
# A function among the changes makes the argument. FUNCTION stands for the function's name.

MERGED = "merged into 'blocks.0.up', 'blocks.0.down', 'blocks.1.up' and 1 more"
TAKEN = "exists already; the adapters are ['a', 'b']. Choose another name, or delete_adapter"
NO_ADAPTER = "no adapter 'x'; the adapters are ['a', 'b']"
NO_LAYER = {"model": Net()}, ValueError, "FUNCTION: Net has no LoRA layer; call inject(model, config) first"
NONE_ACTIVE = {"model": disabled, "adapter_names": None}, RuntimeError, "FUNCTION: no adapter is active in"
NO_NAMES = {"adapter_names": []}, ValueError, "FUNCTION: adapter_names is empty; name at least one adapter"
NO_NAME = {"adapter_names": ["x"]}, KeyError, "FUNCTION: no layer has an adapter 'x'; the adapters are ['a', 'b']"
TWO_ACTIVE = {"model": lambda: adapters.set_adapter(injected(), ["a", "b"]), "adapter_name": None}
NO_CONFIG = {"directory": lambda path: damaged(path, "adapter_config.json", b"{")}
NO_WEIGHTS = {"directory": lambda path: damaged(path, "adapter_model.safetensors", b"{}")}
RANK_4 = {"model": lambda: inject(Net(), LoraConfig(r=4, target_modules=["up"]), "c")}
TWO_RANKS = {
    "model": lambda: inject(inject(Net(), CONFIG, "a"), LoraConfig(r=3, target_modules=["up"]), "b"),
    "combination_type": "linear",
    "svd_rank": None,
}
RANK_1 = {"model": lambda: inject(Net(), LoraConfig(r=1, target_modules=["up", "down"]), "a")}
INJECTED_BERT = {"model": lambda: inject(bert(), LoraConfig(target_modules=["query"]))}
MERGED_BERT = {"model": lambda: merge(adapted("lora", target_modules=["query"]))}
DORA_16_BITS = {"model": adapting(lambda: Net().bfloat16(), "up", use_dora=True), "rounding": "stochastic"}


def offloading(make: Callable[[], nn.Module], *targets: str, **options: Any) -> dict[str, Any]:
    """A model whose values are not in memory, and the options of a config that reads some."""
    return {"model": lambda: offloaded(make()), "config": LoraConfig(target_modules=targets, **options)}


def file_of(**options: Any) -> dict[str, Any]:
    """A file of another adapter than those of :func:`injected`."""
    options = {"target_modules": ["up", "down"], "modules_to_save": None} | options
    return {"directory": lambda path: adapter_of_net(path / "other", **options)}


# Calls that merge and merge_and_unload must both refuse: changed arguments, the error's type, and part of its text.
NOT_MERGED: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"calibration": []}, ValueError, "FUNCTION: calibration runs the model with its active adapters"),
    ({"adapter_names": None, "calibration": []}, ValueError, "FUNCTION: calibration is for quantised weights, and non"),
    ({"rounding": "random"}, ValueError, "FUNCTION: rounding is 'random', want one of 'nearest', 'stochastic'"),
    ({"rounding": "stochastic", "seed": 2**64}, ValueError, "seed is 18446744073709551616, want an integer of 64 bits"),
    ({"rounding": "stochastic"}, TypeError, "FUNCTION: the weight of 'blocks.0.up' is torch.float32, where"),
    (DORA_16_BITS, ValueError, "the weight of 'blocks.0.up' gets a DoRA adapter; leave out"),
    NO_LAYER,
    NO_NAMES,
    NO_NAME,
    NONE_ACTIVE,
    ({"model": with_nan, "adapter_names": "b"}, ValueError, "the weight of 'blocks.1.up' NaN or infinite: the adapter"),
    ({"model": overflowing}, ValueError, "elements of the weight of 'blocks.0.up' infinite: the sum overflows"),
    ({"model": lambda: parametrized(injected())}, RuntimeError, "'blocks.0.up' is not a parameter but computed; remo"),
    ({"model": tied, "adapter_names": "b"}, ValueError, "is shared with 'blocks.1.up', which would change too"),
    ({"model": tied_while_merged, "adapter_names": "b"}, ValueError, "'blocks.0.up' is shared with 'other'"),
    ({"model": sharing_memory}, RuntimeError, "weights[0] shares memory with weights[2], which would change"),
    ({"model": adapting(lambda: ConvNet("2d grouped"), "conv")}, ValueError, "groups=2 cannot be merged"),
    (
        {"model": adapting(lambda: ConvNet("3d"), "conv", lora_bias=True)},
        ValueError,
        "lora_bias cannot be merged, as the base layer has no bias",
    ),
    (
        {"model": adapting(lambda: llama(True), "q_proj", "lm_head", trainable_token_indices=[7])},
        ValueError,
        "'lm_head.base_layer' has trained rows (trainable_token_indices), which would lose the update; run unmerged",
    ),
]
OTHERS = LoraConfig(target_modules=["original_module", "head"]), LoraConfig(target_modules=["lora_A"])
FEW_DIRECTIONS = {"weight_svd": analysis.block_krylov_svd(torch.randn(4, 6), 1, seed=0)}

ADAPTERS_OF_FACTORS = layers.LoraAdapter, layers.EmbeddingAdapter, layers.PackedAdapter, layers.DoraAdapter
CHANGES = adapters.delete_adapter, adapters.rename_adapter, adapters.hotswap_adapter, adapters.prepare_hotswap
COMBINE, ACTIVATE, DISABLE = adapters.add_weighted_adapter, adapters.set_adapter, adapters.disable_adapters
OF_METHODS = methods.apply_method, methods.prepare_method, methods.set_pooling, methods.load_method
# Calls that several functions must refuse.
SHARED: list[tuple[tuple[Callable[..., Any], ...], dict[str, Any], type[Exception], str]] = [
    (
        (save_adapter, ACTIVATE, COMBINE, DISABLE, *CHANGES),
        *({"model": Net()}, ValueError, "FUNCTION: Net is not injected; call lora_ext.inject on it"),
    ),
    (
        (ACTIVATE, COMBINE, *CHANGES[:2], adapters.merge_and_unload, adapters.unload),
        *({"model": disabled}, RuntimeError, "the adapters are disabled"),
    ),
    ((load_adapter, AdapterPool, COMBINE), {"model": merged}, RuntimeError, MERGED),
    (CHANGES, {"model": merged}, RuntimeError, f"'a' is {MERGED}; call unmerge"),
    ((DISABLE, adapters.unload), {"model": merged}, RuntimeError, f"{MERGED}; call unmerge(model) first"),
    ((unmerge, adapters.unload), *NO_LAYER),
    (OF_METHODS, {"model": Net()}, TypeError, "Net (model type None) is not supported; supported are Transformers' mo"),
    (
        (methods.remove_method, methods.save_method),
        *({"model": bert()}, ValueError, "BertForSequenceClassification is not adapted; call apply_method"),
    ),
    (ADAPTERS_OF_FACTORS, {"r": 0}, ValueError, "FUNCTION: r is 0, want at least 1"),
    (ADAPTERS_OF_FACTORS[2:], {"lora_bias": True}, ValueError, "FUNCTION: lora_bias is True"),
]
REFUSED: list[tuple[Callable[..., Any], dict[str, Any], type[Exception], str]] = [
    *((take, *refusal) for take in (merge, adapters.merge_and_unload) for refusal in NOT_MERGED),
    *((function, *refusal) for functions, *refusal in SHARED for function in functions),
    *((inject, {"adapter_name": bad}, ValueError, f"adapter_name is {bad!r}, want a") for bad in ("a.b", "keys", "")),
    (inject, {"model": injected}, ValueError, f"adapter 'a' {TAKEN}"),
    (inject, {"model": merged, "adapter_name": "c"}, RuntimeError, MERGED),
    (inject, {"model": disabled, "adapter_name": "c"}, RuntimeError, "the adapters are disabled"),
    (inject, {"config": LoraConfig(target_modules=["norm"])}, TypeError, "norm (BatchNorm1d): no LoRA layer adapts B"),
    (inject, {"config": LoraConfig(target_parameters=["norm.weight"])}, TypeError, "norm.weight"),
    (inject, {"model": lambda: inject(Net(), BIASED, "b"), "config": BIASED}, ValueError, "bias is 'all', but the ada"),
    (inject, {"model": with_a_layer}, ValueError, "Net has LoRA layers already ('head')"),
    (
        inject,
        {"model": peft_model},
        ValueError,
        "FUNCTION: 'base_model.model.blocks.0.up' is a layer of PEFT (L",
    ),
    *((inject, {"model": peft_model, "config": other}, ValueError, "is a layer of PEFT (Linear)") for other in OTHERS),
    (inject, {"model": part_of_peft, "config": OTHERS[0]}, ValueError, "'head' is a layer of PEFT (ModulesToSaveWrapp"),
    (inject, offloading(Net, "up", modules_to_save=["head"]), TypeError, "head.weight: modules_to_save trains it, but"),
    (inject, offloading(Net, "up", bias="all"), TypeError, "blocks.0.up.bias: bias trains it, but it is offloaded"),
    (inject, offloading(Net, target_parameters=["up.weight"]), TypeError, "its weight is offloaded; keep"),
    (inject, offloading(llama, "q_proj", trainable_token_indices=[1]), TypeError, "cannot train its rows: its weight"),
    (save_adapter, {"save_embedding_layers": "yes"}, TypeError, "'yes' of type str, want True or False or 'auto'"),
    (save_adapter, {"normalise": "yes"}, TypeError, "normalise is 'yes' of type str, want True or False"),
    (save_adapter, {"adapter_name": "x"}, KeyError, f"save_adapter: there is {NO_ADAPTER}"),
    (save_adapter, TWO_ACTIVE, ValueError, "the active adapters are ['a', 'b'], want exactly one, or a name"),
    (save_adapter, {"directory": lambda path: saved(path) / "adapter_config.json"}, OSError, "adapter_config.json"),
    (load_adapter, {"directory": "org/name"}, FileNotFoundError, "that huggingface_hub.snapshot_download"),
    (load_adapter, NO_CONFIG, ValueError, "adapter_config.json"),
    (load_adapter, NO_WEIGHTS, ValueError, "adapter_mode"),
    (load_adapter, {"model": nn.Linear(2, 2)}, ValueError, "matches no module of Linear"),
    (load_adapter, {"model": injected}, ValueError, "'c' would not train; pass activate=True"),
    (load_adapter, RANK_4, ValueError, "has r=2 but the model was injected with r=4"),
    (load_adapter, {"model": Net().to("meta")}, ValueError, ".0.up.lora_A.weight: the model is on the meta device"),
    (AdapterPool, {"max_bytes": 100}, ValueError, "AdapterPool: max_bytes is 100, but one slot of rank 2 takes"),
    (AdapterPool, {"r": 0}, ValueError, "r is 0"),
    (AdapterPool, {"target_modules": ["nothing"]}, ValueError, "nothing"),
    (AdapterPool, {"target_modules": ["norm"]}, TypeError, "norm"),
    (AdapterPool, {"host_bytes": 1}, TypeError, "unexpected keyword argument 'host_bytes'"),
    (AdapterPool, {"modules_to_save": ["head"]}, TypeError, "unexpected keyword argument 'modules_to_save'"),
    (AdapterPool, {"directory": "nowhere"}, ValueError, "directory is 'nowhere', which is not a directory"),
    (AdapterPool, {"dtype": torch.int8}, ValueError, "AdapterPool: dtype is torch.int8, want one of torch.float64"),
    (adapters.set_adapter, {"names": ["a", "x"]}, KeyError, f"set_adapter: there is {NO_ADAPTER}"),
    (adapters.set_adapter, {"names": [1]}, TypeError, "names is [1] of type list, want a string or a list of strings"),
    (adapters.set_adapter, {"names": ["a", "a"]}, ValueError, "names are ['a', 'a'], want each once"),
    (adapters.add_weighted_adapter, {"adapters": ["a", "x"]}, KeyError, NO_ADAPTER),
    (adapters.add_weighted_adapter, {"adapters": [], "weights": []}, ValueError, "0 weights for 0 adapters; want one "),
    (adapters.add_weighted_adapter, {"weights": [1.0]}, ValueError, "1 weights for 2 adapters; want one each"),
    (adapters.add_weighted_adapter, {"weights": [1.0, NAN]}, ValueError, "weights are [1.0, nan], want finite numbers"),
    (adapters.add_weighted_adapter, TWO_RANKS, ValueError, "'blocks.0.up': the adapters have ranks [2, 3], but linear"),
    (adapters.add_weighted_adapter, {"adapter_name": "a"}, ValueError, f"adapter 'a' {TAKEN}"),
    (adapters.add_weighted_adapter, {"combination_type": "ties"}, ValueError, "want one of linear, cat, svd; for the"),
    (adapters.add_weighted_adapter, {"svd_rank": 0}, ValueError, "svd_rank is 0, want None or an integer of at least"),
    (adapters.delete_adapter, {"name": "x"}, KeyError, NO_ADAPTER),
    (adapters.delete_adapter, {"name": "b"}, RuntimeError, "'b' is active; call set_adapter with one of ['a'], or u"),
    (adapters.delete_adapter, {"model": tied, "name": "b"}, RuntimeError, "'b' is active; call unload(model), as it"),
    (adapters.rename_adapter, {"old": "x"}, KeyError, NO_ADAPTER),
    (adapters.rename_adapter, {"new": "b"}, ValueError, f"adapter 'b' {TAKEN}"),
    (adapters.rename_adapter, {"new": ""}, ValueError, "adapter_name is '', want a name without dots"),
    (adapters.hotswap_adapter, {"adapter_name": "x"}, KeyError, NO_ADAPTER),
    (adapters.hotswap_adapter, {"directory": lambda path: path / "none"}, FileNotFoundError, "none/adapter_config.jso"),
    (adapters.hotswap_adapter, RANK_1, ValueError, "does not fit the adapter 'a'"),
    (adapters.hotswap_adapter, file_of(r=3), ValueError, "blocks.0.up.lora_A.weight: [3, 6] in the file, [2, 6] in"),
    (adapters.hotswap_adapter, file_of(target_modules=["up", "head"]), ValueError, "unexpected key: base_model.model."),
    (adapters.hotswap_adapter, file_of(modules_to_save=["head"]), ValueError, "unexpected key: base_model.model.head."),
    (adapters.hotswap_adapter, file_of(lora_bias=True), ValueError, "key: base_model.model.blocks.0.up.lora_B.bias"),
    (adapters.prepare_hotswap, {"adapter_name": "x"}, KeyError, NO_ADAPTER),
    (adapters.prepare_hotswap, {"r": 1}, ValueError, "r is 1, but 'blocks.0.up' has rank 2; choose at least 2"),
    (merge, {"model": merged}, RuntimeError, f"merge: adapters are already {MERGED}"),
    (merge, {"model": with_biases}, ValueError, "the lora_bias of 'blocks.0.up' would go into a bias that 'b' trains"),
    (unmerge, *NO_NAMES),
    (unmerge, *NO_NAME),
    (unmerge, {"adapter_names": ["b"]}, RuntimeError, f"unmerge: the adapters are not {MERGED}"),
    (unmerge, {"model": injected, "adapter_names": None}, RuntimeError, f"the adapters are not {MERGED}"),
    (unmerge, {"model": lambda: parametrized(merged())}, RuntimeError, "unmerge: the weight of 'blocks.0.up' is not "),
    (unmerge, {"model": lambda: merged().double()}, RuntimeError, "was converted from torch.float32 to torch.float64"),
    (adapters.merge_and_unload, {"model": of_two_sets_of_rows}, ValueError, "train rows for the tokens [1, 2]"),
    (methods.new_method, {"name": "adapter-x"}, ValueError, "name has 'adapter-x', want one of full, bitfit"),
    (methods.new_method, {"bottleneck_size": 0}, ValueError, "bottleneck_size is 0, want at least 1"),
    (methods.new_method, {"size": 4}, TypeError, "adapter-h has no option 'size'; it has"),
    (methods.option_names, {"name": "x"}, ValueError, "name is 'x', want one of full, bitfit"),
    (methods.apply_method, {"model": lambda: adapted()}, ValueError, "the model is adapted by adapter-h already"),
    (methods.apply_method, INJECTED_BERT, ValueError, "the model is injected already"),
    (methods.set_pooling, {"pooling": "max"}, ValueError, "pooling is 'max', want one of cls, mean"),
    (methods.set_pooling, {"model": lambda: methods.set_pooling(bert(), "cls")}, ValueError, "has the pooling 'cls' a"),
    (methods.remove_method, MERGED_BERT, RuntimeError, "merged"),
    (methods.save_method, {"directory": lambda path: saved_method(path) / "method.json"}, OSError, "method.json"),
    (methods.load_method, {"model": lambda: adapted("bitfit")}, ValueError, "call remove_method(model) first"),
    (methods.read_method, {"directory": lambda path: path / "none"}, FileNotFoundError, "none"),
    (integration.accelerate, {"model": Net()}, ValueError, "Net has no PEFT LoRA layers; adapt it first"),
    (integration.accelerate, {"merge_rounding": "up"}, ValueError, "FUNCTION: rounding is 'up', want one of 'neare"),
    (
        integration.accelerate,
        {"merge_rounding": "stochastic"},
        TypeError,
        "the weight of 'base_model.model.blocks.0.u",
    ),
    (integration.accelerate, {"model": None, "merge_rounding": "stochastic"}, ValueError, "pass the model"),
    (integration.restore, {"model": merged_peft_model}, RuntimeError, "adapters are merged into 2 layers"),
    (
        layers.LoraAdapter,
        {"lora_dropout": 1.0},
        ValueError,
        "FUNCTION: lora_dropout is 1.0, want 0 <= lora_dropout",
    ),
    (layers.LoraAdapter, {"lora_dropout": NAN}, ValueError, "FUNCTION: lora_dropout is nan"),
    (
        layers.LoraAdapter,
        {"lora_alpha": NAN},
        ValueError,
        "FUNCTION: lora_alpha is nan, want a finite number of at",
    ),
    (layers.LoraAdapter, {"lora_alpha": -1.0}, ValueError, "FUNCTION: lora_alpha is -1.0, want a finite number of at"),
    (layers.LoraAdapter, {"lora_alpha": float("inf")}, ValueError, "FUNCTION: lora_alpha is inf, want a finite number"),
    (layers.LoraAdapter, {"init_lora_weights": "pissa"}, ValueError, "is 'pissa', want True, False or \"gaussian\""),
    (layers.LoraAdapter, {"in_features": -6}, ValueError, "in_features is -6, want at least 0"),
    (layers.EmbeddingAdapter, {"num_embeddings": -6}, ValueError, "num_embeddings is -6"),
    (layers.PackedAdapter, {"enable_lora": [False]}, ValueError, "enable_lora is [False], want at least one True"),
    (layers.PackedAdapter, {"enable_lora": [True] * 4}, ValueError, "enable_lora has 4 parts, want a divisor of out_f"),
    (analysis.factored_svd, {"lora_A": torch.randn(3, 6)}, ValueError, "factored_svd: lora_B has rank 2 but lora_A ha"),
    (analysis.factored_svd, {"lora_A": torch.randn(6)}, ValueError, "factored_svd: lora_A has shape [6], want 2 dimen"),
    (analysis.factored_svd, {"scaling": NAN}, ValueError, "factored_svd: lora_A, lora_B or scaling nan is not finite"),
    (analysis.block_krylov_svd, {"weight": torch.full((6, 4), NAN)}, ValueError, "weight [6, 4] is not finite"),
    (analysis.block_krylov_svd, {"rank": 5}, ValueError, "block_krylov_svd: rank is 5, want 1 to 4, the smaller side"),
    (analysis.project, {"U": torch.randn(4, 2)}, ValueError, "project: U [4, 2] and V [4, 2] do not fit the weight [6"),
    (analysis.projection_table, {"weight": torch.randn(6, 4)}, ValueError, "update has shape [4, 6] but weight has [6"),
    (analysis.projection_table, FEW_DIRECTIONS, ValueError, "weight_svd has 1 directions, want at least the 2 of u"),
    (analysis.expected_random_norm, {"r": 5}, ValueError, "r is 5"),
    (analysis.expected_random_norm, {"in_features": 0}, ValueError, "in_features=0"),
    (analysis.leading_ranks, {"count": -1}, ValueError, "count is -1, want at least 0"),
    (analysis.singular_basis, {"matrix": torch.full((2, 6), NAN)}, ValueError, "matrix [2, 6] is not finite"),
    (analysis.subspace_similarity, {"second": torch.eye(5)}, ValueError, "subspace_similarity: second has 5 rows but"),
    (analysis.orthonormal_columns, {"count": 5}, ValueError, "orthonormal_columns: count is 5, want 0 to dim=4"),
    (layers.LoraAdapter, {"r": True}, TypeError, "r is True of type bool, want an integer"),
    (adapters.add_weighted_adapter, {"adapters": "a"}, TypeError, "adapters is 'a' of type str, want a list of strin"),
    (methods.load_method, {"trainable": 1}, TypeError, "trainable is 1 of type int, want True or False"),
    (inject, {"share_inputs": "yes"}, TypeError, "share_inputs is 'yes' of type str, want True or False"),
    *(
        (function, {name: made.to(wrong)}, error, f"{name} {words}")
        for wrong, error, words in (
            ("meta", ValueError, "is on the meta device, where it has no values"),
            (torch.int64, TypeError, "has dtype int64, want one of float64, float32"),
        )
        for function, name, made in (
            (analysis.project, "V", torch.ones(4, 2)),
            (analysis.subspace_similarity, "second", torch.ones(4, 2)),
            (analysis.singular_basis, "matrix", torch.ones(2, 6)),
            (analysis.block_krylov_svd, "weight", torch.ones(6, 4)),
            (analysis.factored_svd, "lora_A", torch.ones(2, 6)),
        )
    ),
    (layers.LoraLinear, {"adapter": layers.LoraAdapter(5, 4, 2, 4)}, ValueError, "lora_A has shape [2, 5], want [2,"),
    (layers.LoraLinear, {"adapter": layers.LoraAdapter(6, 5, 2, 4)}, ValueError, "lora_B has shape [5, 2], want [4,"),
    (layers.LoraLinear, {"adapter": layers.DoraAdapter(6, 4, 2, 4)}, TypeError, "is a DoraAdapter, want one without"),
    (layers.DoraLinear, {"adapter": layers.LoraAdapter(6, 4, 2, 4)}, TypeError, "is a LoraAdapter, want a DoraAdapt"),
    (layers.LoraEmbedding, {"adapter": layers.EmbeddingAdapter(7, 4, 2, 4)}, ValueError, "lora_A has shape [7, 2], w"),
    *((kind, {"base_layer": nn.ReLU()}, TypeError, f"base_layer is a ReLU, want {kind.base_kinds}") for kind in BASES),
    (layers.LoraPackedLinear, {"num_parts": 4}, ValueError, "num_parts is 4, want a divisor of out_features=6"),
    (layers.LoraPackedLinear, {"num_parts": 0}, ValueError, "num_parts is 0"),
    (layers.LoraParameter, {"parameter_name": "x"}, TypeError, "its x is computed"),
    (layers.LoraParameter, {"parameter_name": "bias"}, TypeError, "its bias has 1 dimensions, want 2, or 3"),
    *(
        (function, {"singular_values": torch.tensor(values)}, ValueError, words)
        for function in SPECTRA
        for values, words in (
            ([[2.0, 1.0]], "[1, 2], want a vector of real numbers"),
            ([1.0, 2.0], "descending order; sort them first"),
            ([1.0, NAN], "singular_values must be finite"),
        )
    ),
    (analysis.energy_rank, {"energy": 1.5}, ValueError, "energy_rank: energy is 1.5, want 0 < energy <= 1"),
    *((function, {"i_max": 5}, ValueError, "i_max is 5, want 0 to dim=4") for function in SIMILARITIES),
    *((function, {"j_max": -1}, ValueError, "j_max is -1, want 0 to dim=4") for function in SIMILARITIES),
]
