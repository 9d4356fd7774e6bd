"""Three steps from torch's attention layer to one that no other package offers.

1. The same layer: torch.nn.MultiheadAttention swapped inside a model, with the same outputs.
2. A cheaper layer: fewer key and value heads, so that a decoder has less to cache and to read.
3. Any layer: query heads shared out unevenly, because heads do not all need a key of their own.

Run it with ``python examples/drop_in_layer.py``; it takes a few seconds on a CPU.
"""

import torch
from torch import nn

from efficient_attn import HeadMap
from efficient_attn.layers import GroupedQueryAttention, MultiheadAttention, RotaryEmbedding

WIDTH, HEADS, BATCH, TOKENS = 256, 8, 2, 128


def swap_attention(model: nn.Module) -> int:
    """Replace every torch.nn.MultiheadAttention in place; return how many there were."""
    found = [
        (parent, name, layer)
        for parent in model.modules()
        for name, layer in parent.named_children()
        if type(layer) is nn.MultiheadAttention
    ]
    for parent, name, theirs in found:
        ours = MultiheadAttention(
            theirs.embed_dim, theirs.num_heads, theirs.dropout, batch_first=theirs.batch_first
        )
        ours.load_state_dict(theirs.state_dict())
        setattr(parent, name, ours.train(theirs.training))
    return len(found)


def show_drop_in() -> float:
    """Swap the attention of an encoder and compare outputs on padded, causal input."""
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, batch_first=True, dropout=0.0)
    model = nn.TransformerEncoder(layer, num_layers=3, enable_nested_tensor=False)
    tokens = torch.randn(BATCH, TOKENS, WIDTH)
    masks = {
        "mask": torch.ones(TOKENS, TOKENS, dtype=torch.bool).triu(1),  # True blocks, as in torch
        "src_key_padding_mask": torch.arange(TOKENS) >= torch.tensor([[TOKENS], [100]]),
        "is_causal": True,
    }
    before = model(tokens, **masks)
    count = swap_attention(model)
    difference = (model(tokens, **masks) - before).abs().max().item()
    print(f"1. {count} attention layers swapped; outputs differ by at most {difference:.1e}")
    return difference


def show_head_maps() -> dict[str, int]:
    """Build layers from counts and from a map; print the size of their caches per token."""
    common = {"causal": True, "bias": False, "rotary": RotaryEmbedding(WIDTH // HEADS)}
    uneven = HeadMap.from_group_sizes([4, 2, 1, 1])
    layers = {
        "2. multi-head, 8 key and value heads": {},
        "2. grouped, 2 key and value heads": {"num_kv_heads": 2},
        "3. uneven groups of 4, 2, 1 and 1 query heads": {"head_map": uneven},
        "3. 2 key heads and 4 value heads": {"head_map": HeadMap.diff(HEADS, k=2, v=4)},
    }
    tokens = torch.randn(BATCH, TOKENS, WIDTH)
    cached = {}
    for name, options in layers.items():
        layer = GroupedQueryAttention(WIDTH, HEADS, **common, **options)
        layer(tokens).square().mean().backward()
        cached[name] = layer.k_proj.out_features + layer.v_proj.out_features
        print(f"{name}: {cached[name]} numbers cached per token")
    return cached


def main() -> None:
    torch.manual_seed(0)
    show_drop_in()
    show_head_maps()


if __name__ == "__main__":
    main()
