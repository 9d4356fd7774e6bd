"""What a conversion needs to know of a layer's activations: second moments, never activations."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from einops import einsum, rearrange
from torch import Tensor

from efficient_attn.convert.attention_weights import GroupedAttentionWeights, with_tensors
from efficient_attn.convert.mla.assemble import bias_of_keys_and_values
from efficient_attn.convert.mla.pairs import key_heads_of, query_gain
from efficient_attn.convert.mla.turning import Distances

# Scores of this many queries of one head are in memory at a time.
QUERY_BLOCK = 256


@dataclass(frozen=True)
class LayerMoments:
    """Statistics of one layer over calibration tokens, all fp64.

    Attributes:
        mean: ``(2 g d,)`` mean of keys, not turned, and values of all heads.
        second: ``(2 g d, 2 g d)`` mean product of those.
        query: ``(H, d, d)`` mean product of a head's query channels, with the factors of
            :func:`query_gain`.
        distances: How far back each head looks.
        key_weight: ``(H,)`` squared change of the layer's output per squared change of a score,
            summed over the keys of a query: ``E sum_s (p_s |W_O (v_s - o)|)^2``.
        value_weight: ``(H,)`` the same per squared change of ``W_O v``: ``E sum_s p_s^2``.
        inputs: ``(D, D)`` mean product of the layer's inputs, or None where norms on heads made
            that of no use.
    """

    mean: Tensor
    second: Tensor
    query: Tensor
    distances: Distances
    key_weight: Tensor
    value_weight: Tensor
    inputs: Tensor | None = None


class MomentAccumulator:
    """Collects :class:`LayerMoments`, one batch of layer inputs at a time.

    Memory does not grow with the number of tokens: without norms on heads, the moments are those of
    the ``D`` inputs, from which all others follow; with norms, those of the normalised heads.
    """

    def __init__(
        self, weights: GroupedAttentionWeights, device: torch.device | str = "cpu"
    ) -> None:
        self.weights = weights
        self._there = with_tensors(weights, lambda _, x: x.to(device))
        self.linear = weights.query_norm is None and weights.key_norm is None
        width = weights.key.shape[1] if self.linear else 2 * len(weights.key)
        options = {"dtype": torch.float64, "device": device}
        heads, dim = weights.num_heads, weights.head_dim
        self._total = torch.zeros((), **options)
        self._mean = torch.zeros(width, **options)
        self._second = torch.zeros(width, width, **options)
        self._query = torch.zeros(heads, dim, dim, **options)
        self._seen = 0
        self._shares = torch.zeros(heads, 0, **options)
        self._key_weight = torch.zeros(heads, **options)
        self._value_weight = torch.zeros(heads, **options)

    def add(self, x: Tensor, token_weights: Tensor | None = None) -> None:
        """Count the tokens of ``x``, ``(..., D)``, with weights ``(...)`` or alike."""
        x = x.flatten(0, -2)
        weight = x.new_ones(len(x)) if token_weights is None else token_weights.flatten().to(x)
        weight = weight.double()
        self._total += weight.sum()
        if self.linear:
            rows = x.double()
        else:
            w, x = self._there, x.double()
            rows = torch.cat([heads_of(w, x, name).flatten(-2) for name in ("key", "value")], -1)
            query = heads_of(w, x, "query") * query_gain(w).to(x.device)
            self._query += einsum(query, query * weight[:, None, None], "n h a, n h b -> h a b")
        self._mean += weight @ rows
        self._second += rows.mT @ (rows * weight[:, None])

    def attend(self, x: Tensor) -> None:
        """Follow what the queries of one sequence ``(N, D)`` attend to, a block at a time."""
        w, tokens = self._there, len(x)
        key_heads = key_heads_of(w).to(x.device)
        query, key, value = (heads_of(w, x, n).transpose(0, 1) for n in ("query", "key", "value"))
        query, key = (turned(each, w) for each in (query, key))
        key, value = key[key_heads], value[key_heads]
        output = rearrange(w.output, "e (h d) -> h e d", h=w.num_heads).to(x.dtype)
        shown = value @ output.mT  # as it enters the layer's output
        size = shown.square().sum(-1)
        if tokens > self._shares.shape[1]:
            more = self._shares.new_zeros(w.num_heads, tokens - self._shares.shape[1])
            self._shares = torch.cat((self._shares, more), 1)
        for start in range(0, tokens, QUERY_BLOCK):
            end = min(start + QUERY_BLOCK, tokens)
            rows, columns = (torch.arange(*to, device=x.device) for to in ((start, end), (end,)))
            distance = rows[:, None] - columns
            hidden = (distance < 0) | (distance >= (w.window or tokens))
            seen = slice(0, end)
            score = w.scale * query[:, start:end] @ key[:, seen].mT
            p = score.masked_fill(hidden, -torch.inf).softmax(-1)
            out = p @ shown[:, seen]
            apart = size[:, None, seen] - 2 * out @ shown[:, seen].mT
            apart = (apart + out.square().sum(-1, keepdim=True)).clamp(min=0)
            squared = p.square()
            self._value_weight += squared.sum((1, 2)).double()
            self._key_weight += (squared * apart).sum((1, 2)).double()
            self._shares.index_add_(1, distance.clamp(min=0).flatten(), p.double().flatten(1))
        self._seen += tokens

    def finish(self) -> LayerMoments:
        """The moments of everything so far.

        Raises:
            ValueError: Nothing was counted, or no sequence was followed.
        """
        total = float(self._total)
        if not total or not self._seen:
            missing = "add(x)" if not total else "attend(x)"
            raise ValueError(f"there are no moments of nothing; call {missing} first.")
        w = self.weights
        mean, second, query = (m.cpu() / total for m in (self._mean, self._second, self._query))
        inputs = second if self.linear else None
        if self.linear:
            gain = query_gain(w)
            head = rearrange(w.query.double(), "(h d) e -> h d e", h=w.num_heads)
            bias = torch.zeros(len(w.query)).double() if w.query_bias is None else w.query_bias
            head_bias = bias.double().view(w.num_heads, -1)
            query = _second_of(head, head_bias, mean, second) * gain[:, None] * gain
            both = torch.cat((w.key, w.value)).double()
            bias = bias_of_keys_and_values(w)
            second = _second_of(both, bias, mean, second)
            mean = both @ mean + bias
        return LayerMoments(
            mean=mean,
            second=second,
            query=query,
            distances=Distances(self._shares.cpu() / self._seen),
            key_weight=self._key_weight.cpu() / self._seen,
            value_weight=self._value_weight.cpu() / self._seen,
            inputs=inputs,
        )


def calibrate(
    weights: GroupedAttentionWeights,
    inputs: Iterable[Tensor | tuple[Tensor, Tensor]],
    *,
    attended: int = 16,
    device: torch.device | str = "cpu",
) -> LayerMoments:
    """Moments of a layer over all of its inputs.

    Args:
        weights: The layer.
        inputs: Batches ``(B, N, D)`` of what enters the layer, after the norm before it; or pairs
            of them and token weights ``(B, N)``, such as each token's own loss.
        attended: How many sequences to compute attention of, for distances and weights of errors.
        device: Where the inputs are; the moments are on the CPU.
    """
    accumulator = MomentAccumulator(weights, device)
    for batch in inputs:
        x, token_weights = batch if isinstance(batch, tuple) else (batch, None)
        accumulator.add(x, token_weights)
        for row in x[:attended]:
            accumulator.attend(row)
        attended = max(0, attended - len(x))
    return accumulator.finish()


def heads_of(weights: GroupedAttentionWeights, x: Tensor, name: str) -> Tensor:
    """Queries, keys or values ``(..., heads, d)`` of inputs ``(..., D)``, not turned."""
    bias = getattr(weights, f"{name}_bias")
    rows = torch.nn.functional.linear(
        x, getattr(weights, name).to(x.dtype), None if bias is None else bias.to(x.dtype)
    )
    rows = rearrange(rows, "... (h d) -> ... h d", d=weights.head_dim)
    norm = None if name == "value" else getattr(weights, f"{name}_norm")
    if norm is None:
        return rows
    size = rows.square().mean(-1, keepdim=True) + weights.norm_eps
    return rows * size.rsqrt() * norm.to(x.dtype)


def turned(rows: Tensor, weights: GroupedAttentionWeights) -> Tensor:
    """``(heads, N, d)`` turned by their positions, and scaled."""
    frequencies = weights.inverse_frequencies.double()
    pairs = len(frequencies)
    positions = torch.arange(rows.shape[1], dtype=torch.float64, device=rows.device)
    angle = positions[:, None] * frequencies
    cos, sin = (part.to(rows.dtype) * weights.rotary_scale for part in (angle.cos(), angle.sin()))
    first, second, rest = rows.split((pairs, pairs, rows.shape[-1] - 2 * pairs), -1)
    return torch.cat((first * cos - second * sin, first * sin + second * cos, rest), -1)


def _second_of(weight: Tensor, bias: Tensor, mean: Tensor, second: Tensor) -> Tensor:
    """Mean product of ``weight @ x + bias``."""
    at = weight @ mean
    cross = at[..., :, None] * bias[..., None, :]
    product = weight @ second @ weight.mT + cross + cross.mT
    return product + bias[..., :, None] * bias[..., None, :]
