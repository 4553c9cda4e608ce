"""The part of the table of public functions (refusals.py) about methods, and about PEFT's models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
from support.models import Net, bert
from support.public_calls import Call
from torch import nn

from lora_ext import LoraConfig, inject, merge, methods
from lora_ext.integrations import peft as integration

NOT_SUPPORTED = "Net (model type None) is not supported; supported are"


def saved_method(directory: Path) -> Path:
    methods.save_method(adapted(), directory / "method")
    return directory / "method"


def adapted(name: str = "adapter-h", **options: Any) -> nn.Module:
    return methods.apply_method(bert(), methods.new_method(name, **options))


def peft_model() -> peft.PeftModel:
    return peft.get_peft_model(Net(), peft.LoraConfig(r=2, target_modules=["up"]))


def merged_peft_model() -> peft.PeftModel:
    model = integration.accelerate(peft_model())
    model.merge_adapter()
    return model


METHODS = [
    Call(
        methods.new_method,
        lambda _: {"name": "adapter-h", "bottleneck_size": 4},
        [
            ({"name": "adapter-x"}, ValueError, "name has 'adapter-x', want one of full, bitfit"),
            ({"bottleneck_size": 0}, ValueError, "bottleneck_size is 0, want at least 1"),
            ({"size": 4}, TypeError, "adapter-h has no option 'size'; it has"),
        ],
    ),
    Call(
        methods.option_names,
        lambda _: {"name": "adapter-h"},
        [({"name": "x"}, ValueError, "name is 'x', want one of full, bitfit")],
    ),
    Call(
        methods.apply_method,
        lambda _: {"model": bert(), "method": methods.new_method("adapter-h")},
        [
            ({"method": "adapter-h"}, TypeError, "method is 'adapter-h' of type str, want a Method"),
            ({"model": Net()}, TypeError, f"{NOT_SUPPORTED} Transformers' models of the types bert, roberta, "),
            (lambda _: {"model": adapted()}, ValueError, "the model is adapted by adapter-h already"),
            (
                lambda _: {"model": inject(bert(), LoraConfig(target_modules=["query"]))},
                ValueError,
                "the model is injected already",
            ),
        ],
    ),
    Call(
        methods.prepare_method,
        lambda _: {"model": bert(), "method": methods.new_method("adapter-h")},
        [({"method": None}, TypeError, "method is None, want a Method"), ({"model": Net()}, TypeError, NOT_SUPPORTED)],
    ),
    Call(
        methods.set_pooling,
        lambda _: {"model": bert(), "pooling": "mean"},
        [
            ({"pooling": "max"}, ValueError, "pooling is 'max', want one of cls, mean"),
            ({"model": Net()}, TypeError, NOT_SUPPORTED),
            (
                lambda _: {"model": methods.set_pooling(bert(), "mean"), "pooling": "cls"},
                ValueError,
                "the model has the pooling 'mean' already; load it again",
            ),
        ],
    ),
    Call(methods.pooling_of, lambda _: {"model": bert()}),
    Call(methods.method_of, lambda _: {"model": adapted()}),
    Call(methods.head_parameters, lambda _: {"model": bert()}),
    Call(methods.head_parameter_count, lambda _: {"model": bert()}),
    Call(
        methods.remove_method,
        lambda _: {"model": adapted()},
        [
            ({"model": bert()}, ValueError, "BertForSequenceClassification is not adapted; call apply_method"),
            (lambda _: {"model": merge(adapted("lora", target_modules=["query"]))}, RuntimeError, "merged"),
        ],
    ),
    Call(
        methods.save_method,
        lambda path: {"model": adapted(), "directory": path / "out"},
        [
            ({"model": bert()}, ValueError, "BertForSequenceClassification is not adapted; call apply_method"),
            (lambda path: {"directory": saved_method(path) / "method.json"}, OSError, "method.json"),
        ],
    ),
    Call(
        methods.load_method,
        lambda path: {"model": bert(), "directory": saved_method(path), "trainable": False},
        [
            (lambda path: {"directory": path / "none"}, FileNotFoundError, "none"),
            ({"model": Net()}, TypeError, NOT_SUPPORTED),
            (lambda path: {"model": adapted("bitfit")}, ValueError, "call remove_method(model) first"),
            ({"trainable": 1}, TypeError, "trainable is 1 of type int, want True or False"),
        ],
    ),
    Call(
        methods.read_method,
        lambda path: {"directory": saved_method(path)},
        [(lambda path: {"directory": path / "none"}, FileNotFoundError, "none")],
    ),
    # --- PEFT ---------------------------------------------------------------------------------------------------------
    Call(
        integration.accelerate,
        lambda _: {"model": peft_model(), "share_inputs": True},
        [
            ({"model": Net()}, ValueError, "Net has no PEFT LoRA layers; adapt it first"),
            ({"share_inputs": 1}, TypeError, "share_inputs is 1 of type int, want True or False"),
        ],
    ),
    Call(
        integration.restore,
        lambda _: {"model": integration.accelerate(peft_model())},
        [(lambda _: {"model": merged_peft_model()}, RuntimeError, "adapters are merged into 2 layers")],
    ),
    Call(integration.report, lambda _: {"model": peft_model()}),
]
