"""The trainer of a decoder: packed batches, and perplexity in place of accuracy."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lora_ext.tasks.causal_lm.evaluating import batches_of, perplexity
from lora_ext.tasks.causal_lm.packing import Collator
from lora_ext.tasks.causal_lm.settings import CausalSettings
from lora_ext.tasks.finetune.trainer import FinetuneTrainer, build_trainer, forward_of
from lora_ext.tasks.shared import team


class CausalTrainer(FinetuneTrainer):
    """Evaluates the loss of every counted token, and counts the tokens of packs.

    Attributes:
        settings: the run's, for the precision of evaluations.
    """

    settings: CausalSettings

    def evaluate(self, eval_dataset: Any = None, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Evaluates rows that are not packed: ``eval_loss``, ``eval_perplexity``."""
        rows = self.eval_dataset if eval_dataset is None else eval_dataset
        batches = team.part_of(batches_of(rows, self.settings))
        was_training = self.model.training
        self.model.eval()
        self.callback_handler.eval_dataloader = batches
        step = lambda: self.callback_handler.on_prediction_step(self.args, self.state, self.control)  # noqa: E731
        with self.average.in_place() if self.average is not None else nullcontext():
            forward = forward_of(self.model, self.settings)
            scores = perplexity(forward, batches, self.data_collator, self.model.device, step, is_part=True)
        self.model.train(was_training)
        metrics = {f"eval_{name}": scores[name] for name in ("loss", "perplexity")}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _track_num_input_tokens(self, inputs: dict[str, Tensor]) -> None:
        if "attention_mask" in inputs:
            super()._track_num_input_tokens(inputs)
        else:  # packs: nearly no padding
            self.state.num_input_tokens_seen += inputs["input_ids"].numel()


@torch.no_grad()
def divides_by_items(model: PreTrainedModel) -> bool:
    """Returns whether the model divides its loss by ``num_items_in_batch``, if that is given.

    The Trainer then gives it the number of counted tokens in all batches of a step, so that accumulated batches count
    by their tokens. It trusts the signature of ``forward``, which says little.
    """
    ids = torch.arange(1, 5, device=model.device)[None]
    was_training = model.training
    model.eval()
    try:
        mean, part = (
            float(model(input_ids=ids, labels=ids, use_cache=False, **more).loss)
            for more in ({}, {"num_items_in_batch": torch.tensor(6, device=model.device)})
        )
    except TypeError:
        return False
    finally:
        model.train(was_training)
    return abs(part - mean / 2) <= 1e-3 * mean  # three tokens are counted


def build_causal_trainer(
    model: PreTrainedModel,
    settings: CausalSettings,
    out: Path,
    train: list[dict[str, Sequence[int]]],
    validation: list[dict[str, Sequence[int]]],
    collator: Collator,
) -> CausalTrainer:
    """Returns a trainer; ``train`` may be packed, ``validation`` must not."""
    trainer = build_trainer(model, settings, out, train, validation, collator, kind=CausalTrainer)
    trainer.settings = settings
    trainer.args.remove_unused_columns = False  # position ids also reach a model that takes them by **kwargs
    trainer.model_accepts_loss_kwargs = divides_by_items(model)
    model.config.use_cache = False  # packs are found only if there is no cache
    return trainer
