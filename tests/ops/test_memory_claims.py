"""Memory that a layer keeps for its backward and allocates, by the records of autograd and the allocator.

The kernels' workspace is no tensor: it belongs to the thread, and depends on the layer's widths, ranks and the number
of threads. The heap shows that it does not grow with the tokens.
"""

import ctypes
import gc
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from lora_ext import functional
from lora_ext._ops.checks import mask_row_bytes
from lora_ext.nn import EmbeddingAdapter, LoraEmbedding, LoraLinear
from lora_ext.nn.trainable_tokens import TokenRows, TrainableTokens

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from harness import contestants, memory, whole_models

pytestmark = [pytest.mark.cpu_only("reads the CPU allocator's records"), pytest.mark.full]

TOKENS, IN, OUT, RANK, DROPOUT = 192, 320, 448, 8, 0.1
MOST_OF_PEFT = 0.7  # the project's claim, for adapters on every linear layer
DTYPES = [torch.float32, torch.bfloat16]


def mask_bytes(tokens: int = TOKENS) -> int:
    return tokens * mask_row_bytes(IN)


def xa_bytes(rank: int, tokens: int = TOKENS) -> int:
    return tokens * rank * 4  # float32 also for a 16-bit x


class Layer:
    """A base layer, factors of its dtype, and an x that another layer has computed and saved."""

    def __init__(self, dtype: torch.dtype, tokens: int = TOKENS) -> None:
        self.base = nn.Linear(IN, OUT, dtype=dtype).requires_grad_(False)
        self.A, self.B = (torch.randn(s, dtype=dtype).requires_grad_() for s in ((RANK, IN), (OUT, RANK)))
        self.leaf = torch.randn(tokens, IN, dtype=dtype).requires_grad_()

    def x(self) -> torch.Tensor:
        return self.leaf.tanh()  # tanh's backward reads its result, which is the layer's x

    def exists(self) -> list[torch.Tensor]:
        return [self.leaf, self.A, self.B, *self.base.parameters()]

    def make(self, name: str) -> nn.Module:
        return contestants.LAYERS[name](self.base, self.A.detach(), self.B.detach(), DROPOUT)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_layer_holds_x_once_the_mask_and_xa(dtype):
    layer = Layer(dtype)
    module = layer.make(contestants.LORA_EXT)
    assert isinstance(module, LoraLinear) and module.training
    held = memory.saved_storages(lambda: module(layer.x()), [*layer.exists(), *module.parameters()])
    x = TOKENS * IN * dtype.itemsize
    assert sorted(held.values()) == sorted([x, mask_bytes(), xa_bytes(RANK)])
    # tanh keeps the same memory of x without an adapter.
    assert list(memory.saved_storages(layer.x, layer.exists()).values()) == [x]


@pytest.mark.parametrize("dtype, factors", [(torch.float32, None), (torch.bfloat16, None), (torch.bfloat16,) * 2])
def test_a_model_holds_at_most_seven_tenths_of_pefts(dtype, factors):
    """Four layers of BERT-base's widths, adapters on all linear layers with dropout 0.1.

    The base model's dropout is off, as its memory does not depend on the adapter and would only shift the ratio.
    """
    pytest.importorskip("peft")
    copies = whole_models.adapted(whole_models.bert(dtype, dropout=0.0, vocabulary=100), RANK, DROPOUT, factors)
    tokens = torch.randint(100, (2, 64))
    held = {name: memory.activation_bytes(copies[name], lambda m=copies[name]: m(tokens).logits) for name in copies}
    assert held[whole_models.HEAD_ONLY] < held["frozen"] < held["lora_ext"] <= MOST_OF_PEFT * held["peft"]


def split(sizes: list[int], expected: list[int]) -> list[int]:
    """Removes the expected sizes, all of which must occur, from ``sizes``."""
    rest = [size for size in sizes if size > 0]
    for size in expected:
        assert size in rest, f"{size} is not among {sizes}"
        rest.remove(size)
    return rest


@pytest.mark.parametrize("dtype", DTYPES)
def test_forward_and_backward_allocate_their_results_and_nothing_as_large(dtype):
    """Also allowed: the seed, and in bfloat16 scratch memory of the base product, which a frozen layer needs too."""
    tokens = 4096
    layer = Layer(dtype, tokens=tokens)
    base, A, B = layer.base, layer.A, layer.B
    x, grad_y = layer.leaf, torch.randn(tokens, OUT, dtype=dtype)
    y, sizes = memory.allocations(lambda: functional.lora_linear(x, base.weight, base.bias, A, B, 2.0, DROPOUT))
    rest = split(sizes, [8, y.nbytes, mask_bytes(tokens), xa_bytes(RANK, tokens)])
    assert not any(size >= min(x.nbytes, y.nbytes) for size in rest), rest

    grads, sizes = memory.allocations(lambda: torch.autograd.grad(y, (x, A, B), grad_y))
    rest += split(sizes, [grad.nbytes for grad in grads])
    assert not any(size >= min(x.nbytes, y.nbytes) for size in rest), rest
    if dtype == torch.float32:
        assert rest == []


def heap_bytes() -> int:
    """Bytes used by this process's C and C++ code, tensors included; skips if glibc does not tell."""

    class Mallinfo2(ctypes.Structure):
        names = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"
        _fields_ = [(name, ctypes.c_size_t) for name in names.split()]

    try:
        mallinfo2 = ctypes.CDLL(None).mallinfo2
    except AttributeError:
        pytest.skip("no mallinfo2 in this C library")
    mallinfo2.restype = Mallinfo2
    gc.collect()
    now = mallinfo2()
    return now.uordblks + now.hblkhd


def test_the_workspace_does_not_grow_with_the_tokens():
    def step(tokens: int) -> None:
        layer = Layer(torch.float32, tokens=tokens)
        base, A, B = layer.base, layer.A, layer.B
        y = functional.lora_linear(layer.leaf, base.weight, base.bias, A, B, 2.0, DROPOUT)
        y.backward(torch.ones_like(y))

    step(1024)
    before = heap_bytes()
    step(16384)
    assert heap_bytes() - before < 16384 * RANK * 4  # not even as much as one more xa


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_embedding_holds_xa_and_allocates_its_output_once_more(dtype):
    """With 16 bits and float32 factors, both sums are in float32, and so is the gradient of the output."""
    tokens, dim = 16384, 256
    base = nn.Embedding(1000, dim, dtype=dtype)
    layer = LoraEmbedding(base, EmbeddingAdapter(1000, dim, RANK, 8, dtype=torch.float32))
    ids, grad_y = torch.randint(1000, (tokens,)), torch.randn(tokens, dim, dtype=dtype)
    held = memory.saved_storages(lambda: layer(ids), [ids, *layer.parameters()])
    assert list(held.values()) == [xa_bytes(RANK, tokens)]

    y, sizes = memory.allocations(lambda: layer(ids))
    rest = split(sizes, [y.nbytes, xa_bytes(RANK, tokens)])
    gradients, sizes = memory.allocations(lambda: torch.autograd.grad(y, list(layer.adapters.parameters()), grad_y))
    rest += split(sizes, [gradient.nbytes for gradient in gradients])
    wide = y.numel() * 4
    assert sorted(size for size in rest if size >= y.nbytes) == [y.nbytes] + [wide] * (3 if y.nbytes < wide else 0)
    if dtype == torch.float32:
        assert sorted(rest)[-2] <= xa_bytes(RANK, tokens)
        with torch.no_grad():  # in place
            y, sizes = memory.allocations(lambda: layer(ids))
        assert not any(size > xa_bytes(RANK, tokens) for size in split(sizes, [y.nbytes]))


def test_trained_rows_allocate_nothing_as_large_as_the_weight():
    base = nn.Embedding(20000, 64)
    layer = TrainableTokens(base)
    layer.add_adapter("default", TokenRows(base.weight, (5, 7)))
    layer.set_active("default")
    ids = torch.randint(20000, (50,))
    y, sizes = memory.allocations(lambda: layer(ids))
    sizes += memory.allocations(lambda: torch.autograd.grad(y, layer.adapters.default.rows, torch.ones_like(y)))[1]
    assert max(sizes) <= y.nbytes
