"""Tests how compare names methods, joins them to lines, and finds a winner beyond the spread of the seeds."""

from __future__ import annotations

import re
from dataclasses import asdict
from typing import Any

import pytest

from lora_ext.tasks import TaskError
from lora_ext.tasks.comparison.method_spec import MethodSpec, check_labels, without
from lora_ext.tasks.comparison.spread import lines_of, over_seeds, summary, winner
from lora_ext.tasks.finetune.defaults import LEARNING_RATES
from lora_ext.tasks.finetune.settings import Settings


def settings_of(spec: str, options: dict[str, Any], seed: int) -> Settings:
    return MethodSpec.parse(spec).settings(options, seed)


def test_lines_join_rows_that_differ_in_one_size():
    def row(text: str, parameters: int) -> dict[str, Any]:
        spec = MethodSpec.parse(text)
        settings = spec.settings(asdict(Settings()) | {"learning_rate": None}, 0)
        named = {"label": spec.label, "spec": text} if spec.is_named else {"label": text}
        return named | {"settings": asdict(settings), "trained_parameters": parameters}

    labels = ["lora:r=8", "lora:r=2", "lora:target-modules=q", "adapter-h", "adapter-p:bottleneck-size=8", "lora:r=4"]
    labels += [
        "adapter-p",
        "prefix-layer",
        "prefix-layer:prefix-length=2:infix-length=2",
        "lora:r=4:learning-rate=1e-4",
        "lora:r=6:target-modules=k:name=large",
        "lora:r=5:target-modules=k:name=small",
    ]
    lines = lines_of([row(label, 10 * (len(labels) - at)) for at, label in enumerate(labels)])
    assert {name: [point["label"] for point in points] for name, points in lines.items()} == {
        "lora, r 4, 2, 8": ["lora:r=4", "lora:r=2", "lora:r=8"],
        "lora:target-modules=q": ["lora:target-modules=q"],
        "adapter-h": ["adapter-h"],
        "adapter-p, bottleneck size 16, 8": ["adapter-p", "adapter-p:bottleneck-size=8"],
        "prefix-layer": ["prefix-layer"],
        "prefix-layer:prefix-length=2:infix-length=2": ["prefix-layer:prefix-length=2:infix-length=2"],
        "lora:r=4:learning-rate=1e-4": ["lora:r=4:learning-rate=1e-4"],
        "small, large, r 5, 6": ["small", "large"],
    }
    assert over_seeds([3]) == "seed 3" and over_seeds([0, 1]) == "mean and standard deviation over 2 seeds"


def test_winners_must_exceed_the_spread():
    assert summary([0.5]) == {"values": [0.5], "mean": 0.5, "sd": None}
    a, b = summary([0.80, 0.82, 0.84]), summary([0.70, 0.71, 0.72])  # sd 0.02 and 0.01
    assert winner({"a": a, "b": b}) == "a"
    assert winner({"a": a, "b": summary([0.78, 0.80, 0.82])}) is None  # 0.02 apart, within 0.028
    assert winner({"a": a, "b": b, "c": summary([0.83, 0.84, 0.85])}) is None
    assert winner({"a": a}) is None
    assert winner({"a": summary([0.9]), "b": summary([0.1])}) is None


def test_a_method_may_carry_options():
    common = asdict(Settings()) | {"learning_rate": None, "r": 4}
    settings = settings_of("adapter-drop:bottleneck-size=8:drop-layers=2:epochs=0.5", common, seed=3)
    assert (settings.bottleneck_size, settings.drop_layers, settings.epochs, settings.seed) == (8, 2, 0.5, 3)
    assert settings_of("full", common, 0).learning_rate == LEARNING_RATES["full"]
    assert settings_of("full:learning-rate=1e-5", common, 0).learning_rate == 1e-5
    assert settings_of("lora", common, 0).r == 4
    for spec in ("lora:target-modules=(?:query|value):r=2", "lora:r=2:target-modules=(?:query|value)"):
        assert settings_of(spec, common, 0).target_modules == "(?:query|value)"
    assert settings_of("lora+bitfit", common, 0).learning_rate == 1e-3
    for spec, message in [
        ("lora:r", "'r' is not option=value"),
        ("lora:rank=3", "'rank=3' is not option=value"),
        ("lora:seed=3", "'seed=3' is not option=value"),
        ("lora:precision=bfloat16", "precision is the same for all; give --precision"),
        ("lora:r=two", "r is 'two', want a number"),
        ("dora:r=3", "--method is 'dora', want one of full"),
        ("dora", "--method is 'dora', want one of full"),
    ]:
        with pytest.raises(TaskError, match=message):
            settings_of(spec, common, 0)


@pytest.mark.parametrize(
    ("methods", "message"),
    [
        (["lora:name="], "'lora:name=': name is '', want at most 40 letters, digits"),
        (["lora:name=-x"], "name is '-x', want at most 40 letters, digits and . _ + -, with a letter or digit first"),
        (["lora:name=.."], "name is '..', want at most 40"),
        (["lora:name=a/b"], "name is 'a/b', want at most 40"),
        (["lora:name=a b"], "name is 'a b', want at most 40"),
        (["lora:name=é"], "name is 'é', want at most 40"),
        (["lora:name=a\x1b[1m"], r"name is 'a\x1b[1m', want at most 40"),
        (["lora:name=a\n"], r"name is 'a\n', want at most 40"),
        ([f"lora:name={'a' * 41}"], f"name is '{'a' * 41}', want at most 40"),
        (["lora:name"], "'name' is not option=value of finetune"),
        (["lora:name=a:b"], "'b' is not option=value of finetune"),
        (["lora:name=Base"], "name is 'Base', which tables use for the model without a method"),
        (["lora:name=bitfit"], "name is 'bitfit', which is another method"),
        (["lora:name=lora+bitfit"], "name is 'lora+bitfit', which is another method"),
        (["lora:r=2:name=a", "bitfit:name=a"], "'lora:r=2:name=a' and 'bitfit:name=a' have one name, 'a'"),
        (["lora:r=2:name=a", "bitfit:name=A"], "'lora:r=2:name=a' and 'bitfit:name=A' have one name, 'A'"),
        (["lora", "lora:r=2:name=lora"], "'lora' and 'lora:r=2:name=lora' have one name, 'lora'"),
        (["lora:r=2:name=lora", "lora"], "'lora:r=2:name=lora' and 'lora' have one name, 'lora'"),
        (["lora:r=2", "lora:r=2:name=a"], "'lora:r=2' and 'lora:r=2:name=a' are the same runs under two names"),
        (["lora", "lora:r=4:name=a"], "'lora' and 'lora:r=4:name=a' are the same runs under two names"),
    ],
)
def test_names_that_would_mix_methods_up_are_refused(methods: list[str], message: str):
    options = asdict(Settings()) | {"learning_rate": None}
    with pytest.raises(TaskError, match=re.escape(message)):
        check_labels([(spec, spec.settings(options, 0)) for spec in map(MethodSpec.parse, methods)])


def test_names_that_are_allowed():
    options = asdict(Settings()) | {"learning_rate": None}
    texts = ["lora", "lora:r=8", "lora:r=2:name=lora-qv", "full:name=A.b_c+d-1", f"bitfit:name={'a' * 40}"]
    specs = [MethodSpec.parse(text) for text in texts]
    check_labels([(spec, spec.settings(options, 0)) for spec in specs])
    assert [spec.label for spec in specs] == [*texts[:2], "lora-qv", "A.b_c+d-1", "a" * 40]
    assert MethodSpec.parse("lora:r=2:name=lora").label == "lora"  # allowed if no other method has this label
    assert without(texts, ["lora-qv", texts[3]]) == [*texts[:2], texts[4]]
    with pytest.raises(TaskError, match="--without lora-q: there are lora, lora:r=8, lora-qv"):
        without(texts, ["lora-q"])
    with pytest.raises(TaskError, match="--without lora leaves no method"):
        without(["lora"], ["lora"])
