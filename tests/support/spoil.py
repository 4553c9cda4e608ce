"""A callback after which an earlier adapter is the best."""

from __future__ import annotations

import torch
from transformers import TrainerCallback


class Spoil(TrainerCallback):
    """Spoils the adapter after step 2."""

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if state.global_step == 2:
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.requires_grad:
                        parameter.add_(torch.randn_like(parameter), alpha=30)
