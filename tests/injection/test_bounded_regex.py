"""Expressions in configs match as in PEFT, in bounded time."""

from __future__ import annotations

import re
import time

import peft
import pytest
from hostile.attacks import CATASTROPHIC
from peft.tuners.tuners_utils import check_target_module_exists

from lora_ext import LoraConfig
from lora_ext._common.matching import PathMatcher, PathPatterns, TimeAllowance, check_expressions, compiled

pytestmark = pytest.mark.cpu_only("has no tensors")

LEAVES = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.experts.3.down_proj", "mlp"]
PATHS = [
    f"{top}.{i}.{leaf}"
    for top in ("model.layers", "vision.blocks", "text_model.h")
    for i in (0, 1, 12)
    for leaf in LEAVES
]
PATHS += ["lm_head", "model", "model.embed_tokens", "layers.1.mlp", "q_proj", "model.layers", "é.q_proj"]

# Expressions from model cards, PEFT's documentation and issues.
WRITTEN = [
    "q_proj",
    "model.layers.0.self_attn.q_proj",
    "^model.layers.0.self_attn.q_proj",
    r".*\.(q_proj|v_proj)$",
    r"model\.layers\.(0|1|12)\.(self_attn|mlp)\..*proj",
    r"^(?!.*vision).*(?:q_proj|v_proj|gate_proj)",
    r".*(?<!experts\.3)\.down_proj",
    r"(?:.*?(?:language|text|model).*?(?:self_attn|attention|attn|mlp|ffn).*?(?:k_proj|v_proj|q_proj|down_proj).*?)"
    r"|(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|mlp)\.(?:(?:k_proj|v_proj|q_proj|o_proj)))",
    r"(?:\w+\.)*q_proj",
    r"(\w+\.){2,4}\w+_proj",
    r"(?i).*Q_PROJ",
    r"[^.]*\.[^.]*\.\d+\.(?:mlp|self_attn)(?:\.(gate|q)_proj)?",
    r".*(?P<kind>self)_attn\..*",
    r"(?s).*q_proj",
    r"(?x) .* \. q_proj  # queries",
    r"\Amodel\..*_proj\Z",
    r"model.layers.1.*|vision.blocks.12.mlp|lm_head",
    r".*?\.h\.1{1,2}\..*",
    r"",
]


@pytest.mark.parametrize("source", WRITTEN)
def test_they_select_the_same_modules_as_in_peft(source):
    config = peft.LoraConfig(target_modules=source)
    expected = [path for path in PATHS if check_target_module_exists(config, path)]
    matcher = PathMatcher("target_modules", source)
    for _ in range(200):  # a match takes less time than it adds to the allowance, or the allowance suffices
        assert list(filter(matcher, PATHS)) == expected


def test_dots_in_names_are_dots():
    """For PEFT they are any character; in an expression, which has other special characters, here too."""
    patterns = PathPatterns("rank_pattern", ["q.proj", r"k\.proj", "^.*v.proj"])
    assert [patterns.first(f"model.{path}") for path in ("q_proj", "q.proj", "k.proj")] == [None, "q.proj", r"k\.proj"]
    assert patterns.first("model.v_proj") == "^.*v.proj"
    assert not PathMatcher("target_modules", "model.q")("model_q") and PathMatcher("", "model.q|v")("model.q")


@pytest.mark.parametrize("source", ["(", "[", "(?P<x>a", "a**", "(?P=x)", "(" * 3000 + ")" * 3000])
def test_invalid_expressions_are_named(source):
    with pytest.raises(ValueError, match="LoraConfig: exclude_modules is .*, not a regular expression"):
        check_expressions("exclude_modules", [source])


# --- time and memory; tests/hostile measures seconds and bytes -------------------------------


def test_time_is_bounded_for_all_matches_together():
    source, allowance = CATASTROPHIC["alternatives"], TimeAllowance("target_modules")
    fullmatch = compiled(source).fullmatch
    assert allowance.run(fullmatch, source, "abc!")
    for path in ("a" * 100, "abc!"):  # the second call has no time left
        with pytest.raises(ValueError, match="takes too long"):
            allowance.run(fullmatch, source, path)


def test_thousands_of_names_are_one_lookup():
    names = [re.escape(f"model.layers.{i}.mlp.up_proj") for i in range(10_000)]
    config = LoraConfig(target_modules=["up_proj"], rank_pattern={name: i + 1 for i, name in enumerate(names)})
    begin = time.thread_time()
    assert [config.rank_for(f"base.model.layers.{i}.mlp.up_proj") for i in range(10_000)] == [*range(1, 10_001)]
    assert config.rank_for("model.layers.9999.mlp.down_proj") == 8
    matcher = PathMatcher("target_modules", "|".join(names))
    assert all(matcher(f"model.layers.{i}.mlp.up_proj") for i in range(10_000)) and not matcher("mlp.up_proj")
    assert time.thread_time() - begin < 2  # 10,000 matches of 10,000 expressions take minutes
