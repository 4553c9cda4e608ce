"""Tests set_pooling: what the head reads, with every method, in files, and through what people put around a model."""

from __future__ import annotations

import pytest
import torch
from support.models import VOCABULARY
from test_methods import method, model_of
from transformers import AutoModelForSequenceClassification, GPT2Config, PreTrainedModel

from lora_ext.methods import apply_method, load_method, new_method, pooling_of, save_method, set_pooling


def batch() -> dict[str, torch.Tensor]:
    """Two texts of 7 and 4 tokens, padded."""
    generator = torch.Generator(torch.get_default_device()).manual_seed(0)
    ids = torch.randint(2, VOCABULARY, (2, 7), generator=generator)
    mask = torch.ones(2, 7, dtype=torch.long)
    ids[1, 4:], mask[1, 4:] = 1, 0
    return {"input_ids": ids, "attention_mask": mask}


def adapted(name: str) -> PreTrainedModel:
    return apply_method(model_of("bert, mean"), method(name))


@pytest.mark.parametrize("return_dict", [True, False])
@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_the_mean_is_over_the_texts_tokens(family, return_dict):
    plain, model = model_of(family), model_of(f"{family}, mean")
    mask = batch()["attention_mask"][..., None]
    hidden = plain.base_model(**batch()).last_hidden_state
    mean = (hidden * mask).sum(1) / mask.sum(1)
    expected = plain.classifier(mean if family == "bert" else mean[:, None])
    found = model(**batch(), output_hidden_states=True, output_attentions=True, return_dict=return_dict)
    torch.testing.assert_close(found["logits"] if return_dict else found[0], expected)
    alone = {name: value[1:, :4] for name, value in batch().items()}
    torch.testing.assert_close(model(**alone).logits, expected[1:])
    torch.testing.assert_close(model(input_ids=alone["input_ids"]).logits, expected[1:])  # all tokens count
    assert not [name for name, _ in model.named_parameters() if "pooler" in name]


def test_prefix_tokens_are_not_part_of_the_mean():
    """Compares with a prefix that is inserted by hand behind the text."""
    model = adapted("prefix-embed")
    hidden = []
    hook = model.bert.encoder.register_forward_hook(lambda module, args, output: hidden.append(output[0]))
    logits = model(**batch()).logits
    hook.remove()
    mask = batch()["attention_mask"][..., None]
    mean = (hidden[0][:, :7] * mask).sum(1) / mask.sum(1)
    torch.testing.assert_close(logits, model.classifier(mean))


def test_a_whole_model_notes_it_in_its_config(tmp_path):
    model = model_of("bert, mean")
    model.save_pretrained(tmp_path)
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert again.config.classifier_pooling == "mean"
    torch.testing.assert_close(set_pooling(again, "mean")(**batch()).logits, model(**batch()).logits)


def test_refusals():
    model = model_of("bert, mean")
    assert set_pooling(model, "mean") is model and len(model.bert._forward_hooks) == 1
    gpt2 = AutoModelForSequenceClassification.from_config(
        GPT2Config(vocab_size=VOCABULARY, n_embd=8, n_layer=1, n_head=1, pad_token_id=1)
    )
    with pytest.raises(TypeError, match="GPT2ForSequenceClassification is not an encoder for sequence classification"):
        set_pooling(gpt2, "mean")
    with pytest.raises(TypeError, match="BertModel is not an encoder for sequence classification"):
        set_pooling(model_of("bert").bert, "mean")
    with pytest.raises(ValueError, match="attention_mask has 4 dimensions"):
        model(input_ids=batch()["input_ids"], attention_mask=torch.ones(2, 1, 7, 7, dtype=torch.bool))


def test_files_and_models_of_another_pooling_are_refused(tmp_path):
    save_method(adapted("bitfit"), tmp_path / "mean")
    plain = apply_method(model_of("bert"), new_method("bitfit"))
    save_method(plain, tmp_path / "plain")
    with pytest.raises(ValueError, match="the model has the pooling 'cls' already"):
        load_method(model_of("bert, cls"), tmp_path / "mean")
    with pytest.raises(ValueError, match="has the pooling 'mean', and the file was trained without it"):
        load_method(model_of("bert, mean"), tmp_path / "plain")


def test_a_file_that_does_not_fit_leaves_the_pooling(tmp_path):
    save_method(adapted("bitfit"), tmp_path)
    (tmp_path / "method.safetensors").unlink()
    model = model_of("bert")
    expected = model(**batch()).logits
    with pytest.raises(FileNotFoundError):
        load_method(model, tmp_path)
    assert pooling_of(model) is None and not hasattr(model.config, "classifier_pooling")
    assert torch.equal(model(**batch()).logits, expected)
