"""The architectures: one row each. A new architecture is one more row of :data:`ARCHITECTURES`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor

VOCABULARY = 64
IMAGE = 32  # pixels a side


class Known(NamedTuple):
    """A known difference from PEFT.

    Attributes:
        targets: "all-linear" or "usual".
        checks: the checks that fail, separated by spaces.
        reason: a sentence for the document.
    """

    targets: str
    checks: str
    reason: str


@dataclass(frozen=True)
class Architecture:
    """A tiny model of one architecture.

    Attributes:
        name: the name that people use.
        model: the class in transformers.
        inputs: makes the arguments of a forward for two samples.
        targets: the layers that users usually adapt, separated by spaces.
        sizes: the config's options.
        dtype: float32 where the model computes in no other; rounding hides least in float64.
        known: what differs from PEFT.
    """

    name: str
    model: str
    inputs: Callable[[], dict[str, Tensor]]
    targets: str
    sizes: dict[str, Any]
    dtype: torch.dtype = torch.float64
    known: tuple[Known, ...] = ()

    @property
    def model_class(self) -> type[transformers.PreTrainedModel]:
        return getattr(transformers, self.model)

    def build(self) -> transformers.PreTrainedModel:
        """Builds the model from its config with random weights, the same in every call."""
        model = self.model_class
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return model(model.config_class(**self.sizes)).to(self.dtype).eval()


def _random(*shape: int) -> Tensor:
    return torch.randn(2, *shape, dtype=torch.float64)


def _ids(length: int) -> Tensor:
    return torch.randint(3, VOCABULARY, (2, length))


def tokens() -> dict[str, Tensor]:
    return {"input_ids": _ids(7)}


def translation() -> dict[str, Tensor]:
    return tokens() | {"decoder_input_ids": _ids(5)}


def images() -> dict[str, Tensor]:
    return {"pixel_values": _random(3, IMAGE, IMAGE)}


def images_and_text() -> dict[str, Tensor]:
    return images() | tokens()


def waves() -> dict[str, Tensor]:
    return {"input_values": _random(400)}


def spectrograms() -> dict[str, Tensor]:
    """Mel spectrograms in Whisper's layout, channels first."""
    return {"input_features": _random(8, 20), "decoder_input_ids": _ids(5)}


def frames() -> dict[str, Tensor]:
    """Mel spectrograms in Speech2Text's layout, channels last."""
    return {"input_features": _random(20, 8), "decoder_input_ids": _ids(5)}


def patches_of_sound() -> dict[str, Tensor]:
    return {"input_values": _random(32, 16)}


TOKENS = dict(vocab_size=VOCABULARY, pad_token_id=0, bos_token_id=1, eos_token_id=2)
WIDTHS = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24)

# Encoders of text.
ENCODER = dict(**TOKENS, **WIDTHS, max_position_embeddings=32)
FACTORED = dict(**ENCODER, embedding_size=8)
DISTILBERT = dict(**TOKENS, dim=16, n_layers=2, n_heads=2, hidden_dim=24)
DEBERTA = dict(**ENCODER, relative_attention=True, pos_att_type=["c2p", "p2c"])
SQUEEZE_GROUPS = dict(q_groups=2, k_groups=2, v_groups=2, post_attention_groups=1, intermediate_groups=2)
SQUEEZEBERT = dict(**ENCODER, **SQUEEZE_GROUPS, embedding_size=16, output_groups=2)
XLNET = dict(**TOKENS, d_model=16, n_layer=1, n_head=2, d_inner=24)

# Decoders of text.
DECODER = dict(**ENCODER, num_key_value_heads=1)
HEADS_OF_8 = dict(**DECODER, head_dim=8)
GPT2 = dict(**TOKENS, n_positions=32, n_embd=16, n_layer=2, n_head=2)
GPT_NEO_LAYERS = dict(num_layers=2, num_heads=2, attention_types=[[["global", "local"], 1]], window_size=4)
GPT_NEO = dict(**TOKENS, **GPT_NEO_LAYERS, hidden_size=16, max_position_embeddings=32)
CODEGEN = dict(**GPT2 | {"n_head": 4}, rotary_dim=4)
OPT = dict(**ENCODER, ffn_dim=24, word_embed_proj_dim=8)
BLOOM = dict(**TOKENS, hidden_size=16, n_layer=2, n_head=2)
MPT = dict(**TOKENS, d_model=16, n_layers=2, n_heads=2, max_seq_len=32, expansion_ratio=2)

# Mixtures of experts.
FOUR_EXPERTS = dict(num_local_experts=4, num_experts_per_tok=2)
SMALL_EXPERTS = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=12)
LATENT_ATTENTION = dict(q_lora_rank=8, kv_lora_rank=8, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=8)
DEEPSEEK_EXPERTS = dict(moe_intermediate_size=12, n_routed_experts=4, num_experts_per_tok=2, n_group=2, topk_group=1)
DEEPSEEK = dict(**ENCODER, **LATENT_ATTENTION, **DEEPSEEK_EXPERTS, num_key_value_heads=2, first_k_dense_replace=1)

# Encoder and decoder.
T5 = dict(vocab_size=VOCABULARY, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2, decoder_start_token_id=0)
SWITCH = dict(**T5, num_decoder_layers=1, num_experts=4, num_sparse_encoder_layers=1, num_sparse_decoder_layers=1)
BART_ENCODER = dict(encoder_layers=1, encoder_attention_heads=2, encoder_ffn_dim=24)
BART_DECODER = dict(decoder_layers=1, decoder_attention_heads=2, decoder_ffn_dim=24, decoder_start_token_id=2)
TRANSCRIBER = dict(**TOKENS, **BART_ENCODER, **BART_DECODER, d_model=16)
BART = dict(**TRANSCRIBER, max_position_embeddings=32)

# Vision, and vision with text.
VISION = dict(**WIDTHS, image_size=IMAGE, patch_size=16)
SWIN = dict(image_size=IMAGE, patch_size=4, embed_dim=8, depths=[1, 1], num_heads=[1, 2], window_size=4)
CONVNEXT = dict(hidden_sizes=[8, 12], depths=[1, 1], num_stages=2, layer_scale_init_value=1.0)
SEGFORMER_STAGES = dict(num_encoder_blocks=2, depths=[1, 1], sr_ratios=[2, 1], patch_sizes=[7, 3], strides=[4, 2])
SEGFORMER_WIDTHS = dict(hidden_sizes=[8, 16], num_attention_heads=[1, 2], mlp_ratios=[2, 2], decoder_hidden_size=8)
SEGFORMER = dict(**SEGFORMER_STAGES, **SEGFORMER_WIDTHS, initializer_range=0.3)
TEXT_AND_VISION = dict(text_config=ENCODER, vision_config=VISION, projection_dim=16)

# Audio.
CONVOLUTIONS = dict(conv_dim=(16, 16), conv_stride=(5, 4), conv_kernel=(10, 8), num_feat_extract_layers=2)
POSITIONS = dict(num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2)
WAV2VEC2 = dict(**WIDTHS, **CONVOLUTIONS, **POSITIONS, vocab_size=VOCABULARY)
LENGTHS = dict(max_source_positions=20, max_target_positions=16)
WHISPER = dict(**TRANSCRIBER, **LENGTHS | {"max_source_positions": 10}, num_mel_bins=8)
WHISPER |= dict(suppress_tokens=None, begin_suppress_tokens=None)
SPEECH2TEXT = dict(**BART, **LENGTHS, input_feat_per_channel=8, conv_channels=8)
AST = dict(**WIDTHS, patch_size=4, max_length=32, num_mel_bins=16, frequency_stride=4, time_stride=4)

# State spaces and recurrences.
MAMBA = dict(**TOKENS, hidden_size=16, num_hidden_layers=2, state_size=4, conv_kernel=4)
MAMBA2 = dict(**MAMBA, num_heads=4, head_dim=8, n_groups=1, chunk_size=4)
JAMBA_LAYERS = dict(attn_layer_period=2, attn_layer_offset=1, expert_layer_period=2, expert_layer_offset=1)
JAMBA = dict(**DECODER, **JAMBA_LAYERS, num_experts=2, mamba_d_state=4, mamba_dt_rank=4, use_mamba_kernels=False)
RWKV = dict(**TOKENS, hidden_size=16, num_hidden_layers=2, attention_hidden_size=16, intermediate_size=24)
RWKV |= dict(context_length=32, use_cache=False)  # with a cache, the model changes what its backward needs
GRIFFIN = dict(**DECODER, lru_width=16, block_types=["recurrent", "attention"], attention_window_size=8)

GROUPS = "The update of a convolution with groups cannot be merged; PEFT refuses to merge it, too."
OUT_PROJ = (
    "nn.MultiheadAttention reads the weight of its out_proj and never calls it. An adapter there has no effect in PEFT "
    "until it is merged. Here it has the same effect before and after."
)
READ = (
    "The model multiplies by the weights of some layers itself (dt_proj of Jamba, WavLM's attention). An adapter there "
    "has no effect, as in PEFT, but merging it would have one. Here a warning names these layers at the "
    "second forward, and refuses to merge from then on."
)
OWN_OUT_PROJ = (
    "PEFT refuses out_proj by its name, because CUDA kernels take its weight. Here it is adapted where it is called; a "
    "warning names it where it is not."
)
IN_WAVLM = (Known("all-linear", "merge", READ),)
IN_JAMBA = (Known("all-linear", "merge tokens", READ),)
IN_MAMBA = (Known("all-linear", "targets", OWN_OUT_PROJ),)
IN_SQUEEZEBERT = (Known("usual", "merge", GROUPS),)
IN_SIGLIP = (Known("all-linear", "outputs files gradients step", OUT_PROJ),)

_A, _F32 = Architecture, torch.float32
ARCHITECTURES = (
    # Encoders of text.
    _A("BERT", "BertForMaskedLM", tokens, "query value", ENCODER),
    _A("RoBERTa", "RobertaForMaskedLM", tokens, "query value", ENCODER),
    _A("XLM-R", "XLMRobertaForMaskedLM", tokens, "query value", ENCODER),
    _A("DistilBERT", "DistilBertForMaskedLM", tokens, "q_lin v_lin", DISTILBERT),
    _A("ALBERT", "AlbertForMaskedLM", tokens, "query value", FACTORED),
    _A("DeBERTa", "DebertaForMaskedLM", tokens, "in_proj", DEBERTA),
    _A("DeBERTa-v2", "DebertaV2ForMaskedLM", tokens, "query_proj value_proj", DEBERTA),
    _A("ELECTRA", "ElectraForMaskedLM", tokens, "query value", FACTORED),
    _A("MPNet", "MPNetForMaskedLM", tokens, "q v", ENCODER),
    _A("ModernBERT", "ModernBertForMaskedLM", tokens, "Wqkv Wo", ENCODER),
    _A("RoFormer", "RoFormerForMaskedLM", tokens, "query value", FACTORED),
    _A("SqueezeBERT", "SqueezeBertForMaskedLM", tokens, "query value", SQUEEZEBERT, known=IN_SQUEEZEBERT),
    _A("FNet", "FNetForMaskedLM", tokens, "dense", ENCODER),
    _A("XLNet", "XLNetLMHeadModel", tokens, "layer_1 layer_2", XLNET, _F32),
    # Decoders of text.
    _A("GPT-2", "GPT2LMHeadModel", tokens, "c_attn", GPT2),
    _A("GPT-Neo", "GPTNeoForCausalLM", tokens, "q_proj v_proj", GPT_NEO),
    _A("GPT-NeoX", "GPTNeoXForCausalLM", tokens, "query_key_value", ENCODER),
    _A("GPT-J", "GPTJForCausalLM", tokens, "q_proj v_proj", GPT2 | dict(rotary_dim=4)),
    _A("GPT-BigCode", "GPTBigCodeForCausalLM", tokens, "c_attn", GPT2),
    _A("CodeGen", "CodeGenForCausalLM", tokens, "qkv_proj", CODEGEN),
    _A("OPT", "OPTForCausalLM", tokens, "q_proj v_proj", OPT),
    _A("BLOOM", "BloomForCausalLM", tokens, "query_key_value", BLOOM),
    _A("MPT", "MptForCausalLM", tokens, "Wqkv", MPT),
    _A("Llama", "LlamaForCausalLM", tokens, "q_proj v_proj", DECODER),
    _A("Mistral", "MistralForCausalLM", tokens, "q_proj v_proj", DECODER),
    _A("Qwen2", "Qwen2ForCausalLM", tokens, "q_proj v_proj", DECODER),
    _A("Qwen3", "Qwen3ForCausalLM", tokens, "q_proj v_proj", HEADS_OF_8),
    _A("Gemma2", "Gemma2ForCausalLM", tokens, "q_proj v_proj", HEADS_OF_8),
    _A("Gemma3", "Gemma3ForCausalLM", tokens, "q_proj v_proj", HEADS_OF_8),
    _A("Phi", "PhiForCausalLM", tokens, "q_proj v_proj fc1 fc2", DECODER),
    _A("Phi-3", "Phi3ForCausalLM", tokens, "qkv_proj", DECODER),
    _A("Falcon", "FalconForCausalLM", tokens, "query_key_value", ENCODER),
    _A("StableLM", "StableLmForCausalLM", tokens, "q_proj v_proj", DECODER),
    _A("Cohere", "CohereForCausalLM", tokens, "q_proj v_proj", DECODER),
    _A("OLMo2", "Olmo2ForCausalLM", tokens, "q_proj v_proj", DECODER),
    _A("Granite", "GraniteForCausalLM", tokens, "q_proj v_proj", DECODER),
    _A("StarCoder2", "Starcoder2ForCausalLM", tokens, "q_proj v_proj", DECODER),
    # Mixtures of experts; their products of groups are float32 at most.
    _A("Mixtral", "MixtralForCausalLM", tokens, "q_proj v_proj", DECODER | FOUR_EXPERTS, _F32),
    _A("Qwen3-MoE", "Qwen3MoeForCausalLM", tokens, "q_proj v_proj", HEADS_OF_8 | SMALL_EXPERTS, _F32),
    _A("OLMoE", "OlmoeForCausalLM", tokens, "q_proj v_proj", DECODER | SMALL_EXPERTS, _F32),
    _A("DeepSeek-V3", "DeepseekV3ForCausalLM", tokens, "q_b_proj kv_b_proj", DEEPSEEK, _F32),
    _A("GPT-OSS", "GptOssForCausalLM", tokens, "q_proj v_proj", HEADS_OF_8 | FOUR_EXPERTS, _F32),
    # Encoder and decoder.
    _A("T5", "T5ForConditionalGeneration", translation, "q v", T5),
    _A("mT5", "MT5ForConditionalGeneration", translation, "q v", T5),
    _A("Switch", "SwitchTransformersForConditionalGeneration", translation, "q v", SWITCH, _F32),
    _A("BART", "BartForConditionalGeneration", translation, "q_proj v_proj", BART),
    _A("mBART", "MBartForConditionalGeneration", translation, "q_proj v_proj", BART),
    _A("Marian", "MarianMTModel", translation, "q_proj v_proj", BART),
    _A("Pegasus", "PegasusForConditionalGeneration", translation, "q_proj v_proj", BART),
    _A("M2M100", "M2M100ForConditionalGeneration", translation, "q_proj v_proj", BART),
    # Vision.
    _A("ViT", "ViTForImageClassification", images, "q_proj v_proj", VISION),
    _A("DeiT", "DeiTForImageClassification", images, "q_proj v_proj", VISION),
    _A("BEiT", "BeitForImageClassification", images, "q_proj v_proj", VISION),
    _A("DINOv2", "Dinov2ForImageClassification", images, "q_proj v_proj", VISION),
    _A("Swin", "SwinForImageClassification", images, "q_proj v_proj", SWIN),
    _A("ConvNext", "ConvNextForImageClassification", images, "pwconv1 pwconv2", CONVNEXT),
    _A("SegFormer", "SegformerForSemanticSegmentation", images, "q_proj v_proj", SEGFORMER),
    # Vision and text.
    _A("CLIP", "CLIPModel", images_and_text, "q_proj v_proj", TEXT_AND_VISION),
    _A("SigLIP", "SiglipModel", images_and_text, "q_proj v_proj", TEXT_AND_VISION, known=IN_SIGLIP),
    # Audio.
    _A("Wav2Vec2", "Wav2Vec2ForCTC", waves, "q_proj v_proj", WAV2VEC2),
    _A("HuBERT", "HubertForCTC", waves, "q_proj v_proj", WAV2VEC2),
    _A("WavLM", "WavLMForCTC", waves, "intermediate_dense output_dense", WAV2VEC2, known=IN_WAVLM),
    _A("Whisper", "WhisperForConditionalGeneration", spectrograms, "q_proj v_proj", WHISPER),
    _A("Speech2Text", "Speech2TextForConditionalGeneration", frames, "q_proj v_proj", SPEECH2TEXT),
    _A("AST", "ASTForAudioClassification", patches_of_sound, "q_proj v_proj", AST),
    # State spaces and recurrences.
    _A("Mamba", "MambaForCausalLM", tokens, "in_proj x_proj", MAMBA, known=IN_MAMBA),
    _A("FalconMamba", "FalconMambaForCausalLM", tokens, "in_proj x_proj", MAMBA, known=IN_MAMBA),
    _A("Mamba2", "Mamba2ForCausalLM", tokens, "in_proj", MAMBA2, known=IN_MAMBA),
    _A("Jamba", "JambaForCausalLM", tokens, "q_proj v_proj", JAMBA, _F32, known=IN_JAMBA),
    _A("RWKV", "RwkvForCausalLM", tokens, "key value receptance output", RWKV),
    _A("RecurrentGemma", "RecurrentGemmaForCausalLM", tokens, "q_proj v_proj", GRIFFIN),
)
