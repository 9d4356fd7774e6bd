"""Which kernel answers on CUDA: torch's own for standard shapes, ours in Triton for the rest."""

from __future__ import annotations

from torch import Tensor

from efficient_attn.errors import UnsupportedError
from efficient_attn.kernels import torch_cuda
from efficient_attn.kernels.triton import attention_bwd, attention_fwd, grouping, hyper
from efficient_attn.kernels.triton import decode as triton_decode
from efficient_attn.kernels.triton import selective as triton_selective
from efficient_attn.kernels.triton._arguments import device_refusals

_ADVICE = "efficient_attn.reference.{} computes any input, slowly and in full memory."


def forward(
    query, key, value, q_to_k, q_to_v, bias, key_lengths, window_left, window_right, scale, softcap
) -> tuple[Tensor, Tensor]:
    """The ``attention`` op."""
    arguments = (
        query, key, value, q_to_k, q_to_v, bias, key_lengths,
        window_left, window_right, scale, softcap,
    )  # fmt: skip
    if which := torch_cuda.choose(*arguments):
        return torch_cuda.forward(which, query, key, value, window_right == 0, scale)
    _refuse("attention", attention_fwd.refusals(query, key, value))
    return attention_fwd.forward(*arguments)


def backward(
    grad_out, grad_lse, query, key, value, out, lse, q_to_k, q_to_v, bias, key_lengths,
    window_left, window_right, scale, softcap, needs_bias_grad,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The ``attention_backward`` op. Any forward may be followed by any backward."""
    options = (
        q_to_k, q_to_v, bias, key_lengths, window_left, window_right, scale, softcap
    )  # fmt: skip
    if which := torch_cuda.choose(query, key, value, *options, grad_lse=grad_lse):
        grads = torch_cuda.backward(
            which, grad_out, query, key, value, out, lse, window_right == 0, scale
        )
        return *grads, query.new_empty(0)
    return attention_bwd.backward(
        grad_out, grad_lse, query, key, value, out, lse, *options, needs_bias_grad
    )


def forward_varlen(query, key, value, *options) -> tuple[Tensor, Tensor]:
    """The ``attention_varlen`` op."""
    _refuse("attention_varlen", attention_fwd.refusals(query, key, value))
    return attention_fwd.forward_varlen(query, key, value, *options)


def backward_varlen(*arguments) -> tuple[Tensor, Tensor, Tensor]:
    """The ``attention_varlen_backward`` op."""
    return attention_bwd.backward_varlen(*arguments)


def decode(query, key_cache, value_cache, *options) -> tuple[Tensor, Tensor]:
    """The ``attention_decode`` op."""
    _refuse("attention_decode", attention_fwd.refusals(query, key_cache, value_cache))
    return triton_decode.decode(query, key_cache, value_cache, *options)


def latent_decode(q_latent, q_rope, cache, *options) -> tuple[Tensor, Tensor]:
    """The ``mla_decode`` op."""
    _refuse("mla_decode", triton_decode.latent_refusals(q_latent, q_rope))
    return triton_decode.latent_decode(q_latent, q_rope, cache, *options)


def selective_decode(query, key_cache, value_cache, *options) -> tuple[Tensor, Tensor, Tensor]:
    """The ``selective_decode`` op."""
    _refuse("selective_decode", attention_fwd.refusals(query, key_cache, value_cache))
    return triton_selective.decode(query, key_cache, value_cache, *options)


def forward_hyper(query, key, value, *plan_and_scale) -> tuple[Tensor, Tensor]:
    """The ``hyper_attention`` op."""
    _refuse("hyper_attention", attention_fwd.refusals(query, key, value))
    return hyper.forward(query, key, value, *plan_and_scale)


def backward_hyper(*arguments) -> tuple[Tensor, Tensor, Tensor]:
    """The ``hyper_attention_backward`` op."""
    return hyper.backward(*arguments)


def key_norms(key, key_lengths) -> Tensor:
    """The ``key_norms`` op."""
    _refuse("key_norms", device_refusals(key.device))
    return grouping.key_norms(key, key_lengths)


def allocate_heads(scores, *options) -> tuple[Tensor, Tensor]:
    """The ``allocate_heads`` op."""
    _refuse("allocate_heads", device_refusals(scores.device))
    return grouping.allocate_heads(scores, *options)


def _refuse(op: str, reasons: list[str]) -> None:
    if reasons:
        raise UnsupportedError(f"{op} on CUDA", reasons, _ADVICE.format(op))
