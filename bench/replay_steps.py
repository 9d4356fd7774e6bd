"""A prefill and a training step of one layer of Sigma-1.5B, in every arm of the replay.

Fewer key heads save nothing there, for a prefill multiplies as much whatever the heads; what can be
seen is what the augmented query costs. Each arm is also timed with torch's attention in the layer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from bench import replay
from bench.measure import Clock, interleave
from bench.replay import ARMS, Arm
from bench.runner import Write
from efficient_attn.layers import DiffQKVAttention, RotaryEmbedding

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
OURS = "efficient_attn"
MODES = {"forward": "prefill", "forward_backward": "training step"}
# At most this many times the error of torch's own op in the same dtype, plus a floor.
FACTOR, FLOOR = 2.0, 1e-5
HEADS = ("pass", "tokens", "heads", "ours, ms", "fastest of torch", "ms", "ratio", "over GQA")


def time_steps(
    tokens: int,
    dtype: torch.dtype,
    device: str,
    clock: Clock,
    write: Write,
    *,
    seconds: float = 1.0,
) -> None:
    """Check and time every arm on ``tokens`` tokens, and write a record for each way and mode.

    Args:
        tokens: Length of the one sequence.
        dtype: Of the weights and of what is computed.
        device: ``"cpu"`` or ``"cuda"``.
        clock: The device's clock.
        write: Receives the records.
        seconds: Time to spend on each.
    """
    torch.manual_seed(0)
    x = torch.randn(1, tokens, replay.EMBED, device=device, dtype=dtype)
    layers, told = {}, {}
    for arm in ARMS:
        ways = {OURS: None, "enable_gqa": _shared, "copied heads": _copied}
        made = {name: _layer(arm, attend, dtype, device) for name, attend in ways.items()}
        truth = _result(_layer(arm, _copied, torch.float64, device), x.double())
        errors = {name: _error(_result(layer, x), truth) for name, layer in made.items()}
        limit = FLOOR + FACTOR * errors["copied heads"]
        for name, layer in made.items():
            right = errors[name] <= limit
            told[arm, name] = {"error": errors[name], "error_limit": limit, "right": right}
            if right:
                layers[arm, name] = layer
    for mode in MODES:
        steps = {key: _step(layer, x, mode) for key, layer in layers.items()}
        for step in steps.values():
            step()
        timings = interleave(steps, clock, seconds)
        for (arm, name), checked in told.items():
            record = {
                "kind": "replay step",
                "arm": arm.name,
                "contender": name,
                "mode": mode,
                "tokens": tokens,
                "dtype": str(dtype).removeprefix("torch."),
                "status": "timed" if checked["right"] else "wrong",
                **{key: checked[key] for key in ("error", "error_limit")},
            }
            if checked["right"]:
                record["seconds"] = asdict(timings[arm, name])
            write(record)


def step_rows(records: list[dict]) -> list[tuple[str, ...]]:
    """Headings and rows of the table."""
    timed = [r for r in records if r["kind"] == "replay step" and r["status"] == "timed"]
    rows = [HEADS]
    for mode, tokens, arm in dict.fromkeys((r["mode"], r["tokens"], r["arm"]) for r in timed):
        alike = [r for r in timed if (r["mode"], r["tokens"]) == (mode, tokens)]
        took = {(r["arm"], r["contender"]): r["seconds"]["median"] for r in alike}
        theirs = {way: t for (of, way), t in took.items() if of == arm and way != OURS}
        if (arm, OURS) not in took or not theirs:
            continue
        ours, way = took[arm, OURS], min(theirs, key=theirs.get)
        over = took.get((replay.BASELINE, OURS), float("nan")) / ours
        milliseconds = f"{theirs[way] * 1e3:.1f}", f"**{theirs[way] / ours:.2f}**"
        rows.append(
            (MODES[mode], str(tokens), arm, f"{ours * 1e3:.1f}", way, *milliseconds, f"{over:.2f}")
        )
    return rows


class _WithAttention(DiffQKVAttention):
    """A layer whose attention is somebody else's."""

    theirs: Attend

    def attend(self, query: Tensor, key: Tensor, value: Tensor, **options: object) -> Tensor:
        return self.theirs(query, key, value)


def _layer(arm: Arm, attend: Attend | None, dtype: torch.dtype, device: str) -> DiffQKVAttention:
    """The arm's layer, always with the same weights."""
    torch.manual_seed(1)
    made = DiffQKVAttention(
        replay.EMBED,
        replay.HEADS,
        num_key_heads=arm.key_heads,
        num_value_heads=arm.value_heads,
        head_dim=replay.DIM,
        augmented_query_dim=arm.augmented_query_dim,
        causal=True,
        rotary=RotaryEmbedding(replay.DIM),
    ).to(device, dtype)
    if attend is not None:
        made.__class__, made.theirs = _WithAttention, attend
    return made


def _shared(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Grouped attention of torch; what there are fewer of is copied until the numbers are equal."""
    most = max(key.shape[1], value.shape[1])
    key, value = (x.repeat_interleave(most // x.shape[1], 1) for x in (key, value))
    return scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)


def _copied(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
    return scaled_dot_product_attention(query, key, value, is_causal=True)


def _result(layer: DiffQKVAttention, x: Tensor) -> tuple[Tensor, Tensor]:
    x = x.detach().clone().requires_grad_()
    out = layer(x)
    return out.detach(), torch.autograd.grad(out.square().sum(), x)[0]


def _error(found: tuple[Tensor, ...], truth: tuple[Tensor, ...]) -> float:
    """The larger relative error of output and gradient."""
    return max(float((a - b).norm() / b.norm()) for a, b in zip(found, truth, strict=True))


def _step(layer: DiffQKVAttention, x: Tensor, mode: str) -> Callable[[], object]:
    if mode == "forward":

        def forward() -> Tensor:
            with torch.no_grad():
                return layer(x)

        return forward
    inputs = [x.detach().clone().requires_grad_(), *layer.parameters()]
    grad_out = torch.randn_like(x)
    return lambda: torch.autograd.grad(layer(inputs[0]), inputs, grad_out)
