"""Recovery training: it moves a damaged conversion towards its parent, in one process or in two."""

import dataclasses
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

transformers = pytest.importorskip("transformers")
pytest.importorskip("typer")

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
sys.path.insert(0, str(EXAMPLES))

from recover_mla import Recipe, main, recover, schedule, sequences  # noqa: E402
from typer import BadParameter  # noqa: E402

from efficient_attn.convert import convert  # noqa: E402
from efficient_attn.convert.checkpoint import Checkpoint  # noqa: E402
from efficient_attn.convert.mla import rorope  # noqa: E402
from efficient_attn.convert.source import Source  # noqa: E402
from efficient_attn.integrations.converted import (  # noqa: E402
    load_converted,
    replace_attention,
)

RECIPE = Recipe(steps=6, batch=4, length=24, rate=2e-3, attention_steps=0.5)


@pytest.fixture(autouse=True)
def small(one_thread):
    pass


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A parent, a conversion of it that lost much, and a text."""
    folder = tmp_path_factory.mktemp("models")
    tokenizer = transformers.AutoTokenizer.from_pretrained(EXAMPLES / "pycode_llama")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.2,
        tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
    )
    parent = transformers.LlamaForCausalLM(config)
    parent.save_pretrained(folder / "parent")
    tokenizer.save_pretrained(folder / "parent")
    source = Source.open(Checkpoint.open(folder / "parent"))
    weights = []
    for i in range(2):
        layer = rorope(source.attention(i))
        # Half of the rotary key and half of the latent carry nothing.
        down = layer.latent_down.clone()
        down[: layer.kv_lora_rank // 2] = 0
        down[layer.kv_lora_rank + layer.qk_rope_head_dim // 2 :] = 0
        weights.append(dataclasses.replace(layer, latent_down=down))
    replace_attention(parent, weights).save_pretrained(folder / "converted")
    (folder / "text.txt").write_text((EXAMPLES / "corpus.py").read_text())
    return folder


def options(folder, name):
    return {
        "parent": folder / "parent",
        "converted": folder / "converted",
        "recovered": folder / name,
        "text": [folder / "text.txt"],
        "steps": RECIPE.steps,
        "batch": RECIPE.batch,
        "length": RECIPE.length,
        "rate": RECIPE.rate,
    }


def loaded(folders):
    parent = transformers.AutoModelForCausalLM.from_pretrained(folders / "parent")
    return load_converted(folders / "converted"), parent


@pytest.mark.parametrize("attention_only", [False, True])
def test_the_student_comes_nearer_to_its_parent(folders, attention_only):
    student, parent = loaded(folders)
    recipe = dataclasses.replace(RECIPE, steps=40, rate=1e-2, attention_only=attention_only)
    start = torch.randint(parent.config.vocab_size, (64, 1))
    everything = torch.ones_like(start)
    options = {"attention_mask": everything, "do_sample": True, "max_new_tokens": 63}
    stream = parent.generate(start, **options, pad_token_id=0).flatten()
    before = {name: x.clone() for name, x in student.state_dict().items()}
    told = []
    recover(student, parent, stream, recipe, lambda step, losses: told.append(losses))
    assert [step for step, losses in enumerate(told) if "attention" in losses] == [*range(20)]
    assert told[19]["attention"] < 0.9 * told[0]["attention"]
    assert told[-1]["parent"] < 0.7 * told[0]["parent"]
    changed = {name for name, x in student.state_dict().items() if not torch.equal(x, before[name])}
    assert any("self_attn" in name for name in changed)
    assert any("mlp" in name for name in changed) != attention_only
    assert not any("frequencies" in name for name in changed)


def test_two_processes_do_what_one_does(folders, monkeypatch):
    """And what they store is a native checkpoint."""
    main(**options(folders, "one"))
    words = [str(folders / name) for name in ("parent", "converted", "two")]
    words += ["--text", str(folders / "text.txt")]
    for name in ("steps", "batch", "length", "rate"):
        words += [f"--{name}", str(getattr(RECIPE, name))]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    for name, x in {**place, "WORLD_SIZE": "2", "RANK": "0"}.items():
        monkeypatch.setenv(name, x)
    command = [sys.executable, str(EXAMPLES / "recover_mla.py"), *words]
    environment = {**os.environ, "RANK": "1"}
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as other:
        main(**options(folders, "two"))
        _, told = other.communicate()
    assert other.returncode == 0, told[-3000:]

    configs = [(folders / name / "config.json").read_text() for name in ("one", "two")]
    assert configs[0] == configs[1] and "LlamaForCausalLM" in configs[0]

    one, two, start = (
        load_converted(folders / name).state_dict() for name in ("one", "two", "converted")
    )
    for name, x in one.items():
        # Adam turns rounding into steps where a gradient is next to nothing, so all are compared.
        moved = (x - start[name]).norm()
        assert (two[name] - x).norm() <= 1e-3 * moved, name
        assert (moved > 0) != ("frequencies" in name)
    assert transformers.AutoTokenizer.from_pretrained(folders / "two").eos_token_id is not None


def test_every_step_sees_other_text_and_rates_rise_and_fall():
    stream = torch.arange(1000)
    starts = {int(row[0]) for step in range(10) for row in sequences(stream, step, RECIPE)}
    assert len(starts) == 40 and max(starts) - min(starts) > 900
    rates = [schedule(step, 100) for step in range(100)]
    assert rates[0] == pytest.approx(1 / 3) and max(rates) == 1 and rates[-1] < 0.11


def test_an_augmented_query_is_trained_from_no_effect_to_one(folders):
    """Two steps of fewer key heads: what is stored is loaded by the Auto classes."""
    options_of_diffqkv = {"key_heads": 1, "augmented_query_dim": 16}
    convert(folders / "parent", folders / "diffqkv", "diffqkv", **options_of_diffqkv)
    given = options(folders, "diffqkv-recovered") | {"converted": folders / "diffqkv", "steps": 2}
    main(**given)
    before, after = (
        transformers.AutoModelForCausalLM.from_pretrained(folders / name).eval()
        for name in ("diffqkv", "diffqkv-recovered")
    )
    assert type(after).__name__ == "DiffQKVForCausalLM" and after.config.num_key_heads == 1
    weights, trained = before.state_dict(), after.state_dict()
    for layer in range(2):
        name = f"model.layers.{layer}.self_attn."
        assert not weights[name + "q_down_proj.weight"].any()
        for part in ("q_down", "q_gate", "q", "k", "v", "o"):
            assert not torch.equal(
                weights[name + f"{part}_proj.weight"], trained[name + f"{part}_proj.weight"]
            )


def test_an_export_is_not_trained(folders):
    convert(folders / "parent", folders / "export", "mla", target="hf-deepseek")
    with pytest.raises(BadParameter, match="too small for an optimiser"):
        main(**options(folders, "no") | {"converted": folders / "export"})
    assert not (folders / "no").exists()


def test_refusals_tell_the_reason(folders):
    with pytest.raises(BadParameter, match="exists"):
        main(**options(folders, "parent"))
    student, parent = loaded(folders)
    with pytest.raises(BadParameter, match="has 24 tokens; sequences of 24 need more"):
        recover(student, parent, torch.arange(24), RECIPE)
