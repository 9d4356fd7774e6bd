"""RotaryEmbedding against multiplication of complex numbers in fp64."""

import pytest
import torch

from efficient_attn.layers import RotaryEmbedding


def turned(x, positions, dim, theta, interleaved):
    """Channel pairs as complex numbers, each times exp(i * angle)."""
    head, rest = x[..., :dim].double(), x[..., dim:].double()
    if interleaved:
        pairs = torch.complex(head[..., 0::2], head[..., 1::2])
    else:
        pairs = torch.complex(head[..., : dim // 2], head[..., dim // 2 :])
    frequency = theta ** (-2 * torch.arange(dim // 2).double() / dim)
    angle = positions.double()[..., None] * frequency
    angle = angle[:, None] if positions.dim() == 2 else angle
    pairs = pairs * torch.polar(torch.ones_like(angle), angle)
    head = torch.cat((pairs.real, pairs.imag), -1)
    if interleaved:
        head = torch.stack((pairs.real, pairs.imag), -1).flatten(-2)
    return torch.cat((head, rest), -1)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("width", "dim"), [(16, 16), (20, 12), (6, 2)])
@pytest.mark.parametrize("batched", [False, True])
def test_is_a_rotation_of_complex_pairs(interleaved, width, dim, batched):
    x = torch.randn(3, 2, 7, width, dtype=torch.float64)
    positions = torch.randint(0, 1000, (3, 7) if batched else (7,))
    rotary = RotaryEmbedding(dim, theta=500.0, interleaved=interleaved)
    expected = turned(x, positions, dim, 500.0, interleaved)
    torch.testing.assert_close(rotary(x, positions), expected, rtol=1e-12, atol=1e-12)


def test_positions_default_to_counting_from_zero():
    x = torch.randn(2, 3, 5, 8)
    rotary = RotaryEmbedding(8)
    assert torch.equal(rotary(x), rotary(x, torch.arange(5)))
    assert torch.equal(rotary(x)[:, :, 0], x[:, :, 0])


@pytest.mark.parametrize("interleaved", [False, True])
def test_products_depend_on_the_distance_alone(interleaved):
    rotary = RotaryEmbedding(12, interleaved=interleaved)
    q, k = torch.randn(2, 1, 2, 9, 12, dtype=torch.float64)
    here, there = torch.arange(9), torch.arange(9) + 137
    scores = rotary(q, here) @ rotary(k, here).mT
    shifted = rotary(q, there) @ rotary(k, there).mT
    torch.testing.assert_close(scores, shifted, rtol=1e-10, atol=1e-10)


def test_low_precision_keeps_exact_angles_at_large_positions():
    """Angles in bf16 would be off by whole turns at position 30000."""
    positions = torch.arange(30000, 30016)
    x = torch.randn(1, 1, 16, 64).bfloat16()
    rotary = RotaryEmbedding(64).to(torch.bfloat16)
    out = rotary(x, positions)
    assert out.dtype == torch.bfloat16
    expected = turned(x, positions, 64, 10000.0, False)
    # An fp32 angle near 3e4 is rounded by up to 1e-3 radians, beside bf16's rounding of the result.
    torch.testing.assert_close(out.double(), expected, rtol=2**-8, atol=1e-2)


def test_a_table_replaces_the_base_and_a_factor_scales_what_is_turned():
    """Repeats included; neither a cast of the module nor memory taken anew changes the table."""
    table = torch.tensor([0.7, 0.02, 0.7], dtype=torch.float64)
    x, positions = torch.randn(2, 3, 5, 8, dtype=torch.float64), torch.arange(5) + 40
    rotary = RotaryEmbedding(6, inverse_frequencies=table, attention_factor=1.3, interleaved=True)
    pairs = torch.complex(x[..., 0:6:2], x[..., 1:6:2])
    angle = positions[:, None] * table
    pairs = pairs * torch.polar(torch.full_like(angle, 1.3), angle)
    expected = torch.cat((torch.stack((pairs.real, pairs.imag), -1).flatten(-2), x[..., 6:]), -1)
    for module in (rotary, rotary.bfloat16(), rotary.to_empty(device="cpu")):
        torch.testing.assert_close(module(x, positions), expected, rtol=1e-12, atol=1e-12)
    assert not rotary.state_dict()
    kept = RotaryEmbedding(6, inverse_frequencies=table, persistent=True)
    assert torch.equal(kept.state_dict()["inverse_frequencies"], table)


def test_a_table_of_a_model_gives_its_angles_to_the_bit():
    table = (10000.0 ** -(torch.arange(0, 64, 2) / 64)).float()
    positions = torch.arange(5000, 5100)
    angles = RotaryEmbedding(64, inverse_frequencies=table).angles(positions, torch.float64)
    assert torch.equal(angles, positions[:, None].float() * table)


def test_gradient_turns_back():
    """The transpose of a rotation is its inverse."""
    rotary = RotaryEmbedding(8)
    x = torch.randn(1, 2, 5, 10, dtype=torch.float64, requires_grad=True)
    out = rotary(x)
    (grad,) = torch.autograd.grad(out, x, grad_outputs=out.detach())
    torch.testing.assert_close(grad, x.detach())


def test_holds_no_state_and_compiles_with_dynamic_lengths():
    rotary = RotaryEmbedding(8)
    assert not rotary.state_dict()
    compiled = torch.compile(rotary, fullgraph=True, dynamic=True, backend="aot_eager")
    for tokens in (5, 9):
        x = torch.randn(2, 3, tokens, 8)
        torch.testing.assert_close(compiled(x), rotary(x))


def test_refusals_name_the_argument():
    with pytest.raises(ValueError, match="dim is 7"):
        RotaryEmbedding(7)
    with pytest.raises(ValueError, match=r"inverse_frequencies has shape \(4,\); dim 4 has \(2,\)"):
        RotaryEmbedding(4, inverse_frequencies=torch.ones(4))
    with pytest.raises(ValueError, match=r"x has shape \(1, 2, 3, 4\)"):
        RotaryEmbedding(8)(torch.zeros(1, 2, 3, 4))
    with pytest.raises(ValueError, match="positions has shape"):
        RotaryEmbedding(4)(torch.zeros(1, 2, 3, 4), torch.arange(5))
