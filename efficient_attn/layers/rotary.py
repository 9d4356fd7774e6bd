"""Rotary position embedding."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


class RotaryEmbedding(nn.Module):
    r"""Turns pairs of channels by an angle proportional to the token's position.

    Pair ``i`` of a token at position ``n`` is turned by ``n * theta ** (-2 * i / dim)``, or by
    ``n * inverse_frequencies[i]``, so that the product of a query and a key depends on their
    distance alone. Angles are computed per call, in fp32 or better, whatever dtype the module has.

    Every way to stretch a model's context (linear, llama3, yarn, longrope) is such a table and a
    factor. A model of transformers has both::

        trained = model.model.rotary_emb
        RotaryEmbedding(
            dim, inverse_frequencies=trained.inv_freq, attention_factor=trained.attention_scaling
        )

    Source: Su et al., RoFormer: Enhanced Transformer with Rotary Position Embedding, section 3.2.2.

    Args:
        dim: How many leading channels of a head are turned; the rest pass through. Even.
        theta: Base of the frequencies.
        interleaved: Pair channels ``(2 i, 2 i + 1)`` as the paper does, instead of
            ``(i, i + dim / 2)`` as Llama and most checkpoints do.
        inverse_frequencies: ``(dim / 2,)``, the angle per token of each pair, instead of ``theta``;
            repeats are allowed. Becomes a buffer whose dtype nothing changes, and angles are
            computed in it.
        attention_factor: Multiplies what is turned, so that scores grow by its square.
        persistent: Whether the state dict holds ``inverse_frequencies``.

    Shape:
        - x: ``(B, H, N, D)`` with ``D >= dim``
        - positions: ``(N,)`` or ``(B, N)``; by default ``0 .. N - 1``
        - output: as ``x``
    """

    def __init__(
        self,
        dim: int,
        *,
        theta: float = 10000.0,
        interleaved: bool = False,
        inverse_frequencies: Tensor | None = None,
        attention_factor: float = 1.0,
        persistent: bool = False,
    ) -> None:
        super().__init__()
        if dim < 2 or dim % 2:
            raise ValueError(f"dim is {dim}; rotary embedding needs a positive even width.")
        if inverse_frequencies is not None:
            if inverse_frequencies.shape != (dim // 2,):
                raise ValueError(
                    f"inverse_frequencies has shape {tuple(inverse_frequencies.shape)}; dim {dim} "
                    f"has ({dim // 2},) pairs."
                )
            exact = torch.promote_types(inverse_frequencies.dtype, torch.float32)
            inverse_frequencies = inverse_frequencies.detach().to(exact, copy=True)
        self.dim = dim
        self.theta = theta
        self.interleaved = interleaved
        self.attention_factor = attention_factor
        self.register_buffer("inverse_frequencies", inverse_frequencies, persistent=persistent)

    def angles(self, positions: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Angle of each pair at each position, ``(..., N, dim / 2)``; override to rescale."""
        table = self.inverse_frequencies
        if table is not None:
            return positions.to(table.dtype).unsqueeze(-1) * table
        exponent = torch.arange(0, self.dim, 2, device=positions.device, dtype=dtype) / self.dim
        return positions.to(dtype).unsqueeze(-1) * self.theta**-exponent

    def forward(self, x: Tensor, positions: Tensor | None = None) -> Tensor:
        """Turn the heads ``x`` by their positions."""
        if x.dim() != 4 or x.shape[-1] < self.dim:
            raise ValueError(
                f"x has shape {tuple(x.shape)}; rotary embedding of {self.dim} channels takes "
                f"(batch, heads, tokens, dim) with dim at least {self.dim}."
            )
        if positions is None:
            positions = torch.arange(x.shape[-2], device=x.device)
        elif positions.dim() not in (1, 2) or positions.shape[-1] != x.shape[-2]:
            raise ValueError(
                f"positions has shape {tuple(positions.shape)} for {x.shape[-2]} tokens; "
                "pass (tokens,) or (batch, tokens)."
            )
        dtype = torch.promote_types(x.dtype, torch.float32)
        angles = self.angles(positions, dtype)
        if angles.dim() == 3:
            angles = angles.unsqueeze(1)  # one row per sample, the same for its heads
        cos, sin = (x * self.attention_factor for x in (angles.cos(), angles.sin()))
        turned, rest = x[..., : self.dim].to(dtype), x[..., self.dim :]
        if self.interleaved:
            first, second = turned[..., 0::2], turned[..., 1::2]
        else:
            first, second = turned.chunk(2, dim=-1)
        pair = (first * cos - second * sin, first * sin + second * cos)
        turned = torch.stack(pair, -1).flatten(-2) if self.interleaved else torch.cat(pair, -1)
        return torch.cat((turned.to(x.dtype), rest), -1)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> RotaryEmbedding:
        # The table moves along and keeps its values: exact angles in a model that is cast to bf16.
        table = self.inverse_frequencies
        super()._apply(fn, recurse)
        if table is not None and not table.is_meta:
            self.inverse_frequencies = table.to(self.inverse_frequencies.device)
        return self

    def extra_repr(self) -> str:
        """Width, base or a table instead, pairing, and a factor if there is one."""
        base = f"theta={self.theta}" if self.inverse_frequencies is None else "inverse_frequencies"
        factor = f", factor={self.attention_factor}" if self.attention_factor != 1 else ""
        return f"{self.dim}, {base}, interleaved={self.interleaved}{factor}"
