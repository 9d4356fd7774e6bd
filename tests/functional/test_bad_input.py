"""Every wrong input is refused by one error that says what was given and what is accepted."""

import pytest
import torch

import efficient_attn as ea
from efficient_attn import HeadMap


def tensors(**change):
    made = {
        "query": torch.randn(2, 4, 3, 8),
        "key": torch.randn(2, 2, 5, 8),
        "value": torch.randn(2, 2, 5, 8),
    }
    return {**made, **change}


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({"query": [[1.0]]}, TypeError, "query is a list"),
        ({"query": torch.randn(4, 3, 8)}, ValueError, "query has shape .* 4 dimensions"),
        ({"key": torch.randn(2, 2, 5, 7)}, ValueError, "head dim 8 and key 7"),
        ({"key": torch.randn(2, 2, 6, 8)}, ValueError, "key has 6 tokens and value 5"),
        ({"key": torch.randn(1, 2, 5, 8)}, ValueError, "key has batch size 1"),
        ({"key": torch.randn(2, 3, 5, 8)}, ValueError, "key has 3 heads and query has 4"),
        ({"value": torch.randn(2, 3, 5, 8)}, ValueError, "value has 3 heads and query has 4"),
        ({"value": torch.randn(2, 2, 5, 0)}, ValueError, "value has head dim 0"),
        ({"value": torch.randn(2, 0, 5, 8)}, ValueError, "value has 0 heads"),
        ({"key": torch.randn(2, 2, 5, 8).double()}, TypeError, "float32, torch.float64"),
        ({"key": torch.ones(2, 2, 5, 8, dtype=torch.int64)}, TypeError, "dtype torch.int64"),
        ({"key": torch.randn(2, 2, 5, 8, device="meta")}, ValueError, "key is on meta"),
        ({"window": 128}, TypeError, "pass \\(left, right\\)"),
        ({"window": (-1, 0)}, ValueError, "left limit"),
        ({"softcap": -1.0}, ValueError, "softcap is -1.0"),
        ({"bias": torch.ones(3, 5, dtype=torch.bool)}, TypeError, "masked_fill"),
        ({"bias": torch.randn(3, 4)}, ValueError, r"\(2, 4, 3, 5\)"),
        ({"bias": torch.randn(1, 1, 1, 1, 5)}, ValueError, "does not broadcast"),
        ({"key_lengths": torch.tensor([5])}, ValueError, r"must be \(2,\)"),
        ({"key_lengths": torch.tensor([5, 6])}, ValueError, r"lie in \[0, 5\]"),
        ({"key_lengths": torch.tensor([5.0, 3.0])}, TypeError, "int32 or int64"),
        ({"head_map": [0, 0, 1, 1]}, TypeError, "pass an efficient_attn.HeadMap"),
        ({"head_map": HeadMap.gqa(8, 2)}, ValueError, "head_map is for 8 query"),
        ({"head_map": HeadMap.from_group_sizes([3, 1]).to("meta")}, ValueError, "is on meta"),
        (
            {"head_map": HeadMap.from_index(torch.zeros(3, 4).int(), num_k_heads=2)},
            ValueError,
            "3 rows, but there are 2 samples",
        ),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_refused(change, kind, message):
    with pytest.raises(kind, match=message):
        ea.attention(**tensors(**change))
