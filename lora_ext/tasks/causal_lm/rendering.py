"""Turns examples into tokens, and proves which of them belong to the completions: the loss counts only those."""

from __future__ import annotations

import re
from array import array
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import TemplateError, TemplateSyntaxError, UndefinedError
from transformers import PreTrainedTokenizerBase

from lora_ext.files import open_regular
from lora_ext.tasks import TaskError
from lora_ext.tasks.causal_lm.conversations import Example
from lora_ext.tasks.causal_lm.settings import CausalSettings

IGNORED = -100  # a label that the loss does not count

_MARKS = re.compile(r"\{%-?\s*generation\s*-?%\}")
_REMEDY = "--chat-template-file names a template with {% generation %} ... {% endgeneration %} around the answers"
_OTHER = "--chat-template-file names another template"
_LARGEST_TEMPLATE = 1_000_000  # bytes


class Encoded(NamedTuple):
    """Examples as tokens, shortest first."""

    examples: list[Example]
    rows: list[dict[str, Sequence[int]]]  # {"input_ids", "labels"}; labels are token ids or IGNORED

    @property
    def trained_tokens(self) -> int:
        return sum(label != IGNORED for row in self.rows for label in row["labels"])


def read_template(path: str) -> str:
    """Returns the chat template in the file ``path``. TaskError: it cannot be read."""
    try:
        with open_regular(Path(path)) as file:
            content = file.read(_LARGEST_TEMPLATE + 1)
        if len(content) > _LARGEST_TEMPLATE:
            raise ValueError(f"{path} has more than {_LARGEST_TEMPLATE:,} bytes")
        return content.decode("utf-8-sig")
    except OSError as error:
        raise TaskError(f"--chat-template-file {path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise TaskError(f"--chat-template-file {path}: not UTF-8 ({error.reason})") from error
    except ValueError as error:
        raise TaskError(f"--chat-template-file: {error}") from error


def use_template(tokenizer: PreTrainedTokenizerBase, path: str) -> None:
    """Gives the tokenizer the chat template in the file ``path``.

    TaskError: it cannot be read, or is no Jinja template.
    """
    tokenizer.chat_template = read_template(path)
    try:
        tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
    except TemplateSyntaxError as error:
        raise TaskError(f"--chat-template-file {path}, line {error.lineno}: {error.message}") from error
    except Exception:  # the line that the template refuses will say more
        pass


class Renderer:
    """Renders examples with a tokenizer.

    Chats go through its chat template. If that marks the answers by ``{% generation %}``, the marks say what is
    learned. Otherwise an answer's tokens are those after the tokens of its prompt: the prompt, rendered by itself, must
    be the beginning of the whole, token by token.

    Prompts and completions that are strings are joined as they are, with the end-of-text token after them; the same
    proof applies. Plain text is learned whole.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, name: str) -> None:
        self.tokenizer, self.name = tokenizer, name
        self._marks: bool | None = None  # not known before the first chat

    def row(self, example: Example) -> dict[str, list[int]]:
        """Returns ``{"input_ids": [...], "labels": [...]}``. ValueError: the completion's tokens cannot be told."""
        if not example.is_chat:
            return self._plain_row(example)
        self.check_template()
        self._check_contents(example)
        if self._marks:
            ids, trained = self._marked(example)
        else:
            ids, trained = self._by_prefixes(example)
        return _row(ids, trained)

    def prompt(self, example: Example) -> list[int]:
        """Returns the tokens after which the last answer is generated; a plain text is returned whole."""
        if example.is_chat:
            return self._chat(example.messages(-1), add_generation_prompt=True)
        return self._begin(example.prompt[0][1])

    def stops(self, example: Example) -> set[int]:
        """Returns special tokens that end the answer in ``example``."""
        special = {*self.tokenizer.all_special_ids}
        special |= {index for index, token in self.tokenizer.added_tokens_decoder.items() if token.special}
        row = self.row(example)
        last = [label for label in row["labels"][-8:] if label in special]
        return {*last[:1]}

    def check_template(self) -> None:
        """Finds out whether the template marks the answers. TaskError: there is no template."""
        if self._marks is not None:
            return
        try:
            template = self.tokenizer.get_chat_template()
        except ValueError as error:
            raise TaskError(
                f"{self.name} has no chat template, so there is no way to write messages as text; --chat-template-file "
                "names one, or use the format with a prompt and a completion that are strings"
            ) from error
        self._marks = _MARKS.search(template) is not None

    def _check_contents(self, example: Example) -> None:
        """Raises ValueError if the template shows a message of the user or the assistant without its content.

        Templates of models that see pictures expect lists in place of strings, and show nothing of a string. Templates
        of reasoning models may leave out what comes before ``</think>``.
        """
        shown = self._apply(example.messages(), tokenize=False)
        for number, (role, content) in enumerate(example.turns, start=1):
            if role != "system" and content.rpartition("</think>")[2].strip() not in shown:
                raise ValueError(f"the chat template does not show the content of message {number}; {_OTHER}")

    def _plain_row(self, example: Example) -> dict[str, list[int]]:
        (_, first), *rest = example.turns
        end = self.tokenizer.eos_token_id
        if end is None:
            raise TaskError(
                f"{self.name}: its tokenizer has no end-of-text token (eos_token), which ends a text; name one in its "
                "tokenizer_config.json"
            )
        start = self._begin(first)
        if not rest:
            return _row([*start, end], [True] * (len(start) + 1))
        ids = self._begin(first + rest[0][1])
        if not _begins(ids, start):
            raise ValueError(
                "the prompt's last and the completion's first characters form one token; move white space from the "
                "end of the prompt to the beginning of the completion"
            )
        return _row([*ids, end], [index >= len(start) for index in range(len(ids) + 1)])

    def _begin(self, text: str) -> list[int]:
        """Tokens of a text that goes on: without the end-of-text token that some tokenizers add."""
        ids = self.tokenizer(text)["input_ids"]
        ends = ids and ids[-1] == self.tokenizer.eos_token_id and not text.endswith(self.tokenizer.eos_token or "\0")
        return ids[:-1] if ends else ids

    def _chat(self, messages: Sequence[dict[str, str]], **options: Any) -> list[int]:
        return self._apply(messages, **options)["input_ids"]

    def _apply(self, messages: Sequence[dict[str, str]], **options: Any) -> Any:
        try:
            return self.tokenizer.apply_chat_template(list(messages), **({"return_dict": True} | options))
        except (UndefinedError, TypeError, KeyError, AttributeError, IndexError, ArithmeticError) as error:
            raise ValueError(f"the chat template fails: {type(error).__name__}: {error}; {_OTHER}") from error
        except TemplateError as error:
            raise ValueError(f"the chat template refuses it: {error}") from error

    def _marked(self, example: Example) -> tuple[list[int], list[bool]]:
        rendered = self._apply(example.messages(), return_assistant_tokens_mask=True)
        ids, mask = rendered["input_ids"], rendered["assistant_masks"]
        before = 0
        if any(role == "assistant" for role, _ in example.turns[: example.first_trained]):
            prompt = self._chat(example.messages(example.first_trained), add_generation_prompt=True)
            if not _begins(ids, prompt):
                raise ValueError(f"the prompt's tokens are not the beginning of the whole's; {_REMEDY}")
            before = len(prompt)
        trained = [bool(marked) and index >= before for index, marked in enumerate(mask)]
        if not any(trained):
            raise ValueError(f"the chat template marks no token of the answers; {_REMEDY}")
        return ids, trained

    def _by_prefixes(self, example: Example) -> tuple[list[int], list[bool]]:
        ids = self._chat(example.messages())
        trained = [False] * len(ids)
        for index in example.trained_turns:
            start = self._chat(example.messages(index), add_generation_prompt=True)
            end = ids if index + 1 == len(example.turns) else self._chat(example.messages(index + 1))
            if not (_begins(ids, start) and _begins(ids, end) and len(start) < len(end)):
                raise ValueError(
                    f"the chat template does not mark message {index + 1}, an answer, and its tokens cannot be told "
                    f"from the prompt's: the prompt alone is not the beginning of the whole; {_REMEDY}"
                )
            trained[len(start) : len(end)] = [True] * (len(end) - len(start))
        return ids, trained


def encode(
    examples: list[Example],
    renderer: Renderer,
    settings: CausalSettings,
    where: str,
    say: Callable[[str], None] = lambda line: None,
) -> Encoded:
    """Renders all examples; refuses, drops or cuts those of more than ``settings.max_length`` tokens.

    Args:
        where: the file, for messages.
        say: tells how many were dropped or cut.

    Raises:
        TaskError: names the line.
    """
    found, long, empty = [], [], []
    for example in examples:
        try:
            row = renderer.row(example)
        except ValueError as error:
            raise TaskError(f"{where}, line {example.line}: {error}") from error
        if len(row["input_ids"]) > settings.max_length:
            long.append((len(row["input_ids"]), example.line))
            if settings.long_texts == "drop":
                continue
            row = {name: values[: settings.max_length] for name, values in row.items()}
        if all(label == IGNORED for label in row["labels"]):
            empty.append(example.line)  # a completion that was cut off whole, or a text of one token
            continue
        found.append((example, {name: array("i", values) for name, values in row.items()}))  # a seventh of a list
    if long and settings.long_texts == "refuse":
        length, line = max(long)
        raise TaskError(
            f"{where}, line {line}: {length:,} tokens, above --max-length {settings.max_length}"
            + (f", and {len(long) - 1:,} more lines are too long" if len(long) > 1 else "")
            + "; raise --max-length, or --long-texts drop leaves them out, or --long-texts truncate cuts their ends"
        )
    did = {"drop": "left out", "truncate": "cut"}
    if long:
        say(
            f"{where}: {len(long):,} of {len(examples):,} texts have more than {settings.max_length} tokens and are "
            f"{did[settings.long_texts]}"
        )
    if empty:
        say(f"{where}: {len(empty):,} texts are left out, because no token to learn is left of them")
    found.sort(key=lambda pair: len(pair[1]["input_ids"]))
    return Encoded([example for example, _ in found], [row for _, row in found])


def _row(ids: list[int], trained: list[bool]) -> dict[str, list[int]]:
    labels = [token if learned else IGNORED for token, learned in zip(ids, trained, strict=True)]
    if labels:
        labels[0] = IGNORED  # no token precedes it; in a pack, another text does
    return {"input_ids": list(ids), "labels": labels}


def _begins(ids: Sequence[int], start: Sequence[int]) -> bool:
    return list(ids[: len(start)]) == list(start)
