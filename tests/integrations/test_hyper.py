"""Estimated attention in transformers models: what is estimated, what is exact, what is refused."""

import copy

import pytest
import torch
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM, ViTConfig, ViTModel

from efficient_attn import HyperConfig, UnsupportedError, hyper_attention, patch_model
from efficient_attn.integrations import hyper
from efficient_attn.integrations.hyper import hyper_attention_forward
from efficient_attn.integrations.visible_spans import visible_spans
from efficient_attn.planning import HyperPlan

CONFIG = HyperConfig(block_size=4, sample_size=4, leaf_size=4, window=4, sinks=1, exact_below=24)
# So wide that nothing is left to estimate, though the estimator runs.
WIDE = HyperConfig(block_size=4, sample_size=4, leaf_size=4, window=96, sinks=1, exact_below=24)
SIZES = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "initializer_range": 0.2,
}  # fmt: skip
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
TIGHT = {"rtol": 1e-4, "atol": 1e-4}
LENGTH = 40


def llama(**options):
    torch.manual_seed(0)
    options = {"num_key_value_heads": 2, "pad_token_id": 0, "eos_token_id": None} | options
    return LlamaForCausalLM(LlamaConfig(vocab_size=96, **SIZES, **options)).eval()


def ids(length=LENGTH, batch=2):
    torch.manual_seed(1)
    return torch.randint(1, 96, (batch, length))


def padded(side, length=LENGTH, batch=2):
    """A batch whose first sample has seven tokens of padding, as a causal model wants it."""
    mask = torch.ones(batch, length, dtype=torch.long)
    mask[0, slice(7) if side == "left" else slice(-7, None)] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    tokens = ids(length, batch).masked_fill(mask == 0, 0)
    return {"input_ids": tokens, "attention_mask": mask, "position_ids": positions}


class CountHyper(torch.utils._python_dispatch.TorchDispatchMode):
    calls = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.efficient_attn.hyper_attention.default:
            # Samples whose mass is limited are a call of their own, without a window.
            self.calls += HyperPlan(*args[3:-1]).window >= 0
        return function(*args, **(kwargs or {}))


@torch.no_grad()
def logits(model, **inputs):
    with CountHyper() as counter:
        out = model(**inputs)
    return (out.logits if hasattr(out, "logits") else out.last_hidden_state), counter.calls


def test_a_language_model_is_estimated_and_restored():
    model = llama()
    expected, _ = logits(model, input_ids=ids())
    with patch_model(model, attention="hyper", config=CONFIG, seed=1) as patch:
        got, calls = logits(model, input_ids=ids())
        assert calls == 2 and not torch.allclose(got, expected, atol=1e-3)
        assert len(patch.report.replaced) == 2
        assert "estimated from 24 keys on, steps of up to 16 tokens (decoding) exact" in str(
            patch.report
        )
        again, _ = logits(copy.deepcopy(model), input_ids=ids())
        assert torch.equal(again, got), "a copy repeats the bits"
        short, calls = logits(model, input_ids=ids(23))
        assert calls == 0
        torch.testing.assert_close(short, logits(llama(), input_ids=ids(23))[0], **TIGHT)
    restored, calls = logits(model, input_ids=ids())
    assert calls == 0 and torch.equal(restored, expected)
    assert not any("efficient_attn_hyper" in vars(module) for module in model.modules())
    with patch_model(model, attention=CONFIG, seed=1):
        assert torch.equal(logits(model, input_ids=ids())[0], got), "a config stands for hyper"
    with patch_model(model, attention=CONFIG, seed=2):
        assert not torch.allclose(logits(model, input_ids=ids())[0], got, atol=1e-3)


def test_each_layer_has_random_numbers_of_its_own():
    model = llama()
    patch_model(model, attention=CONFIG)
    first, second = (hyper.choice_of(layer.self_attn) for layer in model.model.layers)
    assert first.seed != second.seed and first.config is second.config
    by_name = llama()
    by_name.set_attn_implementation(hyper.NAME)
    chosen = hyper.choice_of(by_name.model.layers[1].self_attn)
    assert chosen == hyper.Choice(HyperConfig(), second.seed)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing_for_real_tokens(side):
    """Whole and in part: a sample in a padded batch is estimated as it is alone."""
    for layers in (None, [1]):
        model, batch = llama(), padded(side)
        patch_model(model, attention=CONFIG, layers=layers)
        got, calls = logits(model, **batch)
        assert calls > 0
        for row in range(2):
            real = batch["attention_mask"][row].bool()
            alone, _ = logits(model, input_ids=batch["input_ids"][row, real][None])
            torch.testing.assert_close(got[row, real], alone[0], **TIGHT)


def test_exact_and_estimated_layers_in_one_model():
    model = llama()
    estimated = patch_model(model, attention=CONFIG, layers=[1])
    alone, calls = logits(model, input_ids=ids())
    assert calls == 1
    exact = patch_model(model)
    assert exact.report.replaced == ("model.layers.0.self_attn",)
    both, calls = logits(model, input_ids=ids())
    assert calls == 1
    torch.testing.assert_close(both, alone, **TIGHT)
    exact.undo()
    estimated.undo()
    assert model.config._attn_implementation == "sdpa"
    torch.testing.assert_close(
        logits(model, input_ids=ids())[0], logits(llama(), input_ids=ids())[0]
    )


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("layers", [None, [0]])
def test_generate_estimates_the_prompt_and_decodes_exactly(cache, layers):
    """With a window over everything, the tokens are those of exact attention."""
    theirs, ours = llama(), llama()
    options = {"max_new_tokens": 5, "do_sample": False, "cache_implementation": cache}
    options |= {"disable_compile": True}
    patch_model(ours, attention=WIDE, layers=layers)
    for side in ("none", "left"):
        batch = padded("left") if side == "left" else {"input_ids": ids()}
        batch.pop("position_ids", None)
        with CountHyper() as counter:
            got = ours.generate(**batch, **options)
        assert torch.equal(got, theirs.generate(**batch, **options))
    model = llama()
    patch_model(model, attention=CONFIG, layers=layers)
    with CountHyper() as counter:
        model.generate(ids(), **options)
    assert counter.calls == (2 if layers is None else 1), "the prompt alone, once for each layer"


@pytest.mark.parametrize("padding", [False, True])
def test_bert(padding):
    torch.manual_seed(0)
    model = BertModel(BertConfig(vocab_size=96, **SIZES, **NO_DROPOUT)).eval()
    batch = padded("right") if padding else {"input_ids": ids()}
    batch.pop("position_ids", None)
    expected, _ = logits(model, **batch)
    for layers in (None, [0]):
        with patch_model(model, attention=WIDE, layers=layers):
            got, _ = logits(model, **batch)
            torch.testing.assert_close(got, expected, **TIGHT)
        with patch_model(model, attention=CONFIG, layers=layers):
            got, calls = logits(model, **batch)
            assert calls > 0 and not torch.allclose(got, expected, atol=1e-3)
    if padding:
        with patch_model(model, attention=CONFIG):
            got, _ = logits(model, **batch)
            alone, _ = logits(model, input_ids=batch["input_ids"][:1, :-7])
            torch.testing.assert_close(got[:1, :-7], alone, **TIGHT)


def test_vit():
    torch.manual_seed(0)
    model = ViTModel(ViTConfig(**SIZES, **NO_DROPOUT, image_size=24, patch_size=4)).eval()
    pixels = torch.randn(2, 3, 24, 24)
    expected, _ = logits(model, pixel_values=pixels)
    with patch_model(model, attention=WIDE):
        torch.testing.assert_close(logits(model, pixel_values=pixels)[0], expected, **TIGHT)
    with patch_model(model, attention=CONFIG):
        got, calls = logits(model, pixel_values=pixels)
        assert calls == 2 and not torch.allclose(got, expected, atol=1e-3)


def test_training_under_checkpointing_has_the_gradients_of_one_pass():
    model = llama()
    patch_model(model, attention=CONFIG)
    model.train()

    def gradients():
        model.zero_grad()
        model(input_ids=ids(), labels=ids()).loss.backward()
        return [parameter.grad.clone() for parameter in model.parameters()]

    plain = gradients()
    model.gradient_checkpointing_enable()
    for once, again in zip(plain, gradients(), strict=True):
        assert once.isfinite().all()
        torch.testing.assert_close(again, once)


class Layer(torch.nn.Module):
    is_causal = True


def call(mask=None, config=CONFIG, tokens=32, **options):
    layer = Layer()
    hyper.choose(layer, config, seed=0, layer=0)
    torch.manual_seed(0)
    query, key = torch.randn(2, 4, tokens, 8), torch.randn(2, 2, 32, 8)
    out, weights = hyper_attention_forward(layer, query, key, key, mask, **options)
    assert weights is None
    return out


def test_every_reason_to_refuse_is_given():
    holes = torch.ones(2, 1, 32, 32, dtype=torch.bool).tril()
    holes[..., 9] = False
    with pytest.raises(UnsupportedError, match="exact_below above the 32 keys") as error:
        call(
            sliding_window=8, softcap=2.0, position_bias=torch.zeros(1, 4, 32, 32), dropout=0.1,
            head_mask=torch.ones(4), cu_seq_lens_q=torch.tensor([0, 32]),
        )  # fmt: skip
    assert len(error.value.reasons) == 6
    for mask in (holes, torch.rand(2, 1, 1, 32)):
        with pytest.raises(UnsupportedError, match="neither full nor causal"):
            call(mask)
    # What is exact honours all of it, as the exact function does.
    call(holes[:, :, -16:], tokens=16, sliding_window=8)


def test_packed_sequences_and_attention_sinks():
    lengths = torch.tensor([0, 28, 32], dtype=torch.int32)
    torch.manual_seed(0)
    query, key = torch.randn(1, 4, 32, 8), torch.randn(1, 2, 32, 8)
    options = {"cu_seq_lens_q": lengths, "cu_seq_lens_k": lengths}
    layer, sinks = Layer(), torch.randn(4)
    hyper.choose(layer, CONFIG, seed=0, layer=0)
    out, _ = hyper_attention_forward(layer, query, key, key, None, s_aux=sinks, **options)
    for part in (slice(0, 28), slice(28, 32)):
        expected, lse = hyper_attention(
            query[:, :, part], key[:, :, part], key[:, :, part], causal=True, config=CONFIG,
            return_lse=True,
        )  # fmt: skip
        share = torch.sigmoid(lse - sinks[:, None])[..., None]
        torch.testing.assert_close(out[:, part], (expected * share).transpose(1, 2), **TIGHT)


def test_sliding_layers_and_torch_layers_are_refused_or_skipped():
    from transformers import MistralConfig, MistralForCausalLM

    model = MistralForCausalLM(
        MistralConfig(vocab_size=96, num_key_value_heads=2, sliding_window=8, **SIZES)
    )
    with pytest.raises(UnsupportedError, match="sliding window of 8 tokens"):
        patch_model(model, attention="hyper")
    assert model.config._attn_implementation == "sdpa"
    both = torch.nn.ModuleList([llama(), torch.nn.MultiheadAttention(8, 2)])
    report = patch_model(both, attention="hyper", strict=False).report
    assert len(report.replaced) == 2 and "layers.HyperAttention" in report.skipped["1"]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"attention": "fast"}, ValueError, "accepted: 'exact', 'hyper', or a HyperConfig"),
        ({"attention": CONFIG, "config": CONFIG}, ValueError, "a HyperConfig and no config"),
        ({"config": CONFIG}, ValueError, 'attention="hyper" alone'),
        ({"attention": "hyper", "config": 3}, TypeError, "config is a int; pass a HyperConfig"),
        ({"attention": "hyper", "seed": 0.5}, TypeError, "seed is 0.5; pass an integer"),
    ],
)
def test_wrong_arguments(options, error, message):
    with pytest.raises(error, match=message):
        patch_model(llama(), **options)


@pytest.mark.parametrize("seed", range(8))
def test_spans_say_what_the_mask_says(seed):
    """Masks of every kind that spans express are written out again from them."""
    generator = torch.Generator().manual_seed(seed)

    def number(limit):
        return int(torch.randint(limit, (), generator=generator))

    keys, queries = 6 + number(6), 1 + number(6)
    masks = []
    for _ in range(3):
        start = number(3)
        stop = keys - number(3)
        place = torch.arange(keys)
        real = ((place >= start) & (place < stop)).expand(queries, -1)
        seen = place <= (torch.arange(queries) + keys - queries)[:, None]
        masks.append(real & seen if number(2) else real)
    mask = torch.stack(masks)[:, None]
    for form in (mask, torch.zeros(mask.shape).masked_fill(~mask, torch.finfo().min)):
        spans = visible_spans(form, queries)
        again = torch.zeros_like(mask)
        for sample, row in enumerate(spans):
            for first, last, start, stop, causal in row:
                part = torch.ones(last - first, stop - start, dtype=torch.bool)
                if causal:
                    part = part.tril(stop - start - (last - first))
                again[sample, 0, first:last, start:stop] = part
        assert torch.equal(again, mask)
    # One key less in the middle of what is seen cannot be said.
    seen = mask.nonzero()
    row = seen[(seen[:, 0] == 0)]
    if (row[:, 3].max() - row[:, 3].min()) > 1:
        hole = mask.clone()
        hole[0, 0, :, int(row[:, 3].max()) - 1] = False
        assert visible_spans(hole, queries) is None
