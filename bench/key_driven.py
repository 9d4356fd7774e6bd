"""Layers with uneven groups: a training step and inference, beside what else computes the same.

Every contender has the same weights, and all but those with even groups the same map, so that their
results can be compared. ``attention`` is timed from query, key and value heads, ``layer`` with the
projections around it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor

import efficient_attn as ea
from bench.measure import Clock, interleave
from bench.runner import Write
from efficient_attn.layers import KDGQA, GroupedQueryAttention

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
# As for generation: at most this many times the error of torch's own attention, plus a floor.
FACTOR, FLOOR = 2.0, 1e-5


@dataclass(frozen=True)
class Shape:
    """One attention layer.

    Attributes:
        name: What the layer is like.
        sizes: Query heads of each key head; their mean is the size of the even groups.
    """

    name: str
    batch: int
    tokens: int
    embed_dim: int
    num_heads: int
    sizes: tuple[int, ...]
    causal: bool

    @property
    def num_kv_heads(self) -> int:
        return len(self.sizes)

    def make_layer(self, head_map: ea.HeadMap | None, device: str) -> GroupedQueryAttention:
        """The layer with this map, by default with even groups; always the same weights."""
        torch.manual_seed(0)
        if head_map is None:
            head_map = ea.HeadMap.gqa(self.num_heads, self.num_kv_heads)
        options = {"head_map": head_map, "causal": self.causal, "device": device}
        return GroupedQueryAttention(self.embed_dim, self.num_heads, **options)


# Sizes as key-driven grouping makes them: one head is read by nobody, one by twice its share.
SHAPES = (
    Shape("ViT-B/16", 32, 197, 768, 12, (0, 1, 2, 2, 3, 4), causal=False),
    Shape("Llama 3.2 1B", 1, 1024, 2048, 32, (0, 1, 2, 3, 4, 6, 8, 8), causal=True),
)


class Replaced(GroupedQueryAttention):
    """A layer whose attention is somebody else's."""

    theirs: Attend

    def attend(self, query: Tensor, key: Tensor, value: Tensor, **options: object) -> Tensor:
        return self.theirs(query, key, value)


def contenders(shape: Shape, device: str) -> dict[str, GroupedQueryAttention]:
    """The layers that are timed, by name; their parameters are equal."""
    uneven = ea.HeadMap.from_group_sizes(list(shape.sizes)).to(device)
    layers = {
        "efficient_attn, uneven": shape.make_layer(uneven, device),
        "efficient_attn, even": shape.make_layer(None, device),
    }
    theirs = {
        "torch, heads gathered": _gathered(uneven.key_index().long(), shape.causal),
        "torch, even groups": _even(shape.causal),
        "loop over groups": _looped(shape.sizes, shape.causal),
        PROJECTIONS: _passed_on,
    }
    for name, attend in theirs.items():
        layers[name] = _with_attention(shape.make_layer(uneven, device), attend)
    return layers


def time_layers(
    shape: Shape, device: str, clock: Clock, write: Write, *, seconds: float = 2.0
) -> None:
    """Check and time every contender on a shape, and write a record for each.

    Args:
        shape: What layer.
        device: ``"cpu"`` or ``"cuda"``.
        clock: The device's clock.
        write: Receives the records.
        seconds: Time to spend on each contender, part and mode.
    """
    layers = contenders(shape, device)
    generator = torch.Generator(device).manual_seed(1)
    x = torch.randn(shape.batch, shape.tokens, shape.embed_dim, generator=generator, device=device)
    errors = _errors(shape, layers, x)
    allowed = FLOOR + FACTOR * errors["torch, heads gathered"]
    passed = {name: layer for name, layer in layers.items() if errors.get(name, 0.0) <= allowed}
    attending = {name: layer for name, layer in passed.items() if name != PROJECTIONS}
    for part, steps_of, timed in (
        ("attention", _attention_steps, attending),
        ("layer", _layer_steps, passed),
    ):
        for mode in ("forward", "forward_backward"):
            steps = steps_of(timed, x, mode == "forward_backward")
            if part == "layer" and mode == "forward":
                steps |= _allocation_steps(shape, layers["efficient_attn, uneven"], x)
            for step in steps.values():
                step()
            timings = interleave(steps, clock, seconds)
            for name, timing in timings.items():
                write(
                    {
                        "kind": "layer",
                        "shape": asdict(shape),
                        "part": part,
                        "mode": mode,
                        "contender": name,
                        "status": "timed",
                        "seconds": asdict(timing),
                        "error": errors.get(name),
                        "error_limit": allowed,
                    }
                )
    for name in layers.keys() - passed.keys():
        write({"kind": "layer", "contender": name, "status": "wrong", "error": errors[name]})


# What no attention can save of a layer.
PROJECTIONS = "projections alone"
ALLOCATIONS = ("allocation, one map", "allocation, a map per sample")


def layer_rows(records: list[dict]) -> list[tuple[str, ...]]:
    """Table cells: shape, part, mode, contender, milliseconds, and time over that of ours."""
    timed = [r for r in records if r["kind"] == "layer" and r["status"] == "timed"]
    rows = []
    for record in timed:
        key = (record["shape"]["name"], record["part"], record["mode"])
        ours = next(
            other["seconds"]["median"]
            for other in timed
            if (other["shape"]["name"], other["part"], other["mode"]) == key
            and other["contender"] == "efficient_attn, uneven"
        )
        took = record["seconds"]["median"]
        share = took / ours
        relative = f"{share:.2%}" if record["contender"] in ALLOCATIONS else f"{share:.2f}"
        mode = "inference" if record["mode"] == "forward" else "forward and backward"
        rows.append((*key[:2], mode, record["contender"], f"{took * 1e3:.2f}", relative))
    return rows


HEADS = ("shape", "part", "mode", "groups", "ms", "time over ours, uneven")


def print_layers(records: list[dict], console: Console) -> None:
    """A table of all timings."""
    table = Table(*HEADS)
    for row in layer_rows(records):
        table.add_row(*row)
    console.print(table)


def _with_attention(layer: GroupedQueryAttention, attend: Attend) -> Replaced:
    layer.__class__ = Replaced
    layer.theirs = attend
    return layer


def _gathered(index: Tensor, causal: bool) -> Attend:
    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        key, value = (x.index_select(1, index) for x in (key, value))
        return F.scaled_dot_product_attention(query, key, value, is_causal=causal)

    return attend


def _even(causal: bool) -> Attend:
    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        options = {"is_causal": causal, "enable_gqa": True}
        return F.scaled_dot_product_attention(query, key, value, **options)

    return attend


def _looped(sizes: tuple[int, ...], causal: bool) -> Attend:
    """The way of the method's authors: group after group, all scores written."""

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        tokens = query.shape[2]
        hidden = torch.ones(tokens, tokens, dtype=torch.bool, device=query.device).triu(1)
        query = query * query.shape[-1] ** -0.5
        outs = []
        for group, heads in enumerate(torch.split(query, sizes, dim=1)):
            scores = heads @ key[:, group : group + 1].transpose(-2, -1)
            if causal:
                scores = scores.masked_fill(hidden, -torch.inf)
            outs.append(scores.softmax(-1) @ value[:, group : group + 1])
        return torch.cat(outs, 1)

    return attend


def _passed_on(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """As little as can be computed of all three heads."""
    out = query.clone()
    for heads in (key, value):
        out[:, : heads.shape[1]] += heads
    return out


def _errors(shape: Shape, layers: dict[str, GroupedQueryAttention], x: Tensor) -> dict[str, float]:
    """Relative errors of outputs and input gradients, of those with the uneven map."""
    exact = copy.deepcopy(layers["torch, heads gathered"]).double()
    truth = _result(exact, x.double())
    return {
        name: max(
            float((a.double() - b).norm() / b.norm())
            for a, b in zip(_result(layer, x), truth, strict=True)
        )
        for name, layer in layers.items()
        if name != PROJECTIONS and not name.endswith((", even", "even groups"))
    }


def _result(layer: GroupedQueryAttention, x: Tensor) -> tuple[Tensor, Tensor]:
    x = x.detach().clone().requires_grad_()
    out = layer(x)
    weight = torch.linspace(-1, 1, out.numel(), dtype=out.dtype, device=out.device)
    return out.detach(), torch.autograd.grad(out, x, weight.view_as(out))[0]


def _layer_steps(
    layers: dict[str, GroupedQueryAttention], x: Tensor, backward: bool
) -> dict[str, Callable[[], object]]:
    grad_out = torch.randn_like(x)

    def step(layer: GroupedQueryAttention) -> Callable[[], object]:
        inputs = [x.detach().clone().requires_grad_(), *layer.parameters()]
        return _step(lambda: layer(inputs[0]), inputs, grad_out, backward)

    return {name: step(layer) for name, layer in layers.items()}


def _attention_steps(
    layers: dict[str, GroupedQueryAttention], x: Tensor, backward: bool
) -> dict[str, Callable[[], object]]:
    def step(layer: GroupedQueryAttention) -> Callable[[], object]:
        with torch.no_grad():
            inputs = layer.project(x, x)
        inputs = [head.requires_grad_() for head in inputs]
        options = {"head_map": layer.head_map, "causal": layer.causal}
        grad_out = torch.randn_like(inputs[0])
        return _step(lambda: layer.attend(*inputs, **options), inputs, grad_out, backward)

    return {name: step(layer) for name, layer in layers.items()}


def _step(
    call: Callable[[], Tensor], inputs: list[Tensor], grad_out: Tensor, backward: bool
) -> Callable[[], object]:
    if backward:
        return lambda: torch.autograd.grad(call(), inputs, grad_out)

    def forward() -> Tensor:
        with torch.no_grad():
            return call()

    return forward


def _allocation_steps(
    shape: Shape, layer: GroupedQueryAttention, x: Tensor
) -> dict[str, Callable[[], object]]:
    """Norms of the projected keys, and the map that follows from them."""
    options = {"num_kv_heads": shape.num_kv_heads, "device": x.device}
    steps = {}
    for name, scope in zip(ALLOCATIONS, ("batch", "sample"), strict=True):
        live = KDGQA(shape.embed_dim, shape.num_heads, scope=scope, **options).eval()
        with torch.no_grad():
            heads = layer.project(x, x)
        steps[name] = lambda live=live, heads=heads: live.choose_head_map(*heads, None)
    return steps
