"""Grouped-query attention to multi-head latent attention: modes and targets."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from functools import partial

from efficient_attn.convert.activations import Activations
from efficient_attn.convert.attention_weights import LatentAttentionWeights
from efficient_attn.convert.mla import CompressOptions, exact, rorope
from efficient_attn.convert.mla_compress import CompressedLayers
from efficient_attn.convert.mla_targets import ENGINE_SIZES, TARGETS, MlaSizes, NativeTarget
from efficient_attn.convert.pipeline import Conversion, Part
from efficient_attn.convert.rope import default_frequencies
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
        choices: Everything else that ``"compress"`` leaves open.
        allow_larger_cache: Convert although more numbers would be cached than before.

    Raises:
        ValueError: An option has no such value, or does not go with another.
    """

    mode: str = "rorope"
    target: str = "native"
    dtype: str | None = None
    kv_ratio: float | None = None
    kv_lora_rank: int | None = None
    rope_dim: int | None = None
    choices: CompressOptions = field(default_factory=CompressOptions)
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
        if self.kv_lora_rank is not None and self.rope_dim is None and self.target != "engine":
            raise ValueError(
                f"kv_lora_rank is {self.kv_lora_rank} and rope_dim is None; pass both, or kv_ratio."
            )
        if self.mode == "compress" and not given and self.target != "engine":
            raise ValueError("how much to compress? Pass kv_ratio, or kv_lora_rank and rope_dim.")
        if self.rope_dim is not None and self.rope_dim % 2:
            raise ValueError(f"rope_dim is {self.rope_dim}; pairs are turned, so it must be even.")


class LosslessLayers:
    """The layers of a model with as many cached numbers as before, and nothing lost."""

    def __init__(self, source: Source, mode: str = "rorope") -> None:
        self.source = source
        groups, dim = source.config["num_key_value_heads"], source.config["head_dim"]
        turned = 2 * len(source.inverse_frequencies)
        # All that is turned is one key, frequency by frequency, and the rest the latent.
        self.sizes = MlaSizes(
            kv_lora_rank=groups * (2 * dim - turned),
            qk_rope_head_dim=groups * turned,
            qk_nope_head_dim=dim - turned,
            v_head_dim=dim,
        )
        self.table = source.inverse_frequencies.double().repeat_interleave(groups)
        self.output_bias = any(source.family.biases(source.config)[2:])
        self._convert = {"exact": exact, "rorope": rorope}[mode]

    def convert(self, index: int) -> tuple[LatentAttentionWeights, dict[str, float]]:
        """One layer; there is nothing to tell of it."""
        return self._convert(self.source.attention(index)), {}


def plan(
    source: Source,
    options: MlaOptions,
    flow: Callable[[], Activations] | None = None,
    *,
    dry_run: bool = False,
    progress: bool = False,
) -> Conversion:
    """What converting a source to latent attention would do.

    Args:
        source: The model.
        options: What is wanted.
        flow: Makes the calibration tokens flow, which ``"compress"`` needs.
        dry_run: Compute nothing to find out; say what is known without.
        progress: Show a progress bar while sizes are chosen.

    Raises:
        ConversionError: It cannot be done in this way; the message has every reason.
    """
    dtype = source.dtype if options.dtype is None else FLOATING[options.dtype]
    make_target = TARGETS[options.target]
    compressing = options.mode == "compress"
    layers = _compressed(source, options) if compressing else LosslessLayers(source, options.mode)
    target = make_target(source, layers, dtype)
    before = 2 * source.config["num_key_value_heads"] * source.config["head_dim"]
    after = layers.sizes.kv_lora_rank + layers.sizes.qk_rope_head_dim
    _refuse(source, options, target.reasons_to_refuse(), before, after)
    warnings = [*source.warnings, *target.warnings()]
    calibrated = None
    if compressing and dry_run and layers.open:
        warnings.append(
            "the rotary width is chosen on calibration tokens; "
            f"{layers.sizes.qk_rope_head_dim} stands for it here."
        )
    elif compressing and not dry_run:
        if flow is None:
            raise ConversionError(
                "mode 'compress' chooses by what the model computes on a text: pass calib, a file "
                "of text like what the model is used on."
            )
        activations = flow()
        calibrated = activations.digest
        layers.settle(activations, one_table=target.one_table, progress=progress)
        target = make_target(source, layers, dtype)
        after = layers.sizes.kv_lora_rank + layers.sizes.qk_rope_head_dim
    count, element = source.num_layers, dtype.itemsize
    told = {"dtype": target.dtype_name, "calibration": calibrated}
    return Conversion(
        method="mla",
        decisions={**asdict(options), **told, **asdict(layers.sizes)},
        parts=target.parts(partial(_layer, layers, target)),
        config=target.config,
        bytes_per_token=(before * count * source.dtype.itemsize, after * count * element),
        parameters=(source.parameters, target.parameters()),
        output_bytes=target.parameters() * element,
        memory_bytes=target.memory_bytes() + (_memory_of_moments(source) if compressing else 0),
        parallel={str(n): _on_each_of(n, source, after, element) for n in (1, 2, 4, 8)},
        warnings=warnings,
    )


def verdicts(source: Source) -> dict[str, list[str]]:
    """For each target, every reason why a source cannot become it without loss."""
    layers = LosslessLayers(source)
    return {
        name: make(source, layers, source.dtype).reasons_to_refuse()
        for name, make in TARGETS.items()
    }


def _compressed(source: Source, options: MlaOptions) -> CompressedLayers:
    choices, table, rope_dim = options.choices, None, options.rope_dim
    if options.target == "engine":
        rope_dim = ENGINE_SIZES[0][1] if rope_dim is None else rope_dim
        table = default_frequencies(rope_dim, source.rope["rope_theta"])
        choices = replace(choices, output_bias=False)
    if options.kv_ratio is not None:
        source_total = 2 * source.config["num_key_value_heads"] * source.config["head_dim"]
        total = math.floor(options.kv_ratio * source_total)
    elif options.kv_lora_rank is not None:
        total = options.kv_lora_rank + rope_dim
    else:
        total = sum(ENGINE_SIZES[0])
    return CompressedLayers(source, total, rope_dim, choices, table=table)


def _refuse(
    source: Source, options: MlaOptions, reasons: list[str], before: int, after: int
) -> None:
    if after > before and not options.allow_larger_cache:
        reasons = [
            *reasons,
            f"it would cache {after} numbers per token and layer, and {before} are cached now "
            "(allow_larger_cache converts it all the same)",
        ]
    if reasons:
        advice = "" if options.target == "native" else " Target 'native' may take it."
        raise ConversionError(
            f"{source.checkpoint.folder} cannot become {options.target!r}: "
            f"{'; '.join(reasons)}.{advice}"
        )


def _layer(layers: LosslessLayers | CompressedLayers, target: NativeTarget, index: int) -> Part:
    weights, notes = layers.convert(index)
    tensors, more = target.layer(index, weights)
    return tensors, notes | more


def _memory_of_moments(source: Source) -> int:
    width = source.config["hidden_size"]
    rows = 2 * source.config["num_key_value_heads"] * source.config["head_dim"]
    return 8 * (2 * width**2 + 12 * rows**2)


def _on_each_of(devices: int, source: Source, after: int, element: int) -> tuple[int, int]:
    """Cached bytes per token on each device; a latent is on all of them, heads are shared out."""
    heads = max(1, source.config["num_key_value_heads"] / devices)
    before = 2 * heads * source.config["head_dim"] * source.dtype.itemsize
    return int(before * source.num_layers), after * element * source.num_layers
