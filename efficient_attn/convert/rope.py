"""Inverse frequencies of the rotary scalings that checkpoints ask for.

In fp32 and in the order of operations of transformers, so that the tables have the same bits as the
ones the checkpoint was trained and used with.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from efficient_attn.errors import ConversionError

Parameters = Mapping[str, object]


def default_frequencies(dim: int, theta: float) -> Tensor:
    """``theta ** (-2 i / dim)`` for ``i < dim / 2``."""
    return 1.0 / theta ** (torch.arange(0, dim, 2, dtype=torch.int64).float() / dim)


def linear(parameters: Parameters, dim: int, length: int) -> tuple[Tensor, float]:
    """Positions divided by a factor."""
    return default_frequencies(dim, parameters["rope_theta"]) / parameters["factor"], 1.0


def dynamic(parameters: Parameters, dim: int, length: int) -> tuple[Tensor, float]:
    """A base that grows with the sequence beyond ``length``; up to it, the plain table."""
    return default_frequencies(dim, parameters["rope_theta"]), 1.0


def llama3(parameters: Parameters, dim: int, length: int) -> tuple[Tensor, float]:
    """Slow pairs divided by a factor, fast ones kept, a blend between (Llama 3.1)."""
    factor, low, high, context = (
        parameters[name]
        for name in (
            "factor",
            "low_freq_factor",
            "high_freq_factor",
            "original_max_position_embeddings",
        )
    )
    plain = default_frequencies(dim, parameters["rope_theta"])
    wavelength = 2 * math.pi / plain
    slow = wavelength > context / low
    fast = wavelength < context / high
    scaled = torch.where(slow, plain / factor, plain)
    blend = (context / wavelength - low) / (high - low)
    blended = (1 - blend) * scaled / factor + blend * scaled
    return torch.where(~slow & ~fast, blended, scaled), 1.0


def yarn(parameters: Parameters, dim: int, length: int) -> tuple[Tensor, float]:
    """Pairs that turn seldom divided by a factor, with a ramp (Peng et al., arXiv 2309.00071)."""
    theta, context = parameters["rope_theta"], parameters["original_max_position_embeddings"]
    factor = parameters.get("factor") or length / context

    def gain(weight: float = 1.0) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    attention_factor = parameters.get("attention_factor")
    if attention_factor is None:
        over, under = parameters.get("mscale"), parameters.get("mscale_all_dim")
        attention_factor = gain(over) / gain(under) if over and under else gain()

    def pair_that_turns(times: float) -> float:
        return dim * math.log(context / (times * 2 * math.pi)) / (2 * math.log(theta))

    low = pair_that_turns(parameters.get("beta_fast") or 32)
    high = pair_that_turns(parameters.get("beta_slow") or 1)
    if parameters.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    high += 0.001 if low == high else 0
    divided = ((torch.arange(dim // 2).float() - low) / (high - low)).clamp(0, 1)
    kept = 1 - divided
    powers = theta ** (torch.arange(0, dim, 2).float() / dim)
    return (1.0 / (factor * powers)) * (1 - kept) + (1.0 / powers) * kept, attention_factor


def longrope(parameters: Parameters, dim: int, length: int) -> tuple[Tensor, float]:
    """A table of factors, the one for short sequences (Ding et al., arXiv 2402.13753)."""
    context = parameters["original_max_position_embeddings"]
    factor = parameters.get("factor") or length / context
    attention_factor = parameters.get("attention_factor")
    if attention_factor is None:
        growth = math.log(factor) / math.log(context) if factor > 1 else 0.0
        attention_factor = math.sqrt(1 + growth)
    short = torch.tensor(parameters["short_factor"], dtype=torch.float32)
    if short.shape != (dim // 2,):
        raise ConversionError(
            f"short_factor has {short.numel()} entries; {dim // 2} pairs are turned."
        )
    exponent = torch.arange(0, dim, 2, dtype=torch.int64).float() / dim
    return 1.0 / (short * parameters["rope_theta"] ** exponent), attention_factor


SCALINGS: dict[str, Callable[[Parameters, int, int], tuple[Tensor, float]]] = {
    "default": lambda parameters, dim, _: (
        default_frequencies(dim, parameters["rope_theta"]),
        1.0,
    ),
    "linear": linear,
    "dynamic": dynamic,
    "llama3": llama3,
    "yarn": yarn,
    "longrope": longrope,
}

# Their tables change with the length of a sequence; ours is the one for sequences up to it.
LENGTH_DEPENDENT = {"dynamic": "max_position_embeddings", "longrope": "original length"}


def rope_parameters(config: Mapping[str, object], default_theta: float) -> dict[str, object]:
    """The rotary settings of a config, whichever of its two spellings it uses."""
    given = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if not isinstance(given, Mapping) or any(isinstance(v, Mapping) for v in given.values()):
        raise ConversionError(
            "the rotary settings differ between kinds of layers, which conversion cannot express."
        )
    found = dict(given)
    found["rope_type"] = found.get("rope_type") or found.pop("type", None) or "default"
    found.setdefault("rope_theta", config.get("rope_theta", default_theta))
    partial = found.get("partial_rotary_factor", config.get("partial_rotary_factor"))
    if partial not in (None, 1.0):
        raise ConversionError(
            f"partial_rotary_factor is {partial!r}; the families that are known turn whole heads."
        )
    if found["rope_type"] in ("llama3", "yarn", "longrope"):
        if "original_max_position_embeddings" in config:
            found["original_max_position_embeddings"] = config["original_max_position_embeddings"]
        found.setdefault("original_max_position_embeddings", config["max_position_embeddings"])
    return found


def inverse_frequencies(parameters: Parameters, head_dim: int, length: int) -> tuple[Tensor, float]:
    """The table that a checkpoint uses, ``(F,)``, and its factor on rotated queries and keys.

    Args:
        parameters: As :func:`rope_parameters` gives them.
        head_dim: Width of a head.
        length: The config's ``max_position_embeddings``.

    Raises:
        ConversionError: The scaling is unknown, or a setting is missing or of the wrong kind.
    """
    kind = parameters["rope_type"]
    if kind not in SCALINGS:
        raise ConversionError(f"rotary scaling {kind!r} is unknown; known: {', '.join(SCALINGS)}.")
    try:
        table, factor = SCALINGS[kind](parameters, head_dim, length)
    except (KeyError, TypeError, ArithmeticError, ValueError) as error:
        if isinstance(error, ConversionError):
            raise
        raise ConversionError(
            f"rotary scaling {kind!r}: settings of no sense ({error})."
        ) from error
    if not torch.isfinite(table).all() or not math.isfinite(factor):
        raise ConversionError(f"rotary scaling {kind!r} gives frequencies that are not finite.")
    return table, float(factor)
