"""Common parts of the methods that add trained tokens to the input."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from lora_ext.methods.architectures import Architecture, architecture_of
from lora_ext.methods.base import Method, check_at_least
from lora_ext.model.bare_model import root_module


@dataclass(frozen=True)
class PrefixMethod(Method):
    """Base of :class:`PrefixEmbed` and :class:`PrefixLayer`, with their options.

    Args:
        prefix_length: the paper's ``l_p``: number of special tokens before the input.
        infix_length: the paper's ``l_i``: number of special tokens after it.

    Raises:
        ValueError: both are 0, or one is negative.
    """

    prefix_length: int = 8
    infix_length: int = 0

    def __post_init__(self) -> None:
        check_at_least(self.name, 0, prefix_length=self.prefix_length, infix_length=self.infix_length)
        if self.special_tokens == 0:
            raise ValueError(f"{self.name}: prefix_length and infix_length are 0, want at least 1 for one of them")

    @property
    def special_tokens(self) -> int:
        """Number of special tokens, ``l_p + l_i``."""
        return self.prefix_length + self.infix_length


def is_causal(model: nn.Module, architecture: Architecture) -> bool:
    """Returns whether tokens attend to earlier tokens only."""
    return not architecture.keeps_first or getattr(root_module(model).config, "is_decoder", False)


def architecture_with_prefix(model: nn.Module, method: str) -> Architecture:
    """Returns :func:`architecture_of`. TypeError: an encoder is used as a decoder, and its first token stays first."""
    architecture = architecture_of(model, method)
    if architecture.keeps_first and is_causal(model, architecture):
        raise TypeError(f"{method}: {type(root_module(model)).__name__} has is_decoder=True, which is not supported")
    return architecture


def counted(mask: Tensor) -> Tensor:
    """Maps a mask ``[batch, length]`` (0: padding) to the number of real tokens before each; -1 in leading padding."""
    return mask.long().cumsum(1) - 1
