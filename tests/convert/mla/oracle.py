"""Both kinds of attention layers, computed in fp64 from nothing but their weights."""

import torch
from einops import rearrange

from efficient_attn.convert.attention_weights import GroupedAttentionWeights, LatentAttentionWeights


def grouped_output(w: GroupedAttentionWeights, x: torch.Tensor) -> torch.Tensor:
    """Output ``(N, D)`` of a source layer for one row of inputs ``(N, D)``."""
    query = heads_of(w, x, "query")
    key, value = heads_of(w, x, "key"), heads_of(w, x, "value")
    query, key = (turn_halves(each, w.inverse_frequencies, w.rotary_scale) for each in (query, key))
    per_key = w.num_heads // w.num_kv_heads
    key, value = (each.repeat_interleave(per_key, 0) for each in (key, value))
    probabilities = softmax(w.scale * query @ key.mT, w.window)
    return project(rearrange(probabilities @ value, "h n d -> n (h d)"), w.output, w.output_bias)


def latent_output(w: LatentAttentionWeights, x, *, absorbed: bool = False) -> torch.Tensor:
    """Output ``(N, D)`` of an MLA layer, keys and values expanded or read from the latent."""
    heads, nope, rank = w.num_heads, w.qk_nope_head_dim, w.kv_lora_rank
    if w.source is None:
        query = rearrange(project(x, w.query, w.query_bias), "n (h d) -> h n d", h=heads)
        features = x
    else:
        query = heads_of(w.source, x, "query") @ w.query.mT
        kept = (heads_of(w.source, x, name) for name in ("key", "value"))
        features = torch.cat([rearrange(each, "h n d -> n (h d)") for each in kept], -1)
    latent, key_rope = project(features, w.latent_down, w.latent_down_bias).split(
        (rank, w.qk_rope_head_dim), -1
    )
    query_rope = turn_neighbours(query[..., nope:], w.inverse_frequencies)
    score = w.rotary_scale**2 * query_rope @ turn_neighbours(key_rope, w.inverse_frequencies).mT
    up = w.latent_up.view(heads, -1, rank)
    if absorbed:
        score = score + (query[..., :nope] @ up[:, :nope]) @ latent.mT
        out = (softmax(w.scale * score, w.window) @ latent) @ up[:, nope:].mT
    else:
        score = score + query[..., :nope] @ (latent @ up[:, :nope].mT).mT
        out = softmax(w.scale * score, w.window) @ (latent @ up[:, nope:].mT)
    return project(rearrange(out, "h n d -> n (h d)"), w.output, w.output_bias)


def heads_of(w: GroupedAttentionWeights, x, name: str) -> torch.Tensor:
    """Queries, keys or values ``(heads, N, d)``, normalised where the layer does it, not turned."""
    x = project(x, getattr(w, name), getattr(w, f"{name}_bias"))
    x = rearrange(x, "n (h d) -> h n d", d=w.head_dim)
    norm = getattr(w, f"{name}_norm", None)
    if norm is None:
        return x
    return x * (x.square().mean(-1, keepdim=True) + w.norm_eps).rsqrt() * norm


def project(x, weight, bias):
    return x @ weight.mT if bias is None else x @ weight.mT + bias


def softmax(score, window):
    count = score.shape[-1]
    distance = torch.arange(count)[:, None] - torch.arange(count)
    hidden = (distance < 0) | (distance >= (window or count))
    return score.masked_fill(hidden, -torch.inf).softmax(-1)


def turn_halves(x, frequencies, factor=1.0):
    pairs = len(frequencies)
    z = torch.complex(x[..., :pairs], x[..., pairs : 2 * pairs]) * phases(x, frequencies) * factor
    return torch.cat((z.real, z.imag, x[..., 2 * pairs :]), -1)


def turn_neighbours(x, frequencies):
    z = torch.complex(x[..., 0::2], x[..., 1::2]) * phases(x, frequencies)
    return torch.view_as_real(z).flatten(-2)


def phases(x, frequencies):
    return torch.exp(1j * torch.arange(x.shape[-2])[:, None] * frequencies.double())
