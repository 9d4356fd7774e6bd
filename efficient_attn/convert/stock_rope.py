"""Rotary tables of converted models, as settings that stock classes compute them from."""

from __future__ import annotations

import torch
from torch import Tensor

from efficient_attn.convert.rope import default_frequencies, yarn
from efficient_attn.convert.source import Source

# Rotary scalings that are the plain table, at least up to a length.
PLAIN = ("default", "dynamic")
# Those that a yarn comes near to, and what they call its fast and slow bounds.
NEAR_YARN = {"llama3": ("high_freq_factor", "low_freq_factor"), "yarn": ("beta_fast", "beta_slow")}


def rotary_settings(frequencies: Tensor, theta: float, length: int) -> dict[str, object]:
    """Settings from which transformers computes a rotary table.

    Any table can be had from longrope, which divides the plain one by given factors. They are
    chosen so that what transformers computes in fp32 is as near as fp32 allows: nearly always the
    same bits, never more than one unit in the last place away.

    Args:
        frequencies: ``(d_r / 2,)``.
        theta: Base of the plain table.
        length: ``max_position_embeddings``; longrope keeps one table up to it and beyond.
    """
    wanted = frequencies.float()
    if torch.equal(wanted, default_frequencies(2 * len(wanted), theta)):
        return {"rope_type": "default", "rope_theta": theta}
    dim = 2 * len(wanted)
    powers = theta ** (torch.arange(0, dim, 2, dtype=torch.int64).float() / dim)
    best = 1.0 / (wanted * powers)
    up = down = best
    for _ in range(4):
        up = torch.nextafter(up, torch.full_like(up, torch.inf))
        down = torch.nextafter(down, torch.zeros_like(down))
        for candidate in (up, down):
            nearer = (1.0 / (candidate * powers) - wanted).abs() < (
                1.0 / (best * powers) - wanted
            ).abs()
            best = torch.where(nearer, candidate, best)
    factors = best.clamp(max=torch.finfo(torch.float32).max).tolist()  # a frequency may be 0
    return {
        "rope_type": "longrope",
        "rope_theta": theta,
        "factor": 1.0,
        "attention_factor": 1.0,
        "original_max_position_embeddings": length,
        "short_factor": factors,
        "long_factor": factors,
    }


def engine_rope(source: Source, rope_dim: int) -> tuple[dict[str, object], Tensor]:
    """Rotary settings that engines and transformers understand alike, and the table they make.

    Engines know the plain table and a yarn of DeepSeek's. Llama 3's blend between slow and fast
    pairs is a yarn whose bounds are its wavelengths, but for some pairs between.
    """
    rope, kind = source.rope, source.rope["rope_type"]
    if kind not in NEAR_YARN:
        settings = {"rope_type": "default", "rope_theta": rope["rope_theta"]}
        return settings, default_frequencies(rope_dim, rope["rope_theta"])
    fast, slow = NEAR_YARN[kind]
    longest = source.config["max_position_embeddings"]
    context = rope["original_max_position_embeddings"]
    settings = {
        "rope_type": "yarn",
        "rope_theta": rope["rope_theta"],
        "factor": rope.get("factor") or longest / context,
        "original_max_position_embeddings": context,
        "beta_fast": rope.get(fast) or 32,
        "beta_slow": rope.get(slow) or 1,
        # Scores are scaled by the queries, and by nothing else.
        "attention_factor": 1.0,
        "mscale": 0,
        "mscale_all_dim": 0,
    }
    return settings, yarn(settings, rope_dim, longest)[0]
