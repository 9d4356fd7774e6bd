"""Which calls of attention to a cache go to the CUDA kernels, and which stay with Triton's."""

import pytest
import torch

from efficient_attn.head_map import HeadMap
from efficient_attn.ops import cuda
from tests.cached_inputs import cached

COVERS = {candidate.name: candidate.covers for candidate in cuda.CANDIDATES}
LENGTHS = torch.tensor([9, 3])


def attends(heads=(8, 2), tokens=1, dims=(64, 128), dtype=torch.bfloat16, **changed):
    """Whether a call is covered that differs from one that is in what is given."""
    inputs = cached(HeadMap.gqa(*heads), (9, 3), tokens, dims, 16, dtype)
    names = ("query", "key_cache", "value_cache")
    arguments = dict(zip(names, inputs, strict=True))
    arguments |= {"cache_lengths": LENGTHS, "block_table": None, "q_to_k": None, "q_to_v": None}
    arguments |= {"window_left": None, "scale": 0.1, "softcap": 0.0}
    for name, change in changed.items():
        arguments[name] = change(arguments[name]) if callable(change) else change
    return COVERS["attention_decode"](*arguments.values())


def test_what_decoding_is_like_is_covered():
    assert attends()
    assert attends(dims=(128, 64), dtype=torch.float16)
    assert attends(block_table=torch.zeros(2, 1), q_to_k=torch.zeros(8, dtype=torch.int32))
    assert attends(heads=(32, 8), tokens=8)
    assert attends(query=torch.Tensor.contiguous, key_cache=torch.Tensor.contiguous)


@pytest.mark.parametrize(
    "changed",
    [
        {"dtype": torch.float32},
        {"query": torch.Tensor.half},
        {"dims": (64, 72)},
        {"dims": (256, 128)},
        {"window_left": 40},
        {"softcap": 30.0},
        {"heads": (40, 1)},
        {"heads": (32, 8), "tokens": 9},
        {"tokens": 0},
        {"key_cache": lambda x: torch.stack([x, x], -1)[..., 0]},
        {"value_cache": lambda x: torch.cat([x, x], -1)[..., 4 : 4 + x.shape[-1]]},
        {"key_cache": lambda x: torch.nn.functional.pad(x, (0, 4))[..., :64]},
        {"query": lambda x: torch.nn.functional.pad(x, (0, 1))[..., :64]},
    ],
    ids=str,
)
def test_what_differs_stays_with_triton(changed):
    assert not attends(**changed)


@pytest.mark.parametrize(
    ("rank", "rope", "heads", "tokens", "dtype", "covered"),
    [
        (512, 64, 16, 4, torch.bfloat16, True),
        (512, 64, 64, 1, torch.float16, True),
        (64, 0, 1, 1, torch.bfloat16, True),
        (512, 64, 65, 1, torch.bfloat16, False),
        (512, 64, 16, 1, torch.float32, False),
        (512, 72, 16, 1, torch.bfloat16, False),
        (520, 56, 16, 1, torch.bfloat16, False),
        (60, 4, 16, 1, torch.bfloat16, False),
    ],
)
def test_latents(rank, rope, heads, tokens, dtype, covered):
    query = torch.zeros(2, heads, tokens, rank + rope, dtype=dtype)
    cache = torch.zeros(2, 9, rank + rope, dtype=dtype)
    queries = query.split([rank, rope], -1)
    assert COVERS["mla_decode"](*queries, cache, LENGTHS, None, 0.1) == covered
    assert not COVERS["mla_decode"](*queries, cache[..., 1:], LENGTHS, None, 0.1)
