"""MultiheadAttention against torch.nn.MultiheadAttention, in fp64 unless stated."""

import copy
import inspect
import pickle

import pytest
import torch
from torch import nn

from efficient_attn.errors import UnsupportedError
from efficient_attn.layers import MultiheadAttention, multihead

EMBED, HEADS, BATCH, QUERIES, KEYS = 12, 3, 2, 5, 7


def pair(**kwargs):
    """torch's layer and ours with the same weights, biases included, in training mode.

    In training mode torch's layer takes its ordinary path and not its fused inference kernel.
    """
    torch.manual_seed(0)
    theirs = nn.MultiheadAttention(EMBED, HEADS, dtype=torch.float64, **kwargs)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "bias" in name:
                parameter.normal_()
    ours = MultiheadAttention(EMBED, HEADS, dtype=torch.float64, **kwargs)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def inputs(batched=True, batch_first=False, kdim=EMBED, vdim=EMBED, queries=QUERIES, keys=KEYS):
    shapes = [(queries, EMBED), (keys, kdim), (keys, vdim)]
    if batched:
        shapes = [(BATCH, n, e) if batch_first else (n, BATCH, e) for n, e in shapes]
    return [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]


def mask(kind, shape):
    """A mask that leaves the first key visible to everyone."""
    if kind is None:
        return None
    if kind == "float":
        return torch.randn(shape, dtype=torch.float64, requires_grad=True)
    blocked = torch.rand(shape) < 0.4
    blocked[..., 0] = False
    return blocked


def assert_same(theirs, ours, tensors, **kwargs):
    """Outputs, weights and every gradient agree."""
    leaves = [t for t in (*tensors, *kwargs.values()) if isinstance(t, torch.Tensor)]
    leaves = [t for t in leaves if t.requires_grad]
    results = []
    for layer in (theirs, ours):
        torch.manual_seed(1)  # the same dropout
        out, weights = layer(*tensors, **kwargs)
        loss = (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum()
        if weights is not None:
            loss = loss + (weights * torch.linspace(-1, 1, weights.numel()).view_as(weights)).sum()
        parameters = list(layer.parameters())
        grads = torch.autograd.grad(loss, leaves + parameters)
        results.append((out, weights, grads))
    torch.testing.assert_close(results[1], results[0], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("padding", [None, "bool", "float"])
@pytest.mark.parametrize(
    ("attn_mask", "per_head"),
    [(None, False), ("bool", False), ("bool", True), ("float", False), ("float", True)],
)
@pytest.mark.filterwarnings("ignore:Support for mismatched")
def test_masks(need_weights, batch_first, batched, padding, attn_mask, per_head):
    theirs, ours = pair(batch_first=batch_first)
    batch = BATCH if batched else 1
    leading = (batch * HEADS,) if per_head else ()
    assert_same(
        theirs,
        ours,
        inputs(batched, batch_first),
        key_padding_mask=mask(padding, (BATCH, KEYS) if batched else (KEYS,)),
        attn_mask=mask(attn_mask, (*leading, QUERIES, KEYS)),
        need_weights=need_weights,
        average_attn_weights=per_head,
    )


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("kdim", "vdim"), [(EMBED, EMBED), (8, EMBED), (8, 10)])
@pytest.mark.parametrize("add_bias_kv", [False, True])
@pytest.mark.parametrize("add_zero_attn", [False, True])
@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_constructor_options(bias, kdim, vdim, add_bias_kv, add_zero_attn, need_weights, masked):
    theirs, ours = pair(
        bias=bias, kdim=kdim, vdim=vdim, add_bias_kv=add_bias_kv, add_zero_attn=add_zero_attn
    )
    assert_same(
        theirs,
        ours,
        inputs(kdim=kdim, vdim=vdim),
        key_padding_mask=mask("bool", (BATCH, KEYS)) if masked else None,
        attn_mask=mask("bool", (QUERIES, KEYS)) if masked else None,
        need_weights=need_weights,
    )


@pytest.mark.parametrize("sharing", ["query is key is value", "key is value", "all differ"])
@pytest.mark.parametrize("need_weights", [False, True])
def test_shared_inputs(sharing, need_weights):
    theirs, ours = pair()
    query, key, value = inputs(keys=QUERIES)
    tensors = {
        "query is key is value": [query, query, query],
        "key is value": [query, key, key],
        "all differ": [query, key, value],
    }[sharing]
    assert_same(theirs, ours, tensors, need_weights=need_weights)


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("padding", [None, "bool"])
@pytest.mark.parametrize("add_bias_kv", [False, True])
def test_causal_hint(need_weights, padding, add_bias_kv):
    """With the hint ours equals torch without it: the hint may not change the result."""
    theirs, ours = pair(add_bias_kv=add_bias_kv)
    tensors = inputs(keys=QUERIES)
    causal = torch.ones(QUERIES, QUERIES, dtype=torch.bool).triu(1)
    options = {"key_padding_mask": mask(padding, (BATCH, QUERIES)), "need_weights": need_weights}
    expected, _ = theirs(*tensors, attn_mask=causal, **options)
    out, _ = ours(*tensors, attn_mask=causal, is_causal=True, **options)
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-12)


def test_causal_hint_is_used_where_torch_uses_it():
    """A wrong mask under the hint is not looked at, so none is materialised."""
    theirs, ours = pair()
    tensors = inputs(keys=QUERIES)
    wrong = torch.zeros(QUERIES, QUERIES, dtype=torch.bool)
    assert_same(theirs, ours, tensors, attn_mask=wrong, is_causal=True, need_weights=False)


def test_causal_hint_with_more_keys_than_queries_follows_the_mask():
    theirs, ours = pair()
    tensors = inputs()
    seen_from_the_end = torch.ones(QUERIES, KEYS, dtype=torch.bool).triu(1 + KEYS - QUERIES)
    options = {"attn_mask": seen_from_the_end, "need_weights": False}
    expected, _ = theirs(*tensors, **options)
    out, _ = ours(*tensors, is_causal=True, **options)
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("need_weights", [False, True])
def test_dropout_draws_what_torch_draws(need_weights):
    theirs, ours = pair(dropout=0.4)
    assert_same(theirs, ours, inputs(), need_weights=need_weights)
    theirs.eval(), ours.eval()
    assert_same(theirs, ours, inputs(), need_weights=need_weights)


@pytest.mark.parametrize("need_weights", [False, True])
def test_queries_with_nothing_to_see_give_zeros(need_weights):
    _, ours = pair()
    tensors = inputs()
    padding = torch.zeros(BATCH, KEYS, dtype=torch.bool)
    padding[1] = True
    out, weights = ours(*tensors, key_padding_mask=padding, need_weights=need_weights)
    torch.testing.assert_close(out[:, 1], ours.out_proj.bias.expand(QUERIES, EMBED))
    if need_weights:
        assert torch.equal(weights[1], torch.zeros(QUERIES, KEYS, dtype=torch.float64))
    grads = torch.autograd.grad(out.sum(), tensors)
    for grad in grads:
        assert grad.isfinite().all()
        assert not grad[:, 1].any()


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("add_bias_kv", [False, True])
@pytest.mark.parametrize("kdim", [None, 8])
def test_construction_is_torchs(bias, add_bias_kv, kdim):
    """The same parameters, the same numbers for a seed, checkpoints in both directions."""
    kwargs = {"bias": bias, "add_bias_kv": add_bias_kv, "kdim": kdim}
    torch.manual_seed(3)
    theirs = nn.MultiheadAttention(EMBED, HEADS, **kwargs)
    torch.manual_seed(3)
    ours = MultiheadAttention(EMBED, HEADS, **kwargs)
    assert list(theirs.state_dict()) == list(ours.state_dict())
    for name, expected in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], expected), name
    theirs.load_state_dict(ours.state_dict())


@pytest.mark.parametrize("method", ["__init__", "forward"])
def test_signatures_are_torchs(method):
    theirs, ours = (
        [
            (p.name, p.default, p.kind)
            for p in inspect.signature(getattr(c, method)).parameters.values()
        ]
        for c in (nn.MultiheadAttention, MultiheadAttention)
    )
    assert ours == theirs


def encoder_layer(self_attn=None, **kwargs):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(
        16, 4, 32, dropout=0.0, batch_first=True, dtype=torch.float64, **kwargs
    )
    if self_attn is not None:
        ours = MultiheadAttention(16, 4, batch_first=True, dtype=torch.float64)
        ours.load_state_dict(layer.self_attn.state_dict())
        layer.self_attn = ours
    return layer


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("mode", ["train", "eval", "eval without torch's fused layer"])
@pytest.mark.parametrize("masked", [False, True])
def test_inside_an_encoder_layer(norm_first, mode, masked):
    theirs = encoder_layer(norm_first=norm_first)
    ours = encoder_layer("ours", norm_first=norm_first)
    x = torch.randn(3, 6, 16, dtype=torch.float64)
    kwargs = {}
    if masked:
        padding = torch.arange(6) >= torch.tensor([[6], [4], [1]])
        causal = torch.ones(6, 6, dtype=torch.bool).triu(1)
        kwargs = {"src_mask": causal, "src_key_padding_mask": padding, "is_causal": True}
    calls = []
    fused = mode == "eval"
    if not fused:  # a hook alone would turn torch's fused layer off
        ours.self_attn.register_forward_hook(lambda *_: calls.append(1))
    theirs.train(mode == "train"), ours.train(mode == "train")
    torch.backends.mha.set_fastpath_enabled(fused)
    try:
        with torch.set_grad_enabled(mode == "train"):
            torch.testing.assert_close(ours(x, **kwargs), theirs(x, **kwargs))
    finally:
        torch.backends.mha.set_fastpath_enabled(True)
    assert fused or calls


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_inside_an_encoder_and_a_decoder():
    """The whole of nn.Transformer with every attention swapped, masks and padding included."""
    torch.manual_seed(0)
    theirs = nn.Transformer(16, 4, 2, 2, 32, dropout=0.0, batch_first=True, dtype=torch.float64)
    ours = copy.deepcopy(theirs)
    swapped = 0
    for module in list(ours.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.MultiheadAttention):
                new = MultiheadAttention(16, 4, batch_first=True, dtype=torch.float64)
                new.load_state_dict(child.state_dict())
                setattr(module, name, new)
                swapped += 1
    assert swapped == 6
    source, target = torch.randn(2, 7, 16).double(), torch.randn(2, 5, 16).double()
    padding = torch.arange(7) >= torch.tensor([[7], [4]])
    kwargs = {
        "tgt_mask": nn.Transformer.generate_square_subsequent_mask(5, dtype=torch.float64),
        "src_key_padding_mask": padding,
        "memory_key_padding_mask": padding,
    }
    torch.testing.assert_close(ours(source, target, **kwargs), theirs(source, target, **kwargs))
    theirs.eval(), ours.eval()
    with torch.no_grad():
        torch.testing.assert_close(ours(source, target, **kwargs), theirs(source, target, **kwargs))


@pytest.mark.parametrize("need_weights", [False, True])
def test_autocast_as_torch(need_weights):
    torch.manual_seed(0)
    theirs = nn.MultiheadAttention(64, 4, batch_first=True)
    ours = MultiheadAttention(64, 4, batch_first=True)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 33, 64)
    blocked = torch.ones(33, 33, dtype=torch.bool).triu(1)
    truth, _ = theirs.double()(*[x.double()] * 3, attn_mask=blocked)
    theirs.float()
    outs = []
    with torch.autocast("cpu", torch.bfloat16):
        for layer in (theirs, ours):
            outs.append(layer(x, x, x, attn_mask=blocked, need_weights=need_weights)[0])
    assert outs[0].dtype == outs[1].dtype == torch.bfloat16
    errors = [(out.double() - truth).abs().max() for out in outs]
    assert errors[1] <= 2 * errors[0] + 1e-3


@pytest.mark.parametrize("need_weights", [False, True])
def test_an_fp32_mask_serves_a_bf16_layer(need_weights):
    _, ours = pair()
    tensors = [x.bfloat16() for x in inputs()]
    bias = torch.randn(QUERIES, KEYS)
    expected, _ = ours(*[x.double() for x in tensors], attn_mask=bias.double())
    out, _ = ours.bfloat16()(*tensors, attn_mask=bias, need_weights=need_weights)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.double(), expected, rtol=0.02, atol=0.04)


@pytest.mark.parametrize("need_weights", [False, True])
def test_compiles_whole_with_dynamic_shapes(need_weights):
    _, ours = pair(batch_first=True)
    compiled = torch.compile(ours, fullgraph=True, dynamic=True, backend="aot_eager")
    for tokens in (5, 8):
        x = torch.randn(BATCH, tokens, EMBED, dtype=torch.float64, requires_grad=True)
        padding = mask("bool", (BATCH, tokens))
        causal = torch.ones(tokens, tokens, dtype=torch.bool).triu(1)
        for is_causal in (False,) if need_weights else (False, True):
            options = {"key_padding_mask": padding, "attn_mask": causal, "is_causal": is_causal}
            out, _ = compiled(x, x, x, need_weights=need_weights, **options)
            expected, _ = ours(x, x, x, need_weights=need_weights, **options)
            torch.testing.assert_close(out, expected)
            grads = [torch.autograd.grad(y.square().sum(), x)[0] for y in (out, expected)]
            torch.testing.assert_close(*grads)


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies(copier):
    _, ours = pair(add_bias_kv=True)
    tensors = inputs()
    torch.testing.assert_close(copier(ours)(*tensors), ours(*tensors), rtol=0, atol=0)


def test_refusals_name_the_argument():
    _, ours = pair(batch_first=True)
    query, key, value = inputs(batch_first=True)
    cases = {
        "is_causal is a hint": {"is_causal": True},
        r"attn_mask has shape \(4, 7\)": {"attn_mask": torch.zeros(4, KEYS)},
        r"key_padding_mask has shape \(2, 6\)": {"key_padding_mask": torch.zeros(BATCH, 6)},
        r"value \(2, 6, 12\)": {"value": value[:, :-1]},
        "query has 4 dimensions": {"query": query[None]},
        "key has shape": {"key": key[..., :-1]},
        "is the batch and must agree": {"query": query[:1]},
    }
    for message, change in cases.items():
        with pytest.raises(ValueError, match=message):
            ours(**({"query": query, "key": key, "value": value} | change))
    with pytest.raises(TypeError, match="attn_mask has dtype torch.int64"):
        ours(query, key, value, attn_mask=torch.zeros(QUERIES, KEYS, dtype=torch.int64))
    ragged = torch.nested.nested_tensor([torch.zeros(3, EMBED), torch.zeros(2, EMBED)])
    with pytest.raises(UnsupportedError, match="nested"):
        ours(ragged, ragged, ragged)


def test_masks_reach_the_kernel_as_small_as_they_broadcast(monkeypatch):
    """A padding mask is never blown up to one number per head and query."""
    _, ours = pair()
    tensors = inputs()
    square, padding = torch.zeros(QUERIES, KEYS).bool(), torch.zeros(BATCH, KEYS).bool()
    per_head = torch.zeros(BATCH * HEADS, QUERIES, KEYS).double()
    seen = []

    def spy(q, k, v, *, causal, bias):
        seen.append(None if bias is None else bias.shape)
        return q

    monkeypatch.setattr(multihead, "attention", spy)
    for masks, shape in (
        ((None, None), None),
        ((None, padding), (BATCH, 1, 1, KEYS)),
        ((square, None), (1, 1, QUERIES, KEYS)),
        ((square, padding), (BATCH, 1, QUERIES, KEYS)),
        ((per_head, padding), (BATCH, HEADS, QUERIES, KEYS)),
    ):
        ours(*tensors, attn_mask=masks[0], key_padding_mask=masks[1], need_weights=False)
        assert seen.pop() == shape
