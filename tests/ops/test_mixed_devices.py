"""All ops refuse tensors on two devices, real or fake, in every argument, used or not.

PyTorch calls the fake kernels when any argument is a meta tensor: they would return uninitialised memory.
"""

from __future__ import annotations

import pytest
import torch
from support.op_calls import HAVE_KERNELS, HERE, OPS, all_places, good_call, label, op_named, tensors_of, with_entry
from torch import Tensor
from torch._subclasses import FakeTensorMode

PLACES = [place for place in all_places() if place[0] != "lora_dropout_mask"]  # it has one tensor only
RECORDED = ("lora_linear", "lora_delta_", "lora_shrink")  # with a gradient of lora_A
ELSEWHERE = "meta" if HERE.type == "cpu" else "cpu"  # device of the other tensors for the compiled op


def unused(call: dict[str, object]) -> dict[str, object]:
    """Returns a variant of the call that uses as few of its tensors as possible."""
    idle = {"dropout_p": 0.0, "output_mask": tuple(False for _ in call.get("output_mask", ()))}
    return call | {name: value for name, value in idle.items() if name in call}


def entry_of(call: dict[str, object], name: str, i: int | None) -> Tensor:
    return call[name] if i is None else call[name][i]


def moved(call: dict[str, object], device: str) -> dict[str, object]:
    for name, i, tensor in list(tensors_of(call)):
        call = with_entry(call, name, i, tensor.to(device))
    return call


def assert_refused(
    run, op: str, name: str, i: int | None, call: dict, kind: type[Exception] = ValueError, device: str = "meta"
) -> None:
    """Requires that ``run`` raises an error with op, argument and device, and changes no tensor."""
    real = [tensor for _, _, tensor in tensors_of(call) if not tensor.is_meta]
    before = [(tensor.clone(), tensor._version) for tensor in real]
    with pytest.raises(kind, match=rf"^{op}: \S+ is on \S+ but \S+ is on \S+$") as error:
        run()
    assert label(name, i) in str(error.value).split() and device in str(error.value).split()
    for tensor, (bits, version) in zip(real, before, strict=True):
        assert torch.equal(tensor, bits) and tensor._version == version


def test_there_is_a_good_call_of_every_op():
    assert set(OPS) >= {"lora_linear", "lora_delta_", "lora_merge_record_", "lora_dropout_mask"}
    for op in HAVE_KERNELS:
        op_named(op)(**good_call(op))
    tensors = {op: [a.name for a in op_named(op)._schema.arguments if "Tensor" in str(a.type)] for op in OPS}
    places = {(op, name) for op, name, _ in all_places()}
    assert places == {(op, name) for op, names in tensors.items() for name in names}


@pytest.mark.pairs
@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("use", [lambda call: call, unused], ids=["used", "unused"])
@pytest.mark.parametrize(("op", "name", "i"), PLACES)
def test_one_meta_tensor_among_real_ones(op, name, i, use, requires_grad):
    call = use(good_call(op))
    if requires_grad and op in RECORDED:
        call["lora_A"].requires_grad_()
    bad = with_entry(call, name, i, entry_of(call, name, i).detach().to("meta"))
    assert_refused(lambda: op_named(op)(**bad), op, name, i, bad)


@pytest.mark.parametrize(("op", "name", "i"), PLACES)
def test_one_real_tensor_among_meta_ones(op, name, i):
    call = good_call(op)
    bad = with_entry(moved(call, "meta"), name, i, entry_of(call, name, i))
    assert_refused(lambda: op_named(op)(**bad), op, name, i, bad)


@pytest.mark.parametrize("use", [lambda call: call, unused], ids=["used", "unused"])
@pytest.mark.parametrize(("op", "name", "i"), [place for place in PLACES if place[0] in HAVE_KERNELS])
def test_the_compiled_op_refuses_by_itself(op, name, i, use):
    """PyTorch calls the CUDA kernel if any tensor is on CUDA; here the CPU kernel is called directly."""
    call = use(good_call(op))
    bad = with_entry(call, name, i, entry_of(call, name, i).to(ELSEWHERE))
    keys = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, HERE.type.upper()))

    def run():
        op_named(op).redispatch(keys, *bad.values())

    assert_refused(run, op, name, i, bad, RuntimeError, ELSEWHERE)


@pytest.mark.parametrize(("op", "name", "i"), PLACES)
def test_fake_tensors_of_two_devices(op, name, i):
    call = good_call(op)
    bad = with_entry(call, name, i, entry_of(call, name, i).to("meta"))
    with FakeTensorMode() as mode:
        fake = bad
        for place in list(tensors_of(bad)):
            fake = with_entry(fake, *place[:2], mode.from_tensor(place[2]))
        with pytest.raises(ValueError, match=rf"^{op}: \S+ is on \S+ but \S+ is on \S+$") as error:
            op_named(op)(**fake)
    assert label(name, i) in str(error.value).split()


@pytest.mark.parametrize(("op", "name", "i"), PLACES)
def test_one_fake_tensor_among_real_ones(op, name, i):
    """PyTorch refuses it before anything happens."""
    call = good_call(op)
    before = [tensor.clone() for _, _, tensor in tensors_of(call)]
    fake = FakeTensorMode().from_tensor(entry_of(call, name, i))
    with pytest.raises(Exception, match=rf"lora_ext.{op}|{op}: "):
        op_named(op)(**with_entry(call, name, i, fake))
    assert all(torch.equal(tensor, bits) for (_, _, tensor), bits in zip(tensors_of(call), before, strict=True))


@pytest.mark.cpu_only("cpu:0 is the CPU")
def test_a_device_by_another_name():
    call = good_call("lora_linear")
    op_named("lora_linear")(
        **call | {"x": torch.empty(2, 3, 24, device="cpu:0"), "seed": torch.tensor(1, device="cpu:0")}
    )
