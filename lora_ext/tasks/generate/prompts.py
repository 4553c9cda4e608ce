"""Reads prompts: texts, or chats that go through the tokenizer's chat template."""

from __future__ import annotations

import json
import re
from codecs import BOM_UTF8
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from lora_ext.files import open_regular, parse_json_object
from lora_ext.tasks import TaskError
from lora_ext.tasks.causal_lm.conversations import check_no_tools

_MOST_BYTES = 50_000_000
_LAST_TOKENS = 8  # among the last tokens of a chat is the one that ends an answer
_LINE_END = re.compile(r"\r\n|\n|\r")  # str.splitlines also splits at form feeds and U+2028, which texts may hold
_ROLES = ("system", "developer", "user", "assistant", "tool")  # those of chat templates


@dataclass(frozen=True)
class Prompt:
    """A text or a chat.

    Attributes:
        where: its place, for messages: ``prompt 1``, or a file and a line.
        text: the text, or None.
        messages: the chat, as ``({"role": ..., "content": ...}, ...)``, or None.
    """

    where: str
    text: str | None = None
    messages: tuple[dict[str, str], ...] | None = None

    @property
    def shown(self) -> str:
        """The text, or the last message, in one line."""
        text = self.text if self.messages is None else self.messages[-1]["content"]
        line = " ".join(text.split())
        return line if len(line) <= 60 else f"{line[:60]}..."


def from_texts(texts: Iterable[str]) -> list[Prompt]:
    return [_text(f"prompt {number}", text) for number, text in enumerate(texts, start=1)]


def read_prompts(path: Path, whole: bool) -> list[Prompt]:
    """Reads a file in UTF-8: a ``.jsonl`` file has an object a line, any other file a text a line.

    Objects are ``{"prompt": text}``, ``{"messages": [...]}`` or ``{"prompt": [...]}`` with messages; other keys of
    these objects are ignored, except tools.

    Args:
        whole: the file is one text.

    Raises:
        TaskError: names the line.
    """
    try:
        with open_regular(path) as file:
            content = file.read(_MOST_BYTES + 1)
    except OSError as error:
        raise TaskError(f"{path}: cannot be read: {error.strerror}") from error
    except ValueError as error:  # not a regular file
        raise TaskError(str(error)) from error
    return _parsed(str(path), content, path.suffix.lower() == ".jsonl", whole)


def read_stream(stream: TextIO, whole: bool) -> list[Prompt]:
    """Reads standard input: as a ``.jsonl`` file if its first line is an object, else as a text file."""
    content = stream.buffer.read(_MOST_BYTES + 1)
    is_jsonl = not whole and content.removeprefix(BOM_UTF8).lstrip()[:1] == b"{"
    return _parsed("standard input", content, is_jsonl, whole)


def _parsed(name: str, content: bytes, is_jsonl: bool, whole: bool) -> list[Prompt]:
    if len(content) > _MOST_BYTES:
        raise TaskError(f"{name}: larger than {_MOST_BYTES:,} bytes, the most that is read")
    if whole and is_jsonl:
        raise TaskError(f"{name}: --whole goes with texts; a .jsonl file has a prompt a line")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise TaskError(f"{name}, line {line}: not UTF-8 ({error.reason})") from error
    if whole:
        return [_text(name, text.removesuffix("\n").removesuffix("\r"))]
    lines = [(f"{name}, line {number}", line) for number, line in enumerate(_LINE_END.split(text), 1) if line.strip()]
    if not lines:
        raise TaskError(f"{name}: holds no prompts")
    return [_object(where, line) if is_jsonl else _text(where, line) for where, line in lines]


def _text(where: str, text: str) -> Prompt:
    if not text.strip():
        raise TaskError(f"{where}: is empty")
    return Prompt(where, text=text)


def _object(where: str, line: str) -> Prompt:
    try:
        row = parse_json_object(line, where)
    except ValueError as error:
        raise TaskError(re.sub(r": line 1 column (\d+) \(char \d+\)$", r" at column \1", str(error))) from error
    found = row.get("messages", row.get("prompt"))
    if isinstance(found, str) and "messages" not in row:
        return _text(where, found)
    if not isinstance(found, list):
        raise TaskError(f"{where}: want 'prompt', a text, or 'messages', a list of objects; it has {_keys(row)}")
    if not found:
        raise TaskError(f"{where}: has no messages")
    check_no_tools(where, row)
    for number, message in enumerate(found, start=1):
        fields = message if isinstance(message, dict) else {}
        if not all(isinstance(fields.get(key), str) and fields[key] for key in ("role", "content")):
            raise TaskError(
                f"{where}: message {number} is {json.dumps(message)[:100]}, want texts for role and content"
            )
        if fields["role"] not in _ROLES:
            raise TaskError(
                f"{where}: message {number} has the role {json.dumps(fields['role'])[:100]}, want one of "
                f"{', '.join(_ROLES)}"
            )
        if more := [key for key in fields if key not in ("role", "content") and fields[key]]:
            raise TaskError(
                f"{where}: message {number} has {_keys(more)}, which no text shows; want role and content only"
            )
    if found[-1]["role"] == "assistant":
        raise TaskError(f"{where}: the last message is the assistant's, so there is nothing to answer; leave it out")
    return Prompt(where, messages=tuple({"role": one["role"], "content": one["content"]} for one in found))


def _keys(row: Iterable[str]) -> str:
    return ", ".join(map(repr, list(row)[:10])) or "nothing"


def as_chat(prompt: Prompt, system: str | None) -> Prompt:
    """Makes a text the user's message, after the ``system`` message; a chat gets that unless it begins with one."""
    messages = prompt.messages or ({"role": "user", "content": prompt.text},)
    if system is not None and messages[0]["role"] != "system":
        messages = ({"role": "system", "content": system}, *messages)
    return Prompt(prompt.where, messages=messages)


def token_ids(prompt: Prompt, tokenizer: PreTrainedTokenizerBase, model: str) -> list[int]:
    """Returns the tokens after which the answer begins.

    Raises:
        TaskError: there is no chat template, the template refuses the chat, or there are no tokens.
    """
    if prompt.messages is None:
        ids = tokenizer(prompt.text)["input_ids"]
        if ids[-1:] == [tokenizer.eos_token_id] and not prompt.text.endswith(tokenizer.eos_token):
            ids = ids[:-1]  # some tokenizers end every text
    else:
        ids = _chat(prompt, tokenizer, model, add_generation_prompt=True)
    if not ids:
        raise TaskError(f"{prompt.where}: the tokenizer makes no token of it")
    return ids


def end_tokens(prompt: Prompt, tokenizer: PreTrainedTokenizerBase, model: str) -> set[int]:
    """Returns the special token that the chat template puts after an answer: the end of a turn; none for a text."""
    if prompt.messages is None:
        return set()
    answered = Prompt(prompt.where, messages=(*prompt.messages, {"role": "assistant", "content": "x"}))
    special = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    last = _chat(answered, tokenizer, model)[-_LAST_TOKENS:]
    return set([token for token in last if token in special][-1:])


def _chat(prompt: Prompt, tokenizer: PreTrainedTokenizerBase, model: str, **options: Any) -> list[int]:
    if tokenizer.chat_template is None:
        raise TaskError(
            f"{prompt.where}: the tokenizer of {model} has no chat template, so messages cannot become a text; give "
            "prompts that are texts, or a template with --chat-template-file"
        )
    try:
        return tokenizer.apply_chat_template(list(prompt.messages), return_dict=True, **options)["input_ids"]
    except TemplateError as error:
        raise TaskError(f"{prompt.where}: the chat template refuses it: {error}") from error
