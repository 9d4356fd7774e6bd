"""What the config of an encoder means, completed and checked, whichever library wrote it."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from efficient_attn.convert.encoder_families import LAYOUTS, TIMM
from efficient_attn.convert.encoder_family import EncoderFamily
from efficient_attn.convert.family import Config
from efficient_attn.errors import ConversionError

if TYPE_CHECKING:
    from efficient_attn.convert.checkpoint import Checkpoint

MOST = 1 << 24
COUNTS = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
DEFAULTS: dict[str, Config] = {
    "bert": {
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-12,
        "max_position_embeddings": 512,
        "type_vocab_size": 2,
    },
    "vit": {
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-12,
        "image_size": 224,
        "patch_size": 16,
        "num_channels": 3,
        "qkv_bias": True,
    },
    TIMM: {"hidden_act": "gelu", "layer_norm_eps": 1e-6},
}
OWN_COUNTS = {
    "bert": ("vocab_size", "max_position_embeddings", "type_vocab_size"),
    "vit": ("patch_size", "num_channels"),
    TIMM: (),
}

# Widths of timm's vision transformers and their heads, which nothing else in a checkpoint tells.
TIMM_SIZES = {"tiny": (192, 3), "small": (384, 6), "base": (768, 12), "large": (1024, 16)}
TIMM_NAMES = re.compile(rf"(?:vit|deit)_({'|'.join(TIMM_SIZES)})_patch\d+_\d+")
# What timm may be told of a model without a change to what a layer computes.
TIMM_ARGUMENTS = {
    *("img_size", "patch_size", "in_chans", "num_classes", "global_pool", "embed_dim", "depth"),
    *("num_heads", "mlp_ratio", "qkv_bias", "drop_rate", "drop_path_rate"),
}


def is_encoder(config: Config) -> bool:
    """Whether a config is of a known kind of encoder, or of timm."""
    kind = kind_of(config)
    return isinstance(kind, str) and kind in LAYOUTS


def kind_of(config: Config) -> object:
    """The ``model_type``; of a config of timm, which has none, ``"timm"``."""
    return config.get("model_type", TIMM if "architecture" in config else None)


def encoder_of(checkpoint: Checkpoint) -> tuple[EncoderFamily, dict[str, object]]:
    """The layout of an encoder's checkpoint, and its config with what it leaves out filled in.

    Raises:
        ConversionError: A number is missing or does not fit another, or the model does what no
            layout of its kind knows.
    """
    kind = kind_of(checkpoint.config)
    config = {**DEFAULTS[kind], **checkpoint.config, "model_type": kind}
    if kind == TIMM:
        config |= _told_by_timm(checkpoint)
    for name in (*COUNTS, *OWN_COUNTS[kind]):
        _check_count(name, config.get(name))
    width, heads = config["hidden_size"], config["num_attention_heads"]
    if width % heads:
        raise ConversionError(f"config.json: {width} channels do not divide among {heads} heads.")
    config |= {"head_dim": width // heads, "num_key_value_heads": heads}
    eps = config["layer_norm_eps"]
    if not isinstance(eps, float) or not 0 < eps < 1:
        raise ConversionError(f"config.json: layer_norm_eps is {eps!r}; it must be in (0, 1).")
    if kind == "bert":
        _check_bert(config)
    if kind == "vit":
        config |= _sizes_of_vit(config)
    if kind != TIMM and not _is_list_of_names(config.get("architectures")):
        raise ConversionError(
            "config.json has no architectures; it must name the class of the model, such as "
            f"{LAYOUTS[kind][0].base!r}."
        )
    fitting = [
        family
        for family in LAYOUTS[kind]
        if f"{family.layers.format(0)}{family.norms[0]}.weight" in checkpoint.tensors
    ]
    # Where none fits, the first one says what is missing.
    return (fitting or LAYOUTS[kind])[0], config


def _check_count(name: str, value: object) -> None:
    if type(value) is not int or not 1 <= value <= MOST:
        raise ConversionError(
            f"config.json: {name} is {value!r}; it must be a whole number from 1 to {MOST}."
        )


def _check_bert(config: Config) -> None:
    kind = config.get("position_embedding_type", "absolute")
    if config.get("is_decoder") or config.get("add_cross_attention") or kind != "absolute":
        raise ConversionError(
            "config.json: a BERT that is a decoder, attends to another model, or has relative "
            "positions is not converted."
        )


def _sizes_of_vit(config: Config) -> dict[str, object]:
    size, patch, use_bias = config["image_size"], config["patch_size"], config["qkv_bias"]
    height, width = size if isinstance(size, list) and len(size) == 2 else (size, size)
    for name, value in (("image_size", height), ("image_size", width)):
        _check_count(name, value)
    if type(use_bias) is not bool:
        raise ConversionError(f"config.json: qkv_bias is {use_bias!r}; it must be true or false.")
    pooled = config.get("pooler_output_size") or config["hidden_size"]
    _check_count("pooler_output_size", pooled)
    return {
        "image_size": (height, width),
        "patches": (height // patch) * (width // patch),
        "pooler_output_size": pooled,
    }


def timm_arguments(config: Config) -> tuple[str, dict[str, object]]:
    """Name of a model of timm and what else makes it, both known to be harmless.

    Raises:
        ConversionError: It is another kind of model.
    """
    name, told = config.get("architecture"), config.get("model_args") or {}
    is_known = isinstance(name, str) and TIMM_NAMES.fullmatch(name.partition(".")[0])
    strange = sorted(set(told) - TIMM_ARGUMENTS) if isinstance(told, dict) else [told]
    if not is_known or strange:
        what = f"model_args has {strange[0]!r}" if is_known else f"architecture is {name!r}"
        raise ConversionError(
            f"config.json: {what}; of timm, plain vision transformers are converted, such as "
            f"vit_base_patch16_224 ({', '.join(TIMM_SIZES)}), with no other arguments than "
            f"{', '.join(sorted(TIMM_ARGUMENTS))}."
        )
    return name, told


def _told_by_timm(checkpoint: Checkpoint) -> dict[str, object]:
    """Sizes of a model of timm, from its name and its tensors."""
    tensors = checkpoint.tensors
    name, told = timm_arguments(checkpoint.config)
    shapes = {
        tensor: tensors[tensor].shape if tensor in tensors else ()
        for tensor in ("pos_embed", "patch_embed.proj.weight", "blocks.0.mlp.fc1.weight")
    }
    if [len(shape) for shape in shapes.values()] != [3, 4, 2]:
        lacking = next(n for n, s in zip(shapes, (3, 4, 2), strict=True) if len(shapes[n]) != s)
        raise ConversionError(
            f"{lacking} is missing or has shape {list(shapes[lacking])}, which is not that of a "
            "vision transformer of timm."
        )
    (_, places, width), (_, channels, patch, _), (inner, _) = shapes.values()
    _check_count("patch_size", patch)
    side = round((places - 1) ** 0.5)
    usual, heads = TIMM_SIZES[TIMM_NAMES.match(name)[1]]
    if "num_heads" not in told and width != usual:
        raise ConversionError(
            f"config.json: {name} is {usual} wide and this model {width}; add the number of its "
            "heads to model_args, as num_heads."
        )
    size = told.get("img_size", side * patch)
    height, across = size if isinstance(size, list) and len(size) == 2 else (size, size)
    for side in (height, across):
        _check_count("img_size", side)
    return {
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": sum(n.endswith(".norm1.weight") for n in tensors),
        "num_attention_heads": told.get("num_heads", heads),
        "num_channels": channels,
        "patch_size": patch,
        "image_size": (height, across),
        "patches": (height // patch) * (across // patch),
        "qkv_bias": "blocks.0.attn.qkv.bias" in tensors,
    }


def _is_list_of_names(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(x, str) for x in value)
