"""The families of encoders that are converted: BERT, and vision transformers of two libraries.

Tokens see each other in both directions, nothing is rotated, and there is a key head for every
query head. A checkpoint may have tensors of a task behind the encoder, which are kept as they are.
"""

from __future__ import annotations

from collections.abc import Sequence

from efficient_attn.convert.encoder_family import EncoderFamily, FusedFamily
from efficient_attn.convert.family import Config, Shapes

TIMM = "timm"


def _norm(name: str, width: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def _linear(name: str, rows: int, columns: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (rows, columns), f"{name}.bias": (rows,)}


def _layer(norms: Sequence[str], mlp: Sequence[str]) -> Shapes:
    """What is beside attention in a layer."""

    def shapes(config: Config) -> dict[str, tuple[int, ...]]:
        width, inner = config["hidden_size"], config["intermediate_size"]
        found = _linear(mlp[0], inner, width) | _linear(mlp[1], width, inner)
        return found | _norm(norms[0], width) | _norm(norms[1], width)

    return shapes


def _bert(prefix: str) -> EncoderFamily:
    def outside(config: Config) -> dict[str, tuple[int, ...]]:
        width, place = config["hidden_size"], f"{prefix}embeddings."
        sizes = {"word": "vocab_size", "position": "max_position_embeddings"}
        sizes["token_type"] = "type_vocab_size"
        found = {
            f"{place}{kind}_embeddings.weight": (config[size], width)
            for kind, size in sizes.items()
        }
        return found | _norm(f"{place}LayerNorm", width)

    def pooler(config: Config) -> dict[str, tuple[int, ...]]:
        return _linear(f"{prefix}pooler.dense", config["hidden_size"], config["hidden_size"])

    norms, mlp = (
        ("attention.output.LayerNorm", "output.LayerNorm"),
        ("intermediate.dense", "output.dense"),
    )
    return EncoderFamily(
        defaults={},
        biases=lambda config: (True,) * 4,
        window=lambda config, layer: None,
        others=_layer(norms, mlp),
        outside=outside,
        before=5,
        layers=prefix + "encoder.layer.{}.",
        query="attention.self.query",
        key="attention.self.key",
        value="attention.self.value",
        output="attention.output.dense",
        ignored=("embeddings.position_ids",),
        module="encoder.layer.{}.attention.self",
        base="BertModel",
        prefix="bert.",
        norms=norms,
        mlp=mlp,
        norm_first=False,
        optional_outside=pooler,
        heads=("cls.", "classifier.", "qa_outputs.") if prefix else (),
    )


def _vit(prefix: str, legacy: bool) -> EncoderFamily:
    def outside(config: Config) -> dict[str, tuple[int, ...]]:
        width, place = config["hidden_size"], f"{prefix}embeddings."
        patch, channels = config["patch_size"], config["num_channels"]
        return {
            f"{place}cls_token": (1, 1, width),
            f"{place}position_embeddings": (1, 1 + config["patches"], width),
            f"{place}patch_embeddings.projection.weight": (width, channels, patch, patch),
            f"{place}patch_embeddings.projection.bias": (width,),
            **_norm(f"{prefix}layernorm", width),
        }

    def optional(config: Config) -> dict[str, tuple[int, ...]]:
        width = config["hidden_size"]
        mask = {f"{prefix}embeddings.mask_token": (1, 1, width)}
        return mask | _linear(f"{prefix}pooler.dense", config["pooler_output_size"], width)

    norms = ("layernorm_before", "layernorm_after")
    mlp = ("intermediate.dense", "output.dense") if legacy else ("mlp.fc1", "mlp.fc2")
    names = {
        **dict(query="attention.attention.query", key="attention.attention.key"),
        **dict(value="attention.attention.value", output="attention.output.dense"),
    }
    if not legacy:
        names = {role: f"attention.{role[0]}_proj" for role in names}
    return EncoderFamily(
        defaults={},
        biases=lambda config: (config["qkv_bias"],) * 3 + (True,),
        window=lambda config, layer: None,
        others=_layer(norms, mlp),
        outside=outside,
        before=4,
        layers=prefix + ("encoder.layer.{}." if legacy else "layers.{}."),
        module="layers.{}.attention",
        base="ViTModel",
        prefix="vit.",
        norms=norms,
        mlp=mlp,
        norm_first=True,
        optional_outside=optional,
        heads=("classifier.", "decoder.") if prefix else (),
        **names,
    )


def _timm_outside(config: Config) -> dict[str, tuple[int, ...]]:
    width, patch = config["hidden_size"], config["patch_size"]
    return {
        "cls_token": (1, 1, width),
        "pos_embed": (1, 1 + config["patches"], width),
        "patch_embed.proj.weight": (width, config["num_channels"], patch, patch),
        "patch_embed.proj.bias": (width,),
    }


def _timm_optional(config: Config) -> dict[str, tuple[int, ...]]:
    return _norm("norm", config["hidden_size"]) | _norm("fc_norm", config["hidden_size"])


_TIMM_NORMS, _TIMM_MLP = ("norm1", "norm2"), ("mlp.fc1", "mlp.fc2")
# Every way in which a checkpoint of a kind may be laid out.
LAYOUTS: dict[str, list[EncoderFamily]] = {
    "bert": [_bert(""), _bert("bert.")],
    "vit": [_vit(prefix, legacy) for prefix in ("", "vit.") for legacy in (True, False)],
    TIMM: [
        FusedFamily(
            defaults={},
            biases=lambda config: (config["qkv_bias"],) * 3 + (True,),
            window=lambda config, layer: None,
            others=_layer(_TIMM_NORMS, _TIMM_MLP),
            outside=_timm_outside,
            before=4,
            layers="blocks.{}.",
            query="attn.q_proj",
            key="attn.k_proj",
            value="attn.v_proj",
            output="attn.o_proj",
            fused="attn.qkv",
            fused_output="attn.proj",
            module="blocks.{}.attn",
            norms=_TIMM_NORMS,
            mlp=_TIMM_MLP,
            norm_first=True,
            optional_outside=_timm_optional,
            heads=("head.",),
        )
    ],
}
