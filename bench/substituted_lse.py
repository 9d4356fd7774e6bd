"""Does an attention op's backward honour the output and log-sum-exp that it is given?

Attention over keys in two parts, merged by log-sum-exp, needs no backward of its own: each part's
ordinary backward gives exact gradients when it receives the merged output and the merged
log-sum-exp. That holds if the op reads them instead of recomputing them, which is found out here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from bench.check import formula
from bench.environment import without_paths

SHAPE = (1, 4, 1024, 128)

Backward = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]


class Part(NamedTuple):
    """Attention over some keys; ``backward`` takes the gradient, the output and the lse."""

    out: Tensor
    lse: Tensor
    backward: Backward


def _flash(q: Tensor, k: Tensor, v: Tensor) -> Part:
    ops = torch.ops.aten
    out, lse, cum_q, cum_k, max_q, max_k, seed, offset, _ = ops._scaled_dot_product_flash_attention(
        q, k, v
    )
    rest = (cum_q, cum_k, max_q, max_k, 0.0, False, seed, offset)
    backward = ops._scaled_dot_product_flash_attention_backward
    return Part(out, lse, lambda grad, o, s: backward(grad, q, k, v, o, s, *rest))


def _cudnn(q: Tensor, k: Tensor, v: Tensor) -> Part:
    ops = torch.ops.aten
    out, lse, cum_q, cum_k, max_q, max_k, seed, offset, _ = ops._scaled_dot_product_cudnn_attention(
        q, k, v, None, True
    )
    rest = (seed, offset, None, cum_q, cum_k, max_q, max_k, 0.0, False)
    backward = ops._scaled_dot_product_cudnn_attention_backward
    return Part(out, lse, lambda grad, o, s: backward(grad, q, k, v, o, s, *rest))


def _flash_for_cpu(q: Tensor, k: Tensor, v: Tensor) -> Part:
    ops = torch.ops.aten
    out, lse = ops._scaled_dot_product_flash_attention_for_cpu(q, k, v)
    backward = ops._scaled_dot_product_flash_attention_for_cpu_backward
    return Part(out, lse, lambda grad, o, s: backward(grad, q, k, v, o, s, 0.0, False))


OPS = {"cuda": {"cudnn": _cudnn, "flash": _flash}, "cpu": {"flash_for_cpu": _flash_for_cpu}}


def probe(device: str) -> list[dict]:
    """One record for each op of the device.

    Each holds the relative error of dq, dk and dv against fp64 for one whole call (``whole``) and
    for two parts with substituted output and log-sum-exp (``parts``), and whether the second is
    about as small as the first (``honoured``).
    """
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    generator = torch.Generator(device).manual_seed(0)
    q, k, v, grad = (
        torch.randn(SHAPE, device=device, dtype=dtype, generator=generator) for _ in range(4)
    )
    visible = torch.ones(SHAPE[2], SHAPE[2], dtype=torch.bool, device=device)
    flat = [x.flatten(0, 1).double() for x in (q, k, v, grad)]
    exact, _ = formula(*flat, visible, SHAPE[3] ** -0.5)
    truth = [exact[name].view(SHAPE) for name in ("dq", "dk", "dv")]
    return [_probe(name, op, (q, k, v, grad), truth) for name, op in OPS[device].items()]


def _probe(
    name: str, op: Callable[..., Part], inputs: tuple[Tensor, ...], truth: list[Tensor]
) -> dict:
    q, k, v, grad = inputs
    record: dict = {"kind": "substituted_lse", "op": name}
    try:
        whole = op(q, k, v)
        record["whole"] = _errors(whole.backward(grad, whole.out, whole.lse), truth)
        half = k.shape[2] // 2
        first = op(q, k[:, :, :half].contiguous(), v[:, :, :half].contiguous())
        second = op(q, k[:, :, half:].contiguous(), v[:, :, half:].contiguous())
        out, lse = _merge(first, second)
        dq, dk, dv = first.backward(grad, out, lse.view_as(first.lse))
        dq_, dk_, dv_ = second.backward(grad, out, lse.view_as(second.lse))
        gradients = (dq + dq_, torch.cat([dk, dk_], 2), torch.cat([dv, dv_], 2))
        record["parts"] = _errors(gradients, truth)
    # Private ops change between releases; that is a finding, not the end of the run.
    except Exception as error:
        return record | {"honoured": None, "reason": without_paths(str(error).partition("\n")[0])}
    honoured = all(record["parts"][n] <= 2 * record["whole"][n] + 1e-6 for n in record["whole"])
    return record | {"honoured": honoured}


def _merge(first: Part, second: Part) -> tuple[Tensor, Tensor]:
    shape = (*first.out.shape[:3], 1)
    a, b = first.lse.reshape(shape), second.lse.reshape(shape)
    lse = torch.logaddexp(a, b)
    out = first.out * (a - lse).exp() + second.out * (b - lse).exp()
    return out.to(first.out.dtype), lse


def _errors(gradients: tuple[Tensor, ...], truth: list[Tensor]) -> dict[str, float]:
    return {
        name: float((gradient.double() - exact).norm() / exact.norm())
        for name, gradient, exact in zip(("dq", "dk", "dv"), gradients, truth, strict=True)
    }
