"""csrc/python.cpp."""

from collections.abc import Sequence
from typing import NamedTuple

class Launch(NamedTuple):
    kernel: str
    variant: int
    result: str
    grid: tuple[int, int]
    blocks: int
    threads: int
    shared_bytes: int
    detail: str

class Plan(NamedTuple):
    launches: list[Launch]
    scratch_bytes: int
    streams_weights: bool
    text: str

def build_info() -> dict[str, str]: ...
def cpu_isa() -> str: ...
def available_cpu_isas() -> list[str]: ...
def base_product() -> str: ...
def streams_weight(num_tokens: int, in_features: int, rank: int) -> bool: ...
def refusals() -> dict[str, tuple[str, str]]: ...
def plan_forward(
    num_tokens: int,
    in_features: int,
    layers: Sequence[tuple[int, int]],
    *,
    dtype: str = "bfloat16",
    factor_dtype: str = "float32",
    dropout: bool = True,
    base_layers: bool = True,
    multiprocessors: int = 132,
) -> Plan: ...
def plan_backward(
    num_tokens: int,
    in_features: int,
    layers: Sequence[tuple[int, int]],
    *,
    dtype: str = "bfloat16",
    factor_dtype: str = "float32",
    dropout: bool = True,
    output_mask: tuple[bool, bool, bool] = (True, True, True),
    multiprocessors: int = 132,
) -> Plan: ...
def plan_grouped(
    num_tokens: int,
    in_features: int,
    out_features: int,
    groups: int,
    rank: int,
    *,
    backward: bool = False,
    dtype: str = "bfloat16",
    factor_dtype: str = "float32",
    dropout: bool = False,
    multiprocessors: int = 132,
) -> Plan: ...
