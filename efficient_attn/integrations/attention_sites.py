"""Which attention layers of a model can be read and replaced: transformers', timm's and ours."""

from __future__ import annotations

import inspect

import torch
from torch import nn

from efficient_attn.errors import UnsupportedError
from efficient_attn.integrations.site import Site
from efficient_attn.integrations.whole_site import LayerSite, TimmSite
from efficient_attn.layers import DGQA, KDGQA, GroupedQueryAttention

# Attention classes of transformers by the names of their projections. All of them that are rotary
# pair channel f with f + F.
SEPARATE = {
    **dict.fromkeys(
        (
            *("LlamaAttention", "MistralAttention", "MixtralAttention", "Qwen2Attention"),
            *("Qwen2MoeAttention", "Qwen3Attention", "Qwen3MoeAttention", "ViTAttention"),
        ),
        ("q_proj", "k_proj", "v_proj"),
    ),
    **dict.fromkeys(("BertSelfAttention", "RobertaSelfAttention"), ("query", "key", "value")),
}
KNOWN = (*SEPARATE, "timm's Attention", "GroupedQueryAttention")


def attention_sites(model: nn.Module, *, uneven: bool = False) -> dict[str, Site]:
    """Every attention layer of ``model`` that can be read and replaced, by name.

    Args:
        model: Where to look.
        uneven: Whether layers count whose groups are uneven, or that are frozen key-driven ones.

    Raises:
        UnsupportedError: There is none, or one does more than this can express; all are named.
    """
    found, obstacles = {}, []
    for name, module in model.named_modules():
        kind = type(module).__name__
        if kind in SEPARATE:
            site, reasons = _separate(model, name, module, uneven)
        elif kind == "Attention" and type(module).__module__.startswith("timm."):
            site, reasons = _fused(name, module)
        elif type(module) is GroupedQueryAttention:
            site, reasons = _ours(name, module, uneven)
        elif uneven and isinstance(module, KDGQA | DGQA):
            site, reasons = _ours(name, module, uneven)
            reasons += [] if module.is_frozen else ["its map is not frozen; call freeze() first"]
        else:
            continue
        found[name] = site
        obstacles += [f"{name}: {reason}" for reason in reasons]
    if not found:
        obstacles = [f"there is no attention layer of a known kind in {type(model).__name__}"]
    if obstacles:
        raise UnsupportedError("grouping heads", obstacles, f"Known are {', '.join(KNOWN)}.")
    return found


def _separate(
    model: nn.Module, name: str, module: nn.Module, uneven: bool
) -> tuple[Site | None, list[str]]:
    names = SEPARATE[type(module).__name__]
    if hasattr(module, "o_proj"):
        output = module.o_proj
    else:
        output = model.get_submodule(name.rpartition(".")[0]).output.dense
    parts = {**{each: getattr(module, each) for each in names}, "output projection": output}
    if reasons := _not_plain(parts):
        return None, reasons
    if hasattr(module, "kv_group_sizes") and not uneven:
        return None, ["its groups are uneven already"]
    head_dim = getattr(module, "head_dim", None) or module.attention_head_size
    pairs = 0
    if "position_embeddings" in inspect.signature(type(module).forward).parameters:
        tables = [m.inv_freq for m in model.modules() if hasattr(m, "inv_freq")]
        if not tables:
            return None, ["its model has no rotary embedding"]
        pairs = len(tables[0])
    counts = (len(parts[each].weight) // head_dim for each in names[:2])
    return Site(name, module, *names, output, *counts, module.scaling, pairs), []


def _fused(name: str, module: nn.Module) -> tuple[TimmSite | None, list[str]]:
    reasons = _not_plain({"qkv": module.qkv, "proj": module.proj})
    if getattr(module, "gate", None) is not None:
        reasons.append("its output is gated")
    if not isinstance(getattr(module, "norm", None) or nn.Identity(), nn.Identity):
        reasons.append("its heads are normalised after attention")
    if module.attn_drop.p:
        reasons.append("it has dropout of attention weights")
    if reasons:
        return None, reasons
    counts = module.num_heads, module.num_heads
    return TimmSite(name, module, "qkv", "qkv", "qkv", module.proj, *counts, module.scale), []


def _ours(
    name: str, module: GroupedQueryAttention, uneven: bool
) -> tuple[LayerSite | None, list[str]]:
    projections = ("q_proj", "k_proj", "v_proj")
    reasons = _not_plain({each: getattr(module, each) for each in (*projections, "o_proj")})
    head_map = module.head_map
    read = head_map.key_index()
    if module.num_key_heads != module.num_value_heads or not uneven and head_map.q_to_k is not None:
        reasons.append("its heads are not in even groups")
    elif not torch.equal(read, head_map.value_index()) or bool((read.diff() < 0).any()):
        reasons.append("its groups are not of neighbours, or not the same of keys and values")
    rotary = module.rotary
    if getattr(rotary, "interleaved", rotary is not None):
        reasons.append("its rotary embedding does not pair channels f and f + F")
    if reasons:
        return None, reasons
    counts = module.num_heads, module.num_key_heads
    scale = module.head_dim**-0.5 if module.scale is None else module.scale
    pairs = 0 if rotary is None else rotary.dim // 2
    return LayerSite(name, module, *projections, module.o_proj, *counts, scale, pairs), []


def _not_plain(parts: dict[str, nn.Module]) -> list[str]:
    return [
        f"{name} is a {type(part).__name__}, not a plain nn.Linear"
        for name, part in parts.items()
        if type(part) is not nn.Linear
    ]
