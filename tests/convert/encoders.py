"""Tiny random encoders of transformers and timm, saved as people get them."""

import json

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertModel,
    ViTConfig,
    ViTForImageClassification,
    ViTModel,
)

HEADS, LAYERS = 6, 2
_sizes = {
    "hidden_size": 48,
    "intermediate_size": 40,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
}
_bert = BertConfig(**_sizes, vocab_size=96, max_position_embeddings=64)
_vit = {"patch_size": 4, "image_size": 16}
# Class, config, and whether names on disk are those of the class rather than the older ones.
ENCODERS = {
    "bert": (BertModel, _bert, False),
    "bert-mlm": (BertForMaskedLM, _bert, False),
    "vit": (ViTModel, ViTConfig(**_sizes, patch_size=4, image_size=[16, 8]), False),
    "vit-classes": (ViTForImageClassification, ViTConfig(**_sizes, **_vit), False),
    "vit-no-bias": (ViTModel, ViTConfig(**_sizes, **_vit, qkv_bias=False), False),
    "vit-new-names": (ViTForImageClassification, ViTConfig(**_sizes, **_vit), True),
}


def randomise(model):
    """Weights, biases and norms too, large enough to matter."""
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn_like(parameter)
            is_norm = "norm" in name.lower() and name.endswith("weight")
            parameter.copy_(1 + 0.3 * noise if is_norm else noise * parameter.shape[-1] ** -0.5)
    return model.eval()


def save(name, folder):
    """The model of a name, saved in a folder."""
    if name == "timm":
        return save_timm(folder)
    model_class, config, new_names = ENCODERS[name]
    model = randomise(model_class(config))
    model.save_pretrained(folder, max_shard_size="60KB")
    if new_names:
        for path in folder.glob("model*"):
            path.unlink()
        state = {name: x.clone() for name, x in model.state_dict().items()}
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    return model


def inputs_of(name, count=5):
    """Something that the model takes."""
    torch.manual_seed(1)
    if name.startswith("bert"):
        return torch.randint(3, 96, (count, 11))
    return torch.randn(count, 3, 16, 8 if name == "vit" else 16)


def tensors(folder):
    """All tensors of a checkpoint."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= load_file(path)
    return found


class Attention(nn.Module):
    """As timm's class of this name computes."""

    def __init__(self, dim, heads):
        super().__init__()
        self.num_heads, self.head_dim = heads, dim // heads
        self.scale = self.head_dim**-0.5
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.q_norm, self.k_norm = nn.Identity(), nn.Identity()
        self.attn_drop, self.proj_drop = nn.Dropout(0.0), nn.Dropout(0.0)

    def forward(self, x):
        heads = (3, self.num_heads, self.head_dim)
        q, k, v = self.qkv(x).unflatten(-1, heads).permute(2, 0, 3, 1, 4)
        x = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.proj(x.transpose(1, 2).flatten(2))


Attention.__module__ = "timm.layers.attention"


class Block(nn.Module):
    def __init__(self, dim, heads, inner):
        super().__init__()
        self.norm1, self.norm2 = (nn.LayerNorm(dim, eps=1e-6) for _ in range(2))
        self.attn, self.mlp = Attention(dim, heads), nn.Module()
        self.mlp.fc1, self.mlp.fc2 = nn.Linear(dim, inner), nn.Linear(inner, dim)

    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        return x + self.mlp.fc2(nn.functional.gelu(self.mlp.fc1(self.norm2(x))))


class VisionTransformer(nn.Module):
    """A vision transformer with the names and the arithmetic of timm's."""

    def __init__(self, num_classes, img_size, patch_size, embed_dim, depth, num_heads, **others):
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        places = 1 + (img_size[0] // patch_size) * (img_size[1] // patch_size)
        self.pos_embed = nn.Parameter(torch.zeros(1, places, embed_dim))
        self.patch_embed = nn.Module()
        self.patch_embed.proj = nn.Conv2d(3, embed_dim, patch_size, patch_size)
        self.blocks = nn.Sequential(*(Block(embed_dim, num_heads, 40) for _ in range(depth)))
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6)
        self.head = nn.Linear(embed_dim, num_classes)

    def forward_features(self, images):
        x = self.patch_embed.proj(images).flatten(2).mT
        x = torch.cat((self.cls_token.expand(len(x), -1, -1), x), 1) + self.pos_embed
        return self.norm(self.blocks(x))

    def forward_head(self, x):
        return self.head(x[:, 0])

    def forward(self, images):
        return self.forward_head(self.forward_features(images))


TIMM_ARGS = {
    **{"num_classes": 5, "img_size": [16, 16], "patch_size": 4, "embed_dim": 48},
    **{"depth": LAYERS, "num_heads": HEADS},
}


def save_timm(folder):
    """As ``timm.models.save_for_hf`` writes it."""
    model = randomise(VisionTransformer(**TIMM_ARGS))
    folder.mkdir()
    config = {
        "architecture": "vit_tiny_patch16_224",
        "num_classes": 5,
        "global_pool": "token",
        "model_args": TIMM_ARGS,
        "pretrained_cfg": {"mean": [0.5, 0.4, 0.3], "std": [0.5, 0.25, 0.2]},
    }
    (folder / "config.json").write_text(json.dumps(config))
    save_file(model.state_dict(), folder / "model.safetensors")
    return model
