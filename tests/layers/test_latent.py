"""MultiheadLatentAttention against transformers' own layers, and against itself in other forms."""

import copy

import pytest
import torch
from torch import nn
from transformers import DeepseekV2Config, DeepseekV3Config
from transformers.models.deepseek_v2 import modeling_deepseek_v2 as v2
from transformers.models.deepseek_v3 import modeling_deepseek_v3 as v3

from efficient_attn import UnsupportedError
from efficient_attn.cache import PagedCache, StaticCache
from efficient_attn.layers import (
    FactoredAttention,
    MultiheadLatentAttention,
    NormedLatentAttention,
    RotaryEmbedding,
)

EMBED, HEADS, BATCH, TOKENS = 24, 3, 2, 45
WIDTHS = {"kv_lora_rank": 10, "qk_rope_head_dim": 4, "qk_nope_head_dim": 6, "v_head_dim": 7}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "mscale": 0.8, "mscale_all_dim": 0.6}
YARN |= {"original_max_position_embeddings": 16, "beta_fast": 4, "beta_slow": 1}
LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 3.0}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0}
LLAMA3 |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 16}
LONGROPE = {"rope_type": "longrope", "rope_theta": 1e4, "factor": 4.0}
LONGROPE |= {"original_max_position_embeddings": 64}
LONGROPE |= {"short_factor": [1.0, 1.7], "long_factor": [2.0, 3.0]}
DEFAULT = {"rope_type": "default", "rope_theta": 1e4}
ROPES = {
    "default": DEFAULT,
    "yarn": YARN,
    "linear": LINEAR,
    "llama3": LLAMA3,
    "longrope": LONGROPE,
}


@pytest.fixture(autouse=True)
def small(one_thread):
    pass


def randomise(module):
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.4)
    return module


def tokens(count=TOKENS, batch=BATCH, dtype=torch.float64):
    torch.manual_seed(1)
    return torch.randn(batch, count, EMBED, dtype=dtype)


def stock(version=v3, rope="default", **options):
    """A layer of transformers, the rotary embedding of its model, and their angles."""
    config_class = DeepseekV3Config if version is v3 else DeepseekV2Config
    options = {"q_lora_rank": None, **options}
    config = config_class(
        hidden_size=EMBED,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        max_position_embeddings=64,
        rope_parameters=ROPES[rope],
        attn_implementation="sdpa",
        **WIDTHS,
        **options,
    )
    prefix = "DeepseekV3" if version is v3 else "DeepseekV2"
    attention = randomise(getattr(version, f"{prefix}Attention")(config, 0)).eval()
    return attention, getattr(version, f"{prefix}RotaryEmbedding")(config)


def same_as(attention, rotary, **options):
    """The same layer of ours, under the same names."""
    table = {"inverse_frequencies": rotary.inv_freq, "attention_factor": rotary.attention_scaling}
    interleaved = getattr(attention.config, "rope_interleave", True)
    layer = MultiheadLatentAttention(
        EMBED,
        HEADS,
        **WIDTHS,
        q_lora_rank=attention.q_lora_rank,
        bias=attention.config.attention_bias,
        scale=attention.scaling,
        rotary=RotaryEmbedding(WIDTHS["qk_rope_head_dim"], interleaved=interleaved, **table),
        **options,
    )
    layer.load_state_dict(attention.state_dict(), strict=True)
    return layer


def run_stock(attention, rotary, x):
    angles = rotary(x, torch.arange(x.shape[1])[None])
    return attention(x, position_embeddings=angles, attention_mask=None)[0]


CASES = {
    "v3": (v3, {}),
    "v3, low-rank queries": (v3, {"q_lora_rank": 9}),
    "v3, biases": (v3, {"q_lora_rank": 9, "attention_bias": True}),
    "v3, half layout": (v3, {"rope_interleave": False}),
    "v2": (v2, {}),
    "v2, low-rank queries": (v2, {"q_lora_rank": 9}),
    **{f"v3, {rope}": (v3, {"rope": rope}) for rope in ROPES},
    "v2, yarn": (v2, {"rope": "yarn"}),
}


@pytest.mark.parametrize("case", CASES)
def test_loads_and_computes_what_transformers_does(case):
    version, options = CASES[case]
    attention, rotary = stock(version, **options)
    x = tokens(dtype=torch.float32).requires_grad_()
    layer = same_as(attention, rotary)
    assert layer.state_dict().keys() == attention.state_dict().keys()
    expected, out = run_stock(attention, rotary, x), layer(x)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=2e-5)
    inputs = (x, *attention.parameters()), (x, *layer.parameters())
    weight = torch.randn_like(out)
    for mine, theirs in zip(
        torch.autograd.grad(out, inputs[1], weight),
        torch.autograd.grad(expected, inputs[0], weight),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4 * theirs.abs().max().item())


@pytest.mark.parametrize("case", ["v3, biases", "v3, half layout", "v3, yarn"])
def test_computes_what_transformers_does_in_fp64(case):
    """Its norms compute in fp32 whatever they get, so that they are exchanged here."""
    version, options = CASES[case]
    attention, rotary = stock(version, **options)
    layer = same_as(attention, rotary).double()
    attention = attention.double()
    for name in ("q_a_layernorm", "kv_a_layernorm"):
        if getattr(attention, name) is not None:
            setattr(attention, name, getattr(layer, name))
    x = tokens()
    torch.testing.assert_close(layer(x), run_stock(attention, rotary, x), rtol=1e-12, atol=1e-12)


def latent(**options):
    return MultiheadLatentAttention(EMBED, HEADS, **WIDTHS | options)


def normed(**options):
    norms = {"q_norm": nn.RMSNorm(5), "k_norm": nn.RMSNorm(5)}
    heads = {"num_kv_heads": 3, "head_dim": 5, "qkv_bias": True, "bias": True}
    return NormedLatentAttention(EMBED, HEADS, **heads, **norms, **WIDTHS, **options)


def factored(**options):
    kwargs = {"num_kv_heads": 1, "head_dim": 6, "qkv_bias": True, "key_up": True, "value_up": True}
    return FactoredAttention(EMBED, HEADS, rotary=RotaryEmbedding(4), **kwargs | options)


LAYERS = {
    "plain": latent,
    "low-rank queries": lambda: latent(q_lora_rank=8, bias=True),
    "no norm": lambda: latent(latent_norm=False, q_bias=True, scale=0.9),
    "window": lambda: latent(window=(9, 0)),
    "rotary alone": lambda: latent(qk_nope_head_dim=0),
    "no rotary": lambda: latent(qk_rope_head_dim=0),
    "repeated frequencies": lambda: latent(
        rotary=RotaryEmbedding(4, inverse_frequencies=torch.tensor([0.3, 0.3]), interleaved=True)
    ),
    "normed": normed,
    "normed, window": lambda: normed(window=(9, 0)),
    "factored": factored,
    "selector": lambda: factored(num_kv_heads=3, key_up=False, value_up=False, window=(9, 0)),
    "factored, norms": lambda: factored(q_norm=nn.RMSNorm(6), k_norm=nn.RMSNorm(6)),
}
NOT_ABSORBED = ("factored", "selector", "factored, norms")
KINDS = ("static", "paged")
every_layer = pytest.mark.parametrize("name", LAYERS)
every_kind = pytest.mark.parametrize("kind", KINDS)


def layer(name):
    torch.manual_seed(0)
    return randomise(LAYERS[name]()).double()


def cache_for(module, kind, capacity=TOKENS, page_size=4):
    if kind == "static":
        return StaticCache(module.cache_rows, BATCH, capacity, dtype=torch.float64)
    pages = BATCH * -(-capacity // page_size)
    cache = PagedCache(module.cache_rows, pages, page_size, dtype=torch.float64)
    return cache.batch([cache.allocate() for _ in range(BATCH)])


@every_kind
@every_layer
@torch.no_grad()
def test_every_chunk_is_the_rows_of_one_prefill(name, kind, poisoned_memory):
    """A prefill, then chunks longer and shorter than what decoding takes."""
    module, x = layer(name), tokens()
    cache = cache_for(module, kind)
    chunks = [module(chunk, cache=cache) for chunk in x.split((17, 2, 20, 1, 5), 1)]
    torch.testing.assert_close(torch.cat(chunks, 1), module(x), rtol=1e-9, atol=1e-9)


@every_kind
@every_layer
@torch.no_grad()
def test_ragged_sequences_are_each_their_own(name, kind, poisoned_memory):
    """Padding comes first; every sequence gives what it gives alone."""
    module, x = layer(name), tokens()
    cache = cache_for(module, kind)
    outs, used = [[] for _ in range(BATCH)], [0] * BATCH
    for width, counts in ((20, (20, 3)), (4, (0, 4)), (1, (1, 1)), (18, (2, 18)), (1, (1, 1))):
        chunk = torch.full((BATCH, width, EMBED), 99.0).double()
        for b, count in enumerate(counts):
            chunk[b, width - count :] = x[b, used[b] : used[b] + count]
        out = module(chunk, cache=cache, counts=counts)
        for b, count in enumerate(counts):
            outs[b].append(out[b, width - count :])
            used[b] += count
    for b in range(BATCH):
        expected = module(x[b : b + 1, : used[b]])[0]
        torch.testing.assert_close(torch.cat(outs[b]), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    "name", [name for name in LAYERS if "fac" not in name and name != "selector"]
)
@torch.no_grad()
def test_absorbed_is_expanded(name, poisoned_memory):
    module, x = layer(name), tokens()
    query, rows = module.project(x, torch.arange(TOKENS))
    count = 1 if module.window else 5
    options = {"causal": True, "window": module.window}
    expected = module.attend(query[:, :, -count:], rows, torch.arange(TOKENS), **options)
    lengths = torch.full((BATCH,), TOKENS)
    out = module.decode(query[:, :, -count:], rows, lengths)
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-10)


@torch.no_grad()
def test_absorbed_loses_little_in_low_precision():
    """At most twice what expanding loses."""
    module, x = layer("plain").bfloat16(), tokens().bfloat16()
    exact = copy.deepcopy(module).double()
    truth = exact(x.double())[:, -3:]
    cache = StaticCache(module.cache_rows, BATCH, TOKENS, dtype=torch.bfloat16)
    module(x[:, :-3], cache=cache)
    error, plain_error = (
        (y.double() - truth).abs().mean()
        for y in (module(x[:, -3:], cache=cache), module(x)[:, -3:])
    )
    assert 0 < error <= 2 * plain_error


@every_layer
def test_gradcheck(name):
    module, x = layer(name), tokens(4, batch=1).requires_grad_()
    parameters = dict(module.named_parameters())

    def run(x, *values):
        replaced = dict(zip(parameters, values, strict=True))
        return torch.func.functional_call(module, replaced, (x,))

    inputs = (x, *parameters.values())
    assert torch.autograd.gradcheck(run, inputs, fast_mode=True)


def test_padding_at_the_end_is_not_read():
    module = latent(causal=False).double()
    x, lengths = tokens(7), torch.tensor([7, 4])
    expected = module(x[1:, :4])
    x[1, 4:] = float("nan")
    out = module(torch.where(x.isnan(), 1e3, x), key_lengths=lengths)
    torch.testing.assert_close(out[1:, :4], expected)


def test_a_bias_masks():
    module, x = layer("plain"), tokens(9)
    bias = torch.zeros(9, 9).double()
    bias[:, :3] = -torch.inf
    out = module(x, bias=bias, positions=torch.arange(9))
    torch.testing.assert_close(out[:, 3:], module(x[:, 3:], positions=torch.arange(3, 9)))


def test_a_cache_holds_one_row_of_each_token():
    rows = latent().cache_rows
    assert rows.bytes_per_token(torch.bfloat16) == 2 * (10 + 4)
    cache = StaticCache(rows, BATCH, TOKENS, dtype=torch.bfloat16)
    assert cache.nbytes == BATCH * TOKENS * 2 * (10 + 4)


def test_compiles_whole_with_dynamic_shapes():
    module = layer("plain")
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend="aot_eager")
    for count in (5, 8):
        x = tokens(count)
        torch.testing.assert_close(compiled(x), module(x))


@every_layer
def test_builds_on_the_meta_device_and_resets(name):
    with torch.device("meta"):
        module = LAYERS[name]()
    module.to_empty(device="cpu").reset_parameters()
    if name == "repeated frequencies":
        module.rotary = LAYERS[name]().rotary
    assert module(tokens(dtype=torch.float32)).isfinite().all()
    assert str(EMBED) in repr(module)


def test_refusals_name_the_argument():
    for options, message in (
        ({"kv_lora_rank": 0}, "kv_lora_rank is 0"),
        ({"qk_rope_head_dim": 3}, "dim is 3"),
        ({"qk_rope_head_dim": 0, "qk_nope_head_dim": 0}, r"qk_nope_head_dim \+ qk_rope_head_dim"),
    ):
        with pytest.raises(ValueError, match=message):
            latent(**options)
    module = latent().double()
    with pytest.raises(ValueError, match=r"x has shape \(45, 24\)"):
        module(tokens()[0])
    with pytest.raises(TypeError, match="pass a StaticCache"):
        module(tokens(), cache=[])
    cache = cache_for(module, "static")
    with pytest.raises(ValueError, match="key_lengths cannot be passed"):
        module(tokens(), cache=cache, key_lengths=torch.tensor([3, 3]))
    with pytest.raises(UnsupportedError, match="gradient"):
        module(tokens(), cache=cache)
    with pytest.raises(ValueError, match="causal=False"):
        latent(causal=False).double()(tokens(), cache=cache)
