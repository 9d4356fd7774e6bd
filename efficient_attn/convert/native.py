"""How a converted layer is written down natively: named tensors, and facts that are no tensors.

``config.json`` of a native checkpoint is that of its source with one more entry, to which a
converter may add what else it has to say::

    "efficient_attn": {"format": 1, "layers": [facts of layer 0, facts of layer 1, ...]}

Tensors of layer ``i`` stand behind ``model.layers.{i}.self_attn.``; all others are the source's.
Facts are ``form``, which layer it is (``latent``, ``normed`` or ``factored``), and arguments of its
constructor. :mod:`efficient_attn.integrations.converted` makes models of them.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from efficient_attn.convert.attention_weights import (
    FactoredAttentionWeights,
    GroupedAttentionWeights,
    LatentAttentionWeights,
)
from efficient_attn.errors import ConversionError

FORMAT = 1
TABLE = "rotary.inverse_frequencies"

NativeWeights = LatentAttentionWeights | FactoredAttentionWeights
Facts = dict[str, str | int | float | bool | None]

# Tensors of a layer, and the attributes that hold them.
_LATENT = {
    "kv_a_proj_with_mqa.weight": "latent_down",
    "kv_a_proj_with_mqa.bias": "latent_down_bias",
    "kv_b_proj.weight": "latent_up",
    "o_proj.weight": "output",
    "o_proj.bias": "output_bias",
    TABLE: "inverse_frequencies",
}
_QUERY = {"q_proj.weight": "query", "q_proj.bias": "query_bias"}
_QUERY_OF_LATENT = {
    "q_a_proj.weight": "query_down",
    "q_b_proj.weight": "query",
    "q_b_proj.bias": "query_bias",
}
_HEADS = {
    **_QUERY,
    "k_proj.weight": "key",
    "k_proj.bias": "key_bias",
    "v_proj.weight": "value",
    "v_proj.bias": "value_bias",
    "q_norm.weight": "query_norm",
    "k_norm.weight": "key_norm",
}
_OUTPUT = {
    "o_proj.weight": "output",
    "o_proj.bias": "output_bias",
    TABLE: "inverse_frequencies",
}


def native_state(weights: NativeWeights) -> dict[str, Tensor]:
    """The tensors of a layer by name; those of :func:`native_facts` complete them."""
    if isinstance(weights, FactoredAttentionWeights):
        state = _written(_HEADS | _OUTPUT, weights.latents)
        ups = {"k_up.weight": weights.key_up, "v_up.weight": weights.value_up}
        state |= {name: up for name, up in ups.items() if up is not None}
    elif weights.source is None and weights.query_down is None:
        state = _written(_QUERY | _LATENT, weights)
    elif weights.source is None:
        state = _written(_QUERY_OF_LATENT | _LATENT, weights)
        if weights.latent_down_bias is not None:
            # One switch of the layer gives both latents a bias.
            state["q_a_proj.bias"] = weights.latent_down_bias.new_zeros(len(weights.query_down))
    else:
        if weights.query_bias is not None:
            raise ConversionError("query_bias follows a norm of the heads; fold it into source.")
        state = _written(_HEADS, weights.source) | _written(_LATENT, weights)
        state["q_b_proj.weight"] = weights.query.flatten(0, 1)
    if not weights_table(weights).numel():
        del state[TABLE]
    else:
        # What models of transformers compute their angles from, and in.
        state[TABLE] = state[TABLE].float()
    return state


def native_facts(weights: NativeWeights) -> Facts:
    """What is no tensor of a layer, for ``config.json``."""
    if isinstance(weights, FactoredAttentionWeights):
        source = weights.latents
        return {
            "form": "factored",
            **_facts_of_heads(source),
            "num_heads": source.num_heads,
            "out_bias": source.output_bias is not None,
            "key_up": weights.key_up is not None,
            "value_up": weights.value_up is not None,
            "rotary_dim": 2 * source.inverse_frequencies.numel(),
            "rotary_scale": float(source.rotary_scale),
            "scale": float(source.scale),
            "window": source.window,
        }
    return {
        "form": "latent" if weights.source is None else "normed",
        **({} if weights.source is None else _facts_of_heads(weights.source)),
        **({} if weights.query_down is None else {"q_lora_rank": len(weights.query_down)}),
        "num_heads": weights.num_heads,
        "kv_lora_rank": weights.kv_lora_rank,
        "qk_rope_head_dim": weights.qk_rope_head_dim,
        "qk_nope_head_dim": weights.qk_nope_head_dim,
        "v_head_dim": weights.v_head_dim,
        "q_bias": weights.query_bias is not None,
        "bias": weights.latent_down_bias is not None,
        "out_bias": weights.output_bias is not None,
        "rotary_scale": float(weights.rotary_scale),
        "scale": float(weights.scale),
        "window": weights.window,
    }


def native_weights(facts: Facts, state: Mapping[str, Tensor]) -> NativeWeights:
    """The weights that :func:`native_facts` and :func:`native_state` wrote down.

    Of a source whose norms stay, only what the layer still uses is as it was.
    """
    names = ("num_heads", "rotary_scale", "scale", "window")
    own = {name: facts[name] for name in names}
    table = state.get(TABLE, torch.zeros(0))
    if facts["form"] == "latent":
        sizes = {name: facts[name] for name in ("qk_nope_head_dim", "v_head_dim")}
        names = _QUERY_OF_LATENT if "q_lora_rank" in facts else _QUERY
        return LatentAttentionWeights(
            **_read(names | _LATENT, state) | {"inverse_frequencies": table}, **sizes, **own
        )
    heads = {"num_kv_heads": facts["num_kv_heads"], "norm_eps": facts["norm_eps"]}
    heads |= _read(_HEADS | _OUTPUT, state) | {"inverse_frequencies": table} | own
    if facts["form"] == "factored":
        latents = GroupedAttentionWeights(**heads)
        return FactoredAttentionWeights(latents, state.get("k_up.weight"), state.get("v_up.weight"))
    sizes = {name: facts[name] for name in ("qk_nope_head_dim", "v_head_dim")}
    maps = state["q_b_proj.weight"].unflatten(0, (facts["num_heads"], -1))
    return LatentAttentionWeights(
        **_read(_LATENT, state) | {"inverse_frequencies": table, "query": maps},
        **sizes,
        **own,
        source=GroupedAttentionWeights(**heads),
    )


def weights_table(weights: NativeWeights) -> Tensor:
    """The inverse frequencies of a layer."""
    layer = weights.latents if isinstance(weights, FactoredAttentionWeights) else weights
    return layer.inverse_frequencies


def _facts_of_heads(source: GroupedAttentionWeights) -> Facts:
    biases = [source.query_bias, source.key_bias, source.value_bias]
    if any(x is None for x in biases) and any(x is not None for x in biases):
        raise ConversionError(
            "some of query_bias, key_bias and value_bias are None; pass zeros for these, or None "
            "for all."
        )
    return {
        "num_kv_heads": source.num_kv_heads,
        "head_dim": source.head_dim,
        "qkv_bias": source.query_bias is not None,
        "norms": source.key_norm is not None,
        "norm_eps": float(source.norm_eps),
    }


def _written(names: Mapping[str, str], weights: object) -> dict[str, Tensor]:
    tensors = {name: getattr(weights, attribute) for name, attribute in names.items()}
    return {name: x for name, x in tensors.items() if x is not None}


def _read(names: Mapping[str, str], state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {attribute: state[name] for name, attribute in names.items() if name in state}
