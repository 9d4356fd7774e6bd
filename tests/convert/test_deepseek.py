"""The stock form of a layer: its norm without effect, its tables, biases and refusals."""

import dataclasses
import math

import pytest
import torch
from transformers import DeepseekV3Config
from transformers.models.deepseek_v3.modeling_deepseek_v3 import (
    DeepseekV3RMSNorm,
    DeepseekV3RotaryEmbedding,
)

from efficient_attn import ConversionError
from efficient_attn.convert.attention_weights import LatentAttentionWeights
from efficient_attn.convert.deepseek import (
    LATENT_EPS,
    TOLERATED,
    DeepseekFormat,
)
from efficient_attn.convert.rope import default_frequencies
from efficient_attn.convert.stock_rope import rotary_settings

WIDTH, HEADS, RANK, ROPE, NOPE, VALUE = 64, 3, 24, 8, 5, 6
TABLE = default_frequencies(ROPE, 10000.0)


def weights(**changes):
    def random(*shape):
        return torch.randn(*shape, dtype=torch.float64) * 0.2

    own = LatentAttentionWeights(
        query=random(HEADS * (NOPE + ROPE), WIDTH),
        latent_down=random(RANK + ROPE, WIDTH),
        latent_up=random(HEADS * (NOPE + VALUE), RANK),
        output=random(WIDTH, HEADS * VALUE),
        num_heads=HEADS,
        qk_nope_head_dim=NOPE,
        v_head_dim=VALUE,
        inverse_frequencies=TABLE,
        scale=0.3,
    )
    return dataclasses.replace(own, **changes)


def form(dtype=torch.float32, **options):
    options = {"norm_eps": LATENT_EPS, "frequencies": TABLE, **options}
    return DeepseekFormat(hidden_size=WIDTH, dtype=dtype, **options)


def through_norm(tensors, x, down, norm):
    """What DeepSeek makes of inputs with a down projection and its norm."""
    layer = DeepseekV3RMSNorm(tensors[norm].numel()).to(tensors[norm].dtype)
    layer.weight.data = tensors[norm]
    bias = tensors.get(f"{down}.bias")
    u = torch.nn.functional.linear(x, tensors[f"{down}.weight"], bias)
    return layer(u[..., : layer.weight.numel()])


@pytest.mark.parametrize("scale", [1e-3, 1.0, 300.0])
@pytest.mark.parametrize("dtype", TOLERATED)
def test_the_norm_changes_a_latent_by_less_than_its_bound(dtype, scale):
    layer = weights(latent_down=weights().latent_down * scale)
    gamma = torch.rand(WIDTH) + 0.5
    tensors, notes = form(dtype).layer(layer, gamma)
    assert notes["norm_error"] < 2.0 ** TOLERATED[dtype]
    assert notes["norm_exponent"] % 2 == 0
    assert notes["norm_exponent"] == 0 or 16 * notes["norm_error"] >= 2.0 ** TOLERATED[dtype]
    # The worst inputs too: those along the largest singular vector.
    x = torch.randn(100, WIDTH, dtype=torch.float64)
    x[0] = torch.linalg.svd(layer.latent_down[:RANK] * gamma)[2][0] * 1e3
    x = x / (x.square().mean(-1, keepdim=True) + LATENT_EPS).sqrt() * gamma
    expected = x @ layer.latent_down[:RANK].T
    assert expected.square().mean(-1).max() <= notes["latent_mean_square"]
    rounding = {torch.float64: 1e-12, torch.float32: 3e-6, torch.bfloat16: 3e-2}[dtype]
    tensors = {name: tensor.double() for name, tensor in tensors.items()}
    got = through_norm(tensors, x, "kv_a_proj_with_mqa", "kv_a_layernorm.weight")
    allowed = (notes["norm_error"] + rounding + 2e-7) * expected.norm(dim=-1)
    assert ((got - expected).norm(dim=-1) <= allowed).all()


def test_queries_with_a_bias_go_through_a_latent_that_holds_a_one():
    bias = torch.randn(HEADS * (NOPE + ROPE), dtype=torch.float64)
    layer = weights(query_bias=bias)
    written = form(query_bias=True, bias=True)
    gamma = torch.rand(WIDTH) + 0.5
    tensors, _ = written.layer(layer, gamma)
    assert written.q_lora_rank == 80 and tensors["q_a_proj.weight"].shape == (80, WIDTH)
    x = torch.nn.functional.rms_norm(torch.randn(100, WIDTH), (WIDTH,)) * gamma
    latent = through_norm(tensors, x, "q_a_proj", "q_a_layernorm.weight")
    query = latent @ tensors["q_b_proj.weight"].T
    expected = (x.double() @ layer.query.T + bias) * 0.3 * math.sqrt(NOPE + ROPE)
    torch.testing.assert_close(query.double(), expected, rtol=1e-5, atol=1e-5)


def test_the_residual_stream_of_a_small_epsilon_is_that_of_a_large_one_scaled():
    layer, rescaled = weights(), form(norm_eps=1e-5)
    beta = math.sqrt(0.1)
    assert rescaled.residual_gain == pytest.approx(beta)
    tensors, _ = rescaled.layer(layer, torch.ones(WIDTH))
    plain, _ = form().layer(layer, torch.ones(WIDTH))
    torch.testing.assert_close(tensors["o_proj.weight"], plain["o_proj.weight"] * beta)
    for name in ("q_proj.weight", "kv_a_proj_with_mqa.weight", "kv_b_proj.weight"):
        assert torch.equal(tensors[name], plain[name])
    names = ["model.embed_tokens.weight", "x.mlp.down_proj.weight", "x.mlp.up_proj.weight"]
    ones = {name: torch.ones(2, 2) for name in names}
    factors = [float(x[0, 0]) for x in rescaled.others(ones).values()]
    assert factors == pytest.approx([beta, beta, 1.0])
    x = torch.randn(50, WIDTH, dtype=torch.float64) * 1e-3
    norm = torch.nn.functional.rms_norm
    torch.testing.assert_close(norm(beta * x, (WIDTH,), eps=1e-6), norm(x, (WIDTH,), eps=1e-5))


def test_the_rotary_scale_goes_into_the_rows_that_are_turned():
    layer = weights(latent_up=torch.zeros(33, RANK), rotary_scale=1.5)
    plain, _ = form().layer(dataclasses.replace(layer, rotary_scale=1.0), torch.ones(WIDTH))
    scaled, _ = form().layer(layer, torch.ones(WIDTH))
    ratio = (scaled["q_proj.weight"] / plain["q_proj.weight"]).view(HEADS, NOPE + ROPE, WIDTH)
    torch.testing.assert_close(ratio[:, :NOPE], torch.ones(HEADS, NOPE, WIDTH))
    torch.testing.assert_close(ratio[:, NOPE:], torch.full((HEADS, ROPE, WIDTH), 2.25))


def test_what_a_format_leaves_out_is_an_error():
    one = torch.ones(WIDTH, dtype=torch.float64)
    layer = weights(output_bias=one, query_bias=torch.ones(39), latent_down_bias=torch.ones(32))
    with pytest.raises(ConversionError, match="query_bias and latent_down_bias and output_bias"):
        form().layer(layer, one)
    with pytest.raises(ConversionError, match="rotary table"):
        form().layer(weights(inverse_frequencies=TABLE * 2), one)


def table_of(settings, dim):
    config = DeepseekV3Config(qk_rope_head_dim=dim, rope_parameters=settings)
    rotary = DeepseekV3RotaryEmbedding(config)
    assert rotary.attention_scaling == 1.0
    return rotary.inv_freq


@pytest.mark.parametrize(("heads", "dim", "theta"), [(8, 128, 5e5), (4, 64, 1e4), (2, 12, 1e6)])
def test_any_table_is_had_from_stock_settings(heads, dim, theta):
    plain = default_frequencies(dim, theta)
    settings = rotary_settings(plain, theta, 4096)
    assert settings == {"rope_type": "default", "rope_theta": theta}
    assert torch.equal(table_of(settings, dim), plain)

    wanted = plain.double().repeat_interleave(heads)
    got = table_of(rotary_settings(wanted, theta, 4096), heads * dim).double()
    assert ((got - wanted).abs() <= wanted * torch.finfo(torch.float32).eps).all()
    assert (got == wanted).double().mean() > 0.9


def test_a_pair_that_is_not_turned_is_possible():
    wanted = torch.tensor([1.0, 0.5, 0.0])
    got = table_of(rotary_settings(wanted, 1e4, 4096), 6)
    assert got[2] < 1e-37 and torch.allclose(got[:2], wanted[:2])
