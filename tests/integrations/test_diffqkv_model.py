"""The DiffQKV language model in transformers: sizes, files, generation, training."""

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from efficient_attn.integrations.diffqkv_model import DiffQKVConfig, DiffQKVForCausalLM
from efficient_attn.integrations.past_key_values import PagedPastKeyValues, StaticPastKeyValues

SIZES = {"vocab_size": 61, "hidden_size": 48, "intermediate_size": 40, "num_hidden_layers": 2,
         "num_attention_heads": 12}  # fmt: skip
HEADS = {
    "nested": {"num_key_heads": 2, "num_value_heads": 6, "augmented_query_dim": 20},
    "not nested": {"num_key_heads": 4, "num_value_heads": 6},
    "more keys": {"num_key_heads": 6, "num_value_heads": 2},
    "narrow keys": {"num_key_heads": 2, "num_value_heads": 6, "head_dim": 2, "v_head_dim": 5},
    "widened keys": {"num_key_heads": 2, "num_value_heads": 4, "head_dim": 2, "query_head_dim": 6},
}
IMPLEMENTATIONS = ("eager", "sdpa", "efficient_attn")
CACHES = {
    "dynamic": lambda: {},
    "static of transformers": lambda: {"cache_implementation": "static"},
    "static": lambda: {"past_key_values": StaticPastKeyValues(capacity=40)},
    "paged": lambda: {"past_key_values": PagedPastKeyValues(num_pages=24, page_size=4)},
}


def model(heads="nested", implementation="efficient_attn", **options):
    torch.manual_seed(0)
    config = DiffQKVConfig(**SIZES | HEADS[heads] | options)
    # Large weights make the choices clear, and different from one another.
    made = DiffQKVForCausalLM(config).eval()
    for parameter in made.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.3)
    made.set_attn_implementation(implementation)
    return made


def prompt(batch=2, tokens=11):
    torch.manual_seed(1)
    return torch.randint(3, SIZES["vocab_size"], (batch, tokens))


def generate(made, ids, **options):
    made.generation_config.eos_token_id = None
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0} | options
    return made.generate(ids, **options)


@pytest.mark.parametrize(
    ("preset", "billions", "cache_bytes"),
    [("sigma_1_5b", 2.021, 66_560), ("sigma_10b", 9.988, 163_840)],
)
def test_presets_have_the_published_sizes(preset, billions, cache_bytes):
    config = getattr(DiffQKVConfig, preset)()
    with torch.device("meta"):
        made = DiffQKVForCausalLM(config).bfloat16()
    assert made.num_parameters() == pytest.approx(billions * 1e9, rel=1e-3)
    rows = [layer.self_attn.cache_rows for layer in made.model.layers]
    assert sum(row.bytes_per_token(torch.bfloat16) for row in rows) == cache_bytes


def test_equal_heads_are_llama():
    made = model(num_key_heads=3, num_value_heads=3, augmented_query_dim=0)
    llama = LlamaForCausalLM(LlamaConfig(**SIZES, num_key_value_heads=3)).eval()
    llama.load_state_dict(made.state_dict())
    torch.testing.assert_close(made(prompt()).logits, llama(prompt()).logits)


@pytest.mark.parametrize("heads", HEADS)
def test_every_implementation_and_cache_generates_the_same(heads, one_thread):
    expected = generate(model(heads, "eager"), prompt(), use_cache=False)
    assert len(expected[0, 11:].unique()) > 2
    for implementation in IMPLEMENTATIONS:
        made = model(heads, implementation)
        for name, options in CACHES.items():
            if implementation != "efficient_attn" and "past_key_values" in options():
                continue
            tokens = generate(made, prompt(), **options())
            assert torch.equal(tokens, expected), (implementation, name)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_left_padding_changes_nothing(implementation, one_thread):
    made, ids = model(implementation=implementation), prompt(1)
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.long), ids], 1)
    both = torch.cat([padded, prompt(1, 14)])
    mask = torch.ones_like(both)
    mask[0, :3] = 0
    tokens = generate(made, both, attention_mask=mask)
    assert torch.equal(tokens[0, 3:], generate(made, ids)[0])


def test_beams_and_assistance_find_the_same_as_without_a_cache(one_thread):
    made = model()
    beams = {"num_beams": 3}
    assert torch.equal(
        generate(made, prompt(), **beams), generate(made, prompt(), use_cache=False, **beams)
    )
    assisted = generate(made, prompt(1), assistant_model=model("not nested"))
    assert torch.equal(assisted, generate(made, prompt(1)))


@pytest.mark.parametrize("heads", HEADS)
def test_files_hold_the_whole_model(heads, tmp_path):
    made = model(heads, query_residual=heads == "nested")
    made.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="efficient_attn")
    assert type(again) is DiffQKVForCausalLM
    assert again.config.num_value_heads == made.config.num_value_heads
    assert AutoConfig.from_pretrained(tmp_path).model_type == "diffqkv"
    assert torch.equal(again(prompt()).logits, made(prompt()).logits)


def test_a_residual_query_starts_from_zero():
    config = DiffQKVConfig(**SIZES | HEADS["nested"], query_residual=True)
    layers = DiffQKVForCausalLM(config).model.layers
    assert not any(layer.self_attn.q_down_proj.weight.any() for layer in layers)


@pytest.mark.parametrize("heads", ["nested", "widened keys"])
def test_checkpointed_training_has_the_same_gradients(heads):
    gradients = []
    for checkpointing in (False, True):
        made = model(heads).train()
        if checkpointing:
            made.gradient_checkpointing_enable()
        made(prompt(), labels=prompt(), use_cache=False).loss.backward()
        gradients.append([p.grad for p in made.parameters()])
    for plain, checkpointed in zip(*gradients, strict=True):
        assert plain.abs().max() > 0
        torch.testing.assert_close(plain, checkpointed)


@pytest.mark.parametrize(
    ("heads", "ranks", "more"),
    [("nested", 2, {}), ("not nested", 2, {}), ("not nested", 4, {"num_value_heads": 12})],
)
def test_heads_split_over_ranks_add_up(heads, ranks, more):
    """What the plan for tensor parallelism does, rank by rank, without a process group."""
    made = model(heads, **more).model.layers[0].self_attn
    x, config = torch.randn(1, 9, SIZES["hidden_size"]), made.config
    turn = model(heads, **more).model.rotary_emb(x, torch.arange(9)[None])
    whole, _ = made(x, turn)
    column = "q_down_proj" if config.augmented_query_dim else "q_proj"
    assert config.base_model_tp_plan[f"layers.*.self_attn.{column}"] == "colwise"
    parts = []
    for rank in range(ranks):
        part = model(heads, **more).model.layers[0].self_attn
        for name in (column, "k_proj", "v_proj"):
            weight = getattr(part, name).weight
            weight.data = weight.data.chunk(ranks)[rank]
        part.o_proj.weight.data = part.o_proj.weight.data.chunk(ranks, dim=1)[rank]
        parts.append(part(x, turn)[0])
    torch.testing.assert_close(sum(parts), whole)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_key_heads": 5}, "5 key heads do not divide 12 query heads"),
        ({"num_value_heads": 7}, "7 value heads do not divide 12 query heads"),
        ({"num_key_heads": 0}, "num_k_heads is 0"),
        ({"num_value_heads": -2}, "num_v_heads is -2"),
        ({"head_dim": 3}, "head_dim is 3; .* even"),
        ({"head_dim": 0}, "head_dim is 0; .* even"),
        ({"augmented_query_dim": -4}, "augmented_query_dim is -4"),
    ],
)
def test_a_configuration_that_cannot_be_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        DiffQKVForCausalLM(DiffQKVConfig(**SIZES | HEADS["nested"] | options))


@pytest.mark.parametrize("key_value_heads", [4, 12])
def test_a_checkpoint_of_another_architecture_is_refused(key_value_heads, tmp_path):
    """With a key head for every query head, its tensors would fit."""
    LlamaForCausalLM(LlamaConfig(**SIZES, num_key_value_heads=key_value_heads)).save_pretrained(
        tmp_path
    )
    with pytest.raises(ValueError, match="model_type 'llama', not 'diffqkv'; .* convert diffqkv"):
        DiffQKVForCausalLM.from_pretrained(tmp_path)


@torch.no_grad()
def test_the_cache_of_other_head_counts_is_refused():
    for make in (
        lambda: StaticPastKeyValues(capacity=40),
        lambda: PagedPastKeyValues(num_pages=24, page_size=4),
    ):
        past = make()
        model("nested")(prompt(), past_key_values=past)
        with pytest.raises(ValueError, match=r"key has shape \(2, 4, .*takes \(2, 2, tokens, 4\)"):
            model("not nested")(prompt(), past_key_values=past)
        assert past.get_seq_length() == 11
