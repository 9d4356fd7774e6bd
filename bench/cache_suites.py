"""The suites of attention to a cache.

On a CPU most caches are too large for the processor's own, since the question is how fast memory is
read; small ones show what a call costs besides. Lengths differ by dtype so that bytes do not.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial

from bench.workloads import SHORT_DTYPES, Workload, length_label

# Groups as a search over heads produces them; head 3 is read by nobody.
UNEVEN_WITH_EMPTY = (1, 2, 3, 0, 4, 6, 7, 9)


@dataclass(frozen=True)
class Heads:
    """A head shape: name, numbers of heads, widths, and the map if it is not even."""

    name: str
    q: int
    k: int
    v: int
    d_qk: int = 128
    d_v: int = 128
    options: dict = field(default_factory=dict)

    @property
    def dims(self) -> str:
        return f"d{self.d_qk}" if self.d_qk == self.d_v else f"d{self.d_qk}x{self.d_v}"


def _uneven(q: int, sizes: tuple[int, ...]) -> Heads:
    index = tuple(head for head, size in enumerate(sizes) for _ in range(size))
    heads = len(sizes)
    return Heads(f"uneven{q}-{heads}", q, heads, heads, options={"q_to_k": index, "q_to_v": index})


LLAMA = Heads("gqa32-8", 32, 8, 8)
WIDE_LLAMA = Heads("gqa64-8", 64, 8, 8)
MHA = Heads("mha32", 32, 32, 32)
MQA = Heads("mqa32", 32, 1, 1)
UNEVEN = _uneven(32, UNEVEN_WITH_EMPTY)
SIGMA = Heads("diff32-4-16", 32, 4, 16)
SIGMA_64 = Heads("diff32-4-16", 32, 4, 16, 64, 64)
GQA_16 = Heads("gqa32-16", 32, 16, 16)
GQA_16_64 = Heads("gqa32-16", 32, 16, 16, 64, 64)
HALF_SIGMA = Heads("diff32-2-8", 32, 2, 8)
MLA = {q: Heads(f"heads{q}", q, 1, 1, 576, 512, {"op": "mla_decode"}) for q in (16, 32, 64, 128)}


def _cached(
    suite: str,
    device: str,
    heads: Heads,
    dtype: str,
    *lengths: int,
    batch: int = 1,
    tokens: int = 1,
    **more,
) -> list[Workload]:
    """One workload per length, named after everything that tells it from its neighbours."""
    parts = [suite, heads.name, heads.dims, SHORT_DTYPES[dtype]]
    parts += [f"b{batch}"] if batch > 1 else []
    parts += [f"q{tokens}"] if tokens > 1 else []
    parts += ["graph"] if more.get("replayed") else []
    return [
        Workload(
            **{"op": "decode", "layout": "heads", **heads.options, **more},
            name="-".join([*parts, length_label(length)]),
            suite=suite,
            device=device,
            dtype=dtype,
            batch=batch,
            q_heads=heads.q,
            k_heads=heads.k,
            v_heads=heads.v,
            d_qk=heads.d_qk,
            d_v=heads.d_v,
            num_queries=tokens,
            num_keys=length,
        )
        for length in lengths
    ]


FP32, BF16 = "float32", "bfloat16"


def _decode_cpu() -> list[Workload]:
    cached = partial(_cached, "decode", "cpu")
    return [
        *cached(LLAMA, BF16, 1024, quick=True),
        *cached(LLAMA, BF16, 4096, 16384, 32768, 131072),
        *cached(LLAMA, FP32, 1024, 8192, 32768),
        *cached(LLAMA, BF16, 2048, batch=8),
        *cached(LLAMA, FP32, 1024, batch=8),
        *cached(LLAMA, BF16, 16384, tokens=4),
        *cached(LLAMA, FP32, 8192, tokens=4),
        *cached(MHA, BF16, 1024, 4096, 16384),
        *cached(MHA, FP32, 4096),
        *cached(MQA, BF16, 1024, 16384, 131072),
        *cached(MQA, FP32, 65536),
    ]


def _maps_cpu() -> list[Workload]:
    cached = partial(_cached, "decode-maps", "cpu")
    return [
        *cached(UNEVEN, BF16, 1024, quick=True),
        *cached(UNEVEN, BF16, 32768),
        *cached(LLAMA, BF16, 32768),
        *cached(UNEVEN, FP32, 16384),
        *cached(LLAMA, FP32, 16384),
        *cached(SIGMA, BF16, 16384),
        *cached(GQA_16, BF16, 16384),
        *cached(SIGMA, FP32, 8192),
        *cached(GQA_16, FP32, 8192),
        *cached(SIGMA_64, BF16, 32768),
        *cached(GQA_16_64, BF16, 32768),
        *cached(SIGMA_64, FP32, 16384),
        *cached(GQA_16_64, FP32, 16384),
    ]


def _selective_cpu() -> list[Workload]:
    cached = partial(_cached, "decode-selective", "cpu", top_values=100)
    return [
        *cached(SIGMA_64, BF16, 1024, quick=True),
        *cached(SIGMA_64, BF16, 8192, 32768, 131072),
        *cached(SIGMA, BF16, 8192, 32768),
        *cached(SIGMA_64, FP32, 8192, 32768),
        *cached(SIGMA, FP32, 32768),
        *cached(GQA_16_64, BF16, 32768),
    ]


def _mla_cpu() -> list[Workload]:
    cached = partial(_cached, "decode-mla", "cpu")
    return [
        *cached(MLA[16], BF16, 1024, quick=True),
        *cached(MLA[16], BF16, 16384, 65536, 131072),
        *cached(MLA[16], BF16, 65536, tokens=4),
        *(one for q in (32, 64, 128) for one in cached(MLA[q], BF16, 65536)),
        *(one for q in (16, 32, 64, 128) for one in cached(MLA[q], FP32, 32768)),
    ]


# The rows of ``efficient-attn plan``, and who has the same number of key heads as of value heads.
PLANNED = (MHA, GQA_16, LLAMA, MQA, MLA[32], SIGMA, HALF_SIGMA)


def _plan_cpu() -> list[Workload]:
    cached = partial(_cached, "plan", "cpu")
    return [
        *cached(LLAMA, BF16, 1024, quick=True),
        *(one for heads in PLANNED for one in cached(heads, BF16, 16384)),
        *(one for heads in PLANNED for one in cached(heads, FP32, 8192)),
    ]


def _decode_cuda() -> list[Workload]:
    cached = partial(_cached, "decode", "cuda")
    return [
        *cached(LLAMA, BF16, 4096, batch=32, rank=0),
        *cached(LLAMA, BF16, 131072, replayed=True, rank=0),
        *cached(WIDE_LLAMA, BF16, 4096, 8192, replayed=True, rank=1),
        *cached(LLAMA, BF16, 1024, 8192, 32768, replayed=True, rank=1),
        *cached(WIDE_LLAMA, BF16, 8192, rank=2),
        *cached(WIDE_LLAMA, BF16, 8192, batch=64, rank=2),
        *cached(LLAMA, BF16, 4096, batch=32, tokens=4, rank=2),
        *cached(MHA, BF16, 4096, batch=8, rank=2),
        *cached(MQA, BF16, 8192, batch=128, rank=2),
        *cached(LLAMA, FP32, 4096, batch=16, rank=3),
    ]


def _maps_cuda() -> list[Workload]:
    cached = partial(_cached, "decode-maps", "cuda")
    return [
        *cached(UNEVEN, BF16, 4096, batch=32, rank=0),
        *cached(SIGMA, BF16, 131072, rank=0),
        *cached(GQA_16, BF16, 131072, rank=1),
        *cached(SIGMA, BF16, 32768, replayed=True, rank=1),
        *cached(GQA_16, BF16, 32768, replayed=True, rank=1),
        *cached(UNEVEN, BF16, 8192, replayed=True, rank=2),
        *cached(SIGMA_64, BF16, 131072, rank=2),
        *cached(GQA_16_64, BF16, 131072, rank=2),
    ]


def _selective_cuda() -> list[Workload]:
    cached = partial(_cached, "decode-selective", "cuda", top_values=100)
    return [
        *cached(SIGMA, BF16, 131072, rank=0),
        *cached(SIGMA, BF16, 65536, rank=1),
        *cached(SIGMA_64, BF16, 262144, rank=2),
        *cached(SIGMA, BF16, 32768, batch=16, rank=2),
    ]


def _mla_cuda() -> list[Workload]:
    cached = partial(_cached, "decode-mla", "cuda")
    return [
        *cached(MLA[16], BF16, 4096, batch=128, rank=0),
        *cached(MLA[128], BF16, 4096, batch=128, rank=1),
        *cached(MLA[64], BF16, 4096, batch=128, rank=1),
        *cached(MLA[32], BF16, 4096, batch=128, rank=2),
        *cached(MLA[16], BF16, 131072, replayed=True, rank=2),
        *cached(MLA[16], BF16, 4096, batch=64, tokens=4, rank=2),
    ]


def _plan_cuda() -> list[Workload]:
    cached = partial(_cached, "plan", "cuda", replayed=True, rank=3)
    return [one for heads in PLANNED for one in cached(heads, BF16, 65536)]


CACHE_SUITES: dict[str, list[Workload]] = {
    "decode": [*_decode_cpu(), *_decode_cuda()],
    "decode-maps": [*_maps_cpu(), *_maps_cuda()],
    "decode-selective": [*_selective_cpu(), *_selective_cuda()],
    "decode-mla": [*_mla_cpu(), *_mla_cuda()],
    "plan": [*_plan_cpu(), *_plan_cuda()],
}
