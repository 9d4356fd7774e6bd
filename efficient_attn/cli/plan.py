"""``efficient-attn plan``."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Annotated

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from efficient_attn import costs

ITEMSIZES = {"fp32": 4, "bf16": 2, "fp16": 2, "fp8": 1}


def plan(
    layers: Annotated[int, typer.Option(min=1, help="Number of layers.")] = 32,
    embed_dim: Annotated[int, typer.Option(min=1, help="Width of the tokens.")] = 4096,
    heads: Annotated[int, typer.Option(min=1, help="Query heads.")] = 32,
    head_dim: Annotated[int, typer.Option(min=1, help="Width of a head.")] = 128,
    kv_heads: Annotated[int, typer.Option(min=1, help="Heads of the grouped-query row.")] = 8,
    key_heads: Annotated[int, typer.Option(min=1, help="Key heads of the DiffQKV row.")] = 2,
    value_heads: Annotated[int, typer.Option(min=1, help="Value heads of the DiffQKV row.")] = 8,
    key_head_dim: Annotated[int, typer.Option(min=0, help="Width of a DiffQKV key; 0: all.")] = 0,
    augmented_query_dim: Annotated[int, typer.Option(min=0, help="Of the DiffQKV row.")] = 0,
    kv_lora_rank: Annotated[int, typer.Option(min=1, help="Latent of the MLA row.")] = 512,
    rope_dim: Annotated[int, typer.Option(min=0, help="Rotary key of the MLA row.")] = 64,
    batch: Annotated[int, typer.Option(min=1, help="Sequences decoded together.")] = 1,
    context: Annotated[int, typer.Option(min=1, help="Cached tokens of each.")] = 32768,
    dtype: Annotated[str, typer.Option(help=f"One of {', '.join(ITEMSIZES)}.")] = "bf16",
    device: Annotated[str, typer.Option(help=f"One of {', '.join(costs.DEVICES)}.")] = "H100",
    bandwidth: Annotated[float, typer.Option(help="GB/s, instead of the device's.")] = 0.0,
    tflops: Annotated[float, typer.Option(help="TFLOP/s, instead of the device's.")] = 0.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Compare cache bytes and decode times of attention variants for a model's shape.

    Times are floors: what memory and arithmetic need at the rates of the device's data sheet. The
    last column says from how many cached tokens, of all sequences together, a variant's step reads
    less than that of the grouped-query row, its larger or smaller weights included.
    """
    for name, given, known in (("dtype", dtype, ITEMSIZES), ("device", device, costs.DEVICES)):
        if given not in known:
            raise typer.BadParameter(
                f"{given!r} is not known; pass one of {', '.join(known)}"
                + (", or --bandwidth and --tflops." if name == "device" else "."),
                param_hint=f"--{name}",
            )
    for name, count in (("kv", kv_heads), ("key", key_heads), ("value", value_heads)):
        if heads % count:
            raise typer.BadParameter(
                f"{count} does not divide the {heads} query heads.", param_hint=f"--{name}-heads"
            )
    default_bandwidth, default_flops = costs.DEVICES[device]
    rates = {
        "bandwidth": bandwidth * 1e9 or default_bandwidth,
        "flops": tflops * 1e12 or default_flops,
    }
    size = {"embed_dim": embed_dim, "num_heads": heads}
    grouped = costs.heads_variant(
        f"GQA {heads}/{kv_heads}", **size, num_key_heads=kv_heads, num_value_heads=kv_heads,
        head_dim=head_dim,
    )  # fmt: skip
    variants = [
        costs.heads_variant(
            f"MHA {heads}", **size, num_key_heads=heads, num_value_heads=heads, head_dim=head_dim
        ),
        grouped,
        costs.heads_variant(
            f"MQA {heads}/1", **size, num_key_heads=1, num_value_heads=1, head_dim=head_dim
        ),
        costs.latent_variant(
            f"MLA {kv_lora_rank}+{rope_dim}", **size, kv_lora_rank=kv_lora_rank,
            qk_rope_head_dim=rope_dim, qk_nope_head_dim=head_dim, v_head_dim=head_dim,
        ),
        costs.heads_variant(
            f"DiffQKV {heads}/{key_heads}/{value_heads}", **size, num_key_heads=key_heads,
            num_value_heads=value_heads, head_dim=key_head_dim or head_dim, v_head_dim=head_dim,
            augmented_query_dim=augmented_query_dim,
        ),
    ]  # fmt: skip
    itemsize = ITEMSIZES[dtype]
    load = {"layers": layers, "batch": batch, "context": context, "itemsize": itemsize}
    rows = [
        {
            "variant": variant.name,
            "cache_bytes_per_token": variant.cache_bytes(layers, itemsize),
            "cache_bytes": variant.cache_bytes(layers, itemsize) * batch * context,
            "seconds": asdict(costs.decode_step(variant, **load, **rates)),
            "break_even_tokens": costs.break_even(variant, grouped),
        }
        for variant in variants
    ]
    if as_json:
        for row in rows:
            if row["break_even_tokens"] == float("inf"):
                row["break_even_tokens"] = None
        print(json.dumps({"load": load, "rates": rates, "variants": rows}, indent=2))
        return
    Console().print(_table(rows, grouped.name))


def _table(rows: list[dict], baseline: str) -> Table:
    table = Table(box=box.SIMPLE, pad_edge=False)
    for heading in ("variant", "B/token", "cache", "cache ms", "weights", "step", "from"):
        table.add_column(heading, no_wrap=True)
    totals = {row["variant"]: sum(row["seconds"].values()) for row in rows}
    for row in rows:
        name, seconds, tokens = row["variant"], row["seconds"], row["break_even_tokens"]
        table.add_row(
            name,
            f"{row['cache_bytes_per_token']:,}",
            f"{row['cache_bytes'] / 2**30:,.2f} GiB",
            f"{seconds['cache'] * 1e3:.3f}",
            f"{seconds['weights'] * 1e3:.3f}",
            f"{totals[baseline] / totals[name]:.2f}x",
            _threshold(tokens) if name != baseline else "",
        )
    return table


def _threshold(tokens: float) -> str:
    if tokens == 0:
        return "always"
    return "never" if tokens == float("inf") else f"{tokens:,.0f}"
