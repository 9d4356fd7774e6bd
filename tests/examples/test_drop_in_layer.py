"""The example runs and shows what it claims."""

import runpy
from pathlib import Path

from torch import nn

from efficient_attn.layers import MultiheadAttention

EXAMPLE = runpy.run_path(str(Path(__file__).parents[2] / "examples" / "drop_in_layer.py"))


def test_every_attention_is_swapped():
    model = nn.Transformer(16, 2, 1, 2, 16)
    assert EXAMPLE["swap_attention"](model) == 5
    layers = [x for x in model.modules() if isinstance(x, nn.MultiheadAttention)]
    assert [type(x) for x in layers] == [MultiheadAttention] * 5
    assert EXAMPLE["swap_attention"](model) == 0


def test_it_shows_what_it_claims(capsys):
    assert EXAMPLE["show_drop_in"]() < 1e-5
    multi_head, grouped, uneven, diff = EXAMPLE["show_head_maps"]().values()
    assert (grouped, uneven, diff) == (multi_head // 4, multi_head // 2, multi_head * 3 // 8)
    EXAMPLE["main"]()
    assert "3 attention layers swapped" in capsys.readouterr().out
