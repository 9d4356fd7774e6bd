"""What is written for engines: sizes, rotary tables, and the program that checks an engine.

No engine runs here. Its interfaces are stood for by modules of the same shape, and what it is to
compute by stock transformers.
"""

import importlib.util
import json
import sys
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, DeepseekV3ForCausalLM, LlamaConfig

from efficient_attn import ConversionError
from efficient_attn.convert import convert
from efficient_attn.convert.golden import TOLERANCE
from efficient_attn.convert.mla import CompressOptions
from efficient_attn.convert.self_check import GOLDEN

from .conftest import LLAMA3, SMALL, YARN, make

pytestmark = pytest.mark.usefixtures("one_thread")

# 512 numbers per token and layer; engines are built for 256 + 64.
LARGE = {
    **SMALL,
    "hidden_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 64,
}
SCALINGS = {"default": None, "llama3": LLAMA3, "yarn": YARN}
OPTIONS = {
    "mode": "compress",
    "target": "engine",
    "kv_lora_rank": 256,
    "choices": CompressOptions(refine=0),
}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """``source(scaling)`` is the folder of a model that has that rotary scaling."""
    made = {}

    def get(scaling):
        if scaling not in made:
            folder = tmp_path_factory.mktemp("models") / scaling
            made[scaling] = folder
            config = LlamaConfig(**LARGE, rope_parameters=SCALINGS[scaling])
            make(config).save_pretrained(folder)
        return made[scaling]

    return get


@pytest.fixture
def calib():
    return torch.randint(0, 96, (6, 48))


@pytest.fixture
def converted(source, tmp_path, calib):
    def made(scaling="default", **options):
        convert(source(scaling), tmp_path / "out", calib=calib, **OPTIONS, **options)
        return tmp_path / "out"

    return made


def program(folder):
    """The one in a folder, as it runs there."""
    spec = importlib.util.spec_from_file_location("self_check_of_it", folder / "self_check.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("options", [{}, {"q_lora_rank": 48}])
def test_the_program_accepts_the_stock_class_and_no_other_weights(converted, options, capsys):
    folder = converted(**options)
    assert program(folder).main(["transformers"]) == 0
    assert "computes this model" in capsys.readouterr().out
    # What engines did to checkpoints of others: the norm of the latent taken for an ordinary one.
    golden = json.loads((folder / GOLDEN).read_text())
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.model.layers[1].self_attn.kv_a_layernorm.weight.data.fill_(1.0)
    model.save_pretrained(folder)
    (folder / GOLDEN).write_text(json.dumps(golden))
    assert program(folder).main(["transformers"]) == 1
    assert "WRONG" in capsys.readouterr().out


def test_what_is_recorded_is_what_stock_transformers_computes(converted, calib):
    folder = converted()
    golden = json.loads((folder / GOLDEN).read_text())
    prompts = torch.tensor(golden["prompts"])
    assert torch.equal(prompts, calib[:4])
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert type(model) is DeepseekV3ForCausalLM
    with torch.no_grad():
        told = model(prompts).logits[:, :-1].log_softmax(-1)
    told = told.gather(-1, prompts[:, 1:, None]).squeeze(-1)
    expected = torch.tensor(golden["log_probabilities"])
    torch.testing.assert_close(told, expected, rtol=0, atol=1e-4)


def test_engines_are_asked_as_they_want_to_be(converted, monkeypatch, capsys):
    """Modules of their shape, which draw what was recorded, or something else."""
    folder = converted()
    golden = json.loads((folder / GOLDEN).read_text())
    prompts, told, wrong = golden["prompts"], golden["log_probabilities"], 0.0

    def vllm_outputs(asked, sampling):
        assert asked == [{"prompt_token_ids": ids} for ids in prompts]
        assert sampling["prompt_logprobs"] == 0 and sampling["max_tokens"] == 1
        return [
            SimpleNamespace(
                prompt_logprobs=[None]
                + [
                    {token: SimpleNamespace(logprob=x + wrong), -1: SimpleNamespace(logprob=0.0)}
                    for token, x in zip(ids[1:], xs, strict=True)
                ]
            )
            for ids, xs in zip(prompts, told, strict=True)
        ]

    def sglang_outputs(*, input_ids, sampling_params, return_logprob, logprob_start_len):
        assert input_ids == prompts and return_logprob and logprob_start_len == 0
        return [
            {
                "meta_info": {
                    "input_token_logprobs": [(None, 0, None)] + [(x + wrong, 0, None) for x in xs]
                }
            }
            for xs in told
        ]

    vllm = SimpleNamespace(
        SamplingParams=lambda **options: options,
        LLM=lambda model, **_: SimpleNamespace(generate=vllm_outputs),
    )
    sglang = SimpleNamespace(
        Engine=lambda model_path, **_: SimpleNamespace(
            generate=sglang_outputs, shutdown=lambda: None
        )
    )
    for name, module in (("vllm", vllm), ("sglang", sglang)):
        monkeypatch.setitem(sys.modules, name, module)
        wrong = 0.0
        assert program(folder).main([name]) == 0
        wrong = 2 * TOLERANCE
        assert program(folder).main([name]) == 1
        wrong = float("nan")
        assert program(folder).main([name]) == 1
    assert program(folder).main([]) == 2 and program(folder).main(["tgi"]) == 2
    assert "python self_check.py ENGINE" in capsys.readouterr().out


@pytest.mark.parametrize("scaling", ["llama3", "yarn"])
def test_a_scaled_table_becomes_the_nearest_of_engines_if_that_is_allowed(
    converted, source, tmp_path, scaling
):
    with pytest.raises(ConversionError, match=f"that of {scaling}.*allow_rope_approx"):
        converted(scaling)
    assert not (tmp_path / "out").exists()
    folder = converted(scaling, allow_rope_approx=True)
    config = json.loads((folder / "config.json").read_text())
    rope = config["rope_parameters"]
    assert rope["rope_type"] == "yarn" and rope["mscale_all_dim"] == rope["mscale"] == 0
    if scaling == "llama3":
        assert (rope["beta_fast"], rope["beta_slow"], rope["factor"]) == (4.0, 1.0, 8.0)
    # Turned as the stock class turns, which computes its own table.
    assert program(folder).main(["transformers"]) == 0
    stock = AutoModelForCausalLM.from_pretrained(folder)
    assert stock.model.rotary_emb.attention_scaling == 1.0
    report = json.loads((folder / "conversion.json").read_text())
    for note in report["layers"]:
        assert 0 < note["latent_mean_square_seen"] <= note["latent_mean_square"]
    assert any("long contexts lose more" in warning for warning in report["warnings"])


def test_a_yarn_is_llama3_but_for_a_few_pairs():
    """At the sizes of Llama 3.1: 3 of its 32 pairs lie in the blend, which is shaped otherwise."""
    from efficient_attn.convert.rope import llama3
    from efficient_attn.convert.stock_rope import engine_rope

    rope = {**LLAMA3, "rope_theta": 500000.0, "original_max_position_embeddings": 8192}
    source = SimpleNamespace(rope=rope, config={"max_position_embeddings": 131072})
    table = engine_rope(source, 64)[1]
    wanted = llama3(rope, 64, 131072)[0]
    apart = ((table - wanted).abs() > 1e-6 * wanted).sum()
    assert 1 <= apart <= 4


def test_a_model_that_needs_less_is_filled_up_with_zeros_and_told_to_grow(tmp_path, calib):
    """Four key heads of 16 would need 128 numbers, and engines are built for no fewer than 320."""
    config = LlamaConfig(**{**LARGE, "head_dim": 16, "num_key_value_heads": 4})
    make(config).save_pretrained(tmp_path / "source")
    options = {**OPTIONS, "kv_lora_rank": 56, "rope_dim": 64}
    with pytest.raises(ConversionError, match="cache 320 numbers.* 128 are cached now"):
        convert(tmp_path / "source", tmp_path / "out", calib=calib, **options)
    assert not (tmp_path / "out").exists()
    report = convert(
        tmp_path / "source", tmp_path / "out", calib=calib, **options, allow_larger_cache=True
    )
    assert report.bytes_per_token == {"before": 2 * 4 * 128, "after": 2 * 4 * 320}
    stock, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values()) and stock.config.kv_lora_rank == 256
    assert program(tmp_path / "out").main(["transformers"]) == 0
