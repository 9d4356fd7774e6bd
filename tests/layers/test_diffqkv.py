"""DiffQKVAttention against its equations, written out head by head."""

import pytest
import torch
from torch import nn

from efficient_attn import UnsupportedError
from efficient_attn.cache import StaticCache
from efficient_attn.layers import DiffQKVAttention, GroupedQueryAttention, RotaryEmbedding

EMBED, HEADS, BATCH, TOKENS = 24, 12, 2, 19
# (key heads, value heads): nested, the other way round, not nested, and the special cases.
COUNTS = [(2, 6), (6, 2), (4, 6), (12, 12), (3, 3), (1, 1), (1, 12), (12, 1)]


def layer(num_key_heads=2, num_value_heads=6, **options):
    torch.manual_seed(0)
    options = {"head_dim": 8, "causal": True} | options
    return DiffQKVAttention(
        EMBED, HEADS, num_key_heads=num_key_heads, num_value_heads=num_value_heads, **options
    ).double()


def tokens(count=TOKENS):
    torch.manual_seed(1)
    return torch.randn(BATCH, count, EMBED).double()


def by_equations(module, x, augmented=None):
    """Equations of the paper's section 2, one query head at a time, nothing shared."""
    query = module.q_proj(x) if augmented is None else augmented
    key, value = module.k_proj(x), module.v_proj(x)
    turn = module.rotary or (lambda heads: heads)
    outs = []
    for head in range(HEADS):
        k = head * module.num_key_heads // HEADS
        v = head * module.num_value_heads // HEADS
        width = module.query_dim
        q_head = query[..., head * width : (head + 1) * width]
        if module.key_up is not None:
            q_head = q_head @ module.key_up[k]
        k_head = key[..., k * module.head_dim : (k + 1) * module.head_dim]
        v_head = value[..., v * module.v_head_dim : (v + 1) * module.v_head_dim]
        q_head, k_head = (turn(part[:, None])[:, 0] for part in (q_head, k_head))
        scores = q_head @ k_head.mT / width**0.5
        later = torch.ones(TOKENS, TOKENS).triu(1).bool()
        outs.append(scores.masked_fill(later, -torch.inf).softmax(-1) @ v_head)
    return module.o_proj(torch.cat(outs, -1))


def published_query(module, x):
    """Appendix E: a SwiGLU network on the projected query, nothing else."""
    q0 = x @ module.q_proj.weight.T
    gate, up = q0 @ module.q_gate_proj.weight.T, q0 @ module.q_up_proj.weight.T
    return (gate / (1 + torch.exp(-gate)) * up) @ module.q_down_proj.weight.T


@pytest.mark.parametrize("counts", COUNTS)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"rotary": RotaryEmbedding(8)},
        {"key_head_dim": 4, "rotary": RotaryEmbedding(4)},
        {"key_head_dim": 4, "rotary": RotaryEmbedding(4), "key_compress": "linear_up"},
        {"v_head_dim": 5},
    ],
    ids=["plain", "rotary", "narrow keys", "widened keys", "narrow values"],
)
def test_it_is_the_equations(counts, options, poisoned_memory):
    module, x = layer(*counts, **options), tokens()
    torch.testing.assert_close(module(x), by_equations(module, x), rtol=1e-12, atol=1e-12)


def test_equal_counts_are_grouped_query_attention():
    module, x = layer(3, 3), tokens()
    grouped = GroupedQueryAttention(
        EMBED, HEADS, num_kv_heads=3, head_dim=8, causal=True, bias=False
    ).double()
    grouped.load_state_dict(module.state_dict())
    assert torch.equal(module(x), grouped(x))


def test_the_augmented_query_is_the_published_one():
    module, x = layer(augmented_query_dim=20, rotary=RotaryEmbedding(8)), tokens()
    expected = by_equations(module, x, augmented=published_query(module, x))
    torch.testing.assert_close(module(x), expected, rtol=1e-12, atol=1e-12)


def test_gradients_reach_every_weight():
    module = layer(4, 6, augmented_query_dim=10, key_head_dim=4, key_compress="linear_up")
    x = tokens().requires_grad_()
    inputs = [x, *module.parameters()]
    gradients = torch.autograd.grad(module(x).square().sum(), inputs)
    expected = by_equations(module, x, augmented=published_query(module, x)).square().sum()
    for ours, theirs in zip(gradients, torch.autograd.grad(expected, inputs), strict=True):
        assert theirs.abs().max() > 0
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


def test_a_residual_query_starts_as_the_layer_without_it():
    plain, augmented = layer(), layer(augmented_query_dim=20, query_residual=True)
    augmented.load_state_dict(plain.state_dict(), strict=False)
    x = tokens()
    assert torch.equal(augmented(x), plain(x))
    nn.init.normal_(augmented.q_down_proj.weight)
    assert not torch.equal(augmented(x), plain(x))
    augmented.reset_parameters()
    assert not augmented.q_down_proj.weight.any()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_folding_leaves_the_function_and_drops_the_query_projection(dtype):
    module, x = layer(augmented_query_dim=20).to(dtype), tokens().to(dtype)
    before, weights = module(x), sum(p.numel() for p in module.parameters())
    assert module.fold_q_proj() is module
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(module(x), before, rtol=tolerance, atol=tolerance)
    gate_and_up = 2 * 20 * (EMBED - HEADS * 8)
    dropped = EMBED * HEADS * 8
    assert sum(p.numel() for p in module.parameters()) == weights - dropped + gate_and_up


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({}, "no augmented query"),
        ({"augmented_query_dim": 4, "query_residual": True}, "query_residual"),
        ({"augmented_query_dim": 4, "bias": True}, "bias"),
    ],
)
def test_folding_is_refused_where_it_would_change_the_function(options, reason):
    with pytest.raises(UnsupportedError, match=reason):
        layer(**options).fold_q_proj()


def test_folding_twice_is_refused():
    with pytest.raises(UnsupportedError, match="folded already"):
        layer(augmented_query_dim=4).fold_q_proj().fold_q_proj()


@pytest.mark.parametrize("rotary", [None, RotaryEmbedding(4)], ids=["plain", "rotary"])
def test_a_widened_key_is_a_narrow_query_of_factored_weights(rotary):
    options = {"key_head_dim": 4, "rotary": rotary, "scale": 0.3}
    widened = layer(4, 6, key_compress="linear_up", **options)
    direct = layer(4, 6, **options)
    heads = widened.q_proj.weight.detach().view(4, HEADS // 4, 8, EMBED)
    absorbed = torch.einsum("kgue,kud->kgde", heads, widened.key_up.detach())
    kept = {name: x for name, x in widened.state_dict().items() if name != "key_up"}
    direct.load_state_dict(kept | {"q_proj.weight": absorbed.flatten(0, 2)})
    x = tokens()
    torch.testing.assert_close(widened(x), direct(x), rtol=1e-12, atol=1e-12)


def test_what_is_cached_are_turned_keys_and_values_as_projected():
    module = layer(4, 6, rotary=RotaryEmbedding(8))
    x = tokens()
    cache = StaticCache(module.cache_rows, BATCH, TOKENS, dtype=torch.float64)
    with torch.no_grad():
        module(x, cache=cache)
        key, value = cache.filled()
        heads = module.k_proj(x).unflatten(-1, (4, 8)).transpose(1, 2)
        assert torch.equal(key, module.rotary(heads))
        assert torch.equal(value, module.v_proj(x).unflatten(-1, (6, 8)).transpose(1, 2))


def test_compiles_whole_with_dynamic_shapes():
    module = layer(4, 6, augmented_query_dim=10, key_head_dim=4, key_compress="linear_up")
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch.no_grad():
        for count in (5, 8):
            torch.testing.assert_close(compiled(tokens(count)), module(tokens(count)))


@pytest.mark.parametrize("chunk", [1, 2, 5, 16])
def test_any_chunks_give_the_rows_of_one_prefill(chunk, one_thread, poisoned_memory):
    module = layer(4, 6, rotary=RotaryEmbedding(8), v_head_dim=5)
    x = tokens()
    cache = StaticCache(module.cache_rows, BATCH, TOKENS, dtype=torch.float64)
    with torch.no_grad():
        chunks = [module(part, cache=cache) for part in x.split(chunk, 1)]
        torch.testing.assert_close(torch.cat(chunks, 1), module(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("key_compress", ["direct", "linear_up"])
def test_decoding_gives_the_rows_of_one_prefill(key_compress, one_thread, poisoned_memory):
    module = layer(
        4, 6, key_head_dim=4, key_compress=key_compress, rotary=RotaryEmbedding(4),
        augmented_query_dim=10,
    )  # fmt: skip
    x = tokens()
    cache = StaticCache(module.cache_rows, BATCH, TOKENS, dtype=torch.float64)
    with torch.no_grad():
        chunks = [module(part, cache=cache) for part in x.split([9, 1, 5, 1, 3], 1)]
        torch.testing.assert_close(torch.cat(chunks, 1), module(x), rtol=1e-12, atol=1e-12)
    assert cache.nbytes == BATCH * TOKENS * (4 * 4 + 6 * 8) * 8


def test_scores_depend_on_distances_alone():
    module, x = layer(rotary=RotaryEmbedding(4), key_head_dim=4, key_compress="linear_up"), tokens()
    here, there = (module(x, positions=torch.arange(TOKENS) + start) for start in (0, 1000))
    torch.testing.assert_close(here, there, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_key_heads": 5}, "5"),
        ({"num_value_heads": 7}, "7"),
        ({"num_key_heads": 0}, "0"),
        ({"head_dim": None, "num_heads": 7, "num_key_heads": 1, "num_value_heads": 1}, "head_dim"),
        ({"augmented_query_dim": -1}, "augmented_query_dim is -1"),
        ({"key_compress": "mlp_up"}, "'direct' or 'linear_up'"),
        ({"key_head_dim": 4, "rotary": RotaryEmbedding(8)}, "RotaryEmbedding\\(4\\)"),
    ],
)
def test_what_cannot_be_is_refused_with_the_reason(options, message):
    arguments = {"num_heads": HEADS, "num_key_heads": 2, "num_value_heads": 6, "head_dim": 8}
    with pytest.raises(ValueError, match=message):
        DiffQKVAttention(EMBED, **arguments | options)
