"""One head in place of several: what it is made of, and how it is read.

Every rule is a linear map of the heads of a group, so it is folded into their projections, and
what reads the shared head in place of one of them into queries or the output projection.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from einops import einsum, rearrange
from torch import Tensor

from efficient_attn.convert.gqa.heads import Heads

ROUNDS = 100
CONVERGED = 1e-6


@dataclass(frozen=True)
class Pool:
    """A head ``c`` shared by ``m`` heads of ``d`` channels.

    Attributes:
        write: ``(d, m, d)``; ``c`` is the sum of ``write[:, h] @ head[h]``.
        read: ``(m, d, d)``; ``read[h] @ c`` stands for head ``h``. None for identities.
    """

    write: Tensor
    read: Tensor | None = None


def mean(heads: Heads) -> Pool:
    """The average (Ainslie et al., arXiv 2305.13245, section 2.1).

    Of all heads that are read as they are, it is the nearest to those that it stands for.
    """
    return _weighted(heads, torch.ones(len(heads), dtype=torch.float64))


def first(heads: Heads) -> Pool:
    """The first head of the group (a baseline of Ainslie et al., section 3.3)."""
    weight = torch.zeros(len(heads), dtype=torch.float64)
    weight[0] = 1.0
    return _weighted(heads, weight)


def norm(heads: Heads) -> Pool:
    """An average weighted by the root mean square norms of the heads."""
    return _weighted(heads, einsum(heads.moment, "n d n d -> n").clamp(min=0).sqrt())


def aligned(heads: Heads) -> Pool:
    """The average after rotating the heads towards it, never farther from them than without.

    Rotations are taken in turn, each the best for what the average of the others is (generalised
    Procrustes). Of keys, rotary pairs are turned by an angle each, in the plane in which their
    position turns them; that is all that leaves scores as they are.

    Source: Jin et al., Align Attention Heads Before Merging Them, arXiv 2412.20677, section 3.2.
    """
    if not heads.mixable:
        return mean(heads)
    turned, rest = _parts(heads.moment, heads.pairs)
    turns, rotations = _align(turned[..., None, None]), _align(_as_blocks(rest)[None])
    read = _as_matrix(turns[..., 0, 0].conj(), rotations[0].mT.real)
    return Pool(rearrange(read, "m d e -> e m d") / len(heads), read)


def svd(heads: Heads) -> Pool:
    """The ``d`` numbers from which all heads of the group are recovered with the least error.

    Principal components of the heads side by side; of keys, one complex component for each rotary
    pair. Averages, aligned or not, are a choice of such numbers, so this is nearer than any.

    Source: Yu et al., Effectively Compress KV Heads for LLM, arXiv 2406.07056, section 3.2, there
        for whole keys, which their rotation does not allow.
    """
    eye = torch.eye(heads.dim, dtype=torch.float64, device=heads.second.device)
    return _principal(heads, eye.expand(len(heads), -1, -1))


def fitted(heads: Heads) -> Pool:
    """As ``svd``, but least in the error of scores and of the layer's output."""
    return _principal(heads, heads.metric)


POOLINGS: dict[str, Callable[[Heads], Pool]] = {
    "mean": mean,
    "first": first,
    "norm": norm,
    "aligned": aligned,
    "svd": svd,
    "fitted": fitted,
}


def pool(heads: Heads, pooling: str) -> Pool:
    """The shared head of a group by one of :data:`POOLINGS`; a group of one stays as it is."""
    return mean(heads) if len(heads) == 1 else POOLINGS[pooling](heads)


def cost(heads: Heads, pool: Pool) -> float:
    """Mean square error of what is read, in the metric of the heads."""
    count, dim = len(heads), heads.dim
    eye = torch.eye(dim, dtype=torch.float64, device=heads.second.device)
    read = eye.expand(count, -1, -1) if pool.read is None else pool.read
    left = -einsum(read, pool.write, "n d e, e m f -> n d m f")
    left.diagonal(dim1=0, dim2=2).add_(eye.unsqueeze(-1))
    flat = left.reshape(count * dim, -1)
    error = flat @ heads.moment.reshape(count * dim, -1) @ flat.mT
    error = error.view(count, dim, count, dim)
    return max(float(einsum(error, heads.metric, "n d n e, n d e ->")), 0.0)


def _weighted(heads: Heads, weight: Tensor) -> Pool:
    weight = weight.to(heads.second.device)
    weight = weight / weight.sum() if weight.sum() > 0 else torch.ones_like(weight) / len(weight)
    eye = torch.eye(heads.dim, dtype=torch.float64, device=weight.device)
    return Pool(einsum(weight, eye, "m, e d -> e m d"))


def _parts(moment: Tensor, pairs: int) -> tuple[Tensor, Tensor]:
    """``E[z z^H]`` of each rotary pair, ``(F, m, m)``, and moments of the rest ``(m, e, m, e)``."""
    real, imaginary = slice(0, pairs), slice(pairs, 2 * pairs)

    def across(left: slice, right: slice) -> Tensor:
        return moment[:, left, :, right].diagonal(dim1=1, dim2=3).permute(2, 0, 1)

    turned = torch.complex(
        across(real, real) + across(imaginary, imaginary),
        across(imaginary, real) - across(real, imaginary),
    )
    return turned, moment[:, 2 * pairs :, :, 2 * pairs :]


def _as_blocks(moment: Tensor) -> Tensor:
    return rearrange(moment, "m d n e -> m n d e")


def _as_matrix(turned: Tensor, rest: Tensor) -> Tensor:
    """``(m, d, d)``: multiplication of pairs by ``turned``, ``(F, m)``, and ``rest`` on others."""
    real, imaginary = (torch.diag_embed(part.mT) for part in (turned.real, turned.imag))
    top = torch.cat((real, -imaginary), -1)
    bottom = torch.cat((imaginary, real), -1)
    blocks = torch.cat((top, bottom), -2)
    return torch.stack([torch.block_diag(*pair) for pair in zip(blocks, rest, strict=True)])


def _align(moment: Tensor) -> Tensor:
    """Rotations ``(b, m, e, e)`` of heads with moments ``(b, m, m, e, e)`` towards their mean."""
    batch, count, _, dim, _ = moment.shape
    eye = torch.eye(dim, dtype=moment.dtype, device=moment.device)
    rotations = eye.expand(batch, count, -1, -1).clone()
    if not moment.numel():
        return rotations
    before = None
    for _ in range(ROUNDS):
        for h in range(count):
            # Moments of the sum of the other heads, as they are rotated now, with head h.
            others = [j for j in range(count) if j != h]
            target = einsum(rotations[:, others], moment[:, others, h], "b j d e, b j e f -> b d f")
            left, _, right = torch.linalg.svd(target)
            rotations[:, h] = left @ right
        total = einsum(
            rotations, moment, rotations.conj(), "b j d e, b j k e f, b k d f ->"
        ).real  # the more of the heads' energy is in their sum, the nearer they are to the mean
        if before is not None and total <= before * (1 + CONVERGED):
            break
        before = total
    return rotations


def _principal(heads: Heads, metric: Tensor) -> Pool:
    """Least-squares reading of heads from ``d`` numbers, errors weighed by ``metric``."""
    if not heads.mixable:
        return mean(heads)
    pairs = heads.pairs
    turned, rest = _parts(heads.moment, pairs)
    gain = metric.diagonal(dim1=1, dim2=2)[:, :pairs].sqrt().mT
    write, read = _components_of_pairs(turned, gain)
    rest_write, rest_read = _components(rest, metric[:, 2 * pairs :, 2 * pairs :])
    written = _as_matrix(write, rest_write)
    return Pool(rearrange(written, "m e d -> e m d"), _as_matrix(read, rest_read))


# Components are as strong as the heads were, which suits number formats and further training.


def _components_of_pairs(moment: Tensor, gain: Tensor) -> tuple[Tensor, Tensor]:
    """Factors ``(F, m)`` that make up a shared pair, and those by which it is read.

    ``moment`` is ``(F, m, m)``, ``gain`` the root of the metric, ``(F, m)``.
    """
    _, vectors = torch.linalg.eigh(moment * gain.unsqueeze(-1) * gain.unsqueeze(-2))
    top = vectors[..., -1]
    top = top * torch.exp(-1j * top[:, :1].angle())  # eigenvectors have no phase of their own
    write = gain * top.conj()
    energy = einsum(write, moment, write.conj(), "f m, f m n, f n -> f").real
    scale = _ratio(moment.diagonal(dim1=1, dim2=2).real.mean(-1), energy).unsqueeze(-1)
    return write * scale, top / gain / scale


def _components(moment: Tensor, metric: Tensor) -> tuple[Tensor, Tensor]:
    """The same of ``e`` channels that nothing turns: ``(m, e, e)`` both.

    ``moment`` is ``(m, e, m, e)``, ``metric`` ``(m, e, e)``.
    """
    count, width = moment.shape[:2]
    root, inverse = _roots(metric)
    side_by_side = einsum(root, moment, root, "m d e, m e n f, n g f -> m d n g")
    _, vectors = torch.linalg.eigh(side_by_side.flatten(2).flatten(0, 1))
    basis = vectors[:, (count - 1) * width :].reshape(count, width, width)
    write = einsum(basis, root, "m d e, m d f -> m e f")
    energy = einsum(write, moment, write, "m e d, m d n f, n e f ->")
    scale = _ratio(einsum(moment, "m d m d ->") / count, energy)
    return write * scale, inverse @ basis / scale


def _ratio(wanted: Tensor, present: Tensor) -> Tensor:
    return torch.where((wanted > 0) & (present > 0), wanted / present, 1.0).sqrt()


def _roots(metric: Tensor) -> tuple[Tensor, Tensor]:
    """Square root and its inverse of positive matrices ``(m, e, e)``."""
    values, vectors = torch.linalg.eigh(metric)
    # A metric is invertible to begin with; this is about rounding.
    largest = values.amax(-1, keepdim=True) if values.shape[-1] else values
    values = torch.maximum(values, largest * 1e-12).sqrt()
    return (
        (vectors * values.unsqueeze(-2)) @ vectors.mT,
        (vectors / values.unsqueeze(-2)) @ vectors.mT,
    )
