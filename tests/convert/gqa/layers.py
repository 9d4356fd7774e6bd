"""Small random layers in fp64, and what they compute from nothing but their weights."""

import torch
from einops import rearrange

from efficient_attn.convert.attention_weights import GroupedAttentionWeights
from efficient_attn.convert.gqa import InputMoments
from efficient_attn.head_map import HeadMap
from efficient_attn.reference import attention

HEADS, DIM, WIDTH = 12, 8, 20

KINDS = {
    "rotary": {"pairs": 4},
    "half turned": {"pairs": 2},
    "not turned": {"pairs": 0},
    "rotary, biases": {"pairs": 4, "biases": True},
    "not turned, biases": {"pairs": 0, "biases": True},
    "normalised": {"pairs": 4, "norms": True},
}


def layer(*, pairs=4, groups=6, biases=False, norms=False, dtype=torch.float64):
    def random(*shape):
        return (torch.randn(*shape, dtype=torch.float64) / 3).to(dtype)

    rows = {"query": HEADS * DIM, "key": groups * DIM, "value": groups * DIM}
    found = {name: random(count, WIDTH) for name, count in rows.items()}
    found["output"] = random(WIDTH, HEADS * DIM)
    if biases:
        found |= {f"{name}_bias": random(rows.get(name, WIDTH)) for name in (*rows, "output")}
    if norms:
        found |= {"query_norm": random(DIM).exp(), "key_norm": random(DIM).exp()}
    return GroupedAttentionWeights(
        num_heads=HEADS,
        num_kv_heads=groups,
        inverse_frequencies=0.3 ** torch.arange(pairs, dtype=torch.float64),
        scale=0.5,
        **found,
    )


def tokens(count=50):
    """Tokens with correlated channels whose mean is not zero, ``(N, D)``."""
    mix = torch.randn(WIDTH, WIDTH, dtype=torch.float64) / 3
    return torch.randn(count, WIDTH, dtype=torch.float64) @ mix + torch.linspace(-1, 1, WIDTH)


def moments(x):
    found = InputMoments(x.shape[-1])
    found.add(x)
    return found


def output(weights, x, head_map=None):
    """``(N, D)`` for one row of tokens, seen causally if the layer is rotary."""
    query, key, value = (project(weights, x, name) for name in ("query", "key", "value"))
    query, key = (turned(weights, normalised(weights, *pair)) for pair in
                  ((query, weights.query_norm), (key, weights.key_norm)))  # fmt: skip
    head_map = head_map or HeadMap.gqa(weights.num_heads, weights.num_kv_heads)
    causal = len(weights.inverse_frequencies) > 0
    out, _ = attention(
        query[None], key[None], value[None], head_map=head_map, causal=causal, scale=weights.scale
    )
    out = rearrange(out[0], "h n d -> n (h d)") @ weights.output.mT
    return out if weights.output_bias is None else out + weights.output_bias


def project(weights, x, name):
    """Heads before norm and rotation, ``(h, N, d)``."""
    x = x @ getattr(weights, name).mT
    bias = getattr(weights, f"{name}_bias")
    return rearrange(x if bias is None else x + bias, "n (h d) -> h n d", d=DIM)


def normalised(weights, x, norm):
    if norm is None:
        return x
    return x * (x.square().mean(-1, keepdim=True) + weights.norm_eps).rsqrt() * norm


def turned(weights, x):
    pairs = len(weights.inverse_frequencies)
    angles = torch.arange(x.shape[-2])[:, None] * weights.inverse_frequencies
    z = torch.complex(x[..., :pairs], x[..., pairs : 2 * pairs]) * torch.exp(1j * angles)
    return torch.cat((z.real, z.imag, x[..., 2 * pairs :]), -1)
