"""Tests that other libraries' LoRA layers are measured if they are installed, agree and compute the case.

The libraries need a GPU and Triton: here, packages of their names hold functions with their signatures, in PyTorch. The
signatures are those of unsloth at 015bdef, axolotl at 067b021 (0.9 has no dropout) and CentML/lorafusion of September
2025. Axolotl's own function and Unsloth's autograd function ran through these adapters on the CPU, and agreed.
"""

from __future__ import annotations

import sys

import pytest
import torch

pytest.importorskip("peft")

from harness import rivals
from harness.contestants import FROZEN, LORA_EXT
from harness.shapes import Shape

pytestmark = pytest.mark.cpu_only("runs scripts on the CPU")

SHAPE = Shape(8, 16, 24)
READ_PEFT = """
import torch

def get_lora_parameters(proj):
    name = proj.active_adapters[0]
    return proj.base_layer.weight, proj.lora_A[name].weight, proj.lora_B[name].weight, proj.scaling[name]

def _apply_dropout(dropout, X, training):
    return dropout(X) if training else None

def apply_lora_o(self, X):
    W, A, B, s = get_lora_parameters(self.o_proj)
    batch, length, features = X.shape
    return X @ W.t() + s * (DROPPED @ A.t()) @ B.t()
"""
UNSLOTH = READ_PEFT.replace("DROPPED", "X").replace("_apply_dropout", "unused")
AXOLOTL = READ_PEFT.replace(
    "DROPPED", "_apply_dropout(self.o_proj.lora_dropout[self.o_proj.active_adapters[0]], X, self.training)"
)
LORAFUSION = """
import torch

def fused_linear_lora(x, linear_w, lora_a, lora_b, alpha, seed=None, dropout_p=0.0, linear_bias=None):
    if dropout_p == 0.0:
        raise AttributeError("'NoneType' object has no attribute 'shape'")
    batch, length, features = x.shape
    dropped = torch.nn.functional.dropout(x, dropout_p)
    return torch.nn.functional.linear(x, linear_w, linear_bias) + alpha * (dropped @ lora_a.t()) @ lora_b.t()
"""
SOURCES = {
    "unsloth/kernels/fast_lora.py": UNSLOTH,
    "axolotl/kernels/lora.py": AXOLOTL,
    "lorafusion/ops/lora_v1.py": LORAFUSION,
}


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Installs a file of a package for the test."""
    monkeypatch.syspath_prepend(tmp_path)

    def write(path: str, source: str) -> None:
        (file := tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        for folder in file.relative_to(tmp_path).parents[:-1]:
            (tmp_path / folder / "__init__.py").touch()
        file.write_text(source)

    yield write
    for name in [name for name in sys.modules if name.partition(".")[0] in rivals.RIVALS]:
        del sys.modules[name]


def test_rivals_that_are_not_installed_are_left_out_by_name(capsys):
    assert rivals.load_all() == {}
    said = capsys.readouterr().out.splitlines()
    assert said == [f"{name}: not measured, {name} is not installed" for name in rivals.RIVALS]


def test_each_rival_is_measured_where_it_computes(install):
    for path, source in SOURCES.items():
        install(path, source)
    found = rivals.load_all()
    assert found.keys() == rivals.RIVALS.keys()
    modules = rivals.on_same_weights(SHAPE, torch.float32, "cpu", 16, [0.0, 0.1], found)
    assert {dropout: list(layers) for dropout, layers in modules.items()} == {
        0.0: [FROZEN, LORA_EXT, "unsloth", "axolotl"],
        0.1: [FROZEN, LORA_EXT, "axolotl", "lorafusion"],
    }
    # Dropout is the rival's own, in training.
    x = torch.randn(8, 16)
    for name, differs in (("unsloth", False), ("axolotl", True)):
        layer = (modules[0.1] | {"unsloth": modules[0.0]["unsloth"]})[name]
        assert bool((layer(x) != layer(x)).any()) == differs


def test_a_rival_that_cannot_be_used_is_left_out_with_the_reason(install, capsys):
    install("unsloth/kernels/fast_lora.py", "raise NotImplementedError('Unsloth needs a GPU')")
    install("axolotl/kernels/lora.py", AXOLOTL.replace("+ s * (", "+ 2 * s * ("))
    raises = LORAFUSION.replace("    batch, length", "    raise RuntimeError('no Triton')\n    batch, length")
    install("lorafusion/ops/lora_v1.py", raises)
    found = rivals.load_all()
    assert list(found) == ["axolotl", "lorafusion"]
    modules = rivals.on_same_weights(SHAPE, torch.float32, "cpu", 16, [0.0, 0.1], found)
    assert {tuple(layers) for layers in modules.values()} == {(FROZEN, LORA_EXT)}
    said = capsys.readouterr().out
    for expected in (
        "unsloth: not measured, unsloth cannot be used: NotImplementedError: Unsloth needs a GPU",
        "axolotl: not measured at 8 x 16 -> 24, axolotl and lora_ext disagree by",
        "lorafusion: not measured at 8 x 16 -> 24, RuntimeError: no Triton",
    ):
        assert expected in said
