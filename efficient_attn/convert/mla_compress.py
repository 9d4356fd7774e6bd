"""Compressing all layers of a model: sizes, a rotary table for all, and the order of work."""

from __future__ import annotations

from dataclasses import replace
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
    turned_in_part,
    with_query_latent,
)
from efficient_attn.convert.mla.sizes import (
    SHARES,
    best_choice,
    candidates,
    error_curve,
    rank_beside,
    shared_table,
    sizes_by_layer,
    turning_gains,
)
from efficient_attn.convert.mla_output import refit_output, wanted_behind
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
        per_layer: Give layers different sizes, ``numbers`` of each in the mean.
        q_lora_rank: Width of a latent to make queries from, or None.
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
        per_layer: bool = False,
        q_lora_rank: int | None = None,
        attended: int = 16,
    ) -> None:
        self.source = source
        self.numbers = numbers
        self.options = options
        self.per_layer = per_layer
        self.q_lora_rank = q_lora_rank
        self.attended = attended
        self.open = rope_dim is None or options.fold is None or per_layer
        self.flow: Activations | None = None
        # What flows behind converted layers, where something is fitted to that.
        self.behind: Activations | None = None
        self._rope_dim = rope_dim
        self._token_weights: Tensor | None = None
        self._prescribed = table
        if self.open and numbers < 3:
            raise ConversionError(
                f"{numbers} numbers per token and layer are too few to cache; 3 are the least."
            )
        if self.open:
            found = candidates(source.outline(0), numbers, rope_dim, options)
            rope_dim = found[len(found) // 2][1]
        self._settle_on([(numbers, rope_dim)] * source.num_layers)
        biases = source.family.biases(source.config)
        may_have = options.output_bias and (options.center or options.refit_output)
        self.output_bias = biases[2] or biases[3] or may_have

    def settle(self, flow: Activations, *, one_table: bool, progress: bool = False) -> None:
        """Choose sizes, the fold, and maybe one table, as far as they are open.

        Args:
            flow: Calibration tokens.
            one_table: Whether all layers must turn by the same frequencies.
            progress: Show a progress bar.
        """
        self.flow = flow
        if self.options.sequential or self.options.refit_output:
            self.behind = Activations(self.source, flow.rows, device=flow.device)
        if self.options.weigh_tokens:
            self._token_weights = flow.losses()
            flow.restart()
        one_table = one_table and self._prescribed is None
        if not self.open and not one_table:
            return
        shares = SHARES if self.per_layer else (1.0,)
        numbers = sorted({self._at_most(share * self.numbers) for share in shares})
        curves: list[dict[int, dict[tuple[int, int], float]]] = []
        gains = []
        layers = range(self.source.num_layers)
        for index in tqdm(layers, unit="layer", desc="choosing", disable=not progress):
            weights = self.source.attention(index)
            moments = self._moments(weights, flow)
            if self.open:
                curves.append({n: self._curve(weights, moments, n, one_table) for n in numbers})
            gains.append(turning_gains(weights, moments))
            flow.advance()
        flow.restart()
        sizes = [(self.numbers, self.sizes[0].qk_rope_head_dim)] * self.source.num_layers
        if self.open:
            even = self._at_most(self.numbers)
            fold, rope_dim = best_choice(curve[even] for curve in curves)
            self.options = replace(self.options, fold=fold)
            sizes = [(self.numbers, rope_dim)] * self.source.num_layers
        if self.per_layer:
            sizes = sizes_by_layer(curves, fold, self.numbers * self.source.num_layers)
        if one_table and self.options.selection != "grid":
            count = sizes[0][1] // 2
            self._prescribed = shared_table(gains, self.source.inverse_frequencies, count)
        self._settle_on(sizes)

    def convert(self, index: int) -> tuple[LatentAttentionWeights, dict[str, float]]:
        """One compressed layer, and figures of what it costs.

        ``key_error`` and ``value_error`` are expected mean squares of the change of the layer's
        output. ``output_error`` is its relative change on the first calibration tokens;
        ``rope_error`` is that of turning less alone, and ``rank_error`` that of what it adds to
        cache less. ``latent_mean_square_seen`` is the largest of a latent on those tokens.
        """
        if self.flow.layer > index:
            self.flow.restart()
            if self.behind is not None:
                self.behind.restart()
        while self.flow.layer < index:
            self._advance(None if self.behind is None else self._current()[2])
        weights, moments, found = self._current()
        notes = {"key_error": found.key_error, "value_error": found.value_error}
        notes |= self._errors(weights, moments, found)
        if weights.query_norm is None:
            notes["latent_mean_square_seen"] = self._latent_mean_square(found.weights)
        self._advance(found)
        return found.weights, notes

    def turned_in_part(self, index: int) -> LatentAttentionWeights:
        """A layer that turns as little as the compressed one, and keeps everything else."""
        self.flow.go_to(index)
        weights = self.source.attention(index)
        return self._turned_in_part(weights, self._moments(weights, self.flow))

    def _current(self) -> tuple[GroupedAttentionWeights, LayerMoments, Compressed]:
        weights = self.source.attention(self.flow.layer)
        moments = self._moments(weights, self.behind if self.options.sequential else self.flow)
        return weights, moments, self._compress(weights, moments)

    def _advance(self, found: Compressed | None) -> None:
        self.flow.advance()
        if self.behind is not None:
            weights = in_fp32(found.weights, self.behind.device)
            self.behind.advance(partial(latent_attention, weights))

    def _moments(self, weights: GroupedAttentionWeights, flow: Activations) -> LayerMoments:
        inputs = flow.inputs()
        if self._token_weights is not None:
            inputs = zip(inputs, self._token_weights.split(flow.batch), strict=True)
        options = {"attended": self.attended, "device": flow.device}
        return calibrate(in_fp32(weights), inputs, **options)

    def _curve(
        self,
        weights: GroupedAttentionWeights,
        moments: LayerMoments,
        numbers: int,
        one_table: bool,
    ) -> dict[tuple[int, int], float]:
        curve = error_curve(weights, moments, numbers, self.options, rope_dim=self._rope_dim)
        return {choice: e for choice, e in curve.items() if choice[1] or not one_table}

    def _compress(self, weights: GroupedAttentionWeights, moments: LayerMoments) -> Compressed:
        sizes = self.sizes[self.flow.layer]
        try:
            found = compress(
                weights,
                moments,
                kv_lora_rank=sizes.kv_lora_rank,
                rope_dim=sizes.qk_rope_head_dim,
                options=self.options,
                frequencies=self._prescribed,
            )
            made = found.weights
            if self.q_lora_rank is not None:
                made = with_query_latent(made, weights, self.q_lora_rank, moments.inputs)
        except ValueError as error:
            raise ConversionError(str(error)) from error
        if self.options.refit_output:
            bias, device = self.output_bias, self.flow.device
            wanted = wanted_behind(self.flow, self.behind, weights)
            made = refit_output(made, wanted, bias=bias, device=device)
        return replace(found, weights=made)

    def _turned_in_part(
        self, weights: GroupedAttentionWeights, moments: LayerMoments
    ) -> LatentAttentionWeights:
        return turned_in_part(
            weights,
            moments,
            rope_dim=self.sizes[self.flow.layer].qk_rope_head_dim,
            options=self.options,
            frequencies=self._prescribed,
        )

    def _errors(
        self, weights: GroupedAttentionWeights, moments: LayerMoments, found: Compressed
    ) -> dict[str, float]:
        row = self.flow.first_input()
        expected = grouped_attention(in_fp32(weights), row)
        turned, got = (
            latent_attention(in_fp32(each), row)
            for each in (self._turned_in_part(weights, moments), found.weights)
        )
        size = expected.norm().clamp(min=1e-30)
        pairs = {
            "rope_error": (turned, expected),
            "rank_error": (got, turned),
            "output_error": (got, expected),
        }
        return {name: float((x - y).norm() / size) for name, (x, y) in pairs.items()}

    def _latent_mean_square(self, weights: LatentAttentionWeights) -> float:
        """The largest on the first calibration tokens, where stock classes have only a bound."""
        down = weights.latent_down[: weights.kv_lora_rank].float()
        return float((self.flow.first_input() @ down.mT).square().mean(-1).max())

    def _at_most(self, numbers: float) -> int:
        """So many numbers, or as many as a layer can use, or as few as it can have."""
        return max(3, min(int(numbers), 2 * len(self.source.outline(0).key)))

    def _settle_on(self, sizes: list[tuple[int, int]]) -> None:
        """Take so many numbers in each layer, and so many of them turned."""
        dim, outline = self.source.config["head_dim"], self.source.outline(0)
        try:
            ranks = [rank_beside(outline, *size) for size in sizes]
        except ValueError as error:
            raise ConversionError(
                f"{self.numbers} cached numbers per token and layer do not fit this model: {error}"
            ) from error
        self.sizes = tuple(
            MlaSizes(rank, rope_dim, dim, dim)
            for rank, (_, rope_dim) in zip(ranks, sizes, strict=True)
        )
        self.table = self._prescribed
        if self.table is None:
            # That of TransMLA's grid; where layers are free, theirs go with them instead.
            stride = self._stride(self.sizes[0].qk_rope_head_dim)
            self.table = self.source.inverse_frequencies.double()[::stride]

    def _stride(self, rope_dim: int) -> int:
        pairs = len(self.source.inverse_frequencies)
        return max(1, pairs // max(1, rope_dim // 2))
