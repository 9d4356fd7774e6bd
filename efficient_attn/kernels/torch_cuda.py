"""torch's own fused attention on CUDA, with its log-sum-exp: cuDNN and FlashAttention-2.

They serve what they were built for, even groups under a square causal mask or none, and nothing
here widens that. On Hopper and later cuDNN is about twice as fast as the flash op; before that, and
wherever cuDNN refuses, the flash op is the faster one.

Their backward adds dQ in whatever order its blocks finish, unless
``torch.use_deterministic_algorithms(True)`` asks for a fixed one, as everywhere in torch.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from torch.backends.cuda import SDPAParams, can_use_cudnn_attention, can_use_flash_attention

from efficient_attn.kernels.conventions import tokens_major

aten = torch.ops.aten


def choose(
    query, key, value, q_to_k, q_to_v, bias, key_lengths, left, right, scale, softcap, grad_lse=None
) -> str | None:
    """``"cudnn"``, ``"flash"``, or None where this call needs a kernel of ours."""
    nq, nk = query.shape[2], key.shape[2]
    standard = (
        query.dtype in (torch.float16, torch.bfloat16)
        and query.shape[-1] == value.shape[-1]
        and key.shape[1] == value.shape[1]
        and all(x is None for x in (q_to_k, q_to_v, bias, key_lengths, left, grad_lse))
        and (right is None or (right == 0 and nq == nk))
        and softcap == 0
        and min(query.numel(), key.numel()) > 0
    )
    if not standard:
        return None
    grouped = query.shape[1] != key.shape[1]
    params = SDPAParams(query, key, value, None, 0.0, right == 0, grouped)
    if _prefers_cudnn(query.device.index or 0) and can_use_cudnn_attention(params):
        return "cudnn"
    return "flash" if can_use_flash_attention(params) else None


def forward(which: str, query, key, value, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """The ``attention`` op by the implementation that :func:`choose` named."""
    if which == "cudnn":
        out, lse, *_ = aten._scaled_dot_product_cudnn_attention(
            query, key, value, None, True, 0.0, causal, False, scale=scale
        )
    else:
        out, lse, *_ = aten._scaled_dot_product_flash_attention(
            query, key, value, 0.0, causal, False, scale=scale
        )
    # cuDNN keeps a trailing dimension of one.
    lse = lse.reshape(query.shape[:3])
    return tokens_major(out), lse.contiguous()


def backward(
    which: str, grad_out, query, key, value, out, lse, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The ``attention_backward`` op by the implementation that :func:`choose` named."""
    # Without dropout the random state is not looked at, but the schema wants it.
    seed = torch.zeros(2, dtype=torch.uint64, device=query.device)
    offset = torch.zeros((), dtype=torch.uint64, device=query.device)
    lengths = (None, None, query.shape[2], key.shape[2])
    if which == "cudnn":
        grads = aten._scaled_dot_product_cudnn_attention_backward(
            grad_out, query, key, value, out, lse.unsqueeze(-1), seed, offset, None,
            *lengths, 0.0, causal, scale=scale,
        )  # fmt: skip
    else:
        grads = aten._scaled_dot_product_flash_attention_backward(
            grad_out, query, key, value, out, lse, *lengths, 0.0, causal, seed, offset, scale=scale
        )
    return tuple(map(tokens_major, grads))


@functools.cache
def _prefers_cudnn(device: int) -> bool:
    return torch.cuda.get_device_capability(device) >= (9, 0)
