"""DeepSeek models of transformers that decode from their latents without expanding them.

The models of transformers cache latents too, but make keys and values of all of them anew in every
step. With the layers of this package the same weights read them as they are::

    model = AutoModelForCausalLM.from_pretrained(name)
    absorb_latent_attention(model)
    model.generate(**inputs)
"""

from __future__ import annotations

import torch
from torch import nn
from transformers import PreTrainedModel

from efficient_attn.errors import UnsupportedError
from efficient_attn.integrations.converted import ConvertedAttention
from efficient_attn.integrations.transformers import NAME
from efficient_attn.layers import RotaryEmbedding

FAMILIES = ("deepseek_v2", "deepseek_v3")


def absorb_latent_attention(model: PreTrainedModel) -> PreTrainedModel:
    """Give a DeepSeek model of transformers the attention layers of this package, in place.

    Weights stay where they are and keep their names, so that ``save_pretrained`` writes what it
    wrote before. Results are the same up to rounding.

    Args:
        model: A ``DeepseekV2ForCausalLM`` or ``DeepseekV3ForCausalLM``, or what is inside.

    Returns:
        ``model``.

    Raises:
        UnsupportedError: It is another model, or its rotary frequencies change with the length.
    """
    config = model.config
    reasons = []
    if config.model_type not in FAMILIES:
        reasons.append(f"its model_type is {config.model_type}, not {' or '.join(FAMILIES)}")
    else:
        rope = config.rope_parameters
        kind = rope.get("rope_type", "default")
        if kind == "dynamic" or rope.get("short_factor") != rope.get("long_factor"):
            reasons.append(f"its rotary frequencies ({kind}) change with the length of the input")
        if config.attention_dropout:
            reasons.append(f"its attention_dropout is {config.attention_dropout}")
    if reasons:
        raise UnsupportedError(f"absorb_latent_attention on {type(model).__name__}", reasons)
    decoder = model.get_decoder()
    made = [_layer(layer.self_attn, decoder.rotary_emb) for layer in decoder.layers]
    for layer, attention in zip(decoder.layers, made, strict=True):
        layer.self_attn = attention
    model.set_attn_implementation(NAME)
    return model


def _layer(stock: nn.Module, angles: nn.Module) -> ConvertedAttention:
    config = stock.config
    with torch.device("meta"):
        layer = ConvertedAttention(
            config.hidden_size,
            stock.num_heads,
            kv_lora_rank=stock.kv_lora_rank,
            qk_rope_head_dim=stock.qk_rope_head_dim,
            qk_nope_head_dim=stock.qk_nope_head_dim,
            v_head_dim=stock.v_head_dim,
            q_lora_rank=stock.q_lora_rank,
            bias=config.attention_bias,
            scale=stock.scaling,
        )
    layer.layer_idx = stock.layer_idx
    layer.rotary = RotaryEmbedding(
        stock.qk_rope_head_dim,
        # Version 2 knows no other layout.
        interleaved=getattr(config, "rope_interleave", True),
        inverse_frequencies=angles.inv_freq,
        attention_factor=angles.attention_scaling,
    )
    for name, child in stock.named_children():
        # The modules themselves, since its norms round in a place of their own.
        setattr(layer, name, child)
    return layer.train(stock.training)
