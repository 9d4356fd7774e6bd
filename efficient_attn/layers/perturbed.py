"""Grouped-query attention with noise on what the heads give."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from efficient_attn.errors import UnsupportedError
from efficient_attn.functional import perturb_heads
from efficient_attn.functional.grouping import check_choice
from efficient_attn.layers.grouped import GroupedQueryAttention

Noise = Literal["gaussian", "uniform"]


class PGQA(GroupedQueryAttention):
    """Perturbed grouped-query attention: every head's output is centred and blurred in training.

    Of the output ``o`` of a head, ``mean(o) + std(o) * n`` is subtracted, with statistics over the
    tokens and channels of one sample and noise ``n`` of mean 0 and variance 1 that is drawn for
    each call and head, and shared by the samples. So the mean becomes 0 and the variance about
    twice what it was. In evaluation nothing is done, unless asked for.

    Source: Khan et al., arXiv 2408.08454. ``compat="khan2024"`` is the authors' code: the noise is
    uniform, one element of each head is left out, and evaluation is perturbed as well.

    Args:
        embed_dim: Width ``E`` of the tokens.
        num_heads: Number of query heads ``Hq``.
        noise: The law of the noise, ``"gaussian"`` or ``"uniform"``; by default ``"gaussian"``,
            with ``compat`` ``"uniform"``.
        in_evaluation: Whether evaluation is perturbed too; by default with ``compat`` only.
        compat: ``"khan2024"`` for the published noise; needs even groups.
        options: Of :class:`GroupedQueryAttention`, such as ``num_kv_heads`` and ``rotary``.

    Shape:
        - x: ``(B, N, E)``
        - output: ``(B, N, E)``

    Raises:
        UnsupportedError: ``causal``: the statistics of a head are over all tokens, later ones too.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        noise: Noise | None = None,
        in_evaluation: bool | None = None,
        compat: Literal["khan2024"] | None = None,
        **options: object,
    ) -> None:
        super().__init__(embed_dim, num_heads, **options)
        check_choice("compat", compat, (None, "khan2024"))
        if noise is None:
            noise = "gaussian" if compat is None else "uniform"
        check_choice("noise", noise, ("gaussian", "uniform"))
        if self.causal:
            raise UnsupportedError(
                "PGQA",
                ["the layer is causal, and mean and std of a head are over all tokens"],
                "GroupedQueryAttention is the same layer without the noise.",
            )
        if compat and (self.head_map.q_to_k is not None or self.head_map.q_to_v is not None):
            raise ValueError("compat='khan2024' knows even groups only; pass num_kv_heads.")
        self.noise = noise
        self.in_evaluation = bool(compat) if in_evaluation is None else in_evaluation
        self.compat = compat

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        *,
        key_lengths: Tensor | None = None,
        **options: object,
    ) -> Tensor:
        """As the exact layer; ``key_lengths`` says of ``x`` too how much of it is padding."""
        if context is not None and key_lengths is not None and self._is_noisy:
            raise UnsupportedError(
                "PGQA",
                ["key_lengths tells the padding of context, and the statistics are over x"],
                "Leave out one of the two, or call evaluation without noise.",
            )
        return super().forward(x, context, key_lengths=key_lengths, **options)

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        key_lengths: Tensor | None = None,
        **options: object,
    ) -> Tensor:
        """Attended heads, perturbed in training."""
        out = super().attend(query, key, value, key_lengths=key_lengths, **options)
        if not self._is_noisy:
            return out
        return perturb_heads(out, self.draw_noise(out), lengths=key_lengths)

    def draw_noise(self, out: Tensor) -> Tensor:
        """Noise of mean 0 and variance 1 for attended heads ``(B, Hq, N, D)``, ``(Hq, N, D)``."""
        draw = torch.randn if self.noise == "gaussian" else torch.rand
        dtype = out.dtype if out.dtype == torch.float64 else torch.float32
        noise = draw(out.shape[1:], device=out.device, dtype=dtype).flatten(1)
        if self.compat:
            # The element of each head whose number is that of the head in its group, where it has.
            place = torch.arange(self.num_heads, device=out.device)
            place = (place % (self.num_heads // self.num_key_heads)).unsqueeze(1)
            noise = noise.scatter(1, place.clamp(max=noise.shape[1] - 1), 0.0)
        std, mean = torch.std_mean(noise, dim=1, keepdim=True)
        noise = (noise - mean) / std.where(std > 0, 1.0)
        return noise.view(out.shape[1:]).to(out.dtype)

    def extra_repr(self) -> str:
        """That of the exact layer, and the noise."""
        own = f"noise={self.noise!r}, in_evaluation={self.in_evaluation}, compat={self.compat!r}"
        return f"{super().extra_repr()}, {own}"

    @property
    def _is_noisy(self) -> bool:
        return self.training or self.in_evaluation
