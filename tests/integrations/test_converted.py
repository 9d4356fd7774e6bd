"""Models with latent attention: what they compute, generate, cache and store.

Their weights are a change of notation of the source's, made here in a few lines: one rotary key of
all key heads, whose frequencies repeat, and a latent of all values.
"""

import copy
import dataclasses
import json

import pytest
import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.cache_utils import DynamicCache, StaticCache

from efficient_attn.convert.attention_weights import (
    FactoredAttentionWeights,
    GroupedAttentionWeights,
    LatentAttentionWeights,
)
from efficient_attn.convert.native import native_facts, native_state, native_weights
from efficient_attn.errors import ConversionError, UnsupportedError
from efficient_attn.integrations.converted import load_converted, replace_attention
from efficient_attn.integrations.past_key_values import PagedPastKeyValues, StaticPastKeyValues

VOCABULARY, LAYERS, HEADS, KV_HEADS, WINDOW, NEW_TOKENS = 96, 2, 4, 2, 6, 10
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
}
ROPE = {"rope_theta": 1e4, "factor": 8.0, "original_max_position_embeddings": 32}
LLAMA3 = {**ROPE, "rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
FAMILIES = {
    "llama": (LlamaForCausalLM, LlamaConfig(**SIZES)),
    "llama3": (LlamaForCausalLM, LlamaConfig(**SIZES, rope_parameters=LLAMA3)),
    "yarn": (LlamaForCausalLM, LlamaConfig(**SIZES, rope_parameters={**ROPE, "rope_type": "yarn"})),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config(**SIZES)),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config(**SIZES, head_dim=24)),
    "mistral": (MistralForCausalLM, MistralConfig(**SIZES, sliding_window=WINDOW)),
    "mixtral": (
        MixtralForCausalLM,
        MixtralConfig(**SIZES, num_local_experts=2, num_experts_per_tok=1),
    ),
}


def source_of(attention, model):
    """The weights of a stock layer."""
    tensors = {"query": "q_proj", "key": "k_proj", "value": "v_proj", "output": "o_proj"}
    kwargs = {name: getattr(attention, module).weight for name, module in tensors.items()}
    kwargs |= {f"{name}_bias": getattr(attention, x).bias for name, x in tensors.items()}
    for name, norm in (("query_norm", "q_norm"), ("key_norm", "k_norm")):
        kwargs[name] = getattr(attention, norm).weight if hasattr(attention, norm) else None
    config, rotary = model.config, model.model.rotary_emb
    return GroupedAttentionWeights(
        **kwargs,
        num_heads=HEADS,
        num_kv_heads=KV_HEADS,
        inverse_frequencies=rotary.inv_freq,
        rotary_scale=rotary.attention_scaling,
        scale=attention.scaling,
        norm_eps=config.rms_norm_eps,
        window=WINDOW if config.model_type == "mistral" else None,
    )


def selector(source):
    """Which of the ``g d`` grouped channels each channel of a query head reads, ``(H, d, g d)``."""
    heads, grouped, dim = source.num_heads, source.num_kv_heads, source.head_dim
    rows = torch.eye(grouped * dim, dtype=source.key.dtype).unflatten(0, (grouped, dim))
    return rows.repeat_interleave(heads // grouped, 0)


def latent(source):
    grouped, dim, width = source.num_kv_heads, source.head_dim, source.key.shape[0]
    # Pairs (f, f + F) of each key head become neighbours.
    order = torch.arange(width).view(grouped, 2, dim // 2).mT.flatten()
    reads = selector(source)
    embed = reads[:, :, order].mT
    common = {
        "latent_up": reads.flatten(0, 1),
        "output": source.output,
        "output_bias": source.output_bias,
        "num_heads": source.num_heads,
        "qk_nope_head_dim": 0,
        "v_head_dim": dim,
        "inverse_frequencies": source.inverse_frequencies.repeat(grouped),
        "rotary_scale": source.rotary_scale,
        "scale": source.scale,
        "window": source.window,
    }
    if source.key_norm is not None:
        both = torch.eye(2 * width, dtype=source.key.dtype)
        down = torch.cat((both[width:], both[order]))
        return LatentAttentionWeights(query=embed, latent_down=down, source=source, **common)
    query = torch.cat([m @ w for m, w in zip(embed, source.query.split(dim), strict=True)])
    biases = {}
    if source.query_bias is not None:
        parts = zip(embed, source.query_bias.split(dim), strict=True)
        biases["query_bias"] = torch.cat([m @ b for m, b in parts])
        biases["latent_down_bias"] = torch.cat((source.value_bias, source.key_bias[order]))
    down = torch.cat((source.value, source.key[order]))
    return LatentAttentionWeights(query=query, latent_down=down, **biases, **common)


def factored(source):
    """Latents in a basis of their own, which the up-projection undoes."""
    reads = selector(source).flatten(0, 1)
    turn, _ = torch.linalg.qr(torch.randn(source.key.shape[0], source.key.shape[0]).to(reads))
    bias = None if source.key_bias is None else turn @ source.key_bias
    latents = dataclasses.replace(source, key=turn @ source.key, key_bias=bias)
    return FactoredAttentionWeights(latents, key_up=reads @ turn.T, value_up=reads)


FORMS = {"latent": latent, "factored": factored, "selector": FactoredAttentionWeights}
everywhere = pytest.mark.parametrize("form", FORMS)


def pair(family, form="latent", dtype=torch.float64):
    """A stock model, and one with converted attention."""
    model_class, config = FAMILIES[family]
    torch.manual_seed(0)
    # Experts of transformers know fp64 in their plain form alone.
    options = {"experts_implementation": "eager"} if family == "mixtral" else {}
    theirs = model_class._from_config(copy.deepcopy(config), **options).to(dtype).eval()
    for name, parameter in theirs.named_parameters():
        if name.endswith("bias") or "q_norm" in name or "k_norm" in name:
            torch.nn.init.normal_(parameter)
    theirs.set_attn_implementation("sdpa")
    theirs.requires_grad_(False)
    weights = [FORMS[form](source_of(x.self_attn, theirs)) for x in theirs.model.layers]
    return theirs, replace_attention(copy.deepcopy(theirs), weights)


def search(model, batch, **options):
    return model.generate(**batch, max_new_tokens=NEW_TOKENS, do_sample=False, **options)


@everywhere
@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_logits_in_fp64(family, form, decoder_batch, poisoned_memory):
    theirs, ours = pair(family, form)
    for padding in ("none", "left", "right"):
        batch = decoder_batch(padding)
        real = batch["attention_mask"].bool()
        difference = (theirs(**batch).logits - ours(**batch).logits)[real]
        assert difference.abs().max() < 1e-9


@everywhere
@pytest.mark.parametrize("family", ["llama", "qwen3", "mistral"])
@pytest.mark.parametrize("padding", ["none", "left"])
def test_the_same_tokens(family, form, padding, padded_batch, poisoned_memory):
    theirs, ours = pair(family, form)
    batch = padded_batch(padding)
    for options in ({}, {"num_beams": 3}, {"prefill_chunk_size": 5}):
        expected = search(theirs, batch, **options)
        assert len(expected[:, -NEW_TOKENS:].unique()) > 3, "the models run in circles"
        assert torch.equal(search(ours, batch, **options), expected)


@everywhere
@pytest.mark.parametrize("family", ["llama3", "yarn", "qwen2", "qwen3", "mistral", "mixtral"])
def test_what_is_saved_is_what_is_loaded(family, form, tmp_path, padded_batch):
    theirs, ours = pair(family, form, torch.float32)
    ours.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architectures"] == [type(theirs).__name__]
    batch = padded_batch("left")
    loaded = load_converted(tmp_path).eval()
    assert torch.equal(loaded(**batch).logits, ours(**batch).logits)
    low = load_converted(tmp_path, dtype=torch.bfloat16)
    assert {p.dtype for p in low.parameters()} == {torch.bfloat16}
    rotary = low.bfloat16().model.layers[1].self_attn.rotary
    own = ours.model.layers[1].self_attn.rotary
    assert torch.equal(rotary.inverse_frequencies, own.inverse_frequencies)


@everywhere
@pytest.mark.parametrize("family", ["qwen2", "qwen3", "mistral", "yarn"])
def test_weights_written_down_are_read_back(family, form):
    model, _ = pair(family)
    weights = FORMS[form](source_of(model.model.layers[0].self_attn, model))
    facts = json.loads(json.dumps(native_facts(weights)))
    state = native_state(weights)
    back = native_weights(facts, state)
    assert type(back) is type(weights)
    assert native_facts(back) == native_facts(weights)
    again = native_state(back)
    assert again.keys() == state.keys()
    assert all(torch.equal(again[name], x) for name, x in state.items())


CACHES = {
    "dynamic": lambda config: DynamicCache(config=config),
    "transformers' static": lambda config: StaticCache(config=config, max_cache_len=64),
    "static": lambda config: StaticPastKeyValues(64),
    "paged": lambda config: PagedPastKeyValues(80, page_size=4),
}


@everywhere
@pytest.mark.parametrize(("padding", "beams"), [("none", 3), ("left", 1)])
@pytest.mark.parametrize("cache", CACHES)
def test_every_cache_will_do(cache, padding, beams, form, padded_batch, poisoned_memory):
    theirs, ours = pair("mistral", form)
    batch = padded_batch(padding)
    got = search(ours, batch, past_key_values=CACHES[cache](ours.config), num_beams=beams)
    assert torch.equal(got, search(theirs, batch, num_beams=beams))


@pytest.mark.parametrize("family", ["llama", "mistral"])
@pytest.mark.parametrize("cache", CACHES)
def test_decoding_calls_the_op_for_it(cache, family, padded_batch, ops):
    """With left padding too, but for prompts; transformers' static caches need masks."""
    _, ours = pair(family)
    for padding in ("none", "left"):
        with ops:
            search(ours, padded_batch(padding), past_key_values=CACHES[cache](ours.config))
        expected = ["attention"] * LAYERS + ["mla_decode"] * LAYERS * (NEW_TOKENS - 1)
        assert ops.called == expected
        ops.called.clear()


@everywhere
def test_a_token_takes_in_a_cache_what_its_row_does(form):
    """In these forms, which are lossless, as much as the heads of the source."""
    theirs, ours = pair("llama", form)
    rows = ours.model.layers[0].self_attn.cache_rows
    per_token = LAYERS * rows.bytes_per_token(torch.float64)
    grouped = 2 * KV_HEADS * 16 * LAYERS * 8
    assert per_token == grouped
    ids = torch.randint(1, VOCABULARY, (3, 17))
    past = ours(ids, past_key_values=DynamicCache(config=ours.config)).past_key_values
    held = sum(x.nbytes for layer in past.layers for x in (layer.keys, layer.values))
    assert held == ids.numel() * per_token
    own = StaticPastKeyValues(20)
    ours(ids, past_key_values=own)
    assert own.nbytes == 3 * 20 * per_token


@everywhere
@pytest.mark.parametrize("family", ["llama3", "qwen2", "qwen3", "mistral"])
def test_chunks_are_the_rows_of_one_prefill(family, form, poisoned_memory):
    _, ours = pair(family, form)
    ids = torch.randint(1, VOCABULARY, (2, 45))
    expected = ours(ids).logits
    past, chunks = DynamicCache(config=ours.config), []
    for chunk in ids.split((17, 1, 2, 20, 5), 1):
        chunks.append(ours(chunk, past_key_values=past).logits)
    # A window's rows are dropped, so that its chunks count positions from elsewhere.
    assert (torch.cat(chunks, 1) - expected).abs().max() < 1e-5


@everywhere
def test_gradients_are_those_of_the_source(form, decoder_batch):
    """With respect to what both have: the parameters outside attention."""
    theirs, ours = pair("qwen3", form)
    batch = decoder_batch("right")
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    grads = []
    for model in (theirs, ours):
        model.requires_grad_(True).train()
        model(**batch, labels=labels).loss.backward()
        grads.append({n: p.grad for n, p in model.named_parameters() if "self_attn" not in n})
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-5, atol=1e-7)
    assert all(p.grad is not None for p in ours.parameters())


def test_refusals_tell_the_reason(tmp_path):
    theirs, ours = pair("llama")
    weights = [latent(source_of(x.self_attn, theirs)) for x in theirs.model.layers]
    with pytest.raises(ConversionError, match="weights of 1 layers, and LlamaForCausalLM has 2"):
        replace_attention(theirs, weights[:1])
    short = dataclasses.replace(weights[1], output=weights[1].output[:, 1:])
    with pytest.raises(ConversionError, match=r"(?s)weights of layer 1 do not fit .*o_proj"):
        replace_attention(theirs, [weights[0], short])
    assert "LlamaAttention" in {type(x.self_attn).__name__ for x in theirs.model.layers}
    with pytest.raises(UnsupportedError, match="output_attentions is set"):
        ours(torch.ones(1, 3, dtype=torch.long), output_attentions=True)

    ours.float().save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())

    def refused(record, match):
        path.write_text(json.dumps({**config, "efficient_attn": record}))
        with pytest.raises(ConversionError, match=match):
            load_converted(tmp_path)

    record = config["efficient_attn"]
    refused(None, "not a natively converted checkpoint")
    refused({**record, "format": 7}, "written in format 7")
    refused({**record, "layers": record["layers"][:1]}, "weights of 1 layers")
    for change, match in (
        ({"bias": True}, r"kv_a_proj_with_mqa.bias is missing and should be \(64,\)"),
        ({"kv_lora_rank": 1 << 40}, "kv_a_proj_with_mqa.weight is"),
        ({"kv_lora_rank": -1}, "what is said of layer 0 makes none: ValueError"),
        ({"form": "other"}, "what is said of layer 0 makes none"),
        ({"num_heads": "4"}, "what is said of layer 0 makes none: TypeError"),
        ({"more": 1}, "what is said of layer 0 makes none: TypeError"),
    ):
        refused({**record, "layers": [{**layer, **change} for layer in record["layers"]]}, match)
    path.write_text(json.dumps({**config, "intermediate_size": 1 << 20}))
    with pytest.raises(ConversionError, match="mlp.down_proj.weight is"):
        load_converted(tmp_path)
