"""Measures a decoder: perplexity of texts, and how its answers compare with the expected ones."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch.nn import functional as F
from transformers import GenerationConfig, PreTrainedModel

from lora_ext.tasks.causal_lm.conversations import Example
from lora_ext.tasks.causal_lm.packing import Collator
from lora_ext.tasks.causal_lm.rendering import IGNORED, Encoded, Renderer
from lora_ext.tasks.causal_lm.settings import CausalSettings
from lora_ext.tasks.shared import team

ROUGE = ("rouge1", "rouge2", "rougeL")

Row = dict[str, Sequence[int]]

_AT_ONCE = 16  # answers that are generated together
_CONTINUED = 32  # tokens of a plain text that its continuation follows, at most half of it


def batches_of(rows: Sequence[Row], settings: CausalSettings) -> list[list[Row]]:
    """Batches of as many texts as in training; for a run with packs, of at most as many tokens, padding included.

    Args:
        rows: shortest first.
    """
    if not settings.packing:
        return [list(rows[at : at + settings.batch_size]) for at in range(0, len(rows), settings.batch_size)]
    batches: list[list[Row]] = []
    for row in rows:
        if not batches or (len(batches[-1]) + 1) * len(row["input_ids"]) > settings.batch_size * settings.max_length:
            batches.append([])
        batches[-1].append(row)
    return batches


@torch.inference_mode()
def perplexity(
    forward: Callable[..., Any],
    batches: Iterable[Sequence[Row]],
    collator: Collator,
    device: torch.device,
    after_batch: Callable[[], None] = lambda: None,
    is_part: bool = False,
) -> dict[str, float]:
    """Returns ``loss``, ``perplexity = exp(loss)`` and ``tokens``: the mean over all tokens that labels count.

    Args:
        forward: calls the model in the run's precision.
        batches: rows without packing.
        is_part: ``batches`` are this process's, and the mean is over those of all processes, which call this function.
    """
    total, tokens = 0.0, 0
    for rows in batches:
        batch = {name: tensor.to(device) for name, tensor in collator(rows).items()}
        labels = batch.pop("labels")[:, 1:]
        logits = forward(**batch, use_cache=False).logits[:, :-1]
        counted = labels != IGNORED  # only these rows become float32
        losses = F.cross_entropy(logits[counted].float(), labels[counted], reduction="none")
        total += float(losses.double().sum())
        tokens += int(counted.sum())
        after_batch()
    if is_part:
        total, tokens = team.sums([total, tokens])
    loss = total / tokens
    return {"loss": loss, "perplexity": math.exp(min(loss, 700.0)), "tokens": int(tokens)}


@torch.inference_mode()
def generated(
    model: PreTrainedModel,
    examples: Sequence[Example],
    renderer: Renderer,
    max_new_tokens: int,
    most_tokens: int | None = None,
) -> list[dict[str, Any]]:
    """Returns the answers to the examples' prompts by greedy decoding in the weights' dtype, in their order.

    The processes of a run share the prompts, in groups that do not depend on their number. A plain text is continued
    after at most 32 tokens. Prompt and answer together have at most ``most_tokens``.

    Returns:
        One ``{"answer": text, "prompt": text, "cut": bool}`` per example; ``cut``: the model did not end the answer.
    """
    tokenizer = renderer.tokenizer
    prompts = [renderer.prompt(example) for example in examples]
    prompts = [
        ids if example.answer is not None else ids[: max(1, min(_CONTINUED, len(ids) // 2))]
        for ids, example in zip(prompts, examples, strict=True)
    ]
    known = model.generation_config.eos_token_id
    ends = {tokenizer.eos_token_id, *(known if isinstance(known, list) else [known])} - {None}
    for example in examples[:1]:
        ends |= renderer.stops(example)
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    groups = [order[at : at + _AT_ONCE] for at in range(0, len(order), _AT_ONCE)]
    found: dict[int, dict[str, Any]] = {}
    was_training, cache = model.training, model.config.use_cache
    model.eval()
    model.config.use_cache = True
    try:
        for indices in team.part_of(groups):
            longest = max(len(prompts[index]) for index in indices)
            padded = [[tokenizer.pad_token_id] * (longest - len(prompts[i])) + prompts[i] for i in indices]
            mask = [[0] * (longest - len(prompts[i])) + [1] * len(prompts[i]) for i in indices]
            room = max_new_tokens if most_tokens is None else min(max_new_tokens, most_tokens - longest)
            if room < 1:
                for index in indices:
                    found[index] = {"prompt": tokenizer.decode(prompts[index]), "answer": "", "cut": True}
                continue
            config = GenerationConfig(
                do_sample=False, max_new_tokens=room, pad_token_id=tokenizer.pad_token_id, eos_token_id=sorted(ends)
            )
            ids = torch.tensor(padded, device=model.device)
            out = model.generate(
                input_ids=ids, attention_mask=torch.tensor(mask, device=model.device), generation_config=config
            )
            for index, tokens in zip(indices, out[:, longest:].tolist(), strict=True):
                stop = next((at for at, token in enumerate(tokens) if token in ends), None)
                found[index] = {
                    "prompt": tokenizer.decode(prompts[index]),
                    "answer": tokenizer.decode(tokens[:stop], skip_special_tokens=True).strip(),
                    "cut": stop is None,
                }
    finally:
        model.train(was_training)
        model.config.use_cache = cache
    everything = {index: answer for part in team.gathered([found]) for index, answer in part.items()}
    return [everything[index] for index in range(len(prompts))]


def answer_scores(answers: Sequence[str], expected: Sequence[str]) -> dict[str, float]:
    """Returns the means of exact match and of ROUGE's F-measures, all in [0, 1].

    Exact match compares the strings without white space at their ends. ROUGE is rouge-score's, with stemming; its
    tokens are the letters a-z and digits, so texts in other scripts score 0.
    """
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(list(ROUGE), use_stemmer=True)
    scores = [scorer.score(want, got) for want, got in zip(expected, answers, strict=True)]
    equal = sum(want.strip() == got.strip() for want, got in zip(expected, answers, strict=True))
    means = {name: sum(score[name].fmeasure for score in scores) / len(scores) for name in ROUGE}
    return {"exact_match": equal / len(answers), **means}


def answered(split: Sequence[Example], encoded: Encoded, count: int) -> list[Example]:
    """Returns the first ``count`` examples of a split, in its order, except those left out for their lengths."""
    kept = {example.line for example in encoded.examples}
    return [example for example in split if example.line in kept][:count]
