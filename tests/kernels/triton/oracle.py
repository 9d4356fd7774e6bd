"""Run a kernel and the reference on one input, and compare everything that comes out."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from efficient_attn import reference
from efficient_attn.head_map import HeadMap
from efficient_attn.kernels.triton import attention_bwd, attention_fwd
from efficient_attn.masking import window_limits
from efficient_attn.testing import assert_accurate, qkv

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PAIR = HeadMap.gqa(2, 1)


@dataclass
class Call:
    """One call of dense attention; ``options`` are those of the reference."""

    query: Tensor
    key: Tensor
    value: Tensor
    head_map: HeadMap | None = None
    options: dict = field(default_factory=dict)

    @classmethod
    def random(cls, head_map=PAIR, *, options=None, **shape) -> Call:
        """Normal inputs of :func:`efficient_attn.testing.qkv`, one sample if nothing is said."""
        tensors = qkv(head_map, **({"batch": 1, "device": DEVICE} | shape))
        return cls(*tensors, head_map.to(DEVICE), options or {})

    @property
    def tensors(self) -> list[Tensor]:
        """Everything that has a gradient."""
        bias = self.options.get("bias")
        return [self.query, self.key, self.value, *([] if bias is None else [bias])]

    def arguments(self) -> tuple:
        """The arguments of the op behind query, key and value."""
        options = dict(self.options)
        window = window_limits(options.pop("causal", False), options.pop("window", None))
        bias, key_lengths = options.pop("bias", None), options.pop("key_lengths", None)
        scale = options.pop("scale", self.query.shape[-1] ** -0.5)
        softcap = options.pop("softcap", 0.0)
        assert not options, options
        maps = (
            (None, None) if self.head_map is None else (self.head_map.q_to_k, self.head_map.q_to_v)
        )
        return (*maps, bias, key_lengths, *window, scale, softcap)

    def forward(self) -> tuple[Tensor, Tensor]:
        return attention_fwd.forward(self.query, self.key, self.value, *self.arguments())

    def backward(self, grad_out, grad_lse, out, lse) -> list[Tensor]:
        needs_bias_grad = self.options.get("bias") is not None
        grads = attention_bwd.backward(
            grad_out, grad_lse, self.query, self.key, self.value, out, lse,
            *self.arguments(), needs_bias_grad,
        )  # fmt: skip
        return list(grads if needs_bias_grad else grads[:3])

    def reference(self, dtype: torch.dtype, grads: tuple[Tensor, Tensor]) -> list[Tensor]:
        """out, lse and the gradients by the reference, computed in ``dtype``."""
        leaves = [x.detach().to(dtype).requires_grad_() for x in self.tensors]
        options = dict(self.options)
        if len(leaves) == 4:
            options["bias"] = leaves[3]
        out, lse = reference.attention(*leaves[:3], head_map=self.head_map, **options)
        grads = [x.to(dtype) for x in grads]
        return [out, lse, *torch.autograd.grad((out, lse), leaves, grads, allow_unused=True)]


NAMES = ("out", "lse", "grad_query", "grad_key", "grad_value", "grad_bias")


def compare(call: Call, *, floor: float = 2e-6, lse_gradient: bool = True) -> list[Tensor]:
    """Assert that the kernels are as near to the truth as the plain formula in the same dtype."""
    out, lse = call.forward()
    grad_out = torch.randn_like(out)
    grad_lse = torch.randn_like(lse) if lse_gradient else None
    results = [out, lse, *call.backward(grad_out, grad_lse, out, lse)]
    weights = (grad_out, torch.zeros_like(lse) if grad_lse is None else grad_lse)
    truths = call.reference(torch.float64, weights)
    plains = call.reference(call.query.dtype, weights)
    for name, result, truth, plain in zip(NAMES, results, truths, plains, strict=False):
        assert result.shape == truth.shape, name
        try:
            assert_accurate(result, truth, plain, floor=floor)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from None
    return results
