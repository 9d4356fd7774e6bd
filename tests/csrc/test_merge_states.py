"""The native `merge_states` against fp64."""

import pytest
import torch

from efficient_attn import reference

EPS = {d: torch.finfo(d).eps for d in (torch.float32, torch.bfloat16, torch.float16)}


@pytest.fixture
def merge(use_native):
    return torch.ops.efficient_attn_native.merge_states


def parts(count, *shape, dtype=torch.float32):
    outs = [torch.randn(shape).to(dtype) for _ in range(count)]
    return outs, [3 * torch.randn(shape[:-1]) for _ in range(count)]


def truth(outs, lses):
    return reference.merge_states([x.double() for x in outs], [x.double() for x in lses])


def assert_close(actual, outs, lses):
    expected_out, expected_lse = truth(outs, lses)
    # One rounding to the dtype of the output, and fp32 arithmetic before it.
    rtol = EPS[outs[0].dtype] / 2 + 2e-6
    torch.testing.assert_close(actual[0].double(), expected_out, rtol=rtol, atol=2e-6)
    torch.testing.assert_close(actual[1].double(), expected_lse, rtol=1e-6, atol=1e-6)


# Around the vector widths of every instruction set, and their blocks of eight.
@pytest.mark.parametrize("dim", [1, 3, 4, 7, 8, 15, 16, 17, 31, 64, 65, 96, 128, 131, 200, 576])
@pytest.mark.parametrize("dtype", EPS)
def test_every_width(merge, poisoned_memory, dim, dtype):
    outs, lses = parts(3, 2, 5, dim, dtype=dtype)
    assert_close(merge(outs, lses), outs, lses)


@pytest.mark.parametrize("count", [1, 2, 5, 33])
def test_any_number_of_parts(merge, count):
    outs, lses = parts(count, 7, 20)
    assert_close(merge(outs, lses), outs, lses)


def test_double_precision(merge):
    outs, lses = parts(4, 3, 5, 37)
    outs, lses = [x.double() for x in outs], [x.double() for x in lses]
    torch.testing.assert_close(merge(outs, lses), truth(outs, lses), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("dtype", EPS)
def test_double_lses_are_not_rounded(merge, dtype):
    outs, lses = parts(3, 4, 9, dtype=dtype)
    lses = [1e6 + x.double() for x in lses]
    out, lse = merge(outs, lses)
    assert out.dtype == dtype and lse.dtype == torch.float64
    torch.testing.assert_close(lse, truth(outs, lses)[1], rtol=1e-15, atol=0)
    torch.testing.assert_close(
        out.double(), truth(outs, lses)[0], rtol=EPS[dtype] / 2 + 1e-9, atol=1e-7
    )


LAYOUTS = {
    "tokens-major": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "last dimension strided": lambda x: x.transpose(1, 3).contiguous().transpose(1, 3),
    "every other token": lambda x: x.repeat_interleave(2, dim=2)[:, :, ::2],
    "cut out of a larger one": lambda x: torch.nn.functional.pad(x, (1, 2, 1, 2))[:, :, 1:-2, 1:-2],
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_strides(merge, poisoned_memory, layout):
    outs, lses = parts(3, 2, 4, 6, 24)
    strided = [LAYOUTS[layout](x) for x in outs]
    assert not strided[0].is_contiguous() and torch.equal(strided[0], outs[0])
    mixed = [strided[0], outs[1], strided[2]]  # Each part has strides of its own.
    lses[1] = lses[1].transpose(0, 2).contiguous().transpose(0, 2)
    for given in (strided, mixed):
        out, lse = merge(given, lses)
        assert out.is_contiguous() and lse.is_contiguous()
        assert_close((out, lse), outs, lses)


def test_broadcast_parts(merge):
    outs, lses = parts(2, 3, 5, 8)
    outs[1], lses[1] = outs[1][:1].expand(3, 5, 8), lses[1][:, :1].expand(3, 5)
    assert_close(merge(outs, lses), outs, lses)


def test_what_saw_nothing_is_not_read(merge):
    outs, lses = parts(3, 4, 40)
    lses[0][1] = lses[1][2] = -torch.inf
    for lse in lses:
        lse[3] = -torch.inf
    expected = truth(
        [torch.where(x.isinf()[:, None], 0, o) for o, x in zip(outs, lses, strict=True)], lses
    )
    poisoned = [
        o.masked_fill(x.isinf()[:, None], torch.nan) for o, x in zip(outs, lses, strict=True)
    ]
    out, lse = merge(poisoned, lses)
    torch.testing.assert_close((out.double(), lse.double()), expected, rtol=2e-6, atol=2e-6)
    assert (out[3] == 0).all() and lse[3] == -torch.inf


@pytest.mark.parametrize("shape", [(0, 8), (3, 0), (2, 0, 8), (5,)])
def test_degenerate_shapes(merge, shape):
    outs, lses = parts(2, *shape)
    out, lse = merge(outs, lses)
    expected = truth(outs, lses)
    assert out.shape == shape and lse.shape == shape[:-1]
    torch.testing.assert_close((out.double(), lse.double()), expected, rtol=2e-6, atol=2e-6)


def test_many_threads_give_the_same_bits_as_one(merge):
    outs, lses = parts(3, 3, 1000, 64)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(merge(outs, lses))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert torch.equal(other[0], results[0][0]) and torch.equal(other[1], results[0][1])


def test_what_is_refused(merge):
    outs, lses = parts(2, 3, 8)
    with pytest.raises(RuntimeError, match="one lse for each out"):
        merge(outs, lses[:1])
    with pytest.raises(RuntimeError, match="part 1 of merge_states differs"):
        merge([outs[0], outs[1][:2]], lses)
    with pytest.raises(RuntimeError, match="part 0 of merge_states differs"):
        merge([x[:, None] for x in outs], lses)
    with pytest.raises(RuntimeError, match="Int; pass float16"):
        merge([x.int() for x in outs], lses)
    with pytest.raises(RuntimeError, match="Half; pass float32"):
        merge(outs, [x.half() for x in lses])
