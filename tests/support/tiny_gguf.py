"""Writes a tiny Llama and its tokenizer as a GGUF file, as llama.cpp's converter does."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from support.optional import gguf
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast


def save(path: Path, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> Path:
    """Writes the file in Q8_0 and rounds the model's weights to its values; their sizes are multiples of 32."""
    config, kind = model.config, gguf.GGMLQuantizationType.Q8_0
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    _add_tokenizer(writer, tokenizer, config.vocab_size)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, parameter in model.state_dict().items():
        weight, its_name = parameter.float().numpy(), names.get_name(name, try_suffixes=[".weight"])
        if weight.ndim == 1:
            writer.add_tensor(its_name, weight)
            continue
        if "q_proj" in name or "k_proj" in name:  # llama.cpp stores the two halves of a head's rotations in turns
            heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
            weight = weight.reshape(heads, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)
        writer.add_tensor(its_name, gguf.quants.quantize(np.ascontiguousarray(weight), kind), raw_dtype=kind)
        rounded = gguf.quants.dequantize(gguf.quants.quantize(parameter.float().numpy(), kind), kind)
        parameter.copy_(torch.from_numpy(rounded))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add_tokenizer(writer: gguf.GGUFWriter, tokenizer: PreTrainedTokenizerFast, size: int) -> None:
    by_index = {index: token for token, index in tokenizer.get_vocab().items()}
    special = {*tokenizer.all_special_ids}
    kinds = gguf.TokenType
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([by_index.get(index, f"<unused{index}>") for index in range(size)])
    writer.add_token_types([kinds.CONTROL if index in special else kinds.NORMAL for index in range(size)])
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    writer.add_token_merges([pair if isinstance(pair, str) else " ".join(pair) for pair in merges])
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_bos_token_id(tokenizer.eos_token_id)
    writer.add_pad_token_id(tokenizer.pad_token_id)
    writer.add_chat_template(tokenizer.chat_template)
