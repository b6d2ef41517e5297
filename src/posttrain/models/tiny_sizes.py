"""Sizes of tiny models: what transformers' configurations call their dimensions, and what the types need beside."""

from __future__ import annotations

from typing import Any

SIZES_OF_NAMES: dict[str, int] = {
    # width
    "hidden_size n_embd d_model emb_dim embedding_dim dim embedding_size word_embed_proj_dim": 32,
    "input_embedding_size lru_width attention_hidden_size": 32,
    # MLPs
    "intermediate_size n_inner ffn_dim decoder_ffn_dim encoder_ffn_dim moe_intermediate_size feed_forward_size": 64,
    "shared_expert_intermediate_size shared_intermediate_size shared_experts_intermediate_size d_inner dff dim_ff": 64,
    "intermediate_size_mlp ffn_hidden_size expert_ffn_hidden_size dense_intermediate_size": 64,
    "moe_shared_expert_intermediate_size": 64,
    # layers
    "num_hidden_layers n_layer n_layers num_layers encoder_layers decoder_layers num_blocks depth": 2,
    "num_encoder_layers num_decoder_layers": 2,
    # heads
    "num_attention_heads n_head n_heads num_heads attention_heads encoder_attention_heads decoder_attention_heads": 4,
    "num_encoder_attention_heads num_decoder_attention_heads swa_num_attention_heads num_query_groups": 4,
    "num_key_value_heads num_kv_heads swa_num_key_value_heads": 2,
    "head_dim attention_head_dim swa_head_dim dim_head d_head kv_channels attention_head_size": 8,
    # multi-head latent attention and its indexer
    "q_lora_rank kv_lora_rank o_lora_rank qk_head_dim index_head_dim": 16,
    "qk_nope_head_dim v_head_dim qk_rope_head_dim": 8,
    "index_n_heads": 2,
    # experts
    "num_experts num_local_experts n_routed_experts moe_num_experts": 4,
    "num_experts_per_tok moe_top_k moe_topk moe_k top_k_experts": 2,
    "n_group topk_group n_shared_experts": 1,
    # linear attention and state spaces
    "linear_num_value_heads linear_num_key_heads linear_num_heads": 4,
    "linear_key_head_dim linear_value_head_dim linear_head_dim": 8,
    "mamba_d_state ssm_state_size state_size mamba_n_heads mamba_num_heads": 8,
    "mamba_d_head mamba_head_dim mamba_headdim": 8,
    "mamba_dt_rank time_step_rank": 4,
    "mamba_d_ssm": 64,
    # positions
    "max_position_embeddings n_positions n_ctx max_seq_len context_length": 2048,
    "max_source_positions max_target_positions": 64,
    "rotary_dim": 4,
}
SIZES = {name: size for names, size in SIZES_OF_NAMES.items() for name in names.split()}
"""Values by the names of transformers' configurations; only those that a type has are used."""
BYTES = {"bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 0}
SUB_SIZES: dict[str, Any] = {
    "image_size": 32,
    "patch_size": 16,
    "num_channels": 3,
    "num_mel_bins": 8,
    "out_hidden_size": 32,
    "num_position_embeddings": 16,
}
"""Values of the parts of a composite model that look and listen, which posttrain leaves alone."""
OVERRIDES: dict[str, dict[str, Any]] = {
    "dbrx": {
        "attn_config": {"rope_theta": 10000.0, "kv_n_heads": 2, "clip_qkv": 8.0},
        "ffn_config": {"hidden_size": 32, "ffn_hidden_size": 64, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "deepseek_v3": {"first_k_dense_replace": 1},
    "dots3_note_text": {"num_key_value_heads": 4},
    "gemma3n_text": {
        "num_kv_shared_layers": 0,
        "layer_types": ["sliding_attention", "full_attention"],
        "activation_sparsity_pattern": [0.95, 0.0],
        "vocab_size_per_layer_input": 259,
        "hidden_size_per_layer_input": 8,
        "laurel_rank": 8,
    },
    "gemma4_text": {"vocab_size_per_layer_input": 259, "hidden_size_per_layer_input": 8},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "llama4_text": {"attention_chunk_size": 16},
    "mamba2": {"num_heads": 8, "head_dim": 8},
    "roc_bert": {"shape_vocab_size": 259, "pronunciation_vocab_size": 259},
    "qwen4_exp_text": {"layer_types": None, "mlp_layer_types": None, "num_hidden_layers": 2},
    "reformer": {"is_decoder": True, "axial_pos_shape": [32, 64], "axial_pos_embds_dim": [16, 16]},
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
        "num_hidden_layers": 4,
        "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"],
    },
    "zamba2": {"layers_block_type": ["mamba", "hybrid"], "hybrid_layer_ids": [1]},
    "zaya": {"num_experts_per_tok": 1},
}
"""What single types need, beside or instead of `SIZES`; None leaves a value as the type has it."""


def tiny_settings(config_class: Any, vocabulary: int, changes: dict[str, Any]) -> dict[str, Any]:
    """Return arguments that make a small configuration of a type.

    Args:
        config_class: Class of the configuration.
        vocabulary: Size of the vocabulary.
        changes: Override everything else; None too.
    """
    fields = set(getattr(config_class, "__dataclass_fields__", {}))
    settings: dict[str, Any] = {name: size for name, size in SIZES.items() if name in fields}
    if "kv_lora_rank" in fields:  # latent attention: each head has keys of its own
        settings["num_key_value_heads"] = settings["num_attention_heads"]
    settings |= {"vocab_size": vocabulary, **BYTES}
    settings |= _every_kind_of_layer(config_class, fields)
    for name, part in _parts(config_class).items():
        own = {k: v for k, v in SUB_SIZES.items() if k in part.__dataclass_fields__ and "text" not in name}
        settings[name] = {"model_type": part.model_type, **tiny_settings(part, vocabulary, own)}
    settings |= OVERRIDES.get(config_class.model_type, {})
    return {k: v for k, v in settings.items() if v is not None} | changes


def _parts(config_class: Any) -> dict[str, Any]:
    """Return the configuration classes of a composite model's parts; those of its default configuration if open."""
    named = getattr(config_class, "sub_configs", None) or {}
    default = config_class() if any(c.__name__ == "AutoConfig" for c in named.values()) else None
    parts = {n: type(getattr(default, n)) if c.__name__ == "AutoConfig" else c for n, c in named.items()}
    return {n: c for n, c in parts.items() if getattr(c, "__dataclass_fields__", None)}


def _every_kind_of_layer(config_class: Any, fields: set[str]) -> dict[str, Any]:
    """Return settings that give the model one layer of each kind that its default configuration has, two at least."""
    names = {"layer_types", "mlp_layer_types"} & fields
    try:
        default = config_class() if names else None
    except ValueError:  # a default that its own checks refuse
        return {}
    kinds = {name: list(dict.fromkeys(getattr(default, name, None) or ())) for name in sorted(names)}
    kinds = {name: different for name, different in kinds.items() if len(different) > 1}
    layers = max([2, *map(len, kinds.values())])
    lists = {name: [different[i % len(different)] for i in range(layers)] for name, different in kinds.items()}
    return {"num_hidden_layers": layers, **lists} if lists else {}
