"""What a cache keeps of a token, in every kind, and tokens to put there."""

import pytest
import torch

from efficient_attn.cache import KeyValueRows, LatentRows

ROWS = {
    "more value heads": KeyValueRows(2, 3, 5, 4),
    "more key heads": KeyValueRows(3, 1, 4, 7),
    "latent": LatentRows(6, 2),
    "latent without rotary": LatentRows(6, 0),
}


@pytest.fixture(params=ROWS)
def rows(request):
    return ROWS[request.param]


@pytest.fixture
def new_tokens():
    """Makes random tokens: for each part ``(batch, heads, tokens, dim)``."""

    def make(rows, batch, tokens, dtype=torch.float32):
        return [torch.randn(batch, *heads, tokens, dim).to(dtype) for *heads, dim in rows.shapes]

    return make
