"""How far a converted model is from its source, measured on tokens."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from efficient_attn.convert.report import table
from efficient_attn.errors import ConversionError

Model = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Comparison:
    """Two models on the same tokens; ``source`` is the truth.

    Attributes:
        tokens: Number of predictions compared.
        mean_kl: Mean over predictions of ``KL(source || converted)``, in nats.
        max_kl: Largest of them.
        top1_agreement: Share of predictions whose likeliest token is the same.
        max_logit_difference: Largest absolute difference of two logits.
        perplexity_before: Of the source; exponential of the mean loss in nats per token.
        perplexity_after: Of the converted model.
    """

    tokens: int
    mean_kl: float
    max_kl: float
    top1_agreement: float
    max_logit_difference: float
    perplexity_before: float
    perplexity_after: float

    @property
    def perplexity_ratio(self) -> float:
        """Perplexity after conversion over that before."""
        return self.perplexity_after / self.perplexity_before

    def as_dict(self) -> dict[str, float]:
        """For JSON."""
        return {**asdict(self), "perplexity_ratio": self.perplexity_ratio}

    def markdown(self) -> str:
        """For people."""
        rows = [(name.replace("_", " "), f"{value:.6g}") for name, value in self.as_dict().items()]
        return "\n".join(table(("", ""), rows)) + "\n"

    def broken_bounds(
        self, *, max_kl: float | None = None, max_ppl_ratio: float | None = None
    ) -> list[str]:
        """What exceeds a bound on the mean divergence or on the ratio of perplexities."""
        bounds = [
            ("mean KL divergence", self.mean_kl, max_kl),
            ("perplexity ratio", self.perplexity_ratio, max_ppl_ratio),
        ]
        return [
            f"{name} is {value:.6g}, above the bound of {bound:g}"
            for name, value, bound in bounds
            if bound is not None and not value <= bound
        ]


def verify(source: Model, converted: Model, rows: Iterable[Tensor]) -> Comparison:
    """Compare two models on rows of tokens.

    Args:
        source: From tokens ``(B, N)`` to logits ``(B, N, V)``.
        converted: The same.
        rows: Batches of tokens ``(B, N)``; each token but the first of a row is predicted.

    Raises:
        ConversionError: There is nothing to compare, or a logit is not finite.
    """
    kl_sum = loss_before = loss_after = 0.0
    largest_kl = largest_difference = 0.0
    count = same = 0
    with torch.no_grad():
        for batch in rows:
            if batch.shape[-1] < 2:
                continue
            truth, other = source(batch).double(), converted(batch).double()
            if not bool(torch.isfinite(truth).all() and torch.isfinite(other).all()):
                raise ConversionError("a logit is not finite; nothing can be compared.")
            largest_difference = max(largest_difference, float((truth - other).abs().max()))
            truth, other = truth[:, :-1].log_softmax(-1), other[:, :-1].log_softmax(-1)
            kl = (truth.exp() * (truth - other)).sum(-1).clamp(min=0)
            kl_sum += float(kl.sum())
            largest_kl = max(largest_kl, float(kl.max()))
            same += int((truth.argmax(-1) == other.argmax(-1)).sum())
            count += kl.numel()
            following = batch[:, 1:].unsqueeze(-1)
            loss_before -= float(truth.gather(-1, following).sum())
            loss_after -= float(other.gather(-1, following).sum())
    if not count:
        raise ConversionError("there are no tokens to compare the models on; pass a longer text.")
    return Comparison(
        tokens=count,
        mean_kl=kl_sum / count,
        max_kl=largest_kl,
        top1_agreement=same / count,
        max_logit_difference=largest_difference,
        perplexity_before=math.exp(loss_before / count),
        perplexity_after=math.exp(loss_after / count),
    )
