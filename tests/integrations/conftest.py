"""Tiny models of many families, with weights large enough that attention is far from uniform."""

import copy

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BigBirdPegasusConfig,
    BigBirdPegasusForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)

import efficient_attn.integrations.transformers  # noqa: F401  registers the attention

VOCABULARY = 96
WINDOW = 6

_sizes = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "initializer_range": 0.2,
}
_decoder = {
    **_sizes,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
}
_some_slide = {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]}
_no_dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}

# Family: class, configuration, and the implementation of transformers to be compared with.
FAMILIES = {
    "llama": (LlamaForCausalLM, LlamaConfig(**_decoder), "sdpa"),
    "qwen2": (
        Qwen2ForCausalLM,
        Qwen2Config(**_decoder, use_sliding_window=True, **_some_slide),
        "sdpa",
    ),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config(**_decoder, head_dim=24), "sdpa"),
    "mistral": (MistralForCausalLM, MistralConfig(**_decoder, sliding_window=WINDOW), "sdpa"),
    # sdpa has no softcap and no attention sinks.
    "gemma2": (
        Gemma2ForCausalLM,
        Gemma2Config(
            **_decoder,
            head_dim=16,
            attn_logit_softcapping=2.0,
            tie_word_embeddings=False,
            **_some_slide,
        ),
        "eager",
    ),
    "gpt_oss": (
        GptOssForCausalLM,
        GptOssConfig(
            **_decoder,
            head_dim=16,
            num_local_experts=2,
            num_experts_per_tok=1,
            rope_parameters={"rope_type": "default", "rope_theta": 1e4},
            **_some_slide,
        ),
        "eager",
    ),
    "qwen2_moe": (
        Qwen2MoeForCausalLM,
        Qwen2MoeConfig(
            **_decoder,
            use_sliding_window=True,
            num_experts=2,
            num_experts_per_tok=1,
            moe_intermediate_size=32,
            shared_expert_intermediate_size=32,
            **_some_slide,
        ),
        "sdpa",
    ),
    "bigbird_pegasus": (
        BigBirdPegasusForCausalLM,
        BigBirdPegasusConfig(
            vocab_size=VOCABULARY,
            d_model=64,
            decoder_layers=2,
            decoder_ffn_dim=96,
            decoder_attention_heads=4,
            init_std=0.2,
            dropout=0.0,
        ),
        "eager",
    ),
    "bert": (BertForMaskedLM, BertConfig(**_sizes, **_no_dropout), "sdpa"),
    "vit": (
        ViTForImageClassification,
        ViTConfig(**_sizes, **_no_dropout, image_size=16, patch_size=4, num_labels=5),
        "sdpa",
    ),
    "t5": (
        T5ForConditionalGeneration,
        T5Config(
            vocab_size=VOCABULARY,
            d_model=64,
            d_kv=16,
            d_ff=96,
            num_layers=2,
            num_heads=4,
            dropout_rate=0.0,
            decoder_start_token_id=0,
            relative_attention_num_buckets=8,
            tie_word_embeddings=False,
        ),
        "sdpa",
    ),
}


class CountCalls(TorchDispatchMode):
    """Counts how often this package's attention runs."""

    calls = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.calls += function.namespace == "efficient_attn"
        return function(*args, **(kwargs or {}))


@pytest.fixture
def count_calls():
    return CountCalls


@pytest.fixture
def ops():
    """The names of this package's ops, in the order in which they were called."""

    class Names(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.called = []

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function.namespace == "efficient_attn":
                self.called.append(function._opname)
            return function(*args, **(kwargs or {}))

    return Names()


@pytest.fixture(autouse=True)
def small_models(one_thread):
    """All of them are."""


@pytest.fixture
def model_pair():
    """Makes two equal models: one with attention of transformers, and one for a test to switch."""

    def make(family):
        model_class, config, implementation = FAMILIES[family]
        torch.manual_seed(0)
        theirs = model_class(copy.deepcopy(config)).eval()
        for name, parameter in theirs.named_parameters():
            # Initialised to next to nothing in some families, which would leave them untested.
            if "sinks" in name or "relative_attention_bias" in name:
                torch.nn.init.normal_(parameter)
        ours = copy.deepcopy(theirs)
        theirs.set_attn_implementation(implementation)
        return theirs, ours

    return make


@pytest.fixture
def padded_batch():
    """Makes a batch of three samples, of which two are padded, if any."""

    def make(padding, length=17):
        ids = torch.randint(1, VOCABULARY, (3, length))
        mask = torch.ones_like(ids)
        for sample, pads in ((0, 5), (2, 1)):
            if padding == "left":
                mask[sample, :pads] = 0
            elif padding == "right":
                mask[sample, length - pads :] = 0
        return {"input_ids": ids.masked_fill(mask == 0, 0), "attention_mask": mask}

    return make


@pytest.fixture
def decoder_batch(padded_batch):
    """The same for decoders, whose positions start where the padding ends."""

    def make(padding):
        batch = padded_batch(padding)
        positions = (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)
        return {**batch, "position_ids": positions}

    return make
