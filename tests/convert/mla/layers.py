"""Small source layers of every kind that a conversion has to deal with, random, in fp64."""

import torch

from efficient_attn.convert.attention_weights import GroupedAttentionWeights


def frequencies(dim, *, rotary=1.0, base=10000.0):
    pairs = int(dim * rotary) // 2
    return base ** -(torch.arange(pairs, dtype=torch.float64) / pairs)


def llama3(given):
    """Frequencies as Llama 3.1 rescales them, for an original context of 32 tokens."""
    wavelength = 2 * torch.pi / given
    smooth = ((32 / wavelength - 1) / 3).clamp(0, 1)
    return (1 - smooth) * given / 8 + smooth * given


def layer(*, heads=6, groups=3, dim=8, width=20, biases=(), norms=False, **given):
    """``biases`` names projections that have one."""

    def random(*shape):
        return torch.randn(*shape, dtype=torch.float64)

    rows = {"query": heads * dim, "key": groups * dim, "value": groups * dim}
    found = {name: random(count, width) / 3 for name, count in rows.items()}
    found["output"] = random(width, heads * dim) / 3
    found |= {f"{name}_bias": random(rows.get(name, width)) for name in biases}
    if norms:
        found |= {"query_norm": random(dim).exp(), "key_norm": random(dim).exp()}
    found = {"inverse_frequencies": frequencies(dim), "scale": dim**-0.5, **found, **given}
    return GroupedAttentionWeights(num_heads=heads, num_kv_heads=groups, **found)


FAMILIES = {
    "llama": {},
    "llama, one head": {"groups": 1},
    "llama, a key for each query": {"groups": 6},
    "llama 3.1": {"inverse_frequencies": llama3(frequencies(8))},
    "qwen2": {"biases": ("query", "key", "value")},
    "all biases": {"biases": ("query", "key", "value", "output")},
    "qwen3": {"norms": True},
    "qwen3, biases": {"norms": True, "biases": ("query", "key", "value")},
    "mistral": {"window": 5},
    "a quarter turned": {"inverse_frequencies": frequencies(8, rotary=0.25)},
    "half turned": {"inverse_frequencies": frequencies(8, rotary=0.5), "biases": ("key", "value")},
    "yarn": {"rotary_scale": 1.2},
    "yarn, half turned": {"rotary_scale": 1.2, "inverse_frequencies": frequencies(8, rotary=0.5)},
    "gemma": {"scale": 0.2},
}
