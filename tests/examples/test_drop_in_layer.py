"""The example runs and shows what it claims."""

import runpy
from pathlib import Path

EXAMPLE = runpy.run_path(str(Path(__file__).parents[2] / "examples" / "drop_in_layer.py"))


def test_it_shows_what_it_claims(capsys):
    assert EXAMPLE["show_drop_in"]() < 1e-5
    multi_head, grouped, uneven, diff = EXAMPLE["show_head_maps"]().values()
    assert (grouped, uneven, diff) == (multi_head // 4, multi_head // 2, multi_head * 3 // 8)
    EXAMPLE["main"]()
    assert "outputs differ by at most" in capsys.readouterr().out
