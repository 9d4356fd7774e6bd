"""The tile tables, and what the kernels refuse."""

import itertools

import pytest
import torch

from efficient_attn.kernels.triton import attention_fwd, configs
from efficient_attn.kernels.triton._arguments import Problem
from efficient_attn.kernels.triton._tile import ROW_PADDING

KERNELS = ("forward", "rows", "grad_query", "grad_key_value", "grad_bias")


@pytest.mark.parametrize("arch", [*configs.SHARED_MEMORY, "interpreted"])
@pytest.mark.parametrize("kernel", KERNELS)
def test_every_input_has_a_tile(arch, kernel):
    dims = (8, 40, 64, 72, 128, 192, 256)
    for size, bias, rich in itertools.product((2, 4), (False, True), (False, True)):
        for head_dims in itertools.product(dims, dims):
            tile = configs.tile(
                kernel, arch, size, head_dims, with_bias=bias, with_window_or_softcap=rich
            )
            assert tile.num_warps in (4, 8)
            # The statistics that the backward kernels read whole tiles of are padded to this.
            assert kernel == "forward" or ROW_PADDING.value % tile.rows == 0


@pytest.mark.parametrize(
    ("capability", "family"),
    [
        ((8, 0), "sm80"),
        ((8, 6), "sm86"),
        ((8, 9), "sm86"),
        ((9, 0), "sm90"),
        ((10, 0), "sm100"),
        ((10, 3), "sm100"),
        ((12, 0), "sm86"),
    ],
)
def test_families(capability, family):
    assert configs.family(capability) == family


def test_refusals_name_every_reason():
    query, key = (torch.zeros(1, 1, 1, 300, dtype=torch.float64) for _ in range(2))
    value = torch.zeros(1, 1, 1, 4)
    reasons = attention_fwd.refusals(query, key, value)
    assert len(reasons) == 4
    assert any("float64" in reason for reason in reasons)
    assert any("300" in reason for reason in reasons)
    assert any("4;" in reason for reason in reasons)


def test_nothing_to_refuse():
    x = torch.zeros(1, 1, 1, 8)
    assert attention_fwd.refusals(x, x, x) == []


@pytest.mark.parametrize("tokens", [0, 1, 1000, 10**7])
@pytest.mark.parametrize(("heads", "groups"), [(1, 1), (12, 5), (32, 8), (64, 1)])
def test_sections_of_heads_are_whole_groups_and_not_empty(tokens, heads, groups):
    def meta(count):
        return torch.empty(1, count, tokens, 128, dtype=torch.bfloat16, device="meta")

    problem = Problem(
        meta(heads), meta(groups), meta(groups), None, None, None, None, scale=1.0, softcap=0.0
    )
    together = problem.heads_together()
    assert 1 <= together <= heads
    assert together == heads or together % (heads // groups) == 0
    assert 1 <= problem.groups_together(groups) <= groups
