"""Images as the pixel values that a vision transformer takes, from a folder or an array."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from efficient_attn.convert.checkpoint import inside
from efficient_attn.convert.family import Config
from efficient_attn.convert.header import parse_json, read_bounded
from efficient_attn.errors import ConversionError

ENDINGS = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".webp")
MAX_IMAGE_BYTES = 256 << 20
MAX_ARRAY_BYTES = 8 << 30
MAX_PREPROCESSOR_BYTES = 1 << 20


def pixels_of_images(folder: str | Path, config: Config, given: str | Path, *, most: int) -> Tensor:
    """The first images of a folder or an array, as a model takes them.

    Args:
        folder: The model's checkpoint, whose ``preprocessor_config.json``, or ``pretrained_cfg`` of
            timm, says what mean and deviation colours are brought to; by default both are 0.5.
        config: Its config, completed: ``image_size`` and ``num_channels``.
        given: A folder of images, which are taken in the order of their names; or an ``.npy`` file,
            of images ``(n, H, W)`` or ``(n, H, W, C)`` in bytes, or of floating pixel values
            ``(n, C, H, W)``, which are taken as they are.
        most: How many images at most.

    Returns:
        ``(n, C, H, W)``, fp32. Images of another size are resized, without being cropped.

    Raises:
        ConversionError: There are no images, or one cannot be read or does not fit.
    """
    given = Path(given)
    if given.suffix == ".npy" and given.is_file():
        images = _array(given)
        if images.dtype.kind == "f":
            return torch.from_numpy(np.ascontiguousarray(images[:most], dtype=np.float32))
        if images.dtype != np.uint8 or images.ndim not in (3, 4) or not len(images):
            raise ConversionError(
                f"{given} holds {images.dtype} of shape {list(images.shape)}; pass images "
                "(n, H, W) or (n, H, W, C) in bytes, or floating pixel values (n, C, H, W)."
            )
        pictures = list(images[:most])
    elif given.is_dir():
        names = sorted(path.name for path in given.iterdir() if path.suffix.lower() in ENDINGS)
        if not names:
            raise ConversionError(f"{given} holds no image; known are {', '.join(ENDINGS)}.")
        pictures = [read_bounded(given / name, MAX_IMAGE_BYTES) for name in names[:most]]
    else:
        raise ConversionError(f"{given} is neither a folder of images nor an .npy file.")
    pixels = torch.stack([_pixels(each, config, given) for each in pictures])
    mean, std = _colours(Path(folder), config)
    return (pixels - mean) / std


def _array(path: Path) -> np.ndarray:
    try:
        if path.stat().st_size > MAX_ARRAY_BYTES:
            raise ValueError(f"it is larger than {MAX_ARRAY_BYTES} bytes")
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError) as error:
        raise ConversionError(f"{path} is no array of numbers: {error}.") from error


def _pixels(picture: bytes | np.ndarray, config: Config, origin: Path) -> Tensor:
    """One image between 0 and 1, ``(C, H, W)``."""
    try:
        from PIL import Image
    except ImportError as error:
        raise ConversionError("reading images needs pillow: pip install pillow.") from error
    try:
        if isinstance(picture, bytes):
            image = Image.open(io.BytesIO(picture))
        else:
            image = Image.fromarray(picture)
        image = image.convert("L" if config["num_channels"] == 1 else "RGB")
    except Exception as error:  # every format has errors of its own
        raise ConversionError(f"an image of {origin} cannot be read: {error}.") from error
    height, width = config["image_size"]
    if image.size != (width, height):
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    values = torch.from_numpy(np.array(image, dtype=np.float32)) / 255
    return values.reshape(height, width, -1).permute(2, 0, 1).contiguous()


def _colours(folder: Path, config: Config) -> tuple[Tensor, Tensor]:
    """Mean and deviation of each channel, ``(C, 1, 1)``."""
    told = config.get("pretrained_cfg") or {}
    names = ("mean", "std")
    if (folder / "preprocessor_config.json").exists():
        path = inside(folder, "preprocessor_config.json")
        told = parse_json(read_bounded(path, MAX_PREPROCESSOR_BYTES), path.name)
        names = ("image_mean", "image_std")
    channels = config["num_channels"]
    found = [told.get(name) or [0.5] * channels for name in names]
    if not all(
        isinstance(x, list) and len(x) in (1, channels) and all(isinstance(v, float) for v in x)
        for x in found
    ) or not all(value > 0 for value in found[1]):
        raise ConversionError(
            f"mean and deviation of colours are {found[0]} and {found[1]}; they must be a number "
            f"for each of {channels} channels, deviations above 0."
        )
    mean, std = (torch.tensor(x).view(-1, 1, 1) for x in found)
    return mean, std
