"""GroupedQueryAttention against plain einsums in fp64."""

import copy

import pytest
import torch
from torch import nn

from efficient_attn import ConversionError, HeadMap
from efficient_attn.layers import GroupedQueryAttention, RotaryEmbedding

EMBED, HEADS, BATCH, TOKENS = 24, 6, 2, 7

MAPS = {
    "mha": HeadMap.mha(HEADS),
    "mqa": HeadMap.mqa(HEADS),
    "gqa": HeadMap.gqa(HEADS, 2),
    "diff": HeadMap.diff(HEADS, k=2, v=3),
    "uneven": HeadMap.from_group_sizes([3, 1, 2]),
    "empty group": HeadMap.from_group_sizes([4, 0, 2]),
    "scattered": HeadMap.from_index([2, 0, 1, 0, 2, 0], [1, 0, 1, 1, 0, 3]),
    "key even, value uneven": HeadMap(HEADS, 2, 2, None, torch.tensor([0] * 5 + [1]).int()),
}


def layer(**kwargs):
    torch.manual_seed(0)
    return GroupedQueryAttention(EMBED, HEADS, **({"dtype": torch.float64} | kwargs))


def tokens(count=TOKENS, **kwargs):
    torch.manual_seed(1)
    return torch.randn(BATCH, count, EMBED, **({"dtype": torch.float64} | kwargs))


def written_out(module, x, context=None, head_map=None, visible=None, bias=0.0):
    """The layer's definition: head by head, scores in full, softmax over what is visible."""
    context = x if context is None else context
    head_map = module.head_map if head_map is None else head_map
    key_index, value_index = (
        index.expand(x.shape[0], HEADS) for index in (head_map.key_index(), head_map.value_index())
    )
    q = module.q_proj(x).unflatten(-1, (HEADS, -1))
    k = module.k_proj(context).unflatten(-1, (head_map.num_k_heads, -1))
    v = module.v_proj(context).unflatten(-1, (head_map.num_v_heads, -1))
    heads = []
    for h in range(HEADS):
        key = torch.stack([k[b, :, key_index[b, h]] for b in range(x.shape[0])])
        value = torch.stack([v[b, :, value_index[b, h]] for b in range(x.shape[0])])
        scores = torch.einsum("bnd,bmd->bnm", q[:, :, h], key) * q.shape[-1] ** -0.5
        if module.softcap:
            scores = module.softcap * torch.tanh(scores / module.softcap)
        scores = scores + bias
        if visible is not None:
            scores = scores.masked_fill(~visible, float("-inf"))
        heads.append(torch.einsum("bnm,bmd->bnd", scores.softmax(-1), value))
    return module.o_proj(torch.cat(heads, -1))


def assert_same_with_gradients(module, out, expected, *inputs):
    leaves = [*inputs, *module.parameters()]
    weight = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-12)
    grads, truth = (torch.autograd.grad((y * weight).sum(), leaves) for y in (out, expected))
    torch.testing.assert_close(grads, truth, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", MAPS)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("widths", [{}, {"head_dim": 5}, {"head_dim": 4, "v_head_dim": 6}])
def test_every_map_equals_the_definition(name, causal, widths):
    module = layer(head_map=MAPS[name], causal=causal, **widths)
    x = tokens(requires_grad=True)
    visible = torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril() if causal else None
    assert_same_with_gradients(module, module(x), written_out(module, x, visible=visible), x)


def test_counts_are_even_groups():
    x = tokens()
    for count in (1, 2, 3, 6):
        short, long = layer(num_kv_heads=count), layer(head_map=HeadMap.gqa(HEADS, count))
        assert torch.equal(short(x), long(x))
        assert short.k_proj.out_features == count * EMBED // HEADS


@pytest.mark.parametrize("name", ["gqa", "scattered"])
def test_options_reach_the_attention(name):
    """Window, softcap and a bias with gradient, all at once, over a longer context."""
    module = layer(head_map=MAPS[name], window=(2, 1), softcap=0.7)
    x, context = tokens(requires_grad=True), tokens(TOKENS + 3).requires_grad_()
    bias = torch.randn(BATCH, 1, 1, TOKENS + 3, dtype=torch.float64, requires_grad=True)
    diagonal = torch.arange(TOKENS)[:, None] + 3 - torch.arange(TOKENS + 3)
    visible = (diagonal <= 2) & (diagonal >= -1)
    expected = written_out(module, x, context, visible=visible, bias=bias[:, 0])
    assert_same_with_gradients(module, module(x, context, bias=bias), expected, x, context, bias)


def test_scale():
    module = layer(scale=0.05)
    module_as_default = layer()
    with torch.no_grad():
        module_as_default.q_proj.weight.mul_(0.05 * 2)  # the default is 4 ** -0.5
        module_as_default.q_proj.bias.mul_(0.05 * 2)
    torch.testing.assert_close(module(tokens()), module_as_default(tokens()))


@pytest.mark.parametrize("causal", [False, True])
def test_key_lengths_equal_cutting_each_sample(causal):
    module = layer(num_kv_heads=2, causal=causal)
    x, context = tokens(3), tokens()
    out = module(x, context, key_lengths=torch.tensor([7, 4]))
    for sample, length in enumerate((7, 4)):
        alone = module(x[sample : sample + 1], context[sample : sample + 1, :length])
        torch.testing.assert_close(out[sample : sample + 1], alone)


def test_a_map_per_call_and_per_sample():
    module = layer(head_map=HeadMap.gqa(HEADS, 3))
    x = tokens(requires_grad=True)
    each = HeadMap.from_group_sizes([[4, 1, 1], [0, 3, 3]])
    out = module(x, head_map=each)
    assert_same_with_gradients(module, out, written_out(module, x, head_map=each), x)
    for sample, sizes in enumerate(([4, 1, 1], [0, 3, 3])):
        alone = module(x[sample : sample + 1], head_map=HeadMap.from_group_sizes(sizes))
        torch.testing.assert_close(out[sample : sample + 1], alone)


@pytest.mark.parametrize("bias", [False, True])
def test_from_mha_is_torchs_layer(bias):
    torch.manual_seed(0)
    theirs = nn.MultiheadAttention(EMBED, HEADS, bias=bias, batch_first=True).double().eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.normal_(std=0.3)
    ours = GroupedQueryAttention.from_mha(theirs, causal=True)
    assert not ours.training
    x = tokens()
    blocked = torch.ones(TOKENS, TOKENS, dtype=torch.bool).triu(1)
    torch.testing.assert_close(ours(x), theirs(x, x, x, attn_mask=blocked)[0])
    ours.q_proj.weight.data.zero_()
    assert theirs.in_proj_weight.any(dim=1).all()  # copies, not views


def test_from_mha_names_every_obstacle():
    theirs = nn.MultiheadAttention(EMBED, HEADS, dropout=0.1, add_bias_kv=True, kdim=8)
    with pytest.raises(ConversionError, match="kdim.*; dropout is 0.1; add_bias_kv"):
        GroupedQueryAttention.from_mha(theirs)


def test_injected_parts_are_used():
    q_proj = nn.Sequential(nn.Linear(EMBED, 8), nn.Linear(8, EMBED)).double()
    k_proj, v_proj = (nn.Linear(10, 8).double() for _ in range(2))
    q_norm, k_norm = (nn.RMSNorm(4, dtype=torch.float64) for _ in range(2))
    rotary = RotaryEmbedding(4)
    module = layer(
        num_kv_heads=2,
        q_proj=q_proj,
        k_proj=k_proj,
        v_proj=v_proj,
        q_norm=q_norm,
        k_norm=k_norm,
        rotary=rotary,
    )
    assert {"q_proj.0.weight", "k_norm.weight", "o_proj.bias"} <= module.state_dict().keys()
    x = tokens(requires_grad=True)
    context = torch.randn(BATCH, 9, 10, dtype=torch.float64, requires_grad=True)
    positions, context_positions = torch.arange(TOKENS) + 5, torch.randint(0, 50, (BATCH, 9))
    out = module(x, context, positions=positions, context_positions=context_positions)

    q = rotary(q_norm(q_proj(x).unflatten(-1, (HEADS, 4)).transpose(1, 2)), positions)
    k = rotary(k_norm(k_proj(context).unflatten(-1, (2, 4)).transpose(1, 2)), context_positions)
    v = v_proj(context).unflatten(-1, (2, 4)).transpose(1, 2)
    k, v = (y.repeat_interleave(HEADS // 2, dim=1) for y in (k, v))
    expected = (q @ k.mT / 2).softmax(-1) @ v
    expected = module.o_proj(expected.transpose(1, 2).flatten(2))
    assert_same_with_gradients(module, out, expected, x, context)


def test_self_attention_gives_keys_the_positions_of_the_queries():
    """Distances alone matter, so a common shift changes nothing; a shift of one side does."""
    module = layer(rotary=RotaryEmbedding(4))
    x = tokens()
    shifted = module(x, positions=torch.arange(TOKENS) + 90)
    torch.testing.assert_close(module(x), shifted)
    assert not torch.allclose(module(x, x, positions=torch.arange(TOKENS) + 90), shifted)


def test_even_groups_add_no_buffer_and_explicit_maps_are_saved():
    assert not list(layer(num_kv_heads=2).buffers())
    module = layer(head_map=MAPS["uneven"])
    assert {"q_to_k", "q_to_v"} <= module.state_dict().keys()
    other = layer(head_map=HeadMap.from_group_sizes([1, 1, 4]))
    assert not torch.equal(other(tokens()), module(tokens()))
    other.load_state_dict(module.state_dict())
    assert torch.equal(other(tokens()), module(tokens()))
    with pytest.raises(RuntimeError, match="q_to_k"):
        layer(num_kv_heads=3).load_state_dict(module.state_dict())


def test_buffers_do_not_share_storage():
    module = layer(head_map=MAPS["uneven"])
    assert module.q_to_k.data_ptr() != module.q_to_v.data_ptr()


def test_meta_device_then_reset_restores_weights_and_map():
    with torch.device("meta"):
        module = GroupedQueryAttention(
            EMBED, HEADS, head_map=MAPS["uneven"], rotary=RotaryEmbedding(4)
        )
    explicit = GroupedQueryAttention(EMBED, HEADS, head_map=MAPS["uneven"], device="meta")
    assert all(parameter.is_meta for parameter in [*module.parameters(), *explicit.parameters()])
    assert "meta" in repr(explicit)
    for built in (module, explicit):
        assert built.q_to_k.is_meta
        built.to_empty(device="cpu")
        built.reset_parameters()
        assert torch.equal(built.q_to_k, MAPS["uneven"].q_to_k)
        assert torch.equal(built.q_to_v, MAPS["uneven"].q_to_v)
        assert built(tokens(dtype=torch.float32)).isfinite().all()


def test_low_precision():
    module = layer(num_kv_heads=2, causal=True, dtype=torch.float32)
    x = tokens(33, dtype=torch.float32)
    visible = torch.ones(33, 33, dtype=torch.bool).tril()
    truth = written_out(copy.deepcopy(module).double(), x.double(), visible=visible)
    low, x = module.bfloat16(), x.bfloat16()
    out, plain = low(x), written_out(low, x, visible=visible)
    assert out.dtype == torch.bfloat16
    error, plain_error = ((y.double() - truth).abs().max() for y in (out, plain))
    assert error <= 2 * plain_error + 1e-3


@pytest.mark.parametrize("name", ["gqa", "scattered"])
def test_compiles_whole_with_dynamic_shapes(name):
    module = layer(head_map=MAPS[name], causal=True, rotary=RotaryEmbedding(4))
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend="aot_eager")
    for count in (5, 8):
        x = tokens(count, requires_grad=True)
        assert_same_with_gradients(module, compiled(x), module(x), x)


def test_trains():
    """The second token of a pair can only be told by attending to the first."""
    torch.manual_seed(0)
    attend = GroupedQueryAttention(32, 4, head_map=HeadMap.from_group_sizes([3, 1]), causal=True)
    embed, read = nn.Embedding(8, 32), nn.Linear(32, 8)
    parameters = [*attend.parameters(), *embed.parameters(), *read.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)
    losses = []
    for _ in range(60):
        first, second = torch.randint(0, 8, (2, 64))
        out = attend(embed(torch.stack((first, second), 1)))[:, 1]
        loss = nn.functional.cross_entropy(read(out), first)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] > 1.5
    assert sum(losses[-10:]) / 10 < 0.2


def test_no_attribute_hides_a_module_method():
    module = layer(head_map=MAPS["uneven"], rotary=RotaryEmbedding(4))
    own = set(vars(module)) | set(module._modules) | set(module._buffers)
    own |= set(vars(GroupedQueryAttention))
    methods = {name for name in dir(nn.Module) if not name.startswith("_")}
    assert own & methods <= {"forward", "extra_repr", "training"}


def test_repr_shows_counts_and_map():
    shown = repr(layer(head_map=MAPS["uneven"], causal=True, v_head_dim=3))
    for part in ("num_heads=6", "key_heads=3", "v_head_dim=3", "causal=True", "[0, 0, 0, 1, 2, 2]"):
        assert part in shown
    assert "q_to_k" not in repr(layer(num_kv_heads=2))


def test_refusals_name_the_argument():
    for kwargs, message in (
        ({"num_kv_heads": 4}, "do not divide 6 query heads"),
        ({"num_kv_heads": 3, "head_map": MAPS["gqa"]}, "not both"),
        ({"head_map": HeadMap.mha(4)}, "for 4 query heads and num_heads is 6"),
        ({"k_proj": nn.Linear(EMBED, 20), "num_kv_heads": 2}, "k_proj produces 20 features"),
    ):
        with pytest.raises(ValueError, match=message):
            layer(**kwargs)
    with pytest.raises(ValueError, match="pass head_dim"):
        GroupedQueryAttention(25, 6)
    with pytest.raises(ValueError, match=r"context has shape \(7, 24\)"):
        layer()(tokens(), tokens()[0])
