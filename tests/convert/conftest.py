"""Tiny random models of every family, saved as people get them."""

import pytest
import torch
from transformers import AutoModelForCausalLM as Auto
from transformers import (
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

SMALL = {
    "vocab_size": 96,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 32,
}
FAMILIES: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**SMALL),
    "llama-tied": LlamaConfig(**{**SMALL, "tie_word_embeddings": True}),
    "llama3": LlamaConfig(**SMALL, rope_parameters=LLAMA3),
    "llama-yarn": LlamaConfig(**SMALL, rope_parameters=YARN),
    "llama-biases": LlamaConfig(**SMALL, attention_bias=True),
    "llama-mlp-biases": LlamaConfig(**SMALL, mlp_bias=True),
    "qwen2": Qwen2Config(**SMALL),
    "qwen2-window": Qwen2Config(
        **SMALL, use_sliding_window=True, sliding_window=5, max_window_layers=1
    ),
    "qwen3": Qwen3Config(**SMALL),
    "mistral": MistralConfig(**SMALL, sliding_window=6),
    "mixtral": MixtralConfig(**SMALL, num_local_experts=4),
}


def make(config, dtype=torch.float32, seed=0):
    """A model whose weights, biases and norms too, are random and large enough to matter."""
    torch.manual_seed(seed)
    model = Auto.from_config(config, dtype=dtype).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.copy_(1 + 0.3 * torch.randn_like(parameter))
            else:
                parameter.copy_(torch.randn_like(parameter) * parameter.shape[-1] ** -0.5)
    return model


@pytest.fixture(scope="session")
def saved(tmp_path_factory):
    """``saved(name)`` gives a folder and its model, made once."""
    made = {}

    def get(name):
        if name not in made:
            folder = tmp_path_factory.mktemp("models") / name
            model = make(FAMILIES[name])
            model.save_pretrained(folder, max_shard_size="60KB")
            made[name] = folder, model
        return made[name]

    return get
