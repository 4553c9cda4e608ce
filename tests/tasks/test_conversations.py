"""Tests that chats, completions and texts are read as TRL means them, and that every bad line is named."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from support import tiny_decoder

from lora_ext.tasks import TaskError
from lora_ext.tasks.causal_lm.conversations import Example, read_conversations

pytestmark = pytest.mark.cpu_only("is about files")

USER, ASSISTANT = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}


def read(tmp_path: Path, *rows: Any, **options: Any) -> list[Example]:
    return read_conversations(tiny_decoder.save_rows(tmp_path / "data.jsonl", rows), **options)


def test_messages(tmp_path: Path):
    system = {"role": "system", "content": ""}
    (example,) = read(tmp_path, {"messages": [system, USER, ASSISTANT, USER, ASSISTANT], "id": 7})
    roles = ["system", "user", "assistant", "user", "assistant"]
    assert [role for role, _ in example.turns] == roles and example.is_chat
    assert example.trained_turns == [2, 4] and example.answer == "Hello"
    assert example.messages(2) == [system, USER] and len(example.prompt) == 4


def test_prompts_with_completions(tmp_path: Path):
    rows = [
        {"prompt": "2 + 2 =", "completion": " 4"},
        {"prompt": "3 + 3 =", "completion": " 6"},
    ]
    examples = read(tmp_path, *rows, "")
    assert [example.turns for example in examples] == [
        (("prompt", "2 + 2 ="), ("completion", " 4")),
        (("prompt", "3 + 3 ="), ("completion", " 6")),
    ]
    assert [example.line for example in examples] == [1, 2] and not examples[0].is_chat
    assert examples[0].text == "2 + 2 =" and examples[0].answer == " 4"


def test_completions_of_messages_train_no_answer_of_the_prompt(tmp_path: Path):
    (example,) = read(tmp_path, {"prompt": [USER, ASSISTANT, USER], "completion": [ASSISTANT]})
    assert example.is_chat and example.trained_turns == [3]


def test_plain_text(tmp_path: Path):
    (example,) = read(tmp_path, {"body": "Once upon a time"}, text_column="body")
    assert example.turns == (("text", "Once upon a time"),) and example.answer is None
    assert example.text == "Once upon a time"


EMPTY = {"role": "assistant", "content": " \n"}
REFUSED = {
    "role": ({"messages": [{"role": "human", "content": "Hi"}, ASSISTANT]}, 'message 1 .*role "human", want one of'),
    "tool": ({"messages": [USER, {"role": "tool", "content": "4"}, ASSISTANT]}, 'message 2 .*role "tool"'),
    "empty answer": ({"messages": [USER, EMPTY]}, "message 2, from 'assistant', is empty: .*remove the line"),
    "empty completion": ({"prompt": "a", "completion": "  "}, "the completion is empty"),
    "empty prompt": ({"prompt": "", "completion": "b"}, "the prompt is empty; .*'text'"),
    "empty text": ({"text": ""}, "'text' is empty"),
    "no messages": ({"messages": []}, r"'messages' is \[\], want a list"),
    "no list": ({"messages": "Hi"}, "'messages' is \"Hi\", want a list"),
    "no message": ({"messages": [USER, "Hello"]}, 'message 2 of .* is "Hello", want an object'),
    "no content": ({"messages": [USER, {"role": "assistant"}]}, "message 2 of .* want an object with role and content"),
    "content": ({"messages": [USER, {"role": "assistant", "content": None}]}, "its content is null, want a string"),
    "parts": ({"messages": [{"role": "user", "content": [{"type": "text"}]}, ASSISTANT]}, "want a string"),
    "unanswered": ({"messages": [USER, ASSISTANT, USER]}, "the last message is from 'user', and nothing answers it"),
    "assistant first": ({"messages": [ASSISTANT]}, "the first message is from 'assistant'"),
    "tool calls": ({"messages": [USER, ASSISTANT | {"tool_calls": [{}]}]}, "has tool_calls, which no text shows"),
    "tools": ({"messages": [USER, ASSISTANT], "tools": [{}]}, "holds tools, which are not supported"),
    "mixed kinds": ({"prompt": [USER], "completion": "b"}, "two strings, or two lists"),
    "completion by a user": ({"prompt": [USER], "completion": [USER]}, "the completion begins with 'user'"),
    "two formats": ({"text": "a", "messages": [USER, ASSISTANT]}, "holds messages, text; keep one of them"),
    "no format": ({"instruction": "a", "output": "b"}, 'has instruction, output; want .*"messages".*--text-column'),
    "half a format": ({"prompt": "a"}, "has prompt; want"),
    "number": ({"text": 3}, "'text' is 3, want a string"),
    "surrogate": ('{"text": "\\ud800"}', "a string that is not Unicode"),
    "no object": ("[1]", "holds a list, want an object"),
    "broken": ("{", "is not JSON: .* at column 2$"),
    "NUL": ('{"text": "a\0"}', "holds a NUL"),
}


@pytest.mark.parametrize(("row", "message"), REFUSED.values(), ids=REFUSED)
def test_a_bad_line_is_named(tmp_path: Path, row: Any, message: str):
    blank = "  "
    with pytest.raises(TaskError, match=f"(?s)^{tmp_path}/data.jsonl, line 2.*{message}"):
        read(tmp_path, blank, row)


def test_one_format_in_a_file(tmp_path: Path):
    with pytest.raises(TaskError, match="line 2: the format is text, but line 1 has messages; use one in a file"):
        read(tmp_path, {"messages": [USER, ASSISTANT]}, {"text": "a"})


def test_a_refusal_names_the_text_column(tmp_path: Path):
    (tmp_path / "data.jsonl").write_text('{"text": "a"}')
    with pytest.raises(TaskError, match=r'line 1: has text; want .*, or \{"body": \.\.\.\}; --text-column'):
        read_conversations(tmp_path / "data.jsonl", "body")


def test_other_files_are_refused(tmp_path: Path):
    with pytest.raises(TaskError, match="holds no examples"):
        read(tmp_path, "")
    with pytest.raises(TaskError, match=r"the suffix is '.csv', want .jsonl"):
        read_conversations(tmp_path / "data.csv")
    with pytest.raises(TaskError, match="cannot be read: No such file"):
        read_conversations(tmp_path / "none.jsonl")
    os.mkfifo(tmp_path / "pipe.jsonl")
    with pytest.raises(TaskError, match="is a pipe"):
        read_conversations(tmp_path / "pipe.jsonl")
    (tmp_path / "latin.jsonl").write_bytes(b'{"text": "a"}\n{"text": "\xe9"}\n')
    with pytest.raises(TaskError, match="line 2: not UTF-8"):
        read_conversations(tmp_path / "latin.jsonl")
