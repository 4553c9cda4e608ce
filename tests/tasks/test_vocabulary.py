"""Tests ``--trim-vocabulary``: tokenizers of every kind, the checkpoint that it writes, and what it refuses."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support import tiny_classifier
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from lora_ext.methods import load_method
from lora_ext.tasks import TaskError
from lora_ext.tasks.finetune.run import finetune
from lora_ext.tasks.finetune.settings import Settings
from lora_ext.tasks.finetune.vocabulary import save_trimmed, trim

pytestmark = pytest.mark.cpu_only("the Trainer chooses the device")

OTHERS = ["the lecture was long and boring", "students like the new building", "đi học đầy đủ điểm chuyên cần 漢字"]
TEXTS = ["giảng viên nhiệt tình", "phòng học nóng , máy chiếu hỏng", "giảng viên vui tính ạ"]
SPECIAL = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
WORDPIECE = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


def unigram() -> Tokenizer:
    """Has a piece for every word and every character; made by hand, because the trainer's result varies."""
    words = sorted({f"▁{word}" for text in [*OTHERS, *TEXTS] for word in text.split()})
    characters = sorted({"▁", *"".join([*OTHERS, *TEXTS]).replace(" ", "")} - {*words})
    pieces = [*((name, 0.0) for name in SPECIAL), *((word, -5.0) for word in words)]
    tokenizer = Tokenizer(models.Unigram([*pieces, *((one, -9.0) for one in characters)], unk_id=3))
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.NFKC(), pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    return tokenizer


def wordpiece() -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(vocab_size=300, special_tokens=WORDPIECE, show_progress=False)
    tokenizer.train_from_iterator([*OTHERS, *TEXTS] * 3, trainer)
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    return tokenizer


def byte_level() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=420, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([*OTHERS, *TEXTS] * 3, trainer)
    tokenizer.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0))
    return tokenizer


def ended_words() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", end_of_word_suffix="</w>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.BpeTrainer(
        vocab_size=260, special_tokens=SPECIAL, end_of_word_suffix="</w>", show_progress=False
    )
    tokenizer.train_from_iterator([*OTHERS, *TEXTS] * 3, trainer)
    tokenizer.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0))
    return tokenizer


KINDS = {"unigram": unigram, "wordpiece": wordpiece, "byte level": byte_level, "ended words": ended_words}


def wrapped(kind: str) -> PreTrainedTokenizerFast:
    names = {"pad_token": "<pad>", "unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "cls_token": "<s>"}
    if kind == "wordpiece":
        names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    return PreTrainedTokenizerFast(tokenizer_object=KINDS[kind](), model_max_length=64, **names)


def classifier(tokenizer: PreTrainedTokenizerFast, family: str = "bert", rows: int = 0) -> Any:
    torch.manual_seed(0)
    kinds = {"bert": (BertConfig, BertForSequenceClassification)}
    kinds["roberta"] = (RobertaConfig, RobertaForSequenceClassification)
    config, model = kinds[family]
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48}
    ids = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    return model(config(vocab_size=rows or len(tokenizer), max_position_embeddings=80, **sizes, **ids)).eval()


@pytest.mark.parametrize("kind", KINDS)
def test_the_texts_have_the_same_tokens_and_logits(kind: str, tmp_path: Path):
    tokenizer = wrapped(kind)
    model = classifier(tokenizer, "bert" if kind == "wordpiece" else "roberta")
    batch = tokenizer(TEXTS, padding=True, return_tensors="pt")
    expected = model(**batch).logits
    trimmed = trim("here", tokenizer, model, TEXTS)
    assert 10 < len(trimmed.kept) < 0.9 * trimmed.before
    small = trimmed.tokenizer(TEXTS, padding=True, return_tensors="pt")
    pieces = [tokenizer.convert_ids_to_tokens(ids) for ids in batch["input_ids"]]
    assert [trimmed.tokenizer.convert_ids_to_tokens(ids) for ids in small["input_ids"]] == pieces
    torch.testing.assert_close(model(**small).logits, expected)
    weight = model.get_input_embeddings().weight
    assert weight.shape == (len(trimmed.kept), 32) and model.config.vocab_size == len(trimmed.kept)
    assert trimmed.bytes_saved == (trimmed.before - len(trimmed.kept)) * 32 * 4
    assert max(max(ids) for ids in trimmed.tokenizer(OTHERS)["input_ids"]) < len(trimmed.kept)

    save_trimmed(tmp_path, model, trimmed.tokenizer, without=())
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert again(TEXTS)["input_ids"] == trimmed.tokenizer(TEXTS)["input_ids"]
    for name in ("pad", "unk", "cls", "eos"):
        assert getattr(again, f"{name}_token") == getattr(tokenizer, f"{name}_token")
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert loaded.config.pad_token_id == again.pad_token_id
    torch.testing.assert_close(loaded(**again(TEXTS, padding=True, return_tensors="pt")).logits, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_words_of_other_texts_fall_into_characters(kind: str):
    tokenizer = wrapped(kind)
    trimmed = trim("here", tokenizer, classifier(tokenizer), TEXTS)
    small = trimmed.tokenizer
    ids = small("students nhiệt")["input_ids"]
    assert small.unk_token_id not in ids and len(ids) > len(tokenizer("students nhiệt")["input_ids"])
    if kind in ("byte level", "unigram"):
        assert small.decode(ids, skip_special_tokens=True).strip() == "students nhiệt"
    if kind != "byte level":  # whose bytes are all there
        assert small.unk_token_id in small("漢")["input_ids"]


def test_positions_of_roberta_do_not_move():
    """They are counted from the padding token's id; here other tokens precede it."""
    words = ["<a>", "<s>", "<b>", "<pad>", "</s>", "<unk>", "giảng", "viên", "tốt", "kém"]
    inner = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", unk_token="<unk>")
    model = classifier(tokenizer, "roberta")
    batch = tokenizer(["giảng viên", "tốt"], padding=True, return_tensors="pt")
    expected = model(**batch).logits
    trimmed = trim("here", tokenizer, model, ["giảng viên", "tốt"])
    assert trimmed.kept == [0, 1, 2, 3, 5, 6, 7, 8]
    torch.testing.assert_close(
        model(**trimmed.tokenizer(["giảng viên", "tốt"], padding=True, return_tensors="pt")).logits, expected
    )


# --- refusals ---------------------------------------------------------------------------------------------------------


def test_refusals(monkeypatch: pytest.MonkeyPatch):
    tokenizer = wrapped("unigram")
    model = classifier(tokenizer)
    before = model.get_input_embeddings().weight.clone()
    with pytest.raises(TaskError, match=r"the tokenizer of here has the token \d+, but the embedding has 8 rows"):
        trim("here", tokenizer, classifier(tokenizer, rows=8), TEXTS)
    monkeypatch.setattr(PreTrainedTokenizerFast, "is_fast", False)
    with pytest.raises(TaskError, match="here has a .*, which is written in Python and has no tokenizer.json to trim"):
        trim("here", tokenizer, model, TEXTS)
    monkeypatch.undo()
    model.config.quantization_config = {}
    with pytest.raises(TaskError, match="here is quantised; want the checkpoint that was quantised"):
        trim("here", tokenizer, model, TEXTS)
    del model.config.quantization_config
    model.other = model.get_input_embeddings()
    with pytest.raises(TaskError, match="uses its embedding in several places: bert.*, other.weight"):
        trim("here", tokenizer, model, TEXTS)
    del model.other
    model.config.vocab_size += 1
    with pytest.raises(TaskError, match="here has no embedding of vocab_size="):
        trim("here", tokenizer, model, TEXTS)
    assert torch.equal(model.get_input_embeddings().weight, before)


def test_a_tokenizer_that_would_segment_in_another_way_is_refused(monkeypatch: pytest.MonkeyPatch):
    tokenizer = wrapped("unigram")
    model = classifier(tokenizer)
    monkeypatch.setattr("lora_ext.tasks.finetune.vocabulary._is_single", lambda piece, seen: False)
    changed = "lora_ext.tasks.finetune.vocabulary._remapped"
    import lora_ext.tasks.finetune.vocabulary as vocabulary

    original = vocabulary._remapped

    def broken(content: dict[str, Any], new: dict[int, int]) -> dict[str, Any]:
        result = original(content, new)
        result["normalizer"] = {"type": "Lowercase"}
        result["pre_tokenizer"] = {"type": "Whitespace"}
        return result

    monkeypatch.setattr(changed, broken)
    with pytest.raises(TaskError, match="the tokenizer of here segments 'giảng viên nhiệt tình' in another way"):
        trim("here", tokenizer, model, TEXTS)
    assert model.config.vocab_size == len(tokenizer)


def test_options():
    with pytest.raises(TaskError, match="--trim-vocabulary does not go with --quantize"):
        Settings(trim_vocabulary=True, quantize="nf4")


# --- a run ------------------------------------------------------------------------------------------------------------


@pytest.mark.full
def test_a_run_trains_on_the_trimmed_checkpoint_and_resumes(tmp_path: Path):
    model = tiny_classifier.save_model(tmp_path / "model")
    rows = [row for row in tiny_classifier.reviews(120) if not {"script", "story"} & {*row[0].split()}]
    settings = Settings(
        model=str(model),
        data=str(tiny_classifier.save_reviews(tmp_path / "reviews.csv", rows)),
        epochs=1,
        max_length=32,
        learning_rate=1e-2,
        trim_vocabulary=True,
    )
    said: list[str] = []
    metrics = finetune(settings, tmp_path / "run", say=said.append)
    base = tmp_path / "run" / "base"
    left = len(tiny_classifier.VOCABULARY) - 2
    assert metrics["trimmed_vocabulary"]["tokens"] == left
    assert any(line.startswith(f"--trim-vocabulary: {left} of {left + 2} tokens stay") for line in said)
    config = json.loads((base / "config.json").read_text())
    assert config["vocab_size"] == left and "id2label" not in config
    assert json.loads((tmp_path / "run/adapter/adapter_config.json").read_text())["base_model_name_or_path"] == str(
        base
    )
    saved = load_file(tmp_path / "run/adapter/adapter_model.safetensors")
    of_embeddings = {key.rpartition("embeddings.")[2] for key in saved if "embeddings" in key}
    assert of_embeddings == {"lora_embedding_A", "lora_embedding_B"}  # the vocabulary is that of the new checkpoint
    predictions = [json.loads(line) for line in (tmp_path / "run" / "predictions.jsonl").read_text().splitlines()]
    adapted = load_method(AutoModelForSequenceClassification.from_pretrained(base), tmp_path / "run" / "adapter").eval()
    batch = AutoTokenizer.from_pretrained(base)([row["text"] for row in predictions], padding=True, return_tensors="pt")
    with torch.no_grad():
        logits = adapted(**batch).logits
    torch.testing.assert_close(logits, torch.tensor([row["logits"] for row in predictions]), rtol=1e-4, atol=1e-5)

    plain = finetune(replace(settings, trim_vocabulary=False), tmp_path / "plain", say=lambda line: None)
    assert plain["after"]["accuracy"] == metrics["after"]["accuracy"]
    assert plain["total_parameters"] - metrics["total_parameters"] == 2 * (
        32 + 4
    )  # rows of the embedding and of its adapter
    again = finetune(settings, tmp_path / "run", resume=True, measure=False, say=lambda line: None)
    assert again["after"] == metrics["after"]
