"""The suites: lists of workloads. A new suite is one more list here."""

from __future__ import annotations

from dataclasses import replace

from bench.cache_suites import CACHE_SUITES
from bench.workloads import HYPER_CONFIGS, SHORT_DTYPES, Workload, length_label

# Three unequal groups and a lone head, as key-driven grouping produces them.
UNEVEN_16 = (7, 5, 3, 1)
UNEVEN_32 = (1, 2, 3, 3, 4, 5, 6, 8)


def _sized(
    heads: str,
    template: Workload,
    *lengths: int,
    mode: str = "forward",
    causal: bool = True,
    **changes,
) -> list[Workload]:
    """One workload per length, named after everything that tells it from its neighbours."""
    workload = replace(template, mode=mode, causal=causal, **changes)
    dims = (
        f"d{workload.d_qk}"
        if workload.d_qk == workload.d_v
        else (f"d{workload.d_qk}x{workload.d_v}")
    )
    parts = [workload.suite, heads, dims, SHORT_DTYPES[workload.dtype]]
    parts += ["causal" if causal else "full", "fwd" if mode == "forward" else "fwdbwd"]
    parts += ["heads-major"] if workload.layout == "heads" else []
    return [
        replace(
            workload,
            name="-".join([*parts, length_label(length)]),
            num_queries=length,
            num_keys=length,
        )
        for length in lengths
    ]


def _heads(suite: str, device: str, dtype: str, q: int, k: int, v: int, **more) -> Workload:
    """A template that still lacks its name and lengths."""
    dims = {"d_qk": more.pop("d_qk", 64), "d_v": more.pop("d_v", 64)}
    return Workload(
        name="template",
        suite=suite,
        device=device,
        dtype=dtype,
        q_heads=q,
        k_heads=k,
        v_heads=v,
        num_queries=1,
        num_keys=1,
        **dims,
        **more,
    )


def _contiguous(sizes: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(head for head, size in enumerate(sizes) for _ in range(size))


def _maps(suite: str, device: str, dtype: str, dim: int, q: int, uneven: tuple[int, ...]) -> dict:
    """The head maps that no stock kernel takes, beside those that some do."""
    kv = len(uneven)
    dims = {"d_qk": dim, "d_v": dim}
    ragged, permuted = _contiguous(uneven), tuple(h % kv for h in range(q))
    half_keys = {"d_qk": dim // 2, "d_v": dim}
    few, many = q // 8, q // 2
    return {
        f"uneven{q}-{kv}": _heads(
            suite, device, dtype, q, kv, kv, q_to_k=ragged, q_to_v=ragged, **dims
        ),
        f"permuted{q}-{kv}": _heads(
            suite, device, dtype, q, kv, kv, q_to_k=permuted, q_to_v=permuted, **dims
        ),
        f"mqa{q}": _heads(suite, device, dtype, q, 1, 1, **dims),
        f"gqa{q}-{many}": _heads(suite, device, dtype, q, many, many, **dims),
        f"diff{q}-{few}-{many}": _heads(suite, device, dtype, q, few, many, **dims),
        f"diff{q}-{few}-{many}-half": _heads(suite, device, dtype, q, few, many, **half_keys),
    }


def _prefill_cpu() -> list[Workload]:
    mha = _heads("prefill", "cpu", "float32", 8, 8, 8)
    gqa = _heads("prefill", "cpu", "float32", 16, 4, 4)
    wide = _heads("prefill", "cpu", "float32", 8, 2, 2, d_qk=128, d_v=128)
    half = replace(gqa, dtype="bfloat16")
    both = {"mode": "forward_backward"}
    return [
        *_sized("mha8", mha, 1024, quick=True),
        *_sized("mha8", mha, 2048, 4096, 8192),
        *_sized("mha8", mha, 1024, 4096, causal=False),
        *_sized("mha8", mha, 1024, 2048, 4096, **both),
        *_sized("gqa16-4", gqa, 1024, quick=True),
        *_sized("gqa16-4", gqa, 2048, 4096),
        *_sized("gqa16-4", gqa, 1024, 2048, **both),
        *_sized("gqa8-2", wide, 1024, 4096),
        *_sized("gqa8-2", wide, 2048, **both),
        *_sized("gqa16-4", half, 1024, 2048, 4096, 8192),
        *_sized("gqa16-4", half, 1024, 2048, **both),
    ]


def _maps_cpu() -> list[Workload]:
    templates = _maps("maps", "cpu", "float32", 64, 16, UNEVEN_16)
    uneven = f"uneven16-{len(UNEVEN_16)}"
    workloads = [
        *_sized(uneven, templates[uneven], 1024, quick=True),
        *_sized(uneven, templates[uneven], 2048, 4096),
        *_sized(uneven, templates[uneven], 512, mode="forward_backward", quick=True),
        *_sized(uneven, templates[uneven], 1024, 2048, mode="forward_backward"),
    ]
    for heads, template in templates.items():
        if heads != uneven:
            workloads += _sized(heads, template, 1024, quick=heads.endswith("half"))
            workloads += _sized(heads, template, 2048)
            workloads += _sized(heads, template, 1024, mode="forward_backward")
    return workloads


def _prefill_cuda() -> list[Workload]:
    dims = {"d_qk": 128, "d_v": 128}
    mha = _heads("prefill", "cuda", "bfloat16", 32, 32, 32, **dims)
    gqa = _heads("prefill", "cuda", "bfloat16", 32, 8, 8, **dims)
    narrow = _heads("prefill", "cuda", "bfloat16", 32, 32, 32)
    wide = _heads("prefill", "cuda", "bfloat16", 16, 16, 16, d_qk=256, d_v=256)
    both = {"mode": "forward_backward"}
    return [
        *_sized("gqa32-8", gqa, 8192, rank=0),
        *_sized("gqa32-8", gqa, 8192, rank=0, **both),
        *_sized("mha32", mha, 8192, rank=0),
        *_sized("mha32", mha, 8192, rank=0, causal=False),
        *_sized("mha32", mha, 8192, rank=0, **both),
        *_sized("gqa32-8", gqa, 32768, 131072, rank=1),
        *_sized("gqa32-8", gqa, 32768, rank=1, **both),
        *_sized("mha32", narrow, 8192, 32768, rank=1),
        *_sized("mha32", narrow, 8192, rank=1, **both),
        *_sized("mha32", mha, 32768, rank=1, causal=False),
        *_sized("gqa32-8", gqa, 4096, 16384, 65536, rank=2),
        *_sized("mha32", mha, 8192, rank=2, layout="heads"),
        *_sized("mha16", wide, 8192, rank=2),
        *_sized("mha16", wide, 8192, rank=2, **both),
        *_sized("gqa32-8", gqa, 131072, rank=3, **both),
        *_sized("mha32", mha, 131072, rank=3, causal=False),
        *_sized("mha32", mha, 131072, rank=3, causal=False, **both),
    ]


def _maps_cuda() -> list[Workload]:
    templates = _maps("maps", "cuda", "bfloat16", 128, 32, UNEVEN_32)
    workloads = []
    for heads, template in templates.items():
        headline = 0 if heads.startswith("uneven") else 1
        workloads += _sized(heads, template, 8192, rank=headline)
        workloads += _sized(heads, template, 8192, rank=headline, mode="forward_backward")
        workloads += _sized(heads, template, 32768, rank=2)
    return workloads


def _hyper() -> list[Workload]:
    """Estimates beside exact attention: both configurations, from where the published one starts.

    The longest have one head and take minutes, nearly all of them for the exact side.
    """
    workloads = []
    for config in HYPER_CONFIGS:
        options = {"op": "hyper", "hyper": config}
        two = _heads("hyper", "cpu", "float32", 2, 2, 2, **options)
        one = _heads("hyper", "cpu", "float32", 1, 1, 1, **options)
        many = _heads("hyper", "cuda", "bfloat16", 32, 32, 32, d_qk=128, d_v=128, **options)
        name = {heads: f"{config}-mha{heads}" for heads in (1, 2, 32)}
        for causal in (False, True):
            for mode in ("forward", "forward_backward"):
                which = {"causal": causal, "mode": mode}
                quick = mode == "forward" and not causal
                workloads += _sized(name[2], two, 4096, quick=quick, **which)
                workloads += _sized(name[2], two, 8192, 16384, 32768, **which)
                workloads += _sized(name[1], one, 131072, **which)
                headline = 0 if mode == "forward" else 1
                workloads += _sized(name[32], many, 32768, rank=headline, **which)
            workloads += _sized(name[32], many, 131072, rank=2, causal=causal)
    return workloads


SUITES: dict[str, list[Workload]] = {
    "prefill": [*_prefill_cpu(), *_prefill_cuda()],
    "maps": [*_maps_cpu(), *_maps_cuda()],
    **CACHE_SUITES,
    "hyper": _hyper(),
}


def select(
    *, device: str | None = None, suites: list[str] | None = None, match: str = "", quick=False
) -> list[Workload]:
    """The workloads of some suites, in their order.

    Args:
        device: ``"cpu"`` or ``"cuda"``; ``None`` means both.
        suites: Names of suites; ``None`` or empty means all.
        match: Text that must occur in the workload's name.
        quick: Only the workloads of the quick run.
    """
    unknown = sorted(set(suites or ()) - set(SUITES))
    if unknown:
        raise ValueError(f"unknown suites {unknown}; there are {sorted(SUITES)}.")
    return [
        workload
        for suite in suites or SUITES
        for workload in SUITES[suite]
        if device in (None, workload.device)
        and match in workload.name
        and (workload.quick or not quick)
    ]
