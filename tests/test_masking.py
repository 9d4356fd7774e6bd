"""Windows: the lower right corner, and a closed form that counts what the mask shows."""

import itertools

import pytest
import torch

from efficient_attn.masking import count_visible, visible, window_limits


def test_causal_ends_in_the_lower_right_corner():
    assert visible(2, 4, None, 0).tolist() == [[True, True, True, False], [True] * 4]
    assert visible(4, 2, None, 0).tolist() == [
        [False, False],
        [False, False],
        [True, False],
        [True, True],
    ]


def test_a_causal_window_shows_the_last_keys():
    mask = visible(5, 5, *window_limits(True, (1, None)))
    assert torch.equal(mask, torch.ones(5, 5, dtype=torch.bool).tril().triu(-1))


def test_the_count_is_that_of_the_mask():
    limits = (None, 0, 1, 3, 20)
    for nq, nk, left, right in itertools.product((0, 1, 3, 7), (0, 1, 4, 9), limits, limits):
        assert count_visible(nq, nk, left, right) == int(visible(nq, nk, left, right).sum())


def test_limits():
    assert window_limits(False, None) == (None, None)
    assert window_limits(True, None) == (None, 0)
    assert window_limits(True, (3, 5)) == (3, 0)
    assert window_limits(False, (None, 5)) == (None, 5)
    with pytest.raises(TypeError, match="pass \\(left, right\\)"):
        window_limits(True, 128)
    with pytest.raises(ValueError, match="at least 0"):
        window_limits(True, (-1, 0))
