"""The shapes that the benchmarks measure: (num_tokens, in_features, out_features)."""

from __future__ import annotations

from typing import NamedTuple


class Shape(NamedTuple):
    num_tokens: int
    in_features: int
    out_features: int

    def __str__(self) -> str:
        return f"{self.num_tokens} x {self.in_features} -> {self.out_features}"

    @classmethod
    def parse(cls, text: str) -> Shape:
        """Parses ``TOKENSxINxOUT``, for example 512x768x3072.

        Raises:
            ValueError: the text has another form; the message quotes it.
        """
        numbers = text.split("x")
        if len(numbers) != 3 or not all(number.isdecimal() and int(number) for number in numbers):
            raise ValueError(f"shape {text!r} is not TOKENSxINxOUT in positive integers, for example 512x768x3072")
        return cls(*map(int, numbers))


class SiblingShape(NamedTuple):
    """Layers that read one x."""

    num_tokens: int
    in_features: int
    out_features: tuple[int, ...]

    def __str__(self) -> str:
        widths = self.out_features
        outputs = f"{len(widths)} x {widths[0]}" if len(set(widths)) == 1 else ", ".join(map(str, widths))
        return f"{self.num_tokens} x {self.in_features} -> {outputs}"

    @classmethod
    def parse(cls, text: str) -> SiblingShape:
        """Parses ``TOKENSxINxOUT+OUT``, for example 8192x4096x4096+1024+1024; one OUT stands for three layers.

        Raises:
            ValueError: the text has another form; the message quotes it.
        """
        first, *others = text.split("+")
        shape = Shape.parse(first)
        if not all(width.isdecimal() and int(width) for width in others):
            raise ValueError(f"shape {text!r} is not TOKENSxINxOUT+OUT in positive integers")
        widths = [shape.out_features, *map(int, others)]
        return cls(*shape[:2], tuple(widths if others else widths * 3))


# MiniLM's and BERT's widths at fine-tuning batches, then decoder-sized layers.
CPU_SHAPES = [
    Shape(1536, 384, 384),
    Shape(512, 768, 768),
    Shape(2048, 768, 3072),
    Shape(1024, 2048, 2048),
    Shape(2048, 4096, 4096),
]

# For a GPU, the most informative first, because a run that is short of time stops early. Decoder layers (Llama-3-8B's
# widths), wider ones, decoding steps, and the encoders' widths again.
CUDA_SHAPES = [
    Shape(8192, 4096, 4096),
    Shape(4096, 4096, 14336),
    Shape(4096, 14336, 4096),
    Shape(8192, 4096, 1024),
    Shape(2048, 4096, 4096),
    Shape(4096, 5120, 5120),
    Shape(4096, 8192, 8192),
    Shape(1, 4096, 4096),
    Shape(64, 4096, 4096),
    Shape(1536, 384, 384),
    Shape(8192, 768, 3072),
]

# One decoding step of a stack of decoder layers (Llama-3-8B's widths); tokens are sequences.
DECODE_TOKENS = [1, 2, 4, 8, 16, 32, 64]
DECODE_WIDTHS = [(4096, 4096), (4096, 14336)]

# Attention's q, k and v.
SIBLING_SHAPES = [
    SiblingShape(512, 768, (768,) * 3),
    SiblingShape(1024, 2048, (2048,) * 3),
]

# Llama-3-8B's q, k and v, and gate and up.
LLAMA_SIBLINGS = [
    SiblingShape(8192, 4096, (4096, 1024, 1024)),
    SiblingShape(4096, 4096, (14336, 14336)),
]
