"""Sizes of the default model `tiny`, in the config formats of the checkpoints it stands for."""

from typing import Any

HIDDEN = 128  # of the VLM; also the text width of the DiT and T5
CONNECTOR_HIDDEN = 3 * HIDDEN
SIGLIP_HIDDEN = 128
POOLED = 64
DIT_HEADS, DIT_HEAD_DIM = 4, 64
LATENT_CHANNELS = 16
TASK_HEAD_HIDDEN = 256
ANCHOR_PX = 256 * 256
VLM_IMAGE_PX = 448 * 448  # only a ceiling: the pipeline chooses the size itself

DENOISER = {
    "_class_name": "FluxTransformer2DModel",
    "attention_head_dim": DIT_HEAD_DIM,
    "axes_dims_rope": [8, 28, 28],
    "guidance_embeds": True,
    "in_channels": 4 * LATENT_CHANNELS,
    "joint_attention_dim": HIDDEN,
    "num_attention_heads": DIT_HEADS,
    "num_layers": 2,
    "num_single_layers": 4,
    "out_channels": None,
    "patch_size": 1,
    "pooled_projection_dim": POOLED,
}

VISION = {
    "depth": 2,
    "fullatt_block_indexes": [1],
    "hidden_act": "silu",
    "hidden_size": 64,
    "in_channels": 3,
    "in_chans": 3,
    "intermediate_size": 128,
    "model_type": "qwen2_5_vl",
    "num_heads": 4,
    "out_hidden_size": HIDDEN,
    "patch_size": 14,
    "spatial_merge_size": 2,
    "spatial_patch_size": 14,
    "temporal_patch_size": 2,
    "tokens_per_second": 2,
    "window_size": 112,
}

PREPROCESSOR = {
    "do_convert_rgb": True,
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_processor_type": "Qwen2VLImageProcessor",
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "max_pixels": VLM_IMAGE_PX,
    "merge_size": 2,
    "min_pixels": 56 * 56,
    "patch_size": 14,
    "processor_class": "Qwen2_5_VLProcessor",
    "resample": 3,
    "rescale_factor": 1 / 255,
    "temporal_patch_size": 2,
}

SIGLIP = {
    "architectures": ["SiglipVisionModel"],
    "attention_dropout": 0.0,
    "hidden_act": "gelu_pytorch_tanh",
    "hidden_size": SIGLIP_HIDDEN,
    "image_size": 128,
    "intermediate_size": 256,
    "layer_norm_eps": 1e-6,
    "model_type": "siglip_vision_model",
    "num_attention_heads": 4,
    "num_channels": 3,
    "num_hidden_layers": 2,
    "patch_size": 16,
    "vision_use_head": False,
}

SIGLIP_PREPROCESSOR = {
    "do_convert_rgb": None,
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "image_mean": [0.5, 0.5, 0.5],
    "image_processor_type": "SiglipImageProcessor",
    "image_std": [0.5, 0.5, 0.5],
    "resample": 2,
    "rescale_factor": 1 / 255,
    "size": {"height": SIGLIP["image_size"], "width": SIGLIP["image_size"]},
}

VAE = {
    "_class_name": "AutoencoderKL",
    "act_fn": "silu",
    "block_out_channels": [16, 32, 32, 32],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "force_upcast": True,
    "in_channels": 3,
    "latent_channels": LATENT_CHANNELS,
    "latents_mean": None,
    "latents_std": None,
    "layers_per_block": 1,
    "mid_block_add_attention": True,
    "norm_num_groups": 8,
    "out_channels": 3,
    "sample_size": 256,
    "scaling_factor": 0.3611,
    "shift_factor": 0.1159,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "use_post_quant_conv": False,
    "use_quant_conv": False,
}

SCHEDULER = {
    "_class_name": "FlowMatchEulerDiscreteScheduler",
    "base_image_seq_len": 256,
    "base_shift": 0.5,
    "max_image_seq_len": 4096,
    "max_shift": 1.15,
    "num_train_timesteps": 1000,
    "shift": 3.0,
    "use_dynamic_shifting": True,
}

MODEL_INDEX = {
    "_class_name": "FluxPipeline",
    "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "text_encoder_2": ["transformers", "T5EncoderModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "tokenizer_2": ["transformers", "PreTrainedTokenizerFast"],
    "vae": ["diffusers", "AutoencoderKL"],
}


def qwen_config(ids: dict[str, int]) -> dict[str, Any]:
    """The VLM's config.json; `ids` are the special tokens' ids, the last of the vocabulary."""
    return {
        "attention_dropout": 0.0,
        "bos_token_id": ids["<|endoftext|>"],
        "eos_token_id": ids["<|im_end|>"],
        "hidden_act": "silu",
        "hidden_size": HIDDEN,
        "image_token_id": ids["<|image_pad|>"],
        "initializer_range": 0.02,
        "intermediate_size": 2 * HIDDEN,
        "max_position_embeddings": 4096,
        "max_window_layers": 2,
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
        "num_key_value_heads": 2,
        "pad_token_id": ids["<|endoftext|>"],
        "rms_norm_eps": 1e-6,
        "rope_scaling": {"mrope_section": [4, 6, 6], "rope_type": "default", "type": "default"},
        "rope_theta": 1000000.0,
        "sliding_window": 32768,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "use_sliding_window": False,
        "video_token_id": ids["<|video_pad|>"],
        "vision_config": VISION,
        "vision_end_token_id": ids["<|vision_end|>"],
        "vision_start_token_id": ids["<|vision_start|>"],
        "vision_token_id": ids["<|vision_pad|>"],
        "vocab_size": max(ids.values()) + 1,
    }


def clip_config(ids: dict[str, int]) -> dict[str, Any]:
    """CLIP's text encoder, `POOLED` wide; `ids` from `write_clip_tokenizer`."""
    return {
        "architectures": ["CLIPTextModel"],
        "attention_dropout": 0.0,
        "bos_token_id": ids["bos"],
        "eos_token_id": ids["eos"],
        "hidden_act": "quick_gelu",
        "hidden_size": POOLED,
        "intermediate_size": 4 * POOLED,
        "layer_norm_eps": 1e-5,
        "max_position_embeddings": 77,
        "model_type": "clip_text_model",
        "num_attention_heads": 2,
        "num_hidden_layers": 2,
        "pad_token_id": ids["eos"],
        "projection_dim": POOLED,
        "vocab_size": ids["vocab_size"],
    }


def t5_config(ids: dict[str, int]) -> dict[str, Any]:
    """T5's encoder, as wide as the DiT's text stream; `ids` from `write_t5_tokenizer`."""
    return {
        "architectures": ["T5EncoderModel"],
        "d_ff": 2 * HIDDEN,
        "d_kv": 32,
        "d_model": HIDDEN,
        "decoder_start_token_id": ids["pad"],
        "dropout_rate": 0.1,
        "eos_token_id": ids["eos"],
        "feed_forward_proj": "gated-gelu",
        "is_encoder_decoder": True,
        "layer_norm_epsilon": 1e-6,
        "model_type": "t5",
        "num_decoder_layers": 2,
        "num_heads": 4,
        "num_layers": 2,
        "pad_token_id": ids["pad"],
        "relative_attention_max_distance": 128,
        "relative_attention_num_buckets": 32,
        "tie_word_embeddings": False,
        "use_cache": False,
        "vocab_size": ids["vocab_size"],
    }
