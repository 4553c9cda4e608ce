"""Tests which tokens are learned, and that texts whose completion cannot be told are refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support import tiny_decoder
from support.optional import trl

from lora_ext.tasks import TaskError
from lora_ext.tasks.causal_lm.conversations import Example
from lora_ext.tasks.causal_lm.rendering import IGNORED, Renderer, encode, use_template
from lora_ext.tasks.causal_lm.settings import CausalSettings

pytestmark = pytest.mark.cpu_only("is about tokens")

CHAT = (("user", "What is red?"), ("assistant", "a rose"), ("user", "And blue?"), ("assistant", "the sea"))
PICTURES = {"idefics3", "idefics3_training", "smolvlm", "smolvlm_training", "llava_next", "llava_next_training"}
REFUSES = PICTURES | {"deepseek_r1_distill", "deepseekv3"}
REFUSES |= {f"nemotron_3_{name}" for name in ("5_lightning", "nano", "super", "ultra")}
REFUSES_TURNS = {"gptoss", "phi3", "phi3_5", "qwen3", "qwen3_5_nothink", "qwen3_5_think", "qwen3_6"}
SETTINGS = CausalSettings(model="model", data="data")


def renderer(template: str | None = tiny_decoder.TEMPLATE, **options: Any) -> Renderer:
    return Renderer(tiny_decoder.tokenizer(template, **options), "the model")


def learned(row: dict[str, list[int]], by: Renderer) -> list[str]:
    """The runs of learned tokens as texts."""
    found, last = [], IGNORED
    for label in row["labels"]:
        if label != IGNORED:
            found = [*found, [label]] if last == IGNORED else [*found[:-1], [*found[-1], label]]
        last = label
    return [by.tokenizer.decode(tokens) for tokens in found]


def test_the_prefixes_of_a_chat():
    by = renderer()
    row = by.row(Example(CHAT, 0, 1))
    assert learned(row, by) == ["a rose<|im_end|>\n", "the sea<|im_end|>\n"]
    whole = by.tokenizer.apply_chat_template(Example(CHAT, 0, 1).messages(), tokenize=False)
    assert by.tokenizer.decode(row["input_ids"]) == whole
    assert [label for label in row["labels"] if label != IGNORED] == [
        token for token, label in zip(row["input_ids"], row["labels"], strict=True) if label != IGNORED
    ]


def test_the_marks_of_a_template():
    by = renderer(tiny_decoder.MARKED)
    row = by.row(Example(CHAT, 0, 1))
    assert learned(row, by) == ["a rose<|im_end|>", "the sea<|im_end|>"]
    assert row["input_ids"] == renderer().row(Example(CHAT, 0, 1))["input_ids"]


@pytest.mark.parametrize("template", [tiny_decoder.TEMPLATE, tiny_decoder.MARKED], ids=["prefixes", "marks"])
def test_answers_in_a_prompt_are_not_learned(template: str):
    by = renderer(template)
    assert [text.strip("\n") for text in learned(by.row(Example(CHAT, 3, 1)), by)] == ["the sea<|im_end|>"]


def test_the_prompt_of_the_last_answer_is_where_learning_begins():
    by = renderer()
    example = Example(CHAT, 0, 1)
    prompt, row = by.prompt(example), by.row(example)
    assert row["input_ids"][: len(prompt)] == prompt and row["labels"][len(prompt)] != IGNORED
    assert row["labels"][len(prompt) - 1] == IGNORED
    assert by.tokenizer.convert_ids_to_tokens([*by.stops(example)]) == ["<|im_end|>"]


def test_strings_are_joined_and_end():
    by = renderer()
    row = by.row(Example((("prompt", "The rose is"), ("completion", " red")), 1, 1))
    assert learned(row, by) == [" red<|end|>"]
    assert by.tokenizer.decode(row["input_ids"]) == "The rose is red<|end|>"
    assert by.prompt(Example((("prompt", "The rose is"), ("completion", " red")), 1, 1)) == row["input_ids"][:-2]


def test_a_plain_text_is_learned_but_for_its_first_token():
    by = renderer()
    row = by.row(Example((("text", "The rose is red"),), 0, 1))
    assert row["labels"][0] == IGNORED and row["labels"][1:] == row["input_ids"][1:]
    assert row["input_ids"][-1] == by.tokenizer.eos_token_id


def refusal(by: Renderer, *turns: tuple[str, str], first: int = 0) -> str:
    with pytest.raises(TaskError) as caught:
        encode([Example(turns, first, 7)], by, SETTINGS, "data.jsonl")
    return str(caught.value)


def test_one_token_across_prompt_and_completion_is_refused():
    by = renderer()
    text = refusal(by, ("prompt", "The colo"), ("completion", "ur is red"), first=1)
    assert text.startswith("data.jsonl, line 7: the prompt's last and the completion's first characters form one token")
    assert "move white space" in text


def test_a_template_that_rewrites_earlier_turns_is_refused():
    """As Qwen3's, which drops the reasoning of earlier answers."""
    template = tiny_decoder.TEMPLATE.replace(
        "{{ message['content'] }}",
        "{{ message['content'] }}{{ '' if loop.last or message['role'] == 'user' else ' (earlier)' }}",
    )
    text = refusal(renderer(template), *CHAT)
    assert text.startswith("data.jsonl, line 7: the chat template does not mark message 2, an answer")
    assert "--chat-template-file names a template with {% generation %}" in text
    by = renderer(template)
    assert learned(by.row(Example(CHAT[:2], 0, 1)), by) == ["a rose<|im_end|>\n"]


def test_a_template_that_is_no_jinja_is_named(tmp_path: Path):
    path = tmp_path / "chat.jinja"
    path.write_text("{% for message in messages %}\n{{ message.content }")
    with pytest.raises(TaskError, match=r"^--chat-template-file .*chat.jinja, line 2: unexpected '}'"):
        use_template(tiny_decoder.tokenizer(), str(path))
    path.write_text("{{ raise_exception('never') }}")
    use_template(tiny_decoder.tokenizer(), str(path))  # its refusals name the line of the data


TEMPLATES = sorted(Path(trl.__file__).parent.glob("chat_templates/*.jinja"))


@pytest.mark.parametrize("path", TEMPLATES, ids=lambda path: path.stem)
def test_templates_of_real_models(path: Path):
    """A template is refused, or exactly the answers are learned, with what surrounds them."""
    by = renderer(path.read_text(), bos_token="<|end|>", model_max_length=10_000)
    multi_turn = Example(CHAT, 0, 1)
    for example in (Example(CHAT[:2], 0, 1), multi_turn):
        try:
            found = learned(by.row(example), by)
        except ValueError as error:
            assert path.stem in REFUSES or (example is multi_turn and path.stem in REFUSES_TURNS), error
            assert "the chat template" in str(error) and "--chat-template-file" in str(error)
            continue
        assert path.stem not in REFUSES and not (example is multi_turn and path.stem in REFUSES_TURNS)
        answers = [content for role, content in example.turns if role == "assistant"]
        assert len(found) == len(answers)
        for text, answer in zip(found, answers, strict=True):
            assert answer in text and "What" not in text and "blue" not in text


def test_every_training_template_of_trl_is_accepted():
    marked = [path for path in TEMPLATES if path.stem.endswith("_training")]
    assert len(TEMPLATES) > 60 and len(marked) > 20
    assert {path.stem for path in marked} & (REFUSES | REFUSES_TURNS) == PICTURES & {path.stem for path in marked}


def test_marks_around_nothing_are_refused():
    template = tiny_decoder.TEMPLATE + "{% generation %}{% endgeneration %}"
    assert "the chat template marks no token of the answers" in refusal(renderer(template), *CHAT[:2])


def test_what_the_template_refuses_is_named_with_its_line():
    template = "{{ raise_exception('roles must alternate') }}"
    assert (
        refusal(renderer(template), *CHAT) == "data.jsonl, line 7: the chat template refuses it: roles must alternate"
    )
    broken = refusal(renderer("{% for %}"), *CHAT)
    assert broken.startswith("data.jsonl, line 7: the chat template refuses it:")
    failing = refusal(renderer("{{ messages[0]['content'] + 1 }}"), *CHAT)
    assert "line 7: the chat template fails: TypeError" in failing


def test_a_tokenizer_without_a_template_is_refused(tmp_path: Path):
    by = renderer(None)
    text = refusal(by, *CHAT)
    assert text.startswith("the model has no chat template") and "--chat-template-file" in text
    (tmp_path / "template.jinja").write_text(tiny_decoder.TEMPLATE)
    use_template(by.tokenizer, str(tmp_path / "template.jinja"))
    assert Renderer(by.tokenizer, "the model").row(Example(CHAT, 0, 1)) == renderer().row(Example(CHAT, 0, 1))
    with pytest.raises(TaskError, match="--chat-template-file .*none: cannot be read: No such file"):
        use_template(by.tokenizer, str(tmp_path / "none"))
    with pytest.raises(TaskError, match="--chat-template-file: .*is a directory"):
        use_template(by.tokenizer, str(tmp_path))
    (tmp_path / "latin").write_bytes(b"\xe9")
    with pytest.raises(TaskError, match="--chat-template-file .*latin: not UTF-8"):
        use_template(by.tokenizer, str(tmp_path / "latin"))


def test_strings_need_an_end_of_text_token():
    assert "no end-of-text token (eos_token)" in refusal(renderer(eos_token=None), ("text", "The rose"))


LONG = [Example((("prompt", "The rose is" * count), ("completion", " red")), 1, count) for count in (1, 9, 20)]


def test_long_texts_are_refused_dropped_or_cut():
    by = renderer()
    lengths = [len(by.row(example)["input_ids"]) for example in LONG]
    assert lengths == sorted(lengths) and lengths[0] < 20 < lengths[1]
    settings = replace(SETTINGS, max_length=20)
    with pytest.raises(TaskError) as caught:
        encode(LONG, by, settings, "data.jsonl")
    assert str(caught.value) == (
        f"data.jsonl, line 20: {lengths[2]} tokens, above --max-length 20, and 1 more lines are too long; raise "
        "--max-length, or --long-texts drop leaves them out, or --long-texts truncate cuts their ends"
    )
    said: list[str] = []
    dropped = encode(LONG, by, replace(settings, long_texts="drop"), "data.jsonl", said.append)
    assert [example.line for example in dropped.examples] == [1]
    assert said == ["data.jsonl: 2 of 3 texts have more than 20 tokens and are left out"]
    said.clear()
    cut = encode(
        LONG, by, replace(settings, max_length=lengths[1] - 1, long_texts="truncate"), "data.jsonl", said.append
    )
    assert [len(row["input_ids"]) for row in cut.rows] == [lengths[0], lengths[1] - 1]
    assert said == [
        f"data.jsonl: 2 of 3 texts have more than {lengths[1] - 1} tokens and are cut",
        "data.jsonl: 1 texts are left out, because no token to learn is left of them",
    ]


def test_rows_are_sorted_by_length():
    encoded = encode(LONG[::-1], renderer(), SETTINGS, "data.jsonl")
    assert [example.line for example in encoded.examples] == [1, 9, 20] and encoded.trained_tokens == 6
