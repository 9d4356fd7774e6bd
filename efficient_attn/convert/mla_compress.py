"""Compressing all layers of a model: sizes, a rotary table for all, and the order of work."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from torch import Tensor
from tqdm import tqdm

from efficient_attn.convert.activations import Activations
from efficient_attn.convert.attending import grouped_attention, in_fp32, latent_attention
from efficient_attn.convert.attention_weights import (
    GroupedAttentionWeights,
    LatentAttentionWeights,
)
from efficient_attn.convert.mla import (
    Compressed,
    CompressOptions,
    LayerMoments,
    calibrate,
    compress,
)
from efficient_attn.convert.mla.sizes import (
    best_rope_dim,
    candidate_rope_dims,
    error_curve,
    rank_beside,
    shared_table,
    turning_gains,
)
from efficient_attn.convert.mla_targets import MlaSizes
from efficient_attn.convert.source import Source
from efficient_attn.errors import ConversionError


class CompressedLayers:
    """The layers of a model one after the other, each compressed on what reaches it.

    Args:
        source: The model.
        numbers: How many are cached of a token and layer, of latent and rotary key together.
        rope_dim: Those of the rotary key, or None to choose.
        options: The other choices.
        table: ``(d_r / 2,)`` frequencies that the target prescribes, or None.
        attended: Sequences of which attention itself is computed.

    Raises:
        ConversionError: No layer of this source can be that small or that large.
    """

    def __init__(
        self,
        source: Source,
        numbers: int,
        rope_dim: int | None,
        options: CompressOptions,
        *,
        table: Tensor | None = None,
        attended: int = 16,
    ) -> None:
        self.source = source
        self.numbers = numbers
        self.options = options
        self.attended = attended
        self.open = rope_dim is None
        self.flow: Activations | None = None
        self._token_weights: Tensor | None = None
        self._prescribed = table
        outline = source.outline(0)
        if rope_dim is None:
            if numbers < 3:
                raise ConversionError(
                    f"{numbers} numbers per token and layer are too few to cache; 3 are the least."
                )
            candidates = candidate_rope_dims(outline, numbers, options)
            rope_dim = candidates[len(candidates) // 2]
        self._settle_on(rope_dim)
        biases = source.family.biases(source.config)
        self.output_bias = biases[2] or biases[3] or (options.center and options.output_bias)

    def settle(self, flow: Activations, *, one_table: bool, progress: bool = False) -> None:
        """Choose what is the same for all layers: the rotary width, and maybe one table.

        Args:
            flow: Calibration tokens.
            one_table: Whether all layers must turn by the same frequencies.
            progress: Show a progress bar.
        """
        self.flow = flow
        if self.options.weigh_tokens:
            self._token_weights = flow.losses()
            flow.restart()
        one_table = one_table and self._prescribed is None
        if not self.open and not one_table:
            return
        curves, gains = [], []
        layers = range(self.source.num_layers)
        for index in tqdm(layers, unit="layer", desc="choosing", disable=not progress):
            weights = self.source.attention(index)
            moments = self._moments(weights)
            if self.open:
                curve = error_curve(weights, moments, self.numbers, self.options)
                curves.append({width: e for width, e in curve.items() if width or not one_table})
            gains.append(turning_gains(weights, moments))
            flow.advance()
        flow.restart()
        rope_dim = best_rope_dim(curves) if self.open else self.sizes.qk_rope_head_dim
        if one_table and self.options.selection != "grid":
            self._prescribed = shared_table(gains, self.source.inverse_frequencies, rope_dim // 2)
        self._settle_on(rope_dim)

    def convert(self, index: int) -> tuple[LatentAttentionWeights, dict[str, float]]:
        """One compressed layer, and figures of what it costs.

        ``key_error`` and ``value_error`` are expected mean squares of the change of the layer's
        output; ``output_error`` is its relative change on the first calibration tokens.
        """
        if self.flow.layer > index:
            self.flow.restart()
        while self.flow.layer < index:
            found = self._current()[1] if self.options.sequential else None
            self._advance(found)
        weights, found = self._current()
        changed = self._output_error(weights, found)
        self._advance(found if self.options.sequential else None)
        notes = {"key_error": found.key_error, "value_error": found.value_error}
        return found.weights, {**notes, "output_error": changed}

    def _current(self) -> tuple[GroupedAttentionWeights, Compressed]:
        weights = self.source.attention(self.flow.layer)
        moments = self._moments(weights)
        return weights, self._compress(weights, moments)

    def _advance(self, found: Compressed | None) -> None:
        self.flow.advance(
            None if found is None else partial(latent_attention, in_fp32(found.weights))
        )

    def _moments(self, weights: GroupedAttentionWeights) -> LayerMoments:
        return calibrate(in_fp32(weights), self._inputs(), attended=self.attended)

    def _inputs(self) -> Iterator[Tensor | tuple[Tensor, Tensor]]:
        if self._token_weights is None:
            yield from self.flow.inputs()
        else:
            batches = self._token_weights.split(self.flow.batch)
            yield from zip(self.flow.inputs(), batches, strict=True)

    def _compress(self, weights: GroupedAttentionWeights, moments: LayerMoments) -> Compressed:
        try:
            return compress(
                weights,
                moments,
                kv_lora_rank=self.sizes.kv_lora_rank,
                rope_dim=self.sizes.qk_rope_head_dim,
                options=self.options,
                frequencies=self._prescribed,
            )
        except ValueError as error:
            raise ConversionError(str(error)) from error

    def _output_error(self, weights: GroupedAttentionWeights, found: Compressed) -> float:
        row = next(self.flow.inputs())[0]
        expected = grouped_attention(in_fp32(weights), row)
        got = latent_attention(in_fp32(found.weights), row)
        return float((got - expected).norm() / expected.norm().clamp(min=1e-30))

    def _settle_on(self, rope_dim: int) -> None:
        try:
            rank = rank_beside(self.source.outline(0), self.numbers, rope_dim)
        except ValueError as error:
            raise ConversionError(
                f"{self.numbers} cached numbers per token and layer do not fit this model: {error}"
            ) from error
        dim = self.source.config["head_dim"]
        self.sizes = MlaSizes(rank, rope_dim, dim, dim)
        self.table = self._prescribed
        if self.table is None:
            # That of TransMLA's grid; where layers are free, theirs go with them instead.
            self.table = self.source.inverse_frequencies.double()[:: self._stride(rope_dim)]

    def _stride(self, rope_dim: int) -> int:
        pairs = len(self.source.inverse_frequencies)
        return max(1, pairs // max(1, rope_dim // 2))
