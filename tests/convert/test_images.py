"""Images from folders and arrays, as vision transformers take them."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import ViTImageProcessor

from efficient_attn import ConversionError
from efficient_attn.convert.images import pixels_of_images

CONFIG = {"image_size": (16, 8), "num_channels": 3}
MEAN, STD = [0.5, 0.4, 0.3], [0.5, 0.25, 0.2]


@pytest.fixture
def model(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    told = {"image_mean": MEAN, "image_std": STD}
    (folder / "preprocessor_config.json").write_text(json.dumps(told))
    return folder


@pytest.fixture
def pictures():
    return np.random.default_rng(0).integers(0, 256, (4, 16, 8, 3), dtype=np.uint8)


@pytest.mark.parametrize("size", [(16, 8), (23, 31)])
def test_pixels_are_those_of_the_processor_of_transformers(size, model, tmp_path, pictures):
    rng = np.random.default_rng(1)
    pictures = rng.integers(0, 256, (3, *size, 3), dtype=np.uint8)
    folder = tmp_path / "images"
    folder.mkdir()
    (folder / "notes.txt").write_text("no image")
    for name, picture in zip("cab", pictures, strict=True):
        Image.fromarray(picture).save(folder / f"{name}.png")
    found = pixels_of_images(model, CONFIG, folder, most=9)
    process = ViTImageProcessor(
        size={"height": 16, "width": 8}, resample=3, image_mean=MEAN, image_std=STD
    )
    in_order = [Image.fromarray(pictures[i]) for i in (1, 2, 0)]
    expected = process(in_order, return_tensors="pt")["pixel_values"]
    # Theirs may resize by torch, which rounds otherwise.
    torch.testing.assert_close(found, expected, rtol=0, atol=0.05 if size != (16, 8) else 1e-5)


def test_arrays_of_bytes_and_of_pixel_values(model, tmp_path, pictures):
    np.save(tmp_path / "bytes.npy", pictures)
    found = pixels_of_images(model, CONFIG, tmp_path / "bytes.npy", most=3)
    expected = torch.from_numpy(pictures[:3]).permute(0, 3, 1, 2) / 255
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (MEAN, STD))
    torch.testing.assert_close(found, (expected - mean) / std)
    np.save(tmp_path / "values.npy", found.double().numpy())
    again = pixels_of_images(model, CONFIG, tmp_path / "values.npy", most=2)
    assert torch.equal(again, found[:2])
    np.save(tmp_path / "grey.npy", pictures[..., 0])
    grey = pixels_of_images(model, CONFIG, tmp_path / "grey.npy", most=9) * std + mean
    torch.testing.assert_close(grey[:, 0], grey[:, 1])


def test_what_timm_says_of_colours_and_what_nobody_says(tmp_path, pictures):
    np.save(tmp_path / "bytes.npy", pictures)
    plain = pixels_of_images(tmp_path, CONFIG, tmp_path / "bytes.npy", most=2)
    assert plain.min() == -1 and plain.max() == 1
    told = CONFIG | {"pretrained_cfg": {"mean": MEAN, "std": STD}}
    found = pixels_of_images(tmp_path, told, tmp_path / "bytes.npy", most=2)
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (MEAN, STD))
    torch.testing.assert_close(found * std + mean, plain / 2 + 0.5)
    one = CONFIG | {"num_channels": 1}
    assert pixels_of_images(tmp_path, one, tmp_path / "bytes.npy", most=2).shape == (2, 1, 16, 8)


def test_what_is_no_image_is_refused(model, tmp_path, pictures):
    def refused(given, message, config=CONFIG):
        with pytest.raises(ConversionError, match=message):
            pixels_of_images(model, config, given, most=4)

    refused(tmp_path / "nowhere", "neither a folder")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "holds no image")
    (tmp_path / "empty" / "a.png").write_bytes(b"no image")
    refused(tmp_path / "empty", "cannot be read")
    np.save(tmp_path / "objects.npy", np.array([{}]), allow_pickle=True)
    refused(tmp_path / "objects.npy", "no array of numbers")
    (tmp_path / "text.npy").write_text("no array")
    refused(tmp_path / "text.npy", "no array of numbers")
    np.save(tmp_path / "long.npy", pictures.astype(np.int64))
    refused(tmp_path / "long.npy", "int64")
    np.save(tmp_path / "bytes.npy", pictures)
    (model / "preprocessor_config.json").write_text(json.dumps({"image_std": [0.0, 1.0, 1.0]}))
    refused(tmp_path / "bytes.npy", "deviations above 0")
    (model / "preprocessor_config.json").write_text(json.dumps({"image_mean": "grey"}))
    refused(tmp_path / "bytes.npy", "deviation of colours")
