"""``--trim-vocabulary``: a tokenizer and an embedding with the tokens that some texts use, and few more.

The embedding of a multilingual model is most of the model: of multilingual-e5-small's 118 million parameters, 96
million, for 250,037 tokens; a task in one language uses a few thousand of them.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from tokenizers import Tokenizer
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from lora_ext._common.embeddings import input_embeddings
from lora_ext.methods import ARCHITECTURES, head_parameters
from lora_ext.tasks import TaskError
from lora_ext.tasks.finetune.data import Splits, shown_names
from lora_ext.tasks.shared.whole_files import whole_directory, write_json

if TYPE_CHECKING:
    from lora_ext.tasks.finetune.task_model import TaskModel

_LETTERS = 0x1F00  # single characters below this code point stay: Latin with Vietnamese, Greek, Cyrillic ... Thai
_KINDS = ("Unigram", "WordPiece", "WordLevel", "BPE")
_CONTINUED = ("##", "Ġ", "▁", "@@", "</w>")  # marks of a token's place in a word


class Trimmed(NamedTuple):
    """A trimmed tokenizer.

    Attributes:
        kept: ids in the old tokenizer, by new id.
        before: rows of the embedding before.
        bytes_saved: bytes of the removed rows.
    """

    tokenizer: PreTrainedTokenizerFast
    kept: list[int]
    before: int
    bytes_saved: int

    def line(self) -> str:
        """Says what it does to memory."""
        saved = self.bytes_saved / 1e6
        return (
            f"--trim-vocabulary: {len(self.kept):,} of {self.before:,} tokens stay. The weights take {saved:,.0f} MB "
            f"less; with --method full, gradients and AdamW's moments take {3 * saved:,.0f} MB less"
        )


def trim(path: str, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel, texts: Sequence[str]) -> Trimmed:
    """Removes the embedding rows of ``model``, in place, that ``texts`` do not use; returns the tokenizer to use.

    Kept are the tokens of ``texts``, special and added tokens, and single characters, so that words of other texts fall
    into characters. ``texts`` are segmented as before. Characters that are not kept become the unknown token.

    Args:
        path: of the checkpoint, for messages.

    Raises:
        TaskError: the tokenizer or the model cannot be trimmed; the model is unchanged.
    """
    embedding = _embedding(path, model)
    content = _content(path, tokenizer)
    before = tokenizer(list(texts))["input_ids"]
    kept = _kept(path, content, model, {token for ids in before for token in ids}, texts)
    if max(kept) >= embedding.num_embeddings:
        raise TaskError(
            f"--trim-vocabulary: the tokenizer of {path} has the token {max(kept):,}, but the embedding has "
            f"{embedding.num_embeddings:,} rows"
        )
    new = {old: number for number, old in enumerate(kept)}
    small = _tokenizer(tokenizer, _remapped(content, new))
    for text, old, ids in zip(texts, before, small(list(texts))["input_ids"], strict=True):
        if [new[token] for token in old] != ids:
            raise TaskError(
                f"--trim-vocabulary: without the other tokens, the tokenizer of {path} segments "
                f"{shown_names([text])!r} in another way; train without the option"
            )
    rows = torch.tensor(kept, device=embedding.weight.device)
    weight = nn.Parameter(embedding.weight.detach()[rows].clone(), embedding.weight.requires_grad)
    result = Trimmed(
        small,
        kept,
        embedding.num_embeddings,
        (embedding.num_embeddings - len(kept)) * embedding.embedding_dim * weight.element_size(),
    )
    embedding.weight, embedding.num_embeddings = weight, len(kept)
    if embedding.padding_idx is not None:
        embedding.padding_idx = new[embedding.padding_idx]
    model.config.vocab_size = len(kept)
    for name in _token_ids(model):
        setattr(model.config, name, new[getattr(model.config, name)])
    return result


def trim_task_model(task_model: TaskModel, splits: Splits) -> tuple[Trimmed, frozenset[str]]:
    """Trims the model to the tokens of all texts, in place, by :func:`trim`.

    Returns:
        The trimmed tokenizer, and the parameters that no file of the base has: of the new head, or missing before.
    """
    texts = [example.text for split in splits for example in split]
    trimmed = trim(task_model.path, task_model.tokenizer, task_model.model, texts)
    return trimmed, frozenset({*head_parameters(task_model.model), *task_model.drawn})


def save_trimmed(
    directory: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, without: Collection[str]
) -> None:
    """Writes a checkpoint with the parameters of the bare ``model`` except those named in ``without``.

    WriteError: the disk refuses.
    """
    tensors = {name: tensor for name, tensor in model.state_dict().items() if name not in without}
    with whole_directory(directory) as fresh:
        model.save_pretrained(fresh, state_dict=tensors)
        tokenizer.save_pretrained(fresh)
        config = json.loads((fresh / "config.json").read_text(encoding="utf-8"))
        for name in ("id2label", "label2id", "problem_type"):  # of the new head, which is in no file here
            config.pop(name, None)
        write_json(fresh / "config.json", config)


def _embedding(path: str, model: PreTrainedModel) -> nn.Embedding:
    if (embedding := input_embeddings(model)) is None:
        raise TaskError(
            f"--trim-vocabulary: {type(model).__name__} tells no input embeddings; train without the option"
        )
    if getattr(model.config, "quantization_config", None) is not None:
        raise TaskError(f"--trim-vocabulary: {path} is quantised; want the checkpoint that was quantised")
    if type(embedding) is not nn.Embedding or embedding.num_embeddings != model.config.vocab_size:
        raise TaskError(f"--trim-vocabulary: {path} has no embedding of vocab_size={model.config.vocab_size:,} rows")
    users = [
        name for name, parameter in model.named_parameters(remove_duplicate=False) if parameter is embedding.weight
    ]
    if len(users) > 1:
        raise TaskError(f"--trim-vocabulary: {path} uses its embedding in several places: {', '.join(users)}")
    return embedding


def _content(path: str, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Returns what tokenizer.json would hold."""
    if not tokenizer.is_fast:
        raise TaskError(
            f"--trim-vocabulary: {path} has a {type(tokenizer).__name__}, which is written in Python and has no "
            "tokenizer.json to trim; train without the option"
        )
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    if (kind := content["model"].get("type")) not in _KINDS:
        raise TaskError(f"--trim-vocabulary: {path} has a tokenizer of the kind {kind}, want {', '.join(_KINDS)}")
    return content


def _vocabulary(content: Mapping[str, Any]) -> dict[str, int]:
    vocabulary = content["model"]["vocab"]
    if isinstance(vocabulary, list):  # Unigram
        return {piece: number for number, (piece, _) in enumerate(vocabulary)}
    return vocabulary


def _kept(
    path: str, content: Mapping[str, Any], model: PreTrainedModel, used: set[int], texts: Iterable[str]
) -> list[int]:
    vocabulary = _vocabulary(content)
    special = {token["id"] for token in content["added_tokens"]}
    special |= {getattr(model.config, name) for name in _token_ids(model)}
    if (unknown := content["model"].get("unk_id")) is not None:
        special.add(unknown)
    if (unknown := content["model"].get("unk_token")) is not None:
        special.add(vocabulary[unknown])
    seen = {character for text in texts for character in text}
    single = {number for piece, number in vocabulary.items() if _is_single(piece, seen)}
    kept = used | special | single
    if content["model"]["type"] == "BPE":
        kept |= _parts_of(kept, vocabulary, content["model"]["merges"])
    kept |= set(range(_first_ids(model)))
    return sorted(kept)


def _is_single(piece: str, seen: Collection[str]) -> bool:
    """Returns whether a token is one character, or the mark of a word's begin, or a byte, as in <0x0A>."""
    if piece in _CONTINUED or (len(piece) == 6 and piece.startswith("<0x")):
        return True
    for mark in _CONTINUED:
        piece = piece.removeprefix(mark).removesuffix(mark)
    return len(piece) == 1 and (ord(piece) < _LETTERS or piece in seen)


def _parts_of(kept: Collection[int], vocabulary: Mapping[str, int], merges: Iterable[Any]) -> set[int]:
    """Returns the tokens that merges make the ``kept`` ones of, and those that these are made of."""
    makers: dict[str, list[tuple[str, str]]] = {}
    for left, right in map(_pair, merges):
        makers.setdefault(left + right, []).append((left, right))
    names = {number: piece for piece, number in vocabulary.items()}
    found: set[str] = set()
    waiting = [names[number] for number in kept if number in names]
    while waiting:
        for pair in makers.get(waiting.pop(), ()):
            fresh = {*pair} - found
            found |= fresh
            waiting += fresh
    return {vocabulary[piece] for piece in found}


def _pair(merge: Any) -> tuple[str, str]:
    left, right = merge.split(" ") if isinstance(merge, str) else merge
    return left, right


def _first_ids(model: PreTrainedModel) -> int:
    """Returns how many of the first ids must stay: RoBERTa counts positions from the padding token's id."""
    architecture = ARCHITECTURES.get(model.config.model_type)
    if architecture is None or not architecture.position_table:
        return 0
    padding = model.base_model.get_submodule(architecture.position_table).padding_idx
    return 0 if padding is None else padding + 1


def _token_ids(model: PreTrainedModel) -> list[str]:
    """Returns the names of the special tokens' ids in the config."""
    rows = model.config.vocab_size
    values = {name: value for name, value in model.config.to_dict().items() if name.endswith("_token_id")}
    return [name for name, value in values.items() if type(value) is int and 0 <= value < rows]


def _remapped(content: dict[str, Any], new: Mapping[int, int]) -> dict[str, Any]:
    """Returns the content of tokenizer.json with the kept tokens under their new ids."""
    model = dict(content["model"])
    if isinstance(model["vocab"], list):
        model["vocab"] = [entry for number, entry in enumerate(model["vocab"]) if number in new]
        model["unk_id"] = None if model.get("unk_id") is None else new[model["unk_id"]]
    else:
        model["vocab"] = {piece: new[number] for piece, number in model["vocab"].items() if number in new}
    if "merges" in model:
        known = model["vocab"]
        pairs = ((merge, _pair(merge)) for merge in model["merges"])
        model["merges"] = [m for m, (a, b) in pairs if a in known and b in known and a + b in known]
    added = [token | {"id": new[token["id"]]} for token in content["added_tokens"]]
    processor = _with_ids(content["post_processor"], new)
    changed = {"model": model, "added_tokens": added, "post_processor": processor, "truncation": None, "padding": None}
    return content | changed


def _with_ids(processor: Any, new: Mapping[int, int]) -> Any:
    """Returns a post-processor with new ids: of a template, of BERT's and RoBERTa's kind, or a sequence of them."""
    if not isinstance(processor, dict):
        return processor
    changed = dict(processor)
    if "processors" in changed:
        changed["processors"] = [_with_ids(one, new) for one in changed["processors"]]
    if isinstance(changed.get("special_tokens"), dict):
        changed["special_tokens"] = {
            name: token | {"ids": [new[number] for number in token["ids"]]}
            for name, token in changed["special_tokens"].items()
        }
    for name in ("sep", "cls"):
        if isinstance(changed.get(name), list):
            token, number = changed[name]
            changed[name] = [token, new[number]]
    return changed


def _tokenizer(like: PreTrainedTokenizerBase, content: Mapping[str, Any]) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(content)),
        model_max_length=like.model_max_length,
        padding_side=like.padding_side,
        truncation_side=like.truncation_side,
        model_input_names=like.model_input_names,
        **like.special_tokens_map,
    )
