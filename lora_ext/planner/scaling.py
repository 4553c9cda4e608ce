"""Predicts memory, traffic and time of a step on many devices: FSDP2, tensor parallelism, or both in two dimensions.

Nothing here is measured. Devices are split into groups of ``tensor_parallel``, which share a batch; weights, gradients
and optimizer state are sharded over the groups. Times are sums of bytes over rates and of operations over a rate:

- arithmetic: 2 operations a weight and token in the forward, as many for the gradients of the input, as many for those
  of trained weights, as many to compute layers again; and attention's two products of tokens with tokens.
- FSDP: weights are gathered in the forward and in the backward, gradients are scattered. The next layer's weights
  travel while a layer computes, so a step takes the longer of both.
- tensor parallelism: two all-reduces of ``[tokens, hidden]`` in a layer's forward, two in its backward, two more if it
  is computed again; for an adapted layer one of ``[tokens, r]``, in float32. Nothing is computed meanwhile.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass

from lora_ext.nn import LoraLayer
from lora_ext.planner.memory import Memory, Planner, Setup
from lora_ext.planner.step import trained_parameters
from lora_ext.planner.weights import WEIGHT_DTYPES, tensor_bytes, weight_bytes


@dataclass(frozen=True)
class Hardware:
    """Published rates of a machine with eight NVIDIA H100 SXM.

    Attributes:
        name: for people.
        devices_per_node: devices that the fast link connects.
        flops: dense bfloat16 operations per second (NVIDIA H100 datasheet).
        utilisation: the part of them that training reaches; Llama 3 reports 0.38 to 0.43 (arXiv 2407.21783, table 4).
        link: bytes per second and direction of a device's fast link, NVLink 4.
        network: bytes per second of a device's adapter between nodes, 400 Gb/s.
    """

    name: str = "H100 SXM, NVLink 450 GB/s, network 50 GB/s"
    devices_per_node: int = 8
    flops: float = 989e12
    utilisation: float = 0.4
    link: float = 450e9
    network: float = 50e9

    def rate(self, devices: int, per_node: int) -> float:
        """Bytes per second that a member receives of a ring of ``per_node`` members in each node of ``devices``.

        Rings enter a node through the adapters of all members, and each passes everything on by the fast link.
        """
        return self.link if devices <= self.devices_per_node else min(self.link, per_node * self.network)


@dataclass(frozen=True)
class ModelSizes:
    """The numbers of a model that a step's costs depend on.

    Attributes:
        weight_bytes, trained_bytes: of all weights, and of trained ones.
        parameters, trained: their numbers.
        layers, hidden: number of layers, and features of a token between them.
        ranks: sum of the ranks of all adapted layers.
    """

    weight_bytes: int
    trained_bytes: int
    parameters: int
    trained: int
    layers: int
    hidden: int
    ranks: int


@dataclass(frozen=True)
class Costs:
    """Predicted costs of a step, for each device.

    Attributes:
        memory: bytes at the peak.
        gathered_bytes, scattered_bytes: received for FSDP: weights, and gradients.
        adapter_gathered_bytes: the trained parameters' part of both.
        reduced_bytes: received for tensor parallelism.
        adapter_reduced_bytes: the adapters' part of it.
        compute_seconds, sharding_seconds, reduce_seconds: arithmetic, FSDP, tensor parallelism.
        tokens: of a step, on all devices.
    """

    memory: int
    gathered_bytes: float
    scattered_bytes: float
    adapter_gathered_bytes: float
    reduced_bytes: float
    adapter_reduced_bytes: float
    compute_seconds: float
    sharding_seconds: float
    reduce_seconds: float
    tokens: int

    @property
    def step_seconds(self) -> float:
        return max(self.compute_seconds, self.sharding_seconds) + self.reduce_seconds

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.step_seconds


def sizes_of(planner: Planner, setup: Setup, hidden: int, layers: int) -> ModelSizes:
    model = planner.model(setup.dtype)
    trained = trained_parameters(model)
    adapters = (
        adapter for layer in model.modules() if isinstance(layer, LoraLayer) for adapter in layer.adapters.values()
    )
    return ModelSizes(
        weight_bytes(model, WEIGHT_DTYPES[setup.dtype]).total,
        tensor_bytes(trained),
        sum(parameter.numel() for parameter in model.parameters()),
        sum(parameter.numel() for parameter in trained),
        layers,
        hidden,
        sum(adapter.r for adapter in adapters),
    )


def memory_of(memory: Memory, devices: int, tensor_parallel: int) -> Memory:
    """The memory of one of ``devices``, in groups of ``tensor_parallel`` that split every layer and its tokens."""
    split = dataclasses.replace(
        memory,
        weights=-(-memory.weights // tensor_parallel),
        optimizer_state=-(-memory.optimizer_state // tensor_parallel),
        gradients=-(-memory.gradients // tensor_parallel),
        activations=-(-memory.activations // tensor_parallel),
        gathered=-(-memory.gathered // tensor_parallel),
    )
    return split.sharded(devices // tensor_parallel)


def costs(
    moments: Iterable[Memory],
    sizes: ModelSizes,
    setup: Setup,
    devices: int,
    tensor_parallel: int = 1,
    hardware: Hardware | None = None,
) -> Costs:
    """Predicts a step of ``devices``, in groups of ``tensor_parallel`` with a batch of ``setup`` each.

    Args:
        moments: of the same run on one device, from :meth:`Planner.moments`.

    ValueError: the groups do not divide the devices, or are larger than a node.
    """
    hardware = Hardware() if hardware is None else hardware
    if not 1 <= tensor_parallel <= devices or devices % tensor_parallel:
        raise ValueError(f"tensor_parallel is {tensor_parallel}, want a divisor of the {devices} devices")
    if tensor_parallel > hardware.devices_per_node:
        raise ValueError(
            f"tensor_parallel is {tensor_parallel}, want at most {hardware.devices_per_node}, the devices of a node: "
            "every layer waits for its all-reduces"
        )
    groups, tokens = devices // tensor_parallel, setup.batch_size * setup.seq_len
    others, ring = (groups - 1) / groups, 2 * (tensor_parallel - 1) / tensor_parallel
    again, per_node = int(setup.gradient_checkpointing), max(1, hardware.devices_per_node // tensor_parallel)

    gathers = 2 * others / tensor_parallel
    scattered = sizes.trained_bytes * others / tensor_parallel
    element = 2 if setup.precision == "bfloat16" else WEIGHT_DTYPES[setup.dtype].compute.itemsize
    reduced = ring * (4 + 2 * again) * sizes.layers * tokens * sizes.hidden * element
    adapter_reduced = ring * tokens * sizes.ranks * 4

    forward = 2 * sizes.parameters + 2 * setup.seq_len * sizes.hidden * sizes.layers
    operations = tokens * ((2 + again) * forward + 2 * sizes.trained)
    return Costs(
        memory=max(memory_of(memory, devices, tensor_parallel).peak for memory in moments),
        gathered_bytes=sizes.weight_bytes * gathers,
        scattered_bytes=scattered,
        adapter_gathered_bytes=min(sizes.trained_bytes, sizes.weight_bytes) * gathers + scattered,
        reduced_bytes=reduced + adapter_reduced,
        adapter_reduced_bytes=adapter_reduced,
        compute_seconds=operations / tensor_parallel / (hardware.flops * hardware.utilisation),
        sharding_seconds=(sizes.weight_bytes * gathers + scattered) / hardware.rate(devices, per_node),
        reduce_seconds=(reduced + adapter_reduced) / hardware.link,
        tokens=groups * tokens,
    )
