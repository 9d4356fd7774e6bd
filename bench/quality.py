"""What estimated attention costs trained models, beside exact attention and a window of equal cost.

The bar is a sliding window with sinks: of what evaluates few pairs of a query and a key, it is what
anyone would try first.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from bench.quality_attention import (
    CountPairs,
    Estimated,
    Masked,
    attention_layers,
    calling,
    full,
    window,
)
from bench.quality_tasks import Encoder, LanguageModel
from bench.runner import Write
from efficient_attn import HyperConfig

SINKS = 4
SIZES = (16, 32, 64)
# The size at which every lever is moved, and layers are replaced in part.
MIDDLE = 32
SHARES = (0.25, 0.5, 0.75)
DEPTHS = (0.0, 0.25, 0.5, 0.75)
NEEDLES = 16
# All lengths here are short of the cut-off that pays.
EVERYTHING = {"exact_below": 64, "sinks": SINKS}


def variants(size: int, causal: bool) -> dict[str, HyperConfig]:
    """Configurations that evaluate no more pairs than the published one with ``b = m = size``.

    That is ``2 size`` for each query, and under a causal mask about ``32 + 3 size`` with 512 tokens
    and exact parts of 64.
    """
    if causal:
        near = {"leaf_size": size, "window": size}
        rest = size * 3 // 2 + 24
    else:
        near = {"leaf_size": size // 2, "window": size // 4}
        rest = size - SINKS
    near |= EVERYTHING
    half = rest // 2
    both = {"block_size": half, "sample_size": half, **near}
    samples = {"block_size": 0, "sample_size": rest, **near}
    wide = rest + (0 if causal else size // 2)
    leaves = {**samples, "window": 0, "sample_size": wide + (size if causal else 0)}
    # What is right on average needs a sample that is counted in full.
    leaves |= {"max_sample_mass": None}
    found = {
        "published": HyperConfig.paper(
            block_size=size, sample_size=size, exact_below=64, num_projections=4
        ),
        "window, blocks, samples": HyperConfig(**both),
        "window, samples": HyperConfig(**samples),
        "window, blocks": HyperConfig(block_size=rest, sample_size=0, **near),
        "leaves, samples, no limit": HyperConfig(**leaves),
    }
    if size == MIDDLE:
        found |= {
            "window, blocks, samples: no limit": HyperConfig(**both, max_sample_mass=None),
            "window, samples: no limit": HyperConfig(**samples, max_sample_mass=None),
            "window, samples: no sinks": HyperConfig(**{**samples, "sinks": 0}),
            "window, samples: one set for all": HyperConfig(**samples, own_samples=False),
            "window, samples: with replacement": HyperConfig(**samples, replacement=True),
            "window, blocks, samples: not centred": HyperConfig(**both, center=False),
        }
        if not causal:
            found["window, blocks, samples: not aligned"] = HyperConfig(**both, align_blocks=False)
    return found


MODELS = (Encoder, LanguageModel)


def measure(
    write: Write,
    *,
    models: Sequence[type] = MODELS,
    sizes: Sequence[int] = SIZES,
    length: int = 512,
    rows: int = 8,
    seeds: int = 1,
) -> None:
    """Every variant on both models, each beside the window of equal cost.

    Args:
        write: Receives the records.
        models: Which of ``MODELS``.
        sizes: Block and sample sizes of the published algorithm, whose pairs all may evaluate.
        length: Tokens in a row.
        rows: Rows of text.
        seeds: How often what is random is drawn anew.
    """
    for make in models:
        task = make(length, rows)
        layers = list(range(len(attention_layers(task.model))))
        background = queries_and_keys(task)
        exact = full(length, task.causal)

        def record(name, attention, size, layers, pairs, results, task=task):
            write(
                {
                    "kind": "quality",
                    "model": task.name,
                    "variant": name,
                    "size": size,
                    "tokens": length,
                    "layers": len(layers),
                    "of_layers": len(attention_layers(task.model)),
                    "pairs": pairs,
                    **{key: _mean([result[key] for result in results]) for key in results[0]},
                    **attention,
                }
            )

        def window_beside(pairs, size, layers, task=task, background=background, exact=exact):
            bar = window(length, SINKS, pairs, task.causal)
            results, _ = run(task, [bar], layers)
            recall = needle_recall(background, bar, exact, task.causal)
            evaluated = float(bar.mask.sum()) / length
            record("window", recall, size, layers, evaluated, results)

        record("exact", {}, 0, [], float(exact.mask.sum()) / length, [task.result()])
        for size in sizes:
            for name, config in variants(size, task.causal).items():
                each = [Estimated(config, task.causal, seed) for seed in range(seeds)]
                results, pairs = run(task, each, layers)
                recall = needle_recall(background, each[0], exact, task.causal)
                record(name, recall, size, layers, pairs, results)
                if name == "window, samples":
                    window_beside(pairs, size, layers)
                    shares = SHARES if size == MIDDLE else ()
                    for part in (layers[-math.floor(s * len(layers) + 0.5) :] for s in shares):
                        results, pairs = run(task, each, part)
                        record(name, {}, size, part, pairs, results)
                        window_beside(pairs, size, part)


def run(task, attentions: list, layers: list[int]) -> tuple[list[dict], float]:
    """Results of each, and the pairs for each query of an estimate."""
    results = []
    with CountPairs() as count:
        for attention in attentions:
            with attention.inside(task.model, layers):
                results.append(task.result())
    return results, count.per_query


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


@torch.no_grad()
def queries_and_keys(task) -> tuple[Tensor, Tensor]:
    """Those of the middle layer on the first two texts, ``(2, H, N, D)`` both."""
    layers, found = attention_layers(task.model), []
    exact = full(task.length, task.causal)

    def attend(query, key, value, scale):
        found[:] = [query[:2], key[:2].repeat_interleave(query.shape[1] // key.shape[1], dim=1)]
        return exact.attend(query, key, value, scale)

    with calling(attend, [layers[len(layers) // 2]]):
        task.model(task.text[:2])
    return tuple(found)


@torch.no_grad()
def needle_recall(background: tuple[Tensor, Tensor], attention, exact: Masked, causal: bool):
    """What share of its weight a far key gets to which one query points, by depth.

    At each depth, keys are moved from the mean of all keys in the direction in which a query of the
    last quarter points, so that exact attention gives each about half of that query's weight. A
    window gives what is beyond its reach nothing. An estimate may give a row far too much and
    another nothing, so the mean error of the weight is told beside its mean share.
    """
    query, key = background
    length, dim = query.shape[2:]
    rows = torch.linspace(0.75 * length, length - 1, NEEDLES).long()
    pointing = query[:, :, rows]
    score = pointing @ key.mT * dim**-0.5
    if causal:
        score = score.masked_fill(torch.arange(length) > rows.unsqueeze(1), -torch.inf)
    # A score that outweighs all others together.
    wanted = score.logsumexp(-1, keepdim=True)
    middle = key.mean(2, keepdim=True)
    missing = wanted * dim**0.5 - (pointing * middle).sum(-1, keepdim=True)
    needles = middle + pointing * (missing / pointing.square().sum(-1, keepdim=True))
    shares, errors = {}, {}
    for depth in DEPTHS:
        places = 2 * SINKS + int(depth * 0.7 * length) + torch.arange(NEEDLES)
        keys = key.clone()
        keys[:, :, places] = needles
        value = torch.zeros(length, NEEDLES)
        value[places] = torch.eye(NEEDLES)
        value = pad(value, (0, dim - NEEDLES)).expand_as(key).contiguous()
        got, truth = (
            each.attend(query, keys, value)[:, :, rows, : len(rows)].diagonal(dim1=-2, dim2=-1)
            for each in (attention, exact)
        )
        shares[str(depth)] = float((got / truth).mean())
        errors[str(depth)] = float((got - truth).abs().mean())
    return {"needle_share": shares, "needle_error": errors}
