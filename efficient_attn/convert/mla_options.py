"""What a user may ask of a conversion to latent attention."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import get_args

from efficient_attn.convert.mla import CompressOptions
from efficient_attn.convert.mla.lossless import Factor
from efficient_attn.convert.mla_stock import TARGETS
from efficient_attn.convert.source import FLOATING

MODES = ("exact", "rorope", "compress")


@dataclass(frozen=True)
class MlaOptions:
    """How a model is to become one with latent attention.

    Args:
        mode: ``"exact"`` factorises the weights and ``"rorope"`` also turns heads into each other,
            both without loss and with as many cached numbers as the source; ``"compress"`` caches
            fewer.
        target: ``"native"`` for this package's layers, ``"hf-deepseek"`` for the stock
            ``DeepseekV3ForCausalLM`` of transformers, ``"engine"`` for the same in stock vLLM and
            SGLang, which take less of it.
        dtype: Of the output; by default that of the source.
        kv_ratio: Cached numbers per token as a share of the source's, for ``"compress"``; the rank
            is what they leave beside the rotary part.
        kv_budget: Cached bytes per token of all layers together, instead of ``kv_ratio``.
        kv_lora_rank: Cached numbers of the latent in each layer, instead of ``kv_ratio``.
        rope_dim: Cached numbers of the rotary key.
        per_layer: Give layers different sizes, the same number of numbers altogether.
        q_lora_rank: Make queries from a latent of so many numbers, which saves weights and no
            cache. Below the rank of the query projection this loses something, and needs
            ``"compress"``.
        factor: In mode ``"exact"``, what keys and values are factorised to. Other factors than
            ``"selector"`` stand before the rotation and are starting points for training.
        seed: Of the random factors.
        choices: Everything else that ``"compress"`` leaves open. In mode ``"rorope"`` with a text,
            ``choices.rotation`` says how heads are turned into each other.
        allow_larger_cache: Convert although more numbers would be cached than before.
        allow_rope_approx: For ``"engine"``, take the nearest rotary table that engines have for
            one that they have not (llama3, yarn).
        tp: Devices that share the heads of a served model; only told about in the report.

    Raises:
        ValueError: An option has no such value, or does not go with another.
    """

    mode: str = "rorope"
    target: str = "native"
    dtype: str | None = None
    kv_ratio: float | None = None
    kv_budget: int | None = None
    kv_lora_rank: int | None = None
    rope_dim: int | None = None
    per_layer: bool = False
    q_lora_rank: int | None = None
    factor: str = "selector"
    seed: int = 0
    choices: CompressOptions = field(default_factory=CompressOptions)
    allow_larger_cache: bool = False
    allow_rope_approx: bool = False
    tp: int | None = None

    def __post_init__(self) -> None:
        self._check_names()
        self._check_sizes()
        if self.factor != "selector" and self.mode != "exact":
            raise ValueError(f"factor is {self.factor!r}, which is a choice of mode 'exact' alone.")
        if self.allow_rope_approx and self.target != "engine":
            raise ValueError(
                f"allow_rope_approx is for target 'engine'; {self.target!r} takes any rotary table."
            )

    @property
    def numbers_are_given(self) -> bool:
        """Whether it is said how much is cached, other than by what a target prescribes."""
        return not (self.kv_ratio is self.kv_budget is self.kv_lora_rank is None)

    def _check_names(self) -> None:
        allowed = {
            "mode": MODES,
            "target": TARGETS,
            "dtype": (None, *FLOATING),
            "factor": get_args(Factor),
        }
        for name, values in allowed.items():
            if getattr(self, name) not in values:
                told = ", ".join(str(value) for value in values if value is not None)
                raise ValueError(f"{name} is {getattr(self, name)!r}; take one of {told}.")

    def _check_sizes(self) -> None:
        sizes = {
            name: getattr(self, name)
            for name in ("kv_ratio", "kv_budget", "kv_lora_rank", "rope_dim", "per_layer")
        }
        given = [name for name, value in sizes.items() if value not in (None, False)]
        if self.mode != "compress" and given:
            raise ValueError(
                f"{' and '.join(given)} cannot be chosen in mode {self.mode!r}, which keeps the "
                "size of the cache; take mode 'compress'."
            )
        how_much = [name for name in given if name in ("kv_ratio", "kv_budget", "kv_lora_rank")]
        if len(how_much) > 1:
            raise ValueError(f"{' and '.join(how_much)} both say how much is cached; pass one.")
        if self.kv_ratio is not None and not 0 < self.kv_ratio <= 1:
            raise ValueError(f"kv_ratio is {self.kv_ratio}; it must be in (0, 1].")
        for name in ("kv_budget", "kv_lora_rank", "rope_dim", "q_lora_rank", "tp"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1.")
        if self.rope_dim is not None and self.rope_dim % 2:
            raise ValueError(f"rope_dim is {self.rope_dim}; pairs are turned, so it must be even.")
        if self.per_layer and (self.kv_lora_rank is not None or self.rope_dim is not None):
            raise ValueError(
                "per_layer chooses the sizes of every layer itself; pass kv_ratio or kv_budget "
                "rather than kv_lora_rank and rope_dim."
            )
        if self.target == "engine":
            return
        if self.kv_lora_rank is not None and self.rope_dim is None:
            raise ValueError(
                f"kv_lora_rank is {self.kv_lora_rank} and rope_dim is None; pass both, or kv_ratio."
            )
        if self.mode == "compress" and not self.numbers_are_given:
            raise ValueError(
                "how much to compress? Pass kv_ratio or kv_budget, or kv_lora_rank and rope_dim."
            )
