"""What ``efficient-attn plan`` predicts of a call that reads a cache, beside what it took."""

from __future__ import annotations

from bench.report import first, share_of_peak
from efficient_attn import costs

SUITE = "plan"
HEADS = (
    "attention, cached tokens",
    "MB read",
    "by bytes, ms",
    "and by arithmetic",
    "measured",
    "times the prediction",
    "of the first: predicted",
    "measured",
)


def plan_rows(records: list[dict]) -> list[tuple[str, list[tuple[str, ...]]]]:
    """A heading and rows, the first of which names the columns, for each dtype.

    Bandwidth is that of reading as many bytes in the same rounds, arithmetic that of a matrix
    product in the same run.
    """
    found = [
        r
        for r in records
        if r["kind"] == "result"
        and r["side"] == "ours"
        and r["status"] == "timed"
        and r["workload"]["suite"] == SUITE
        and share_of_peak(r, records) is not None
    ]
    tables = []
    for dtype in dict.fromkeys(r["workload"]["dtype"] for r in found):
        rate = first(records, "ceilings").get("matmul_flops_per_second", {}).get(dtype)
        longest = max(r["workload"]["num_keys"] for r in found if r["workload"]["dtype"] == dtype)
        alike = [
            r
            for r in found
            if r["workload"]["dtype"] == dtype and r["workload"]["num_keys"] == longest
        ]
        if rate is None or len(alike) < 2:
            continue
        times = [(*_predicted(r, records, rate), r["seconds"]["median"]) for r in alike]
        rows = [HEADS]
        for record, (by_bytes, predicted, measured) in zip(alike, times, strict=True):
            rows.append(
                (
                    f"{_variant(record['workload']).name}, {longest}",
                    f"{record['workload']['minimal_bytes'] / 1e6:.1f}",
                    f"{by_bytes * 1e3:.2f}",
                    f"{predicted * 1e3:.2f}",
                    f"{measured * 1e3:.2f}",
                    f"{measured / predicted:.2f}",
                    f"{times[0][1] / predicted:.1f}",
                    f"{times[0][2] / measured:.1f}",
                )
            )
        heading = f"Prediction and measurement of one layer's attention, {dtype}"
        tables.append((heading, rows))
    return tables


def _predicted(record: dict, records: list[dict], rate: float) -> tuple[float, float]:
    """Seconds that the bytes need, and that bytes or arithmetic need, whichever is longer."""
    workload, variant = record["workload"], _variant(record["workload"])
    reading = share_of_peak(record, records) * record["seconds"]["median"]
    itemsize = workload["minimal_bytes"] / (
        workload["batch"] * workload["num_keys"] * variant.cache_numbers
    )
    step = {
        "layers": 1,
        "batch": workload["batch"],
        "context": workload["num_keys"],
        "bandwidth": workload["minimal_bytes"] / reading,
        "itemsize": int(itemsize),
    }
    return tuple(
        costs.decode_step(variant, **step, flops=flops).cache for flops in (float("inf"), rate)
    )


def _variant(workload: dict) -> costs.Variant:
    """What the planner knows of a workload; weights are not part of the call."""
    heads, width = workload["q_heads"], workload["d_v"]
    if workload["op"] == "mla_decode":
        turned = workload["d_qk"] - width
        sizes = {"kv_lora_rank": width, "qk_rope_head_dim": turned}
        name = f"MLA {width}+{turned}, {heads} heads"
        return costs.latent_variant(name, 0, heads, **sizes, qk_nope_head_dim=0, v_head_dim=0)
    key_heads, value_heads = workload["k_heads"], workload["v_heads"]
    sizes = {"num_key_heads": key_heads, "num_value_heads": value_heads}
    if key_heads != value_heads:
        name = f"DiffQKV {heads}/{key_heads}/{value_heads}"
    elif key_heads == heads:
        name = f"MHA {heads}"
    else:
        name = f"{'MQA' if key_heads == 1 else 'GQA'} {heads}/{key_heads}"
    options = {"head_dim": workload["d_qk"], "v_head_dim": width}
    return costs.heads_variant(name, 0, heads, **sizes, **options)
