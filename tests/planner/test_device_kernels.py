"""A step on the meta device keeps and allocates what the kernels of another device would."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

from lora_ext.planner import simulate_step
from lora_ext.planner.device_kernels import device_kernels


def kept(call: Callable[[], torch.Tensor], *exist: torch.Tensor, device: str) -> list[int]:
    def run(module: nn.Module) -> torch.Tensor:
        return call().sum()

    holder = nn.ParameterList(exist)
    return simulate_step(holder, run, device=device).activations


@pytest.mark.parametrize(("device", "nbytes"), [("cuda", 1), ("cpu", 4)])
def test_dropout_keeps_a_byte_on_cuda_and_a_number_on_the_cpu(device, nbytes):
    x = torch.empty(7, 9, device="meta", requires_grad=True)
    assert kept(lambda: nn.functional.dropout(x, 0.5), x, device=device) == 63 * nbytes
    assert kept(lambda: nn.functional.dropout(x, 0.0), x, device=device) == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_attention_on_cuda_keeps_its_output_and_a_number_per_query(dtype, dropout):
    q, k, v = (torch.empty(2, 3, 64, 8, dtype=dtype, device="meta", requires_grad=True) for _ in range(3))
    attention = nn.functional.scaled_dot_product_attention
    nbytes = kept(
        lambda: nn.functional.scaled_dot_product_attention(q, k, v, dropout_p=dropout), q, k, v, device="cuda"
    )
    assert nbytes - q.nbytes - 2 * 3 * 64 * 4 in range(0, 33)  # the seed of the dropout
    assert nn.functional.scaled_dot_product_attention is attention  # restored


def test_attention_on_the_cpu_with_dropout_keeps_probabilities():
    q, k, v = (torch.empty(2, 3, 64, 8, device="meta", requires_grad=True) for _ in range(3))
    nbytes = {
        p: kept(lambda p=p: nn.functional.scaled_dot_product_attention(q, k, v, dropout_p=p), q, k, v, device="cpu")
        for p in (0.0, 0.1)
    }
    assert nbytes[0.0] == q.nbytes + 2 * 3 * 64 * 4
    assert nbytes[0.1] >= 3 * (2 * 3 * 64 * 64 * 4)  # the probabilities, the mask, their product


def test_other_devices_are_refused():
    with pytest.raises(ValueError, match="device is 'tpu', want one of cuda, cpu"), device_kernels("tpu"):
        pass


def test_real_tensors_and_other_threads_are_left_alone():
    """A thread that trains while another plans has PyTorch's functions; two threads that plan take turns."""
    dropout, attention = nn.functional.dropout, nn.functional.scaled_dot_product_attention
    real = torch.ones(1, 2, 3, 4)
    meta = torch.empty(2, 3, 64, 8, device="meta", requires_grad=True)
    with device_kernels("cuda"):
        torch.manual_seed(0)
        drawn = nn.functional.dropout(real, 0.5)
        torch.manual_seed(0)
        assert torch.equal(drawn, dropout(real, 0.5))
        y = nn.functional.scaled_dot_product_attention(real, real, value=real)
        assert torch.equal(y, attention(real, real, real))

    def plan(device: str) -> int:
        return kept(lambda: nn.functional.dropout(meta, 0.5), meta, device=device)

    expected = {device: plan(device) for device in ("cpu", "cuda")}
    assert expected["cuda"] < expected["cpu"]
    with ThreadPoolExecutor(4) as pool:
        assert [*pool.map(plan, ["cpu", "cuda"] * 20)] == [expected["cpu"], expected["cuda"]] * 20
    assert nn.functional.dropout is dropout and nn.functional.scaled_dot_product_attention is attention


def test_a_mask_is_converted_to_numbers():
    q, k, v = (torch.empty(2, 3, 64, 8, device="meta", requires_grad=True) for _ in range(3))
    mask = torch.ones(2, 1, 64, 64, dtype=torch.bool, device="meta")
    with device_kernels("cuda"):
        y = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    assert y.shape == q.shape
    q16, k16, v16 = (x.detach().bfloat16().requires_grad_() for x in (q, k, v))
    with_mask, without = (
        kept(
            lambda m=m: nn.functional.scaled_dot_product_attention(q16, k16, v16, attn_mask=m),
            q16,
            k16,
            v16,
            device="cuda",
        )
        for m in (mask, None)
    )
    assert abs(with_mask - without - mask.numel() * 2) <= 32  # and another form of the dropout's seed
