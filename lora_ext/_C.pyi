"""csrc/python.cpp."""

from collections.abc import Sequence

class Launch:
    @property
    def kernel(self) -> str: ...
    @property
    def variant(self) -> int: ...
    @property
    def result(self) -> str: ...
    @property
    def grid(self) -> tuple[int, int]: ...
    @property
    def blocks(self) -> int: ...
    @property
    def threads(self) -> int: ...
    @property
    def shared_bytes(self) -> int: ...
    @property
    def detail(self) -> str: ...

class Plan:
    @property
    def launches(self) -> list[Launch]: ...
    @property
    def scratch_bytes(self) -> int: ...
    @property
    def streams_weights(self) -> bool: ...

def build_info() -> dict[str, str]: ...
def cpu_isa() -> str: ...
def available_cpu_isas() -> list[str]: ...
def base_product() -> str: ...
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
    sms: int = 132,
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
    sms: int = 132,
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
    sms: int = 132,
) -> Plan: ...
