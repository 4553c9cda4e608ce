"""Makes inputs for golden.cu and the outputs that the documentation promises, as lists of 32-bit words.

The sources are the PTX ISA's figures and CuTe's traits (SM80_16x8x16), not the stand-in.
"""

from __future__ import annotations

import struct

import torch
from torch import Tensor

WARP = range(32)
ALL = 0xFFFFFFFF


def words(values: list | Tensor) -> Tensor:
    """Converts numbers below 2**32 to an int32 tensor of the same bits."""
    values = torch.as_tensor(values, dtype=torch.int64).flatten()
    return (values & ALL).where(values < 2**31, (values & ALL) - 2**32).to(torch.int32)


def _random(count: int, seed: int = 1) -> list[int]:
    return torch.randint(0, 2**32, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def ldmatrix(transposed: bool) -> tuple[Tensor, Tensor]:
    element = torch.arange(4 * 8 * 8).view(4, 8, 8) * 7 + 1  # [matrix][row][column]
    pairs = element.flatten().view(-1, 2)
    matrices = element.transpose(1, 2) if transposed else element
    out = [
        int(matrices[m, lane // 4, 2 * (lane % 4)]) | int(matrices[m, lane // 4, 2 * (lane % 4) + 1]) << 16
        for lane in WARP
        for m in range(4)
    ]
    return words(pairs[:, 0] | pairs[:, 1] << 16), words(out)


def mma(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A product of small integers: exact in every order of summation."""
    generator = torch.Generator().manual_seed(2)
    a, b, c = (torch.randint(-9, 10, shape, generator=generator).float() for shape in ((16, 16), (16, 8), (16, 8)))
    d = a @ b + c

    # CuTe's layouts, as strides of: thread / 4, thread % 4, values. A, C and D are stored by columns.
    of_threads = [
        a.T.contiguous().as_strided((8, 4, 2, 2, 2), (1, 32, 128, 8, 16)).to(dtype),
        b.as_strided((8, 4, 2, 2), (1, 16, 64, 8)).to(dtype),
        *(matrix.T.contiguous().as_strided((8, 4, 2, 2), (1, 32, 8, 16)) for matrix in (c, d)),
    ]
    *inputs, output = (values.reshape(32, -1).view(torch.int32) for values in of_threads)
    return torch.cat(inputs, dim=1).flatten(), output.flatten()


def cp_async() -> tuple[Tensor, Tensor]:
    inputs = words(_random(4 * 32))
    data = inputs.view(torch.uint8).view(32, 16).clone()
    for lane in WARP:
        data[lane, lane % 17 :] = 0
    return inputs, data.flatten().view(torch.int32)


def warp() -> tuple[Tensor, Tensor]:
    value = [0, 1, 2**31, ALL, 0x3F800000, 0x3F808000, 0x3F818000, 0x7F800000, 0x7F7FFFFF, 0x33800000] + _random(22, 4)
    value = [v & 0x7FFFFFFF if v & 0x7F800000 == 0x7F800000 and v & 0x7FFFFF else v for v in value]

    def byte_perm(v: int, selector: int) -> int:
        source = struct.pack("<II", v, v ^ ALL)
        picked = []
        for i in range(4):
            select = selector >> 4 * i & 15
            byte = source[select & 7]
            picked.append((0xFF if byte & 0x80 else 0) if select & 8 else byte)
        return int.from_bytes(bytes(picked), "little")

    floats = words(value).view(torch.float32)
    narrow = [
        [0x7FFF if f.isnan() else int(f.to(dtype).view(torch.int16)) & 0xFFFF for f in floats]
        for dtype in (torch.bfloat16, torch.float16)
    ]
    rows = [
        [value[5]] * 32,
        [value[i // 4 * 4 + (i + 1) % 4] for i in WARP],
        [value[i ^ 3] for i in WARP],
        # Segments of 8: a lane reads from an earlier segment, but gets its previous value instead of a later segment's.
        [value[i ^ 8] if i & 8 else value[i] for i in WARP],
        [value[i - 3] if i % 16 >= 3 else value[i] for i in WARP],
        [value[i ^ 1] for i in WARP],
        [value[i ^ 16] & 0x3FFFFFFF for i in WARP],
        [sum(1 << j for j in WARP if j // 16 == i // 16 and (value[j] ^ value[i]) & 3 == 0) for i in WARP],
        [v.bit_count() for v in value],
        [(v & -v).bit_length() for v in value],
        [byte_perm(v, 0x7250) for v in value],
        [byte_perm(v, 0x9C31) for v in value],
        *narrow,
    ]
    return words(value), words(rows)


def atomics() -> tuple[Tensor, Tensor]:
    """`out` starts as zeros."""
    value = _random(64, 5)
    total = 2 * sum(value) << 20
    return words(value), words([2 * sum(value) & ALL, 0, total & ALL, total >> 32 & ALL])


# In the order of golden.cu.
PRIMITIVES = {
    "ldmatrix": lambda: ldmatrix(False),
    "ldmatrix transposed": lambda: ldmatrix(True),
    "mma bf16": lambda: mma(torch.bfloat16),
    "cp.async": cp_async,
    "shuffles and bits": warp,
    "atomics": atomics,
    "mma f16": lambda: mma(torch.float16),
}
