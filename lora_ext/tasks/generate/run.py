"""``lora-ext generate``: answers prompts with a decoder and its adapters, token by token."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase, TextStreamer, set_seed

from lora_ext.quantized import stop_keeping_stored
from lora_ext.tasks import TaskError
from lora_ext.tasks.causal_lm.decoder import Decoder, load_decoder
from lora_ext.tasks.causal_lm.rendering import use_template
from lora_ext.tasks.generate.chosen_adapters import BASE, load_adapters, named_adapters, using
from lora_ext.tasks.generate.prompts import Prompt, as_chat, end_tokens, token_ids
from lora_ext.tasks.shared import provenance


@dataclass(frozen=True)
class GenerateSettings:
    """Settings of ``lora-ext generate``.

    Attributes:
        model: a directory, a hub id, or a GGUF file.
        adapters: ``DIR`` or ``NAME=DIR``; every prompt is answered with each.
        weights: one for each adapter: every prompt is answered with the weighted sum of their updates instead.
        base: whether the model without an adapter answers, too.
        merge: whether adapters are in the weights while they answer.
        chat: whether texts become the user's message.
        system: the system message of chats.
        chat_template_file: a Jinja file; None: the tokenizer's template.
        max_new_tokens: most tokens of an answer.
        temperature: divides the logits before sampling; 0: the likeliest token.
        top_p, top_k: sampling from the likeliest tokens of this total probability, and of this number.
        seed: seed of every answer.
        dtype: dtype of the weights.
    """

    model: str
    adapters: tuple[str, ...] = ()
    weights: tuple[float, ...] | None = None
    base: bool = False
    merge: bool = False
    chat: bool = False
    system: str | None = None
    chat_template_file: str | None = None
    max_new_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0
    dtype: str = "float32"

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise TaskError(f"--max-new-tokens is {self.max_new_tokens}, want at least 1")
        if not 0.0 <= self.temperature < float("inf"):
            raise TaskError(f"--temperature is {self.temperature}, want a finite number of at least 0")
        if not 0.0 < self.top_p <= 1.0:
            raise TaskError(f"--top-p is {self.top_p}, want 0 < p <= 1")
        if self.top_k < 0:
            raise TaskError(f"--top-k is {self.top_k}, want at least 0, which means all tokens")
        if not 0 <= self.seed < 2**32:
            raise TaskError(f"--seed is {self.seed}, want 0 <= seed < 2**32")
        if self.temperature == 0.0 and (self.top_p != 1.0 or self.top_k):
            raise TaskError(
                "--top-p and --top-k go with --temperature above 0; without it, the likeliest token is next"
            )
        if self.merge and not self.adapters:
            raise TaskError("--merge goes with --adapter")
        if self.base and not self.adapters:
            raise TaskError("--base goes with --adapter; without one, the base answers anyway")
        if self.weights is not None and len(self.weights) != len(self.adapters):
            raise TaskError(f"--weights has {len(self.weights)} numbers for {len(self.adapters)} adapters")
        if self.system is not None and not self.system.strip():
            raise TaskError("--system is empty")


def generate(
    settings: GenerateSettings,
    prompts: Sequence[Prompt],
    *,
    stream: Callable[[str], None] | None = None,
    heading: Callable[[str], None] = lambda line: None,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Answers every prompt with every adapter.

    All prompts, adapters and options are checked before the first answer.

    Args:
        stream: receives the parts of an answer as soon as they are known.
        heading: receives a line before every answer, if there are several.
        say: shows a line about the progress.

    Returns:
        ``{"answers": [{"prompt", "adapter", "text", "tokens", "ended", "at_the_limit", "seconds",
        "tokens_per_second"}, ...], ...}``; ``at_the_limit``: the model takes no more tokens, although
        ``max_new_tokens`` allows more.

    Raises:
        TaskError: a mistake in the options, the prompts or the adapters, or a model that cannot be loaded.
    """
    adapters = named_adapters(settings.adapters)
    if settings.chat or settings.system is not None:
        prompts = [as_chat(prompt, settings.system) for prompt in prompts]
    if settings.chat_template_file is not None and all(prompt.messages is None for prompt in prompts):
        raise TaskError(
            "--chat-template-file goes with messages, and the prompts are texts; --chat makes them the user's messages"
        )
    say(f"loading {settings.model} ...")
    decoder = load_decoder(settings.model, getattr(torch, settings.dtype))
    model, tokenizer = decoder.model, decoder.tokenizer
    if not adapters:
        stop_keeping_stored(model)  # bitsandbytes' packed 4-bit weights answer faster
    if settings.chat_template_file is not None:
        use_template(tokenizer, settings.chat_template_file)
    encoded = [_checked_ids(prompt, decoder) for prompt in prompts]
    ends = [end_tokens(prompt, tokenizer, settings.model) for prompt in prompts]
    names = load_adapters(model, adapters, settings.weights) if adapters else []
    names = [*([BASE] if settings.base or not names else []), *names]
    model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
    for name in names[1:] if settings.merge else ():  # an adapter that cannot be merged is refused before any answer
        with using(model, name, merged=True):
            pass
    answers = []
    for name in names:  # outside, because merging takes a pass over the weights
        with using(model, name, settings.merge):
            for prompt, ids, end in zip(prompts, encoded, ends, strict=True):
                if len(names) * len(prompts) > 1:
                    heading(f"{name}: {prompt.shown}" if adapters else prompt.shown)
                answers.append({"prompt": _content(prompt), "adapter": name if adapters else None})
                answers[-1] |= _answer(decoder, settings, ids, end, stream)
                say("{tokens} tokens, {tokens_per_second:.1f} tokens/s".format(**answers[-1]))
                if answers[-1]["at_the_limit"]:
                    say(f"this answer is cut: {settings.model} takes {decoder.most_tokens:,} tokens in all")
    return {
        **provenance.made_by(),
        "machine": provenance.machine(),
        "settings": asdict(settings),
        "adapters": {adapter.name: str(adapter.directory) for adapter in adapters},
        "answers": answers,
    }


def _content(prompt: Prompt) -> str | list[dict[str, str]]:
    return prompt.text if prompt.messages is None else list(prompt.messages)


def _checked_ids(prompt: Prompt, decoder: Decoder) -> list[int]:
    ids = token_ids(prompt, decoder.tokenizer, decoder.path)
    if decoder.most_tokens is not None and len(ids) >= decoder.most_tokens:
        raise TaskError(f"{prompt.where}: has {len(ids):,} tokens, but the model takes {decoder.most_tokens:,} in all")
    return ids


class _Streamer(TextStreamer):
    """Passes text on; notes the time of every token."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stream: Callable[[str], None] | None) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.stream, self.times = stream, []

    def put(self, value: torch.Tensor) -> None:
        self.times.append(time.perf_counter())
        if self.stream is not None:
            super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        if self.stream is not None:
            self.stream(f"{text}\n" if stream_end else text)


def _answer(
    decoder: Decoder,
    settings: GenerateSettings,
    ids: list[int],
    ends: set[int],
    stream: Callable[[str], None] | None,
) -> dict[str, Any]:
    """Answers one prompt. ``seconds`` are those of the whole answer, the rate is that after its first token."""
    model, tokenizer = decoder.model, decoder.tokenizer
    room = settings.max_new_tokens if decoder.most_tokens is None else decoder.most_tokens - len(ids)
    streamer = _Streamer(tokenizer, stream)
    ends = ends | _ends(model, tokenizer)
    config = GenerationConfig(
        max_new_tokens=min(settings.max_new_tokens, room),
        do_sample=settings.temperature > 0,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=sorted(ends) or None,
        use_cache=True,
        **(
            {"temperature": settings.temperature, "top_p": settings.top_p, "top_k": settings.top_k or None}
            if settings.temperature > 0
            else {}
        ),
    )
    batch = torch.tensor([ids], device=model.device)
    set_seed(settings.seed)
    start = time.perf_counter()
    with torch.inference_mode():
        output = model.generate(
            batch, attention_mask=torch.ones_like(batch), generation_config=config, streamer=streamer
        )[0, len(ids) :].tolist()
    seconds = time.perf_counter() - start
    times = streamer.times[1:]  # the first is the prompt's
    rate = (len(times) - 1) / (times[-1] - times[0]) if len(times) > 1 else len(times) / seconds
    ended = bool(output) and output[-1] in ends
    return {
        "text": tokenizer.decode(output, skip_special_tokens=True),
        "tokens": len(output),
        "ended": ended,
        "at_the_limit": not ended and len(output) == room < settings.max_new_tokens,
        "seconds": seconds,
        "tokens_per_second": rate,
    }


def _ends(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Returns the tokens that end every text: the checkpoint's and the tokenizer's."""
    config = model.generation_config.eos_token_id
    ids = config if isinstance(config, list) else [config]
    return {token for token in [*ids, tokenizer.eos_token_id] if token is not None}
