"""A drop-in for ``torch.nn.MultiheadAttention``."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from efficient_attn.errors import UnsupportedError
from efficient_attn.functional import attention


class MultiheadAttention(nn.MultiheadAttention):
    r"""``torch.nn.MultiheadAttention`` with this package's attention underneath.

    Only ``forward`` is new. Constructor, parameters, initialisation and state dict are inherited,
    so checkpoints move in both directions and a layer can be swapped inside a model.

    Masks keep torch's polarity: a boolean True blocks a position, a floating mask is added to the
    scores. They reach the kernel as they broadcast: a key padding mask costs ``B * S`` numbers, and
    a causal mask announced with ``is_causal`` none.

    Weights are written out, ``B * heads * L * S`` numbers, only where they are needed: when
    ``need_weights`` is true (the default, as in torch) and in training with dropout. Pass
    ``need_weights=False`` for speed.

    Where it differs from torch:
        - A query whose keys are all masked attends to nothing: its weights and its input to
          ``out_proj`` are zero, with zero gradient, where torch gives NaN in most of its paths.
        - The hint ``is_causal`` is believed for square self-attention only. With ``L != S``,
          ``add_bias_kv`` or ``add_zero_attn``, the mask itself is used.
        - Shape errors are ``ValueError`` and name the argument.
        - Nested tensors are refused.

    ``torch.nn.TransformerEncoderLayer`` in ``eval`` without gradients reads the weights of its
    attention and runs a fused kernel of its own instead of calling any attention module;
    ``torch.backends.mha.set_fastpath_enabled(False)`` makes it call this one.

    Shape:
        With ``L`` queries, ``S`` keys, ``B`` samples, ``E`` = ``embed_dim``:

        - query: ``(L, B, E)``; ``(B, L, E)`` if ``batch_first``; or unbatched ``(L, E)``
        - key, value: the same with ``S``, ``kdim`` and ``vdim``
        - key_padding_mask: ``(B, S)`` or unbatched ``(S,)``
        - attn_mask: ``(L, S)`` or ``(B * num_heads, L, S)``
        - output: as ``query``
        - weights: ``(B, L, S)``, or ``(B, num_heads, L, S)`` without ``average_attn_weights``;
          unbatched without ``B``; ``S`` grows by one for each of ``add_bias_kv``, ``add_zero_attn``
    """

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend from ``query`` to ``key`` and ``value``.

        Args:
            query: Tokens that attend.
            key: Tokens attended to.
            value: What is read from them.
            key_padding_mask: Keys that nobody of a sample may see.
            need_weights: Whether to return the attention weights, which costs writing them out.
            attn_mask: Keys that a query may not see, or what to add to the scores.
            average_attn_weights: Whether to return their mean over heads.
            is_causal: A promise that ``attn_mask`` is the causal mask, so that it need not be read.

        Returns:
            The output, and the weights or None. In training with dropout these are, as in torch,
            the weights after dropout.
        """
        self._check(query, key, value)
        if is_causal and attn_mask is None:
            raise ValueError(
                "is_causal is a hint about attn_mask, which is None. Pass the causal mask too, for "
                "example nn.Transformer.generate_square_subsequent_mask(length)."
            )
        q, k, v = (self._split_heads(x) for x in self._project(query, key, value))
        dropout = self.dropout if self.training else 0.0
        write_weights = need_weights or dropout > 0.0
        extra_keys = int(self.bias_k is not None) + int(self.add_zero_attn)
        square = q.shape[-2] == k.shape[-2] and not extra_keys
        causal = is_causal and square and not write_weights

        bias = self._bias(None if causal else attn_mask, key_padding_mask, q, k)
        if extra_keys:
            k, v = self._append_keys(k, v)
            bias = None if bias is None else F.pad(bias, (0, extra_keys))
        if write_weights:
            out, weights = _attention_with_weights(q, k, v, bias, dropout)
        else:
            out, weights = attention(q, k, v, causal=causal, bias=bias), None

        out = self.out_proj(rearrange(out, f"b h n d -> {self._tokens} (h d)"))
        if not need_weights:
            weights = None
        elif average_attn_weights:
            weights = weights.mean(dim=1)
        if query.dim() == 3:
            return out, weights
        return out.squeeze(self._batch_dim), None if weights is None else weights.squeeze(0)

    @property
    def _batch_dim(self) -> int:
        return 0 if self.batch_first else 1

    @property
    def _tokens(self) -> str:
        return "b n" if self.batch_first else "n b"

    def _check(self, query: Tensor, key: Tensor, value: Tensor) -> None:
        if query.is_nested or key.is_nested or value.is_nested:
            raise UnsupportedError(
                "MultiheadAttention",
                ["query, key or value is a nested tensor"],
                "Pass padded tensors with key_padding_mask, and enable_nested_tensor=False to "
                "nn.TransformerEncoder.",
            )
        if query.dim() not in (2, 3):
            raise ValueError(
                f"query has {query.dim()} dimensions; pass 3, or 2 for an unbatched sequence."
            )
        for name, x, width in (
            ("query", query, self.embed_dim),
            ("key", key, self.kdim),
            ("value", value, self.vdim),
        ):
            if x.dim() != query.dim() or x.shape[-1] != width:
                raise ValueError(
                    f"{name} has shape {tuple(x.shape)}; it must have {query.dim()} dimensions, "
                    f"as query has, and width {width}."
                )
        if key.shape[:-1] != value.shape[:-1]:
            raise ValueError(
                f"key has shape {tuple(key.shape)} and value {tuple(value.shape)}; "
                "they must agree in tokens and batch."
            )
        if query.dim() == 3 and query.shape[self._batch_dim] != key.shape[self._batch_dim]:
            raise ValueError(
                f"query has shape {tuple(query.shape)} and key {tuple(key.shape)}; with "
                f"batch_first={self.batch_first}, dimension {self._batch_dim} is the batch and "
                "must agree."
            )

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        if self._qkv_same_embed_dim:
            if query is key and key is value:
                return F.linear(query, self.in_proj_weight, self.in_proj_bias).chunk(3, dim=-1)
            weights = self.in_proj_weight.chunk(3)
        else:
            weights = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        biases = (None,) * 3 if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        inputs = (query, key, value)
        return tuple(F.linear(x, w, b) for x, w, b in zip(inputs, weights, biases, strict=True))

    def _split_heads(self, x: Tensor) -> Tensor:
        x = x.unsqueeze(self._batch_dim) if x.dim() == 2 else x
        return rearrange(x, f"{self._tokens} (h d) -> b h n d", h=self.num_heads)

    def _append_keys(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Add the learned key of ``add_bias_kv`` and the zero key of ``add_zero_attn``."""
        if self.bias_k is not None:
            shape = (k.shape[0], -1, -1, -1)
            learned_k, learned_v = (
                rearrange(x, "n b (h d) -> b h n d", h=self.num_heads).expand(shape)
                for x in (self.bias_k, self.bias_v)
            )
            k = torch.cat((k, learned_k.to(k.dtype)), dim=2)
            v = torch.cat((v, learned_v.to(v.dtype)), dim=2)
        if self.add_zero_attn:
            k, v = F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1))
        return k, v

    def _bias(
        self, attn_mask: Tensor | None, key_padding_mask: Tensor | None, q: Tensor, k: Tensor
    ) -> Tensor | None:
        """Both masks as one additive bias, no larger than they are together."""
        batch, heads, length, _ = q.shape
        keys = k.shape[-2]
        terms = []
        if attn_mask is not None:
            shapes = {2: (length, keys), 3: (batch * heads, length, keys)}
            if attn_mask.shape != shapes.get(attn_mask.dim()):
                raise ValueError(
                    f"attn_mask has shape {tuple(attn_mask.shape)}; it must be {shapes[2]}, or "
                    f"{shapes[3]} with one mask per sample and head."
                )
            mask = _additive("attn_mask", attn_mask, q.dtype)
            per_head = mask.dim() == 3
            terms.append(mask.unflatten(0, (batch, heads)) if per_head else mask[None, None])
        if key_padding_mask is not None:
            mask = key_padding_mask
            mask = mask.unsqueeze(0) if mask.dim() == 1 else mask
            if mask.shape != (batch, keys):
                raise ValueError(
                    f"key_padding_mask has shape {tuple(key_padding_mask.shape)}; it must be "
                    f"{(batch, keys)}, or {(keys,)} for an unbatched sequence."
                )
            terms.append(_additive("key_padding_mask", mask, q.dtype)[:, None, None, :])
        return sum(terms[1:], terms[0]) if terms else None


def _additive(name: str, mask: Tensor, dtype: torch.dtype) -> Tensor:
    if mask.dtype == torch.bool:
        return torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, float("-inf"))
    if mask.is_floating_point():
        return mask
    raise TypeError(
        f"{name} has dtype {mask.dtype}; pass bool (True blocks) or a floating mask to add."
    )


def _attention_with_weights(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, dropout: float
) -> tuple[Tensor, Tensor]:
    scores = (q * q.shape[-1] ** -0.5) @ k.mT
    if bias is None:
        weights = scores.softmax(dim=-1)
    else:
        # Filled before the softmax as well, because its backward would turn a NaN row's zero
        # gradient into NaN.
        nothing_to_see = bias.isneginf().all(dim=-1, keepdim=True)
        weights = (scores + bias).masked_fill(nothing_to_see, 0.0).softmax(dim=-1)
        weights = weights.masked_fill(nothing_to_see, 0.0)
    if dropout > 0.0:
        weights = F.dropout(weights, dropout)
    return weights.to(v.dtype) @ v, weights
