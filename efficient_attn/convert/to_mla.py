"""Grouped-query attention to multi-head latent attention: modes and targets."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial

from torch import Tensor

from efficient_attn.convert.attention_weights import LatentAttentionWeights
from efficient_attn.convert.mla import exact, rorope
from efficient_attn.convert.mla_targets import TARGETS, MlaSizes, Target
from efficient_attn.convert.pipeline import Conversion, Part
from efficient_attn.convert.source import FLOATING, Source
from efficient_attn.errors import ConversionError

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
        kv_lora_rank: Cached numbers of the latent, instead of ``kv_ratio``.
        rope_dim: Cached numbers of the rotary key.
        allow_larger_cache: Convert although more bytes would be cached than before.
    """

    mode: str = "rorope"
    target: str = "native"
    dtype: str | None = None
    kv_ratio: float | None = None
    kv_lora_rank: int | None = None
    rope_dim: int | None = None
    allow_larger_cache: bool = False

    def __post_init__(self) -> None:
        for name, allowed in (("mode", MODES), ("target", TARGETS), ("dtype", (None, *FLOATING))):
            if getattr(self, name) not in allowed:
                told = ", ".join(str(value) for value in allowed if value is not None)
                raise ValueError(f"{name} is {getattr(self, name)!r}; take one of {told}.")
        sizes = {name: getattr(self, name) for name in ("kv_ratio", "kv_lora_rank", "rope_dim")}
        given = [name for name, value in sizes.items() if value is not None]
        if self.mode != "compress" and given:
            raise ValueError(
                f"{' and '.join(given)} cannot be chosen in mode {self.mode!r}, which keeps the "
                "size of the cache; take mode 'compress'."
            )
        if self.kv_ratio is not None and self.kv_lora_rank is not None:
            raise ValueError("kv_ratio and kv_lora_rank both say how much is cached; pass one.")
        if self.kv_ratio is not None and not 0 < self.kv_ratio <= 1:
            raise ValueError(f"kv_ratio is {self.kv_ratio}; it must be in (0, 1].")
        for name in ("kv_lora_rank", "rope_dim"):
            value = sizes[name]
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1.")
        if self.rope_dim is not None and self.rope_dim % 2:
            raise ValueError(f"rope_dim is {self.rope_dim}; pairs are turned, so it must be even.")


def plan(source: Source, options: MlaOptions) -> Conversion:
    """What converting a source to latent attention would do.

    Raises:
        ConversionError: It cannot be done in this way; the message has every reason.
    """
    dtype = source.dtype if options.dtype is None else FLOATING[options.dtype]
    sizes = lossless_sizes(source)
    target = TARGETS[options.target](source, sizes, dtype, lossless_table(source))
    reasons = target.reasons_to_refuse()
    before = 2 * source.config["num_key_value_heads"] * source.config["head_dim"]
    after = sizes.kv_lora_rank + sizes.qk_rope_head_dim
    if after > before and not options.allow_larger_cache:
        reasons.append(
            f"it would cache {after} numbers per token and layer, and {before} are cached now "
            "(allow_larger_cache converts it all the same)"
        )
    if reasons:
        advice = "" if options.target == "native" else " Target 'native' may take it."
        raise ConversionError(
            f"{source.checkpoint.folder} cannot become {options.target!r}: "
            f"{'; '.join(reasons)}.{advice}"
        )
    convert_layer = {"exact": exact, "rorope": rorope}[options.mode]
    parts: dict[str, Callable[[], Part]] = {"embedding": target.embedding}
    for index in range(source.num_layers):
        parts[f"layer {index}"] = partial(_layer, source, target, convert_layer, index)
    parts["head"] = target.head
    layers = source.num_layers
    element = dtype.itemsize
    old, new = source.parameters, target.parameters()
    return Conversion(
        method="mla",
        decisions={**asdict(options), "dtype": str(dtype).removeprefix("torch."), **asdict(sizes)},
        parts=parts,
        config=target.config,
        bytes_per_token=(before * layers * source.dtype.itemsize, after * layers * element),
        parameters=(old, new),
        output_bytes=new * element,
        memory_bytes=target.memory_bytes(),
        parallel={str(n): _on_each_of(n, source, after, element) for n in (1, 2, 4, 8)},
        warnings=[*source.warnings, *target.warnings()],
    )


def verdicts(source: Source) -> dict[str, list[str]]:
    """For each target, every reason why a source cannot become it without loss."""
    facts = lossless_sizes(source), source.dtype, lossless_table(source)
    return {name: make(source, *facts).reasons_to_refuse() for name, make in TARGETS.items()}


def lossless_table(source: Source) -> Tensor:
    """The rotary table ``(d_r / 2,)`` of all key heads side by side, frequency by frequency."""
    table = source.inverse_frequencies.double()
    return table.repeat_interleave(source.config["num_key_value_heads"])


def lossless_sizes(source: Source) -> MlaSizes:
    """Widths at which nothing is lost: all that is turned as one key, the rest as the latent."""
    groups, dim = source.config["num_key_value_heads"], source.config["head_dim"]
    turned = 2 * len(source.inverse_frequencies)
    return MlaSizes(
        kv_lora_rank=groups * (2 * dim - turned),
        qk_rope_head_dim=groups * turned,
        qk_nope_head_dim=dim - turned,
        v_head_dim=dim,
    )


def _layer(
    source: Source,
    target: Target,
    convert_layer: Callable[..., LatentAttentionWeights],
    index: int,
) -> Part:
    return target.layer(index, convert_layer(source.attention(index)))


def _on_each_of(devices: int, source: Source, after: int, element: int) -> tuple[int, int]:
    """Cached bytes per token on each device; a latent is on all of them, heads are shared out."""
    heads = max(1, source.config["num_key_value_heads"] / devices)
    before = 2 * heads * source.config["head_dim"] * source.dtype.itemsize
    return int(before * source.num_layers), after * element * source.num_layers
