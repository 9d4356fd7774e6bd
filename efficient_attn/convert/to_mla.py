"""Grouped-query attention to multi-head latent attention: modes and targets."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial

from torch import Tensor

from efficient_attn.convert.activations import Activations
from efficient_attn.convert.attending import in_fp32, latent_attention
from efficient_attn.convert.mla_compress import CompressedLayers
from efficient_attn.convert.mla_lossless import FactoredLayers, LosslessLayers
from efficient_attn.convert.mla_options import MlaOptions
from efficient_attn.convert.mla_stock import (
    ENGINE_SIZES,
    TARGETS,
    DeepseekTarget,
    EngineTarget,
)
from efficient_attn.convert.mla_targets import FactoredTarget, MlaSizes, NativeTarget
from efficient_attn.convert.pipeline import Conversion, Part
from efficient_attn.convert.source import FLOATING, Source
from efficient_attn.convert.stock_rope import engine_rope
from efficient_attn.errors import ConversionError

AnyLayers = LosslessLayers | FactoredLayers | CompressedLayers
DEVICES = (1, 2, 4, 8)


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
        flow: Makes the calibration tokens flow, which ``"compress"`` needs, and ``"rorope"`` can
            do with.
        dry_run: Compute nothing to find out; say what is known without.
        progress: Show a progress bar while sizes are chosen.

    Raises:
        ConversionError: It cannot be done in this way; the message has every reason.
    """
    layers, target = _made(source, options)
    _refuse(source, options, target, calibrates=flow is not None)
    warnings = [*source.warnings, *target.warnings()]
    compressing, activations = isinstance(layers, CompressedLayers), None
    if compressing and dry_run and layers.open:
        warnings.append(
            "sizes are chosen on calibration tokens; "
            f"{layers.sizes[0].qk_rope_head_dim} turned numbers stand for them here."
        )
    if compressing and not dry_run and flow is None:
        raise ConversionError(
            "mode 'compress' chooses by what the model computes on a text: pass calib, a file "
            "of text like what the model is used on."
        )
    if flow is not None and not dry_run:
        activations = flow()
        if compressing:
            layers.settle(activations, one_table=target.one_table, progress=progress)
            target = _target(source, options, layers)
        else:
            layers.flow = activations
    before, after = _source_numbers(source), _numbers(target.sizes)
    width, element = source.num_layers * source.dtype.itemsize, target.dtype.itemsize
    parallel = {n: _on_each_of(n, source, after * element) for n in _devices(options)}
    warnings += _warnings_of_sharing(parallel, options.tp)
    told = {"dtype": target.dtype_name, "calibration": activations and activations.digest}
    told |= {"choices": asdict(layers.options if compressing else options.choices)}
    return Conversion(
        method="mla",
        decisions={**_asked(options), **told, **_told(target.sizes)},
        parts=target.parts(partial(_layer, layers, target)),
        config=target.config,
        bytes_per_token=(before * width, after * element),
        parameters=(source.parameters, target.parameters()),
        output_bytes=target.parameters() * element,
        memory_bytes=target.memory_bytes()
        + (_memory_of_moments(source) if compressing or flow else 0),
        parallel={str(n): pair for n, pair in parallel.items()},
        warnings=warnings,
        less_turned=partial(_less_turned, layers) if compressing else None,
        checks=activations and target.checks(activations.rows),
    )


def verdicts(source: Source) -> dict[str, list[str]]:
    """For each target, every reason why a source cannot become it without loss."""
    layers = LosslessLayers(source)
    return {
        name: make(source, layers, source.dtype).reasons_to_refuse()
        for name, make in TARGETS.items()
    }


def _made(source: Source, options: MlaOptions) -> tuple[AnyLayers, NativeTarget]:
    if options.mode == "compress":
        layers = _compressed(source, options)
    elif options.factor != "selector":
        layers = FactoredLayers(source, options.factor, options.seed)
    else:
        latent = options.q_lora_rank
        layers = LosslessLayers(source, options.mode, None, options.choices.rotation, latent)
    return layers, _target(source, options, layers)


def _target(source: Source, options: MlaOptions, layers: AnyLayers) -> NativeTarget:
    dtype = source.dtype if options.dtype is None else FLOATING[options.dtype]
    make = TARGETS[options.target]
    if make is EngineTarget:
        return make(source, layers, dtype, allow_rope_approx=options.allow_rope_approx)
    if make is NativeTarget and isinstance(layers, FactoredLayers):
        make = FactoredTarget
    return make(source, layers, dtype)


def _compressed(source: Source, options: MlaOptions) -> CompressedLayers:
    choices, table, rope_dim = options.choices, None, options.rope_dim
    if options.target == "engine":
        rope_dim = ENGINE_SIZES[0][1] if rope_dim is None else rope_dim
        table = engine_rope(source, rope_dim)[1]
        choices = replace(choices, output_bias=False)
    if options.kv_ratio is not None:
        total = math.floor(options.kv_ratio * _source_numbers(source))
    elif options.kv_budget is not None:
        dtype = source.dtype if options.dtype is None else FLOATING[options.dtype]
        total = options.kv_budget // (dtype.itemsize * source.num_layers)
    elif options.kv_lora_rank is not None:
        total = options.kv_lora_rank + rope_dim
    else:
        total = sum(ENGINE_SIZES[0])
    return CompressedLayers(
        source,
        total,
        rope_dim,
        choices,
        table=table,
        per_layer=options.per_layer,
        q_lora_rank=options.q_lora_rank,
    )


def _refuse(source: Source, options: MlaOptions, target: NativeTarget, *, calibrates: bool) -> None:
    reasons = target.reasons_to_refuse()
    if options.mode == "exact" and calibrates:
        reasons.append("mode 'exact' is not fitted to anything, and calib is given")
    if isinstance(target, DeepseekTarget):
        if options.per_layer:
            reasons.append(
                "its layers would have different sizes, and DeepSeek's have the same: filled up "
                "with zeros, each would cache as much as the widest"
            )
        if options.factor != "selector":
            reasons.append(
                f"keys of factor {options.factor!r} are mixed before they are turned, and DeepSeek "
                "caches what is turned"
            )
    before, after = _source_numbers(source) * source.num_layers, _numbers(target.sizes)
    if after > before and not options.allow_larger_cache:
        reasons.append(
            f"it would cache {after // source.num_layers} numbers per token and layer, and "
            f"{before // source.num_layers} are cached now "
            "(allow_larger_cache converts it all the same)",
        )
    if reasons:
        advice = "" if options.target == "native" else " Target 'native' may take it."
        raise ConversionError(
            f"{source.checkpoint.folder} cannot become {options.target!r}: "
            f"{'; '.join(reasons)}.{advice}"
        )


def _layer(layers: AnyLayers, target: NativeTarget, index: int) -> Part:
    weights, notes = layers.convert(index)
    tensors, more = target.layer(index, weights)
    return tensors, notes | more


def _less_turned(layers: CompressedLayers, rows: Tensor) -> dict[str, float]:
    """Losses on rows of text, in nats per token: before, and turning less but keeping the rest."""
    flow = Activations(layers.source, rows, device=layers.flow.device)
    before = flow.losses()
    flow.restart()
    for index in range(layers.source.num_layers):
        weights = in_fp32(layers.turned_in_part(index), flow.device)
        flow.advance(partial(latent_attention, weights))
    losses = {"source": before, "turned in part": flow.losses()}
    return {name: float(each[:, 1:].double().mean()) for name, each in losses.items()}


def _asked(options: MlaOptions) -> dict[str, object]:
    """Those options that have a say in the output."""
    return {name: x for name, x in asdict(options).items() if name not in ("tp", "choices")}


def _told(sizes: Sequence[MlaSizes]) -> dict[str, object]:
    """Sizes as one number each, or one for each layer where they differ."""
    if len(set(sizes)) == 1:
        return asdict(sizes[0])
    return {name: [asdict(each)[name] for each in sizes] for name in asdict(sizes[0])}


def _numbers(sizes: Sequence[MlaSizes]) -> int:
    """Cached per token by all layers."""
    return sum(each.kv_lora_rank + each.qk_rope_head_dim for each in sizes)


def _source_numbers(source: Source) -> int:
    """Cached per token by one layer of the source."""
    return 2 * source.config["num_key_value_heads"] * source.config["head_dim"]


def _memory_of_moments(source: Source) -> int:
    width, rows = source.config["hidden_size"], _source_numbers(source)
    heads = source.config["num_attention_heads"] * source.config["head_dim"]
    return 8 * (2 * width**2 + 12 * rows**2 + 3 * heads**2)


def _devices(options: MlaOptions) -> list[int]:
    return sorted({*DEVICES, *(() if options.tp is None else (options.tp,))})


def _on_each_of(devices: int, source: Source, after: int) -> tuple[int, int]:
    """Cached bytes per token on each device; a latent is on all of them, heads are shared out."""
    heads = max(1, source.config["num_key_value_heads"] / devices)
    before = 2 * heads * source.config["head_dim"] * source.dtype.itemsize
    return int(before * source.num_layers), after


def _warnings_of_sharing(parallel: dict[int, tuple[int, int]], tp: int | None) -> list[str]:
    """Whether heads shared out cache less than a latent on every device; of ``tp`` devices only."""
    worse = [n for n, (before, after) in parallel.items() if after > before and tp in (None, n)]
    if not worse:
        return []
    return [
        f"on {min(worse)} devices that share the heads, each caches more than before: the latent "
        "lies on all of them."
    ]
