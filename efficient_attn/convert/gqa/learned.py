"""Weights of an average of heads that are learned in further training, then folded.

Source: Chinnakonduru and Mohapatra, Weighted Grouped-Query Attention in Transformers, arXiv
2407.10855, section 3: one weight for each head, row or column, all heads alike to begin with.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

PER = ("head", "row", "column")


class LearnedAverage(nn.Module):
    """From the rows of all heads to those of one for each group, ``(g d, ...)`` to ``(G d, ...)``.

    Args:
        groups: The heads of each group.
        per: What has a weight of its own: ``"head"``, ``"row"`` or ``"column"`` of each head.
        shape: Of the rows, ``(g d, D)``, or ``(g d,)`` for a bias.
    """

    def __init__(self, groups: Sequence[Sequence[int]], per: str, shape: Sequence[int]) -> None:
        super().__init__()
        count = sum(map(len, groups))
        sizes = {
            "head": (count, 1),
            "row": (count, shape[0] // count),
            # A bias has one column.
            "column": (count, 1, *shape[1:]),
        }
        if per not in sizes:
            raise ValueError(f"per is {per!r}; accepted: {', '.join(map(repr, PER))}.")
        self.groups = [list(group) for group in groups]
        weight = torch.empty(sizes[per])
        for group in self.groups:
            weight[group] = 1 / len(group)
        dims = 1 + len(shape)
        self.weight = nn.Parameter(weight.view(*weight.shape, *(1,) * (dims - weight.dim())))

    def forward(self, rows: Tensor) -> Tensor:
        """The averages, by the weights of the moment."""
        heads = self.weight * rows.view(len(self.weight), -1, *rows.shape[1:])
        return torch.cat([heads[group].sum(0) for group in self.groups])


def learn_average(
    projection: nn.Linear, groups: Sequence[Sequence[int]], per: str = "head"
) -> None:
    """Let the heads of a key or value projection be averaged by weights that can be trained."""
    for name in ("weight", "bias"):
        rows = getattr(projection, name)
        if rows is not None:
            average = LearnedAverage(groups, per, rows.shape).to(rows)
            parametrize.register_parametrization(projection, name, average, unsafe=True)
    projection.out_features = len(projection.weight)


def fold_averages(model: nn.Module) -> int:
    """Replace learned averages in ``model`` by their results; returns how many there were."""
    folded = 0
    for module in model.modules():
        for name in ("weight", "bias"):
            if not parametrize.is_parametrized(module, name):
                continue
            if any(isinstance(each, LearnedAverage) for each in module.parametrizations[name]):
                # A plain parameter again, without the heads that it was made of.
                parametrize.remove_parametrizations(module, name, leave_parametrized=True)
                folded += 1
    return folded
