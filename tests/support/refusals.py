"""The table of public functions of models and files: a valid call of each one, and calls that it refuses.

``tests/test_refusals.py`` makes the calls and checks that no public function is missing.
"""

from __future__ import annotations

from pathlib import Path

import torch
from support.models import Net, bert
from support.public_calls import NAN, Call
from support.refusals_analysis import ANALYSIS
from support.refusals_layers import LAYERS
from support.refusals_methods import METHODS
from torch import nn

from lora_ext import AdapterPool, LoraConfig, adapters, inject, load_adapter, merge, save_adapter, unmerge

BAD_NAMES = ("a.b", "keys", "")
CONFIG = LoraConfig(r=2, target_modules=["up", "down"], init_lora_weights=False)
BIASED = LoraConfig(r=2, target_modules=["up"], bias="all")


def injected() -> Net:
    model = inject(Net().eval(), CONFIG, "a")
    return inject(model, CONFIG, "b")


def merged() -> Net:
    return merge(injected(), ["a"])


def disabled() -> Net:
    """Makes a model in a disable_adapters context that is never left."""
    model = injected()
    model.context = adapters.disable_adapters(model)  # ends when it is collected
    model.context.__enter__()
    return model


def saved(directory: Path) -> Path:
    save_adapter(injected(), directory / "adapter", "a")
    return directory / "adapter"


def damaged(directory: Path, name: str, content: bytes) -> Path:
    (saved(directory) / name).write_bytes(content)
    return directory / "adapter"


def with_nan() -> Net:
    model = injected()
    with torch.no_grad():
        model.blocks[1].up.adapters["b"].lora_B[0, 0] = NAN
    return model


def parametrized() -> Net:
    model = injected()
    torch.nn.utils.parametrizations.weight_norm(model.blocks[0].up.base_layer)
    return model


def tied() -> Net:
    model = Net()
    model.blocks[1].up.weight = model.blocks[0].up.weight
    return inject(model, LoraConfig(r=2, target_modules=["blocks.0.up"], init_lora_weights=False), "b")


NOT_INJECTED = [({"model": Net()}, ValueError, "FUNCTION: Net is not injected; call lora_ext.inject on it")]
NO_LAYER = [({"model": Net()}, ValueError, "FUNCTION: Net has no LoRA layer; call inject(model, config) first")]
FIRST = "merged into 'blocks.0.up'"
MERGED = f"{FIRST}, 'blocks.0.down', 'blocks.1.up' and 1 more"
TAKEN = "exists already; the adapters are ['a', 'b']. Choose another name, or delete_adapter"
NO_ADAPTER = "no adapter 'x'; the adapters are ['a', 'b']"

CALLS: list[Call] = [
    Call(
        inject,
        lambda _: {"model": Net(), "config": CONFIG, "adapter_name": "a", "share_inputs": False},
        [
            ({"share_inputs": "yes"}, TypeError, "share_inputs is 'yes' of type str, want True or False"),
            ({"config": {"r": 8}}, TypeError, "config is {'r': 8} of type dict, want a LoraConfig"),
            *(
                ({"adapter_name": bad}, ValueError, f"adapter_name is {bad!r}, want a name without dots")
                for bad in BAD_NAMES
            ),
            (lambda _: {"model": injected()}, ValueError, f"adapter 'a' {TAKEN}"),
            (lambda _: {"model": merged(), "adapter_name": "c"}, ValueError, f"adapters are {FIRST}; call unmerge"),
            (lambda _: {"model": disabled(), "adapter_name": "c"}, RuntimeError, "the adapters are disabled"),
            (
                {"config": LoraConfig(target_modules=["upp"])},
                ValueError,
                "target_modules ['upp'] matches no module of Net; close matches: 'up'",
            ),
            (
                {"config": LoraConfig(target_modules=["norm"])},
                TypeError,
                "norm (BatchNorm1d): no LoRA layer adapts BatchNorm1d",
            ),
            (
                {"config": LoraConfig(target_modules=["up"], modules_to_save=["hed"])},
                ValueError,
                "modules_to_save ['hed'] matches no module of Net; close matches: 'head'",
            ),
            ({"config": LoraConfig(target_parameters=["norm.weight"])}, TypeError, "norm.weight"),
            (
                lambda _: {"model": inject(Net(), BIASED, "b"), "config": BIASED},
                ValueError,
                "bias is 'all', but the adapter 'b' trains the model's biases already",
            ),
        ],
    ),
    Call(
        save_adapter,
        lambda path: {
            "model": injected(),
            "directory": path / "out",
            "adapter_name": "a",
            "save_embedding_layers": False,
        },
        [
            *NOT_INJECTED,
            ({"save_embedding_layers": "yes"}, TypeError, "'yes' of type str, want True or False or 'auto'"),
            ({"adapter_name": "x"}, KeyError, f"save_adapter: there is {NO_ADAPTER}"),
            (
                lambda _: {"model": adapters.set_adapter(injected(), ["a", "b"]), "adapter_name": None},
                ValueError,
                "the active adapters are ['a', 'b'], want exactly one, or a name",
            ),
            (lambda path: {"directory": saved(path) / "adapter_config.json"}, OSError, "adapter_config.json"),
        ],
    ),
    Call(
        load_adapter,
        lambda path: {
            "model": Net(),
            "directory": saved(path),
            "trainable": True,
            "adapter_name": "c",
            "activate": False,
            "download": False,
            "revision": None,
            "subfolder": "",
        },
        [
            ({"subfolder": "../b"}, ValueError, "subfolder is '../b', want one within the directory"),
            ({"revision": "main"}, ValueError, "revision is 'main', but nothing is downloaded; set download=True"),
            ({"directory": "org/name"}, FileNotFoundError, "on the Hugging Face hub: load_adapter(..., download=True)"),
            ({"trainable": "yes"}, TypeError, "trainable is 'yes' of type str, want True or False"),
            (lambda path: {"directory": path / "none"}, FileNotFoundError, "none"),
            (lambda path: {"directory": damaged(path, "adapter_config.json", b"{")}, ValueError, "adapter_config.json"),
            (
                lambda path: {"directory": damaged(path, "adapter_model.safetensors", b"{}")},
                ValueError,
                "adapter_model.safetensors",
            ),
            ({"model": nn.Linear(2, 2)}, ValueError, "matches no module of Linear"),
            (lambda _: {"model": injected()}, ValueError, "'c' would not train; pass activate=True"),
            ({"model": bert()}, ValueError, "['up', 'down'] matches no module of BertForSequenceClassification"),
            (
                lambda _: {"model": inject(Net(), LoraConfig(r=4, target_modules=["up"]), "c")},
                ValueError,
                "has r=2 but the model was injected with r=4",
            ),
            (lambda _: {"model": merged()}, RuntimeError, f"an adapter is {FIRST}; call unmerge(model)"),
            (lambda _: {"model": Net().to("meta")}, ValueError, ".0.up.lora_A.weight: the model is on the meta device"),
        ],
    ),
    Call(
        adapters.set_adapter,
        lambda _: {"model": injected(), "names": ["a"], "trainable": False},
        [
            *NOT_INJECTED,
            ({"names": "x"}, KeyError, f"set_adapter: there is {NO_ADAPTER}"),
            ({"names": ["a", "x"]}, KeyError, f"set_adapter: there is {NO_ADAPTER}"),
            ({"names": [1]}, TypeError, "names is [1] of type list, want a string or a list of strings"),
            ({"names": ["a", "a"]}, ValueError, "names are ['a', 'a'], want each once"),
            (lambda _: {"model": disabled()}, RuntimeError, "the adapters are disabled; leave disable_adapters first"),
        ],
    ),
    Call(
        AdapterPool,
        lambda path: {
            "model": Net(),
            "directory": saved(path).parent,
            "target_modules": ["up", "down"],
            "r": 2,
            "max_bytes": 4096,
            "dtype": None,
            "timeout": 1.0,
        },
        [
            ({"r": 0}, ValueError, "r is 0"),
            ({"target_modules": ["x"]}, ValueError, "x"),
            ({"max_bytes": 1}, ValueError, "AdapterPool: max_bytes is 1, but one slot of rank 2 takes"),
            ({"dtype": torch.int8}, ValueError, "AdapterPool: dtype is torch.int8, want one of torch.float64"),
            ({"directory": "none"}, ValueError, "AdapterPool: directory is 'none', which is not a directory"),
            (lambda _: {"model": merged()}, ValueError, "adapters are merged into"),
        ],
    ),
    Call(adapters.adapter_names, lambda _: {"model": injected()}),
    Call(adapters.adapter_status, lambda _: {"model": injected()}),
    Call(adapters.lora_modules, lambda _: {"model": injected()}),
    Call(adapters.merge_record_bytes, lambda _: {"model": merged()}),
    Call(
        adapters.merge_errors,
        lambda _: {"model": injected(), "adapter_names": "a"},
        [
            *NO_LAYER,
            ({"adapter_names": ["x"]}, KeyError, "FUNCTION: no layer has an adapter 'x'; the adapters are ['a', 'b']"),
            (lambda _: {"model": disabled(), "adapter_names": None}, RuntimeError, "FUNCTION: no adapter is active in"),
        ],
    ),
    Call(adapters.input_groups, lambda _: {"model": injected()}),
    Call(adapters.trainable_parameter_counts, lambda _: {"model": injected()}),
    Call(
        adapters.add_weighted_adapter,
        lambda _: {
            "model": injected(),
            "adapters": ["a", "b"],
            "weights": [1.0, 0.5],
            "adapter_name": "c",
            "combination_type": "svd",
            "svd_rank": 2,
        },
        [
            *NOT_INJECTED,
            ({"adapters": ["a", "x"]}, KeyError, NO_ADAPTER),
            ({"adapters": "a"}, TypeError, "adapters is 'a' of type str, want a list of strings"),
            ({"adapters": [], "weights": []}, ValueError, "adapters is empty; name at least one"),
            ({"weights": [1.0]}, ValueError, "weights has 1 entries for 2 adapters; want one each"),
            ({"weights": [1.0, NAN]}, ValueError, "weights are [1.0, nan], want finite numbers"),
            ({"adapter_name": "a"}, ValueError, f"adapter 'a' {TAKEN}"),
            ({"combination_type": "ties"}, ValueError, "want one of linear, cat, svd; for the others use PEFT"),
            ({"svd_rank": 0}, ValueError, "svd_rank is 0, want None or an integer of at least 1"),
            (lambda _: {"model": disabled()}, RuntimeError, "the adapters are disabled"),
            (lambda _: {"model": merged()}, ValueError, f"adapters are {FIRST}; call unmerge(model) first"),
        ],
    ),
    Call(
        adapters.delete_adapter,
        lambda _: {"model": injected(), "name": "a"},
        [
            *NOT_INJECTED,
            ({"name": "x"}, KeyError, NO_ADAPTER),
            ({"name": "b"}, RuntimeError, "'b' is active; call set_adapter(model, ...) first, with one of ['a']"),
            (lambda _: {"model": merged()}, RuntimeError, f"'a' is {MERGED}; call unmerge"),
            (lambda _: {"model": disabled()}, RuntimeError, "the adapters are disabled"),
        ],
    ),
    Call(
        adapters.disable_adapters,
        lambda _: {"model": injected()},
        [*NO_LAYER, (lambda _: {"model": merged()}, RuntimeError, f"{MERGED}; call unmerge(model) first")],
    ),
    Call(
        adapters.hotswap_adapter,
        lambda path: {"model": injected(), "directory": saved(path), "adapter_name": "a"},
        [
            *NOT_INJECTED,
            ({"adapter_name": "x"}, KeyError, NO_ADAPTER),
            (lambda path: {"directory": path / "none"}, FileNotFoundError, "none/adapter_config.json is missing"),
            (lambda _: {"model": merged()}, RuntimeError, f"'a' is {MERGED}; call unmerge(model, 'a') first"),
            (
                lambda _: {"model": inject(Net(), LoraConfig(r=1, target_modules=["up", "down"]), "a")},
                ValueError,
                "rank",
            ),
        ],
    ),
    Call(
        adapters.prepare_hotswap,
        lambda _: {"model": injected(), "r": 4, "adapter_name": "a"},
        [
            *NOT_INJECTED,
            ({"adapter_name": "x"}, KeyError, NO_ADAPTER),
            ({"r": 0}, ValueError, "r is 0, want an integer of at least 1"),
            ({"r": 1}, ValueError, "r is 1, but 'blocks.0.up' has rank 2"),
            (lambda _: {"model": merged()}, RuntimeError, f"'a' is {MERGED}; call unmerge(model, 'a') first"),
        ],
    ),
    Call(
        adapters.rename_adapter,
        lambda _: {"model": injected(), "old": "a", "new": "c"},
        [
            *NOT_INJECTED,
            ({"old": "x"}, KeyError, NO_ADAPTER),
            ({"new": "b"}, ValueError, f"adapter 'b' {TAKEN}"),
            *(({"new": bad}, ValueError, f"adapter_name is {bad!r}, want a name without dots") for bad in BAD_NAMES),
            (lambda _: {"model": merged()}, RuntimeError, f"'a' is {MERGED}; call unmerge"),
            (lambda _: {"model": disabled()}, RuntimeError, "the adapters are disabled"),
        ],
    ),
    Call(
        merge,
        lambda _: {"model": injected(), "adapter_names": ["a"]},
        [
            *NO_LAYER,
            ({"adapter_names": []}, ValueError, "merge: adapter_names is empty; name at least one adapter"),
            ({"adapter_names": ["x"]}, KeyError, "merge: no layer has an adapter 'x'; the adapters are ['a', 'b']"),
            (lambda _: {"model": merged()}, RuntimeError, f"merge: adapters are already {MERGED}"),
            (lambda _: {"model": disabled(), "adapter_names": None}, RuntimeError, "merge: no adapter is active in 'b"),
            (
                lambda _: {"model": with_nan(), "adapter_names": "b"},
                ValueError,
                "the weight of 'blocks.1.up' NaN or infinite: the adapter has NaN or infinite values",
            ),
            (lambda _: {"model": parametrized()}, RuntimeError, "'blocks.0.up' is not a parameter but computed"),
            (
                lambda _: {"model": tied(), "adapter_names": "b"},
                ValueError,
                "is shared with 'blocks.1.up', which would change too",
            ),
        ],
    ),
    Call(
        unmerge,
        lambda _: {"model": merged(), "adapter_names": ["a"]},
        [
            *NO_LAYER,
            ({"adapter_names": []}, ValueError, "unmerge: adapter_names is empty; name at least one adapter"),
            ({"adapter_names": ["x"]}, KeyError, "unmerge: no layer has an adapter 'x'; the adapters are ['a', 'b']"),
            ({"adapter_names": ["b"]}, RuntimeError, f"unmerge: the adapters are not {MERGED}"),
            (lambda _: {"model": injected(), "adapter_names": None}, RuntimeError, f"the adapters are not {MERGED}"),
            (lambda _: {"model": merged().double()}, RuntimeError, "was converted from torch.float32 to torch.float64"),
        ],
    ),
    Call(
        adapters.merge_and_unload,
        lambda _: {"model": injected(), "adapter_names": ["a"], "dequantize": False},
        [
            *NO_LAYER,
            ({"dequantize": True}, ValueError, "FUNCTION: dequantize is set, but Net has no quantised layer"),
            ({"dequantize": torch.int8}, ValueError, "FUNCTION: dequantize is torch.int8, want True, False or one of"),
            ({"dequantize": "yes"}, TypeError, "dequantize is 'yes' of type str"),
            ({"adapter_names": []}, ValueError, "merge_and_unload: adapter_names is empty; name at least one adapter"),
            ({"adapter_names": ["x"]}, KeyError, "FUNCTION: no layer has an adapter 'x'; the adapters are ['a', 'b']"),
            (lambda _: {"model": disabled(), "adapter_names": None}, RuntimeError, "FUNCTION: no adapter is active in"),
            (lambda _: {"model": with_nan(), "adapter_names": "b"}, ValueError, "the adapter has NaN or infinite"),
            (lambda _: {"model": disabled()}, RuntimeError, "the adapters are disabled"),
        ],
    ),
    Call(
        adapters.unload,
        lambda _: {"model": injected()},
        [
            *NO_LAYER,
            (lambda _: {"model": merged()}, RuntimeError, f"{MERGED}; call unmerge(model) first"),
            (lambda _: {"model": disabled()}, RuntimeError, "the adapters are disabled"),
        ],
    ),
    # --- methods, PEFT; layers and measures, which need no model ------------------------------------------------------
    *METHODS,
    *LAYERS,
    *ANALYSIS,
]
