"""The architectures: one row each. A new architecture is one more row of :data:`ARCHITECTURES`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor, nn

from architectures.inputs import (
    IMAGE,
    IMAGE_TOKEN,
    VOCABULARY,
    captions,
    frames,
    image_in_text,
    image_typed_in_text,
    images,
    images_and_text,
    images_of_one_token,
    long_frames,
    noisy_latents,
    noisy_latents_of_sd3,
    noisy_patches,
    patches_in_text,
    patches_of_sound,
    spectrograms,
    speech,
    tokens,
    translation,
    waves,
)


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
        model: the class in transformers or diffusers.
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
    def model_class(self) -> type[nn.Module]:
        if hasattr(transformers, self.model):
            return getattr(transformers, self.model)
        from support.optional import diffusers

        return getattr(diffusers, self.model)

    @property
    def generates(self) -> bool:
        return issubclass(self.model_class, transformers.PreTrainedModel) and self.model_class.can_generate()

    def build(self) -> nn.Module:
        """Builds the model from its config with random weights, the same in every call."""
        model = self.model_class
        with torch.random.fork_rng():
            torch.manual_seed(0)
            config = getattr(model, "config_class", None)
            made = model(**self.sizes) if config is None else model(config(**self.sizes))
            return made.to(self.dtype).eval()


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

LFM2 = dict(layer_types=["conv", "full_attention"])

# Mixtures of experts.
FOUR_EXPERTS = dict(num_local_experts=4, num_experts_per_tok=2)
SMALL_EXPERTS = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=12)
QWEN2_EXPERTS = dict(**SMALL_EXPERTS, shared_expert_intermediate_size=12)
LATENT_ATTENTION = dict(q_lora_rank=8, kv_lora_rank=8, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=8)
DEEPSEEK_EXPERTS = dict(moe_intermediate_size=12, n_routed_experts=4, num_experts_per_tok=2, n_group=2, topk_group=1)
DEEPSEEK = dict(**ENCODER, **LATENT_ATTENTION, **DEEPSEEK_EXPERTS, num_key_value_heads=2, first_k_dense_replace=1)
GLM_EXPERTS = dict(moe_intermediate_size=12, n_routed_experts=4, num_experts_per_tok=2, first_k_dense_replace=1)
LLAMA4 = dict(num_local_experts=4, num_experts_per_tok=1, intermediate_size_mlp=24, interleave_moe_layer_step=1)
GATED_DELTA = dict(linear_num_key_heads=1, linear_num_value_heads=2, linear_key_head_dim=8, linear_value_head_dim=8)
QWEN3_NEXT = dict(**SMALL_EXPERTS, **GATED_DELTA, layer_types=["linear_attention", "full_attention"])
QWEN3_NEXT |= dict(shared_expert_intermediate_size=12, experts_implementation="eager")  # in float64

# Encoder and decoder.
T5 = dict(vocab_size=VOCABULARY, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2, decoder_start_token_id=0)
SWITCH = dict(**T5, num_decoder_layers=1, num_experts=4, num_sparse_encoder_layers=1, num_sparse_decoder_layers=1)
BART_ENCODER = dict(encoder_layers=1, encoder_attention_heads=2, encoder_ffn_dim=24)
BART_DECODER = dict(decoder_layers=1, decoder_attention_heads=2, decoder_ffn_dim=24, decoder_start_token_id=2)
TRANSCRIBER = dict(**TOKENS, **BART_ENCODER, **BART_DECODER, d_model=16)
BART = dict(**TRANSCRIBER, max_position_embeddings=32)
T5GEMMA_PART = dict(**HEADS_OF_8, model_type="t5_gemma_module")
T5GEMMA = dict(**TOKENS, encoder=T5GEMMA_PART, decoder=dict(**T5GEMMA_PART, is_decoder=True))
LED = dict(**TRANSCRIBER, attention_window=[4], max_encoder_position_embeddings=32, max_decoder_position_embeddings=32)
PROPHETNET = dict(**TOKENS, hidden_size=16, encoder_ffn_dim=24, num_encoder_layers=1, num_encoder_attention_heads=2)
PROPHETNET |= dict(decoder_ffn_dim=24, num_decoder_layers=1, num_decoder_attention_heads=2, max_position_embeddings=32)
PROPHETNET |= dict(decoder_start_token_id=2)
NLLB_EXPERTS = dict(num_experts=4, encoder_sparse_step=1, decoder_sparse_step=1, expert_capacity=8)

# Vision, and vision with text.
VISION = dict(**WIDTHS, image_size=IMAGE, patch_size=16)
SWIN = dict(image_size=IMAGE, patch_size=4, embed_dim=8, depths=[1, 1], num_heads=[1, 2], window_size=4)
CONVNEXT = dict(hidden_sizes=[8, 12], depths=[1, 1], num_stages=2, layer_scale_init_value=1.0)
SEGFORMER_STAGES = dict(num_encoder_blocks=2, depths=[1, 1], sr_ratios=[2, 1], patch_sizes=[7, 3], strides=[4, 2])
SEGFORMER_WIDTHS = dict(hidden_sizes=[8, 16], num_attention_heads=[1, 2], mlp_ratios=[2, 2], decoder_hidden_size=8)
SEGFORMER = dict(**SEGFORMER_STAGES, **SEGFORMER_WIDTHS, initializer_range=0.3)
TEXT_AND_VISION = dict(text_config=ENCODER, vision_config=VISION, projection_dim=16)
SEEN = dict(image_token_id=IMAGE_TOKEN)
IN_LLAMA = dict(text_config=dict(**DECODER, model_type="llama"), **SEEN)
LLAVA = dict(**IN_LLAMA, vision_config=dict(**VISION, model_type="clip_vision_model"))
IDEFICS = dict(**IN_LLAMA, vision_config=VISION, scale_factor=2)
SIGLIP = dict(**VISION, model_type="siglip_vision_model", vision_use_head=False)
PALIGEMMA = dict(**SEEN, text_config=dict(**HEADS_OF_8, model_type="gemma"), vision_config=SIGLIP, projection_dim=16)
GEMMA3 = dict(text_config=HEADS_OF_8, vision_config=SIGLIP, mm_tokens_per_image=4, image_token_index=IMAGE_TOKEN)
QWEN_TEXT = dict(
    **DECODER, initializer_range=0.1, rope_parameters=dict(rope_type="default", rope_theta=1e4, mrope_section=[1, 1, 2])
)
QWEN_PATCHES = dict(patch_size=4, spatial_merge_size=2, temporal_patch_size=2, depth=2, num_heads=2)
QWEN2_VL = dict(
    **SEEN, text_config=QWEN_TEXT, vision_config=dict(**QWEN_PATCHES, embed_dim=16, hidden_size=16, mlp_ratio=2)
)
QWEN25_VISION = dict(**QWEN_PATCHES, hidden_size=16, out_hidden_size=16, intermediate_size=24, window_size=16)
QWEN25_VL = dict(**SEEN, text_config=QWEN_TEXT, vision_config=dict(**QWEN25_VISION, fullatt_block_indexes=[1]))
TROCR = dict(
    encoder=dict(**VISION, model_type="vit"), decoder=dict(**GPT2, model_type="gpt2", add_cross_attention=True)
)
TROCR |= dict(decoder_start_token_id=1, pad_token_id=0)

# Diffusion.
UNET_BLOCKS = dict(
    down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D")
)
UNET = dict(**UNET_BLOCKS, sample_size=8, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4)
UNET |= dict(cross_attention_dim=16, attention_head_dim=2)
UNET_TARGETS = "to_q to_k to_v to_out.0 proj_in proj_out conv1 conv2 conv_shortcut conv_in conv_out conv net.2 linear_1"
SD3 = dict(sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=8)
SD3 |= dict(num_attention_heads=2, joint_attention_dim=16, caption_projection_dim=16, pooled_projection_dim=16)
FLUX = dict(in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=8, num_attention_heads=2)
FLUX |= dict(joint_attention_dim=16, pooled_projection_dim=16, axes_dims_rope=(2, 2, 4))

# Audio.
CONVOLUTIONS = dict(conv_dim=(16, 16), conv_stride=(5, 4), conv_kernel=(10, 8), num_feat_extract_layers=2)
POSITIONS = dict(num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2)
WAV2VEC2 = dict(**WIDTHS, **CONVOLUTIONS, **POSITIONS, vocab_size=VOCABULARY)
LENGTHS = dict(max_source_positions=20, max_target_positions=16)
WHISPER = dict(**TRANSCRIBER, **LENGTHS | {"max_source_positions": 10}, num_mel_bins=8)
WHISPER |= dict(suppress_tokens=None, begin_suppress_tokens=None)
SPEECH2TEXT = dict(**BART, **LENGTHS, input_feat_per_channel=8, conv_channels=8)
W2V_BERT = dict(**WIDTHS, vocab_size=VOCABULARY, feature_projection_input_dim=8, conv_depthwise_kernel_size=3)
MOONSHINE = dict(
    **TOKENS, hidden_size=16, intermediate_size=24, encoder_num_hidden_layers=1, decoder_num_hidden_layers=1
)
MOONSHINE |= dict(encoder_num_attention_heads=2, decoder_num_attention_heads=2, decoder_start_token_id=1)
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
    "has no effect in PEFT until it is merged. Here all-linear leaves them out, with a warning, so that there is "
    "nothing to compare."
)
OWN_OUT_PROJ = (
    "PEFT refuses out_proj by its name, because CUDA kernels take its weight. Here it is adapted where it is called."
)
ROUTERS = (
    "PEFT adapts the routers, which return more than a tensor, and fails in the forward. Here all-linear leaves them "
    "out, with a warning."
)
OF_ROUTERS = (Known("all-linear", "targets", ROUTERS),)
IN_WAVLM = (Known("all-linear", "targets outputs merge files training", READ),)
IN_JAMBA = (Known("all-linear", "targets outputs merge files tokens training", READ),)
IN_MAMBA = (Known("all-linear", "targets", OWN_OUT_PROJ),)
IN_SQUEEZEBERT = (Known("usual", "merge", GROUPS),)
IN_SIGLIP = (Known("all-linear", "outputs files training", OUT_PROJ),)

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
    _A("Gemma", "GemmaForCausalLM", tokens, "q_proj v_proj", HEADS_OF_8),
    _A("Cohere2", "Cohere2ForCausalLM", tokens, "q_proj v_proj", DECODER),
    _A("OLMo", "OlmoForCausalLM", tokens, "q_proj v_proj", DECODER),
    _A("SmolLM3", "SmolLM3ForCausalLM", tokens, "q_proj v_proj", DECODER),
    _A("GLM-4", "Glm4ForCausalLM", tokens, "q_proj v_proj", HEADS_OF_8),
    _A("Nemotron", "NemotronForCausalLM", tokens, "q_proj v_proj", DECODER),
    _A("EXAONE-4", "Exaone4ForCausalLM", tokens, "q_proj v_proj", DECODER),
    _A("Helium", "HeliumForCausalLM", tokens, "q_proj v_proj", HEADS_OF_8),
    _A("LFM2", "Lfm2ForCausalLM", tokens, "q_proj v_proj", DECODER | LFM2),
    # Mixtures of experts; their products of groups are float32 at most.
    _A("Mixtral", "MixtralForCausalLM", tokens, "q_proj v_proj", DECODER | FOUR_EXPERTS, _F32),
    _A("Qwen3-MoE", "Qwen3MoeForCausalLM", tokens, "q_proj v_proj", HEADS_OF_8 | SMALL_EXPERTS, _F32),
    _A("OLMoE", "OlmoeForCausalLM", tokens, "q_proj v_proj", DECODER | SMALL_EXPERTS, _F32),
    _A("DeepSeek-V3", "DeepseekV3ForCausalLM", tokens, "q_b_proj kv_b_proj", DEEPSEEK, _F32),
    _A("Qwen2-MoE", "Qwen2MoeForCausalLM", tokens, "q_proj v_proj", DECODER | QWEN2_EXPERTS, _F32),
    _A("Granite-MoE", "GraniteMoeForCausalLM", tokens, "q_proj v_proj", DECODER | FOUR_EXPERTS, _F32),
    _A("PhiMoE", "PhimoeForCausalLM", tokens, "q_proj v_proj", DECODER | FOUR_EXPERTS, _F32, OF_ROUTERS),
    _A("GLM-4-MoE", "Glm4MoeForCausalLM", tokens, "q_proj v_proj", HEADS_OF_8 | GLM_EXPERTS, _F32),
    _A("DeepSeek-V2", "DeepseekV2ForCausalLM", tokens, "q_b_proj kv_b_proj", DEEPSEEK, _F32),
    _A("Llama-4", "Llama4ForCausalLM", tokens, "q_proj v_proj", HEADS_OF_8 | LLAMA4, _F32, OF_ROUTERS),
    _A("Qwen3-Next", "Qwen3NextForCausalLM", tokens, "q_proj v_proj", HEADS_OF_8 | QWEN3_NEXT),
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
    _A("UMT5", "UMT5ForConditionalGeneration", translation, "q v", T5),
    _A("T5Gemma", "T5GemmaForConditionalGeneration", translation, "q_proj v_proj", T5GEMMA),
    _A("BlenderBot", "BlenderbotForConditionalGeneration", translation, "q_proj v_proj", BART),
    _A("LED", "LEDForConditionalGeneration", translation, "query value q_proj v_proj", LED),
    _A("ProphetNet", "ProphetNetForConditionalGeneration", translation, "query_proj value_proj", PROPHETNET),
    _A("NLLB-MoE", "NllbMoeForConditionalGeneration", translation, "q_proj v_proj", BART | NLLB_EXPERTS, _F32),
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
    _A("LLaVA", "LlavaForConditionalGeneration", image_in_text, "q_proj v_proj", LLAVA),
    _A("PaliGemma", "PaliGemmaForConditionalGeneration", image_in_text, "q_proj v_proj", PALIGEMMA),
    _A("Gemma3, images", "Gemma3ForConditionalGeneration", image_typed_in_text, "q_proj v_proj", GEMMA3),
    _A("Idefics3", "Idefics3ForConditionalGeneration", images_of_one_token, "q_proj v_proj", IDEFICS),
    _A("SmolVLM", "SmolVLMForConditionalGeneration", images_of_one_token, "q_proj v_proj", IDEFICS),
    _A("Qwen2-VL", "Qwen2VLForConditionalGeneration", patches_in_text, "q_proj v_proj qkv", QWEN2_VL),
    _A("Qwen2.5-VL", "Qwen2_5_VLForConditionalGeneration", patches_in_text, "q_proj v_proj qkv", QWEN25_VL),
    _A("ViT and GPT-2", "VisionEncoderDecoderModel", captions, "c_attn q_proj v_proj", TROCR),
    # Diffusion.
    _A("UNet (Stable Diffusion)", "UNet2DConditionModel", noisy_latents, UNET_TARGETS, UNET),
    _A("SD 3 transformer", "SD3Transformer2DModel", noisy_latents_of_sd3, "to_q to_k to_v to_out.0", SD3),
    _A("Flux transformer", "FluxTransformer2DModel", noisy_patches, "to_q to_k to_v to_out.0", FLUX),
    # Audio.
    _A("Wav2Vec2", "Wav2Vec2ForCTC", waves, "q_proj v_proj", WAV2VEC2),
    _A("HuBERT", "HubertForCTC", waves, "q_proj v_proj", WAV2VEC2),
    _A("WavLM", "WavLMForCTC", waves, "intermediate_dense output_dense", WAV2VEC2, known=IN_WAVLM),
    _A("Whisper", "WhisperForConditionalGeneration", spectrograms, "q_proj v_proj", WHISPER),
    _A("Speech2Text", "Speech2TextForConditionalGeneration", frames, "q_proj v_proj", SPEECH2TEXT),
    _A("Wav2Vec2-BERT", "Wav2Vec2BertForCTC", long_frames, "linear_q linear_v", W2V_BERT),
    _A("Moonshine", "MoonshineForConditionalGeneration", speech, "q_proj v_proj", MOONSHINE),
    _A("AST", "ASTForAudioClassification", patches_of_sound, "q_proj v_proj", AST),
    # State spaces and recurrences.
    _A("Mamba", "MambaForCausalLM", tokens, "in_proj x_proj", MAMBA, known=IN_MAMBA),
    _A("FalconMamba", "FalconMambaForCausalLM", tokens, "in_proj x_proj", MAMBA, known=IN_MAMBA),
    _A("Mamba2", "Mamba2ForCausalLM", tokens, "in_proj", MAMBA2, known=IN_MAMBA),
    _A("Jamba", "JambaForCausalLM", tokens, "q_proj v_proj", JAMBA, _F32, known=IN_JAMBA),
    _A("RWKV", "RwkvForCausalLM", tokens, "key value receptance output", RWKV),
    _A("RecurrentGemma", "RecurrentGemmaForCausalLM", tokens, "q_proj v_proj", GRIFFIN),
)

# Another row has the same kinds of layers in the same places: only make test-full repeats these.
SIMILAR = frozenset(
    {
        *("XLM-R", "Mistral", "Gemma", "Cohere2", "OLMo", "SmolLM3", "GLM-4", "Nemotron", "EXAONE-4", "Helium"),
        *("Qwen2-MoE", "Granite-MoE", "GLM-4-MoE", "DeepSeek-V2", "mT5", "UMT5", "mBART", "Marian", "Pegasus"),
        *("M2M100", "BlenderBot", "DeiT", "SmolVLM", "Qwen2-VL", "HuBERT", "FalconMamba"),
        *("RoBERTa", "ELECTRA", "MPNet", "Qwen3", "Gemma2", "StableLM", "Cohere", "OLMo2", "Granite", "StarCoder2"),
        *("Qwen3-MoE", "OLMoE", "BEiT", "DINOv2"),
    }
)
