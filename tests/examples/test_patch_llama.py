"""The example runs and shows what it claims."""

import runpy
from pathlib import Path

EXAMPLE = runpy.run_path(str(Path(__file__).parents[2] / "examples" / "patch_llama.py"))


def test_it_shows_what_it_claims(one_thread, capsys):
    EXAMPLE["main"]()
    shown = capsys.readouterr().out
    assert shown.count("yes") == 3
    assert "NO" not in shown
    assert "was sdpa" in shown
    assert "patched alone: model.layers.0.self_attn" in shown
