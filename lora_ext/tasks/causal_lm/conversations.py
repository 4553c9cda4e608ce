"""Reads chats, prompts with completions, and plain texts from JSONL, in TRL's formats, and checks every line."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from lora_ext.tasks import TaskError
from lora_ext.tasks.finetune.data import json_lines, shown_names, shown_value, text_lines

ROLES = ("system", "user", "assistant")

_FORMATS = (
    '{"messages": [{"role": ..., "content": ...}, ...]}, {"prompt": ..., "completion": ...} with strings or lists of '
    'messages, or {"%s": ...}'
)
_PLAIN = ("text", "prompt", "completion")  # the roles of strings, which no chat template formats


class Example(NamedTuple):
    """One text to learn.

    Attributes:
        turns: ``(role, content)`` pairs. A chat has roles of :data:`ROLES`; strings have "text", or "prompt" and
            "completion".
        first_trained: index of the first turn that may be learned; assistant's turns before it belong to the prompt.
        line: in its file, counted from 1.
    """

    turns: tuple[tuple[str, str], ...]
    first_trained: int
    line: int

    @property
    def is_chat(self) -> bool:
        return self.turns[0][0] not in _PLAIN

    @property
    def answer(self) -> str | None:
        """The last turn, if it is learned; None for plain text."""
        return None if self.turns[0][0] == "text" else self.turns[-1][1]

    @property
    def prompt(self) -> tuple[tuple[str, str], ...]:
        """The turns before :attr:`answer`; the text itself for plain text."""
        return self.turns if self.answer is None else self.turns[:-1]

    @property
    def text(self) -> str:
        """The prompt as one string: examples with equal ones land on the same side of a split."""
        return "\n".join(content for _, content in self.prompt)

    @property
    def trained_turns(self) -> list[int]:
        """Indices of the assistant's turns that are learned."""
        numbered = enumerate(self.turns[self.first_trained :], start=self.first_trained)
        return [index for index, (role, _) in numbered if role == "assistant"]

    def messages(self, stop: int | None = None) -> list[dict[str, str]]:
        """Returns the turns before index ``stop`` as a chat template takes them."""
        return [{"role": role, "content": content} for role, content in self.turns[:stop]]


def read_conversations(path: str | Path, text_column: str = "text") -> list[Example]:
    """Reads a UTF-8 file with one JSON object a line; all lines have the same format.

    Args:
        text_column: key of plain texts.

    Raises:
        TaskError: names the file, the line and the mistake. Pipes and devices are refused.
    """
    path = Path(path)
    if path.suffix.lower() != ".jsonl":
        raise TaskError(
            f"{path}: the suffix is {path.suffix!r}, want .jsonl with one object a line: {_FORMATS % text_column}"
        )
    examples, first = [], None
    with text_lines(path) as lines:
        for line, row in json_lines(path, lines):
            where = f"{path}, line {line}"
            form = _form(where, row, text_column)
            if first is None:
                first = (form, line)
            elif form != first[0]:
                raise TaskError(f"{where}: the format is {form}, but line {first[1]} has {first[0]}; use one in a file")
            examples.append(_example(where, row, form, text_column, line))
    if not examples:
        raise TaskError(f"{path}: holds no examples")
    return examples


def _form(where: str, row: Mapping[str, Any], text_column: str) -> str:
    forms = {"messages": ("messages",), "prompt and completion": ("prompt", "completion"), text_column: (text_column,)}
    found = [form for form, keys in forms.items() if all(key in row for key in keys)]
    if len(found) > 1:
        raise TaskError(f"{where}: holds {shown_names(found)}; keep one of them")
    if not found:
        keys = shown_names(row) or "no keys"
        raise TaskError(f"{where}: has {keys}; want {_FORMATS % text_column}; --text-column names another key of texts")
    check_no_tools(where, row)
    return found[0]


def check_no_tools(where: str, row: Mapping[str, Any]) -> None:
    """Checks that a line has no tools, which no text shows. TaskError: it has."""
    if row.get("tools"):
        raise TaskError(f"{where}: holds tools, which are not supported; remove the key 'tools'")


def _example(where: str, row: Mapping[str, Any], form: str, text_column: str, line: int) -> Example:
    if form == "messages":
        return _chat(where, _messages(where, "messages", row["messages"]), 0, line)
    if form == text_column:
        text = _string(where, repr(text_column), row[text_column])
        if not text.strip():
            raise TaskError(f"{where}: {text_column!r} is empty; remove the line")
        return Example((("text", text),), 0, line)
    prompt, completion = row["prompt"], row["completion"]
    if isinstance(prompt, list) and isinstance(completion, list):
        before, after = _messages(where, "prompt", prompt), _messages(where, "completion", completion)
        if after[0][0] != "assistant":
            raise TaskError(f"{where}: the completion begins with {after[0][0]!r}, want 'assistant'")
        return _chat(where, [*before, *after], len(before), line)
    if isinstance(prompt, list) or isinstance(completion, list):
        raise TaskError(f"{where}: one of prompt and completion is a list; want two strings, or two lists of messages")
    prompt, completion = _string(where, "'prompt'", prompt), _string(where, "'completion'", completion)
    if not prompt.strip():
        raise TaskError(f"{where}: the prompt is empty; texts without a prompt have the key 'text'")
    if not completion.strip():
        raise TaskError(f"{where}: the completion is empty: there is nothing to learn; remove the line")
    return Example((("prompt", prompt), ("completion", completion)), 1, line)


def _chat(where: str, turns: list[tuple[str, str]], first_trained: int, line: int) -> Example:
    if turns[-1][0] != "assistant":
        raise TaskError(f"{where}: the last message is from {turns[-1][0]!r}, and nothing answers it; remove it")
    if turns[0][0] == "assistant":
        raise TaskError(f"{where}: the first message is from 'assistant'; want one from 'user' before it")
    example = Example(tuple(turns), first_trained, line)
    if empty := [index for index in example.trained_turns if not turns[index][1].strip()]:
        raise TaskError(
            f"{where}: message {empty[0] + 1}, from 'assistant', is empty: there is nothing to learn; remove the line"
        )
    return example


def _messages(where: str, name: str, messages: Any) -> list[tuple[str, str]]:
    if not isinstance(messages, list) or not messages:
        raise TaskError(f"{where}: {name!r} is {shown_value(messages)}, want a list of messages with role and content")
    return [_message(f"{where}: message {number} of {name!r}", one) for number, one in enumerate(messages, start=1)]


def _message(where: str, message: Any) -> tuple[str, str]:
    if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
        raise TaskError(f"{where} is {shown_value(message)}, want an object with role and content")
    if message["role"] not in ROLES:
        raise TaskError(f"{where} has the role {shown_value(message['role'])}, want one of {', '.join(ROLES)}")
    if more := [key for key in message if key not in ("role", "content") and message[key]]:
        raise TaskError(f"{where} has {shown_names(more)}, which no text shows; want role and content only")
    return message["role"], _string(where, "its content", message["content"])


def _string(where: str, name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise TaskError(f"{where}: {name} is {shown_value(value)}, want a string")
    return value
