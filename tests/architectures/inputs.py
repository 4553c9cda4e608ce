"""Arguments of a forward for two samples, by the kind of model."""

from __future__ import annotations

import torch
from torch import Tensor

VOCABULARY = 64
IMAGE = 32  # pixels a side
IMAGE_TOKEN = 2  # no other input has it


def _random(*shape: int) -> Tensor:
    return torch.randn(2, *shape, dtype=torch.float64)


def _ids(length: int) -> Tensor:
    return torch.randint(3, VOCABULARY, (2, length))


def tokens() -> dict[str, Tensor]:
    return {"input_ids": _ids(7)}


def translation() -> dict[str, Tensor]:
    return tokens() | {"decoder_input_ids": _ids(5)}


def images() -> dict[str, Tensor]:
    return {"pixel_values": _random(3, IMAGE, IMAGE)}


def images_and_text() -> dict[str, Tensor]:
    return images() | tokens()


def _image_and_text(num_tokens: int) -> dict[str, Tensor]:
    ids = _ids(7)
    return {"input_ids": torch.cat([torch.full((2, num_tokens), IMAGE_TOKEN), ids], dim=1)} | images()


def image_in_text() -> dict[str, Tensor]:
    """An image of four patches, each a token."""
    return _image_and_text(4)


def images_of_one_token() -> dict[str, Tensor]:
    """Four patches shuffled into one token; a sample has a list of images."""
    inputs = _image_and_text(1)
    return inputs | {"pixel_values": inputs["pixel_values"].unsqueeze(1)}


def patches_in_text() -> dict[str, Tensor]:
    """Patches in Qwen's layout: 4 x 4 of 2 x 3 x 4 x 4 values for each image; a token for 2 x 2 of them."""
    inputs = _image_and_text(4)
    patches = torch.randn(32, 96, dtype=torch.float64)
    types = (inputs["input_ids"] == IMAGE_TOKEN).int()
    grid = torch.tensor([[1, 4, 4]] * 2)
    return {
        "input_ids": inputs["input_ids"],
        "pixel_values": patches,
        "image_grid_thw": grid,
        "mm_token_type_ids": types,
    }


def image_typed_in_text() -> dict[str, Tensor]:
    inputs = image_in_text()
    return inputs | {"token_type_ids": (inputs["input_ids"] == IMAGE_TOKEN).long()}


def captions() -> dict[str, Tensor]:
    return images() | {"decoder_input_ids": _ids(5)}


def noisy_latents() -> dict[str, Tensor]:
    """Latents with noise, the step, and the text's hidden states: what a diffusion model denoises."""
    return {"sample": _random(4, 8, 8), "timestep": torch.tensor([3, 500]), "encoder_hidden_states": _random(5, 16)}


def noisy_latents_of_sd3() -> dict[str, Tensor]:
    inputs = noisy_latents()
    return {"hidden_states": inputs.pop("sample"), "pooled_projections": _random(16), **inputs}


def noisy_patches() -> dict[str, Tensor]:
    """Inputs of Flux: noisy patches and text, each with positions."""
    positions = {"img_ids": torch.randint(4, (16, 3)).double(), "txt_ids": torch.zeros(5, 3, dtype=torch.float64)}
    inputs = noisy_latents()
    text = {"encoder_hidden_states": inputs["encoder_hidden_states"], "pooled_projections": _random(16)}
    return (
        {"hidden_states": _random(16, 4), "timestep": torch.tensor([0.1, 0.5], dtype=torch.float64)} | text | positions
    )


def waves() -> dict[str, Tensor]:
    return {"input_values": _random(400)}


def speech() -> dict[str, Tensor]:
    return {"input_values": _random(2000), "decoder_input_ids": _ids(5)}


def long_frames() -> dict[str, Tensor]:
    """Mel spectrograms, channels last, without a text."""
    return {"input_features": _random(20, 8)}


def spectrograms() -> dict[str, Tensor]:
    """Mel spectrograms in Whisper's layout, channels first."""
    return {"input_features": _random(8, 20), "decoder_input_ids": _ids(5)}


def frames() -> dict[str, Tensor]:
    """Mel spectrograms in Speech2Text's layout, channels last."""
    return {"input_features": _random(20, 8), "decoder_input_ids": _ids(5)}


def patches_of_sound() -> dict[str, Tensor]:
    return {"input_values": _random(32, 16)}
