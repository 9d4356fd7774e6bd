"""DeepSeek models with layers of this package: the same results from latents as they are."""

import copy

import pytest
import torch
from transformers import (
    DeepseekV2Config,
    DeepseekV2ForCausalLM,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
)
from transformers.cache_utils import DynamicCache

from efficient_attn import UnsupportedError
from efficient_attn.integrations.deepseek import absorb_latent_attention
from efficient_attn.integrations.past_key_values import PagedPastKeyValues, StaticPastKeyValues

LAYERS, HEADS, RANK, ROPE, NEW_TOKENS = 2, 4, 24, 8, 10
SIZES = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": HEADS,
    "kv_lora_rank": RANK,
    "qk_rope_head_dim": ROPE,
    "qk_nope_head_dim": 12,
    "v_head_dim": 20,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "mscale": 0.8, "mscale_all_dim": 0.6}
YARN |= {"original_max_position_embeddings": 64}
FAMILIES = {
    "v2": (DeepseekV2ForCausalLM, DeepseekV2Config(**SIZES, q_lora_rank=None)),
    "v3": (DeepseekV3ForCausalLM, DeepseekV3Config(**SIZES, q_lora_rank=16, rope_parameters=YARN)),
}
CACHES = {
    "dynamic": DynamicCache,
    "static": lambda: StaticPastKeyValues(64),
    "paged": lambda: PagedPastKeyValues(80, page_size=4),
}
every_family = pytest.mark.parametrize("family", FAMILIES)


def pair(family):
    model_class, config = FAMILIES[family]
    torch.manual_seed(0)
    theirs = model_class(copy.deepcopy(config)).eval().requires_grad_(False)
    theirs.set_attn_implementation("sdpa")
    return theirs, absorb_latent_attention(copy.deepcopy(theirs))


@every_family
def test_the_same_logits_under_the_same_names(family, decoder_batch):
    theirs, ours = pair(family)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    for padding in ("none", "left", "right"):
        batch = decoder_batch(padding)
        real = batch["attention_mask"].bool()
        expected, out = theirs(**batch).logits[real], ours(**batch).logits[real]
        torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("padding", ["none", "left"])
@pytest.mark.parametrize("cache", CACHES)
@every_family
def test_the_same_tokens_from_the_latents(family, cache, padding, padded_batch, ops):
    theirs, ours = pair(family)
    search = {"max_new_tokens": NEW_TOKENS, "do_sample": False, **padded_batch(padding)}
    past = CACHES[cache]()
    with ops:
        got = ours.generate(**search, past_key_values=past)
    assert torch.equal(got, theirs.generate(**search))
    assert ops.called == ["attention"] * LAYERS + ["mla_decode"] * LAYERS * (NEW_TOKENS - 1)
    if cache == "dynamic":
        held = sum(x.nbytes for layer in past.layers for x in (layer.keys, layer.values))
        assert held == 3 * past.get_seq_length() * LAYERS * 4 * (RANK + ROPE)


def test_refusals_tell_the_reason():
    llama = LlamaForCausalLM(
        LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_attention_heads=1)
    )
    with pytest.raises(UnsupportedError, match="model_type is llama, not deepseek_v2 or"):
        absorb_latent_attention(llama)
    factors = {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "factor": 4.0, **factors}
    rope["original_max_position_embeddings"] = 64
    config = DeepseekV3Config(**SIZES, rope_parameters=rope, attention_dropout=0.1)
    with pytest.raises(UnsupportedError, match="change with the length.*attention_dropout is 0.1"):
        absorb_latent_attention(DeepseekV3ForCausalLM(config))
