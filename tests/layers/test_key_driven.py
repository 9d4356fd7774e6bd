"""KDGQA and DGQA: which map a call gets, and that it is the attention under that map."""

import copy

import pytest
import torch
from torch import nn

import efficient_attn as ea
from efficient_attn import HeadMap, UnsupportedError
from efficient_attn.cache import StaticCache
from efficient_attn.layers import DGQA, KDGQA, GroupedQueryAttention, RotaryEmbedding, freeze_groups

EMBED, HEADS, GROUPS, BATCH, TOKENS = 24, 6, 3, 4, 7
KHAN = {"compat": "khan2024"}


def kdgqa(**options):
    torch.manual_seed(0)
    options = {"num_kv_heads": GROUPS, "dtype": torch.float64} | options
    return KDGQA(EMBED, HEADS, **options)


def dgqa(**options):
    torch.manual_seed(0)
    options = {"num_kv_heads": GROUPS, "dtype": torch.float64, "update_every": 2} | options
    return DGQA(EMBED, HEADS, **options)


def tokens(*shape, seed=1, **options):
    generator = torch.Generator().manual_seed(seed)
    options = {"dtype": torch.float64} | options
    return torch.randn(*(shape or (BATCH, TOKENS)), EMBED, generator=generator, **options)


def plain(layer, x, head_map, **options):
    """The same projections under a map that is given."""
    like = GroupedQueryAttention(EMBED, HEADS, head_map=HeadMap.gqa(HEADS, GROUPS), dtype=x.dtype)
    like.load_state_dict({k: v for k, v in layer.state_dict().items() if "proj" in k})
    like.causal = layer.causal
    return like(x, head_map=head_map, **options)


def uneven(layer, factors=(0.2, 2.0, 1.0)):
    """Scale the key heads, so that groups become uneven for sure."""
    with torch.no_grad():
        heads = layer.k_proj.weight.view(GROUPS, -1, EMBED)
        heads.mul_(torch.tensor(factors, dtype=heads.dtype)[:, None, None])
        layer.k_proj.bias.zero_()
    return layer


@pytest.mark.parametrize("options", [{}, {"scope": "batch"}, KHAN, {"min_queries": 1}])
def test_kdgqa_is_attention_under_the_allocated_map(options):
    layer, x = uneven(kdgqa(**options)), tokens()
    x[1] *= torch.linspace(0, 3, EMBED, dtype=x.dtype)
    key = layer.k_proj(x).unflatten(-1, (GROUPS, -1)).transpose(1, 2)
    norms = ea.key_norms(key)
    norms = norms if layer.scope == "sample" else norms.sum(0)
    rule = {"normalization": "minmax", "rounding": layer.rounding, "min_queries": layer.min_queries}
    sizes, index = ea.allocate_heads(norms, HEADS, **rule)
    assert sizes.unique().numel() > 1
    expected = plain(layer, x, HeadMap.from_index(index, num_k_heads=GROUPS))
    torch.testing.assert_close(layer(x), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(layer.eval()(x), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("options", [{}, {"scope": "batch"}, KHAN])
def test_equal_norms_give_grouped_query_attention(options):
    layers = [kdgqa(**options), dgqa(compat=options.get("compat")), dgqa(flavor="difference")]
    for layer in layers:
        with torch.no_grad():
            layer.k_proj.weight.view(GROUPS, -1, EMBED)[1:] = layer.k_proj.weight[: EMBED // HEADS]
            layer.k_proj.bias.zero_()
        x = tokens()
        expected = plain(layer, x, HeadMap.gqa(HEADS, GROUPS))
        for _ in range(3):
            torch.testing.assert_close(layer(x), expected, rtol=1e-12, atol=1e-12)
        assert layer.group_sizes.tolist() == [2, 2, 2]


@pytest.mark.parametrize(
    ("num_kv_heads", "sizes"), [(1, [6]), (4, [2, 2, 1, 1]), (8, [1] * 6 + [0] * 2)]
)
def test_any_number_of_key_heads(num_kv_heads, sizes):
    for layer in (kdgqa(num_kv_heads=num_kv_heads), dgqa(num_kv_heads=num_kv_heads)):
        assert layer.group_sizes.tolist() == sizes
        x = tokens(requires_grad=True)
        layer(x).sum().backward()
        assert x.grad.isfinite().all()


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
def test_keys_without_usable_norms_leave_even_groups_and_no_trace(value):
    for layer in (kdgqa(), kdgqa(scope="batch", **KHAN), dgqa(), dgqa(**KHAN)):
        with torch.no_grad():
            layer.k_proj.weight.zero_()
            layer.k_proj.bias.fill_(value)
        layer(tokens())
        assert layer.group_sizes.tolist() == [2, 2, 2]
        assert layer.norm_memory.eq(0).all()


def test_a_sample_does_not_depend_on_its_neighbours_unless_published():
    x = tokens()
    x[2:] *= torch.linspace(0, 3, EMBED, dtype=x.dtype)
    layer = kdgqa().eval()
    alone = torch.cat([layer(row[None]) for row in x])
    torch.testing.assert_close(layer(x), alone, rtol=1e-12, atol=1e-12)
    layer = kdgqa(**KHAN).eval()
    alone = torch.cat([layer(row[None]) for row in x])
    assert (layer(x) - alone).abs().max() > 1e-3


def test_gradients_equal_those_of_the_gathered_heads_and_empty_groups_get_none(poisoned_memory):
    layer, x = uneven(kdgqa(scope="batch"), (0.0, 2.0, 1.0)), tokens(requires_grad=True)
    out = layer(x)
    sizes = layer._allocate(layer.norm_memory).bincount(minlength=GROUPS)
    assert sizes[0] == 0
    index = torch.repeat_interleave(torch.arange(GROUPS), sizes)
    q = layer.q_proj(x).unflatten(-1, (HEADS, -1)).transpose(1, 2)
    k, v = (
        proj(x).unflatten(-1, (GROUPS, -1)).transpose(1, 2)[:, index]
        for proj in (layer.k_proj, layer.v_proj)
    )
    expected = (q @ k.mT * layer.head_dim**-0.5).softmax(-1) @ v
    expected = layer.o_proj(expected.transpose(1, 2).flatten(2))
    leaves = [layer.k_proj.weight, layer.v_proj.weight, x, *layer.parameters()]
    grads, truth = (torch.autograd.grad(y.square().sum(), leaves) for y in (out, expected))
    torch.testing.assert_close(grads, truth, rtol=1e-9, atol=1e-11)
    width = EMBED // HEADS
    for grad in grads[:2]:
        assert grad[:width].eq(0).all() and grad[width:].ne(0).any()


def test_key_norms_ignore_padding_and_rotary_embedding():
    layer, x = uneven(kdgqa()), tokens()
    lengths = torch.tensor([7, 3, 5, 1])
    out = layer(x, key_lengths=lengths)
    noisy = x.clone()
    for row, length in zip(noisy, lengths, strict=True):
        row[length:] = 50 * torch.randn_like(row[length:])
    padded = torch.cat([noisy, torch.full_like(x, 9.0)], dim=1)
    again = layer(padded, key_lengths=lengths)
    for sample, length in enumerate(lengths):
        torch.testing.assert_close(out[sample, :length], again[sample, :length])
    turned = copy.deepcopy(layer)
    turned.rotary, turned.q_norm = RotaryEmbedding(EMBED // HEADS), nn.Identity()
    key = layer.k_proj(x).unflatten(-1, (GROUPS, -1)).transpose(1, 2)
    for module in (layer, turned):
        assert torch.equal(
            module.choose_head_map(None, key, None, None).q_to_k,
            layer._allocate(ea.key_norms(turned.rotary(key, None))),
        )


def test_the_same_bits_every_time():
    layer, x = uneven(kdgqa(dtype=torch.float32)), tokens(dtype=torch.float32, requires_grad=True)
    results = []
    for _ in range(20):
        out = layer(x)
        results.append((out, *torch.autograd.grad(out.square().sum(), [x, *layer.parameters()])))
    for result in results[1:]:
        assert all(map(torch.equal, result, results[0]))


def test_half_precision_has_the_map_of_its_own_keys():
    layer = uneven(kdgqa(dtype=torch.float32)).bfloat16()
    assert layer.norm_memory.dtype == torch.float32 and layer.q_to_k.dtype == torch.int32
    x = tokens(dtype=torch.bfloat16)
    key = layer.k_proj(x).unflatten(-1, (GROUPS, -1)).transpose(1, 2)
    eager = layer.choose_head_map(None, key, None, None).q_to_k
    assert torch.equal(eager, layer._allocate(ea.key_norms(key.float())))
    assert layer(x).dtype == torch.bfloat16


@pytest.mark.parametrize("make", [kdgqa, dgqa])
def test_compiles_whole(make):
    for options in ({}, KHAN, {"scope": "frozen"} if make is kdgqa else {"flavor": "difference"}):
        eager = uneven(make(**options))
        layer = copy.deepcopy(eager)
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        for seed in range(4):
            x = tokens(seed=seed, requires_grad=True)
            results = []
            for module in (eager, compiled):
                out = module(x)
                results.append([out, *torch.autograd.grad(out.square().sum(), x)])
            torch.testing.assert_close(*results, rtol=1e-10, atol=1e-12)
        assert all(map(torch.equal, eager.buffers(), layer.buffers()))


def test_a_live_map_is_refused_where_it_would_see_the_future():
    for options in ({"causal": True}, {"window": (4, 0)}, {"causal": True, "scope": "batch"}):
        with pytest.raises(UnsupportedError, match="a live map is a function of all keys"):
            kdgqa(**options)
    with pytest.raises(ValueError, match="for causal layers"):
        kdgqa(scope="prompt")


@pytest.mark.parametrize(
    "layer",
    [kdgqa(causal=True, scope="frozen"), dgqa(causal=True, update_every=1)],
    ids=["frozen", "dynamic"],
)
def test_no_output_of_a_causal_layer_depends_on_later_tokens(layer):
    layer = uneven(layer)
    for seed in range(3):
        layer(tokens(seed=seed))
    if isinstance(layer, KDGQA):
        layer.freeze()
    assert layer.group_sizes.unique().numel() > 1
    x = tokens()
    other = x.clone()
    other[:, 4:] = 9 * tokens(seed=7)[:, 4:]
    other[:, 4:, :4] *= 100
    same = copy.deepcopy(layer)  # in training mode: the same step, with other tokens at the end
    torch.testing.assert_close(layer(x)[:, :4], same(other)[:, :4], rtol=1e-12, atol=1e-12)


def test_a_prompt_keeps_its_map_while_it_is_continued():
    layer = kdgqa(causal=True, scope="prompt", rotary=RotaryEmbedding(EMBED // HEADS)).eval()
    x = tokens(BATCH, 9)
    x[1, :5] *= torch.linspace(0, 3, EMBED, dtype=x.dtype)
    with pytest.raises(ValueError, match="prompt_map"):
        layer(x)
    head_map = layer.prompt_map(x[:, :5])
    assert len(head_map.q_to_k.unique(dim=0)) > 1
    whole = layer(x, head_map=head_map)
    cache = StaticCache(layer.cache_rows, BATCH, capacity=9, dtype=torch.float64)
    with torch.no_grad():
        parts = [layer(x[:, :5], head_map=head_map, cache=cache)]
        parts += [layer(x[:, i : i + 1], head_map=head_map, cache=cache) for i in range(5, 9)]
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-10, atol=1e-12)
    padded = torch.cat([torch.full_like(x[:, :3], 99.0), x[:, :5]], dim=1)
    same = layer.prompt_map(padded.flip(1), key_lengths=torch.full((BATCH,), 5))
    assert torch.equal(same.q_to_k, head_map.q_to_k)


def test_a_frozen_layer_is_a_grouped_layer_with_its_map():
    layer, x = uneven(kdgqa(causal=True, scope="frozen")), tokens()
    layer(x)
    layer.freeze()
    assert layer.group_sizes.tolist() == layer._allocate(layer.norm_memory).bincount().tolist()
    plain_layer = GroupedQueryAttention(EMBED, HEADS, head_map=layer.head_map, causal=True).double()
    state = {k: v for k, v in layer.state_dict().items() if k in plain_layer.state_dict()}
    plain_layer.load_state_dict(state)
    assert torch.equal(plain_layer(x), layer(x))
    cache = StaticCache(layer.cache_rows, BATCH, capacity=TOKENS, dtype=torch.float64)
    with torch.no_grad():
        steps = [layer(x[:, i : i + 1], cache=cache) for i in range(TOKENS)]
    torch.testing.assert_close(torch.cat(steps, 1), layer(x), rtol=1e-10, atol=1e-12)


def test_freeze_groups_of_a_model():
    model = nn.Sequential(uneven(kdgqa()), nn.ReLU(), uneven(dgqa(update_every=1)))
    for seed in range(2):
        model(tokens(seed=seed))
    frozen = freeze_groups(model)
    assert list(frozen) == ["0", "2"] and all(x.sum() == HEADS for x in frozen.values())
    before = {k: v.clone() for k, v in model.state_dict().items()}
    model(tokens(seed=9))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    with pytest.raises(ValueError, match="no norms to freeze"):
        kdgqa().freeze()


def test_meta_device_then_reset():
    with torch.device("meta"):
        layers = [KDGQA(EMBED, HEADS, num_kv_heads=4), DGQA(EMBED, HEADS, num_kv_heads=4)]
    for layer in layers:
        assert all(x.is_meta for x in [*layer.parameters(), *layer.buffers()])
        layer.to_empty(device="cpu")
        layer.reset_parameters()
        assert layer.group_sizes.tolist() == [2, 2, 1, 1] and not layer.num_updates
        assert layer(tokens(dtype=torch.float32)).isfinite().all()


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (kdgqa, {"num_kv_heads": 0}, "num_kv_heads is 0"),
        (kdgqa, {"scope": "layer"}, "'sample' or 'batch' or 'prompt' or 'frozen'"),
        (kdgqa, {"compat": "khan"}, "None or 'khan2024'"),
        (kdgqa, {"normalization": "max"}, "'sum' or 'minmax'"),
        (kdgqa, {"min_queries": 3}, "0 to 2 each of 6"),
        (dgqa, {"beta": 1.0}, r"\[0, 1\)"),
        (dgqa, {"flavor": "mean"}, "'ema' or 'difference'"),
        (dgqa, {"update_every": 0}, "update_every is 0"),
    ],
)
def test_refusals_name_the_argument(make, options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)


def test_a_map_of_ones_own_is_refused():
    with pytest.raises(TypeError, match="makes its own head_map"):
        kdgqa(head_map=HeadMap.gqa(HEADS, GROUPS))


@pytest.mark.gpu
@pytest.mark.parametrize("kind", [KDGQA, DGQA])
def test_a_device_is_never_waited_for(kind):
    layer = kind(96, HEADS, num_kv_heads=GROUPS, device="cuda", dtype=torch.bfloat16)
    x = torch.randn(2, 50, 96, device="cuda", dtype=torch.bfloat16)
    layer(x).square().sum().backward()  # compiles the kernels
    torch.cuda.set_sync_debug_mode("error")
    try:
        layer(x).square().sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_a_graph_that_is_replayed_makes_the_map_anew():
    layer = KDGQA(96, HEADS, num_kv_heads=GROUPS, device="cuda", dtype=torch.bfloat16).eval()
    inputs = [torch.randn(2, 50, 96, device="cuda", dtype=torch.bfloat16) for _ in range(3)]
    static, graph = inputs[0].clone(), torch.cuda.CUDAGraph()
    with torch.no_grad():
        expected = [layer(x) for x in inputs]
        with torch.cuda.graph(graph):
            out = layer(static)
        for x, eager in zip(inputs, expected, strict=True):
            static.copy_(x)
            graph.replay()
            assert torch.equal(out, eager)
