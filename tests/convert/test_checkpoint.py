"""Reading a checkpoint folder: what is there, and every way in which a folder can lie."""

import json
import os
import pickle
import struct

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from efficient_attn import ConversionError
from efficient_attn.convert.checkpoint import INDEX, MAX_INDEX_BYTES, SINGLE, Checkpoint
from efficient_attn.convert.header import MAX_HEADER_BYTES, read_header

TENSORS = {
    "a": torch.arange(6.0).view(2, 3),
    "b": torch.arange(4).bfloat16(),
    "empty": torch.zeros(0, 5),
}


@pytest.fixture
def folder(tmp_path):
    """One file."""
    path = tmp_path / "model"
    path.mkdir()
    (path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    save_file(TENSORS, path / SINGLE, metadata={"format": "pt"})
    return path


@pytest.fixture
def sharded(folder):
    """Two files and an index."""
    (folder / SINGLE).unlink()
    save_file({"a": TENSORS["a"]}, folder / "one.safetensors")
    save_file({"b": TENSORS["b"], "empty": TENSORS["empty"]}, folder / "two.safetensors")
    write_index(
        folder, {"a": "one.safetensors", "b": "two.safetensors", "empty": "two.safetensors"}
    )
    return folder


def write_index(folder, weight_map):
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def write_header(path, header, data=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)


def entry(start, stop, shape=None, dtype="F32"):
    shape = [(stop - start) // 4] if shape is None else shape
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


def refused(folder, *words):
    with pytest.raises(ConversionError) as caught:
        Checkpoint.open(folder)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize("kind", ["folder", "sharded"])
def test_it_reads_what_was_written(kind, request):
    folder = request.getfixturevalue(kind)
    checkpoint = Checkpoint.open(folder)
    assert checkpoint.config == {"model_type": "llama"}
    assert {name: entry.shape for name, entry in checkpoint.tensors.items()} == {
        name: tuple(tensor.shape) for name, tensor in TENSORS.items()
    }
    for name, tensor in checkpoint.read(TENSORS).items():
        assert tensor.dtype == TENSORS[name].dtype and torch.equal(tensor, TENSORS[name])
    assert checkpoint.nbytes == sum(t.nbytes for t in TENSORS.values())


def test_the_digest_sees_config_and_weights(folder):
    before = Checkpoint.open(folder).digest
    assert Checkpoint.open(folder).digest == before
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen2"}))
    after_config = Checkpoint.open(folder).digest
    save_file({**TENSORS, "a": TENSORS["a"] + 1}, folder / SINGLE)
    assert len({before, after_config, Checkpoint.open(folder).digest}) == 3


@pytest.mark.parametrize(
    "file",
    ["../x.safetensors", "/etc/x.safetensors", "sub/x.safetensors", "a\\x.safetensors"]
    + ["C:x.safetensors", "x\0.safetensors", "..", "", "weights.bin", ".safetensors", 3, None],
)
def test_an_index_names_plain_files_only(sharded, file):
    write_index(sharded, {"a": file})
    refused(sharded, "plain name", "'a'")


def test_an_index_and_its_files_agree(sharded):
    both = {"a": "one.safetensors", "b": "two.safetensors", "empty": "two.safetensors"}
    write_index(sharded, {**both, "c": "one.safetensors"})
    refused(sharded, "'c'", "do not hold")
    write_index(sharded, {"a": "one.safetensors", "b": "two.safetensors"})
    refused(sharded, "'empty'", "None")
    write_index(sharded, both)
    save_file({"a": TENSORS["a"], "b": TENSORS["b"]}, sharded / "one.safetensors")
    refused(sharded, "'b'")
    write_index(sharded, {**both, "c": "three.safetensors"})
    save_file({"a": TENSORS["a"]}, sharded / "one.safetensors")
    refused(sharded, "three.safetensors")


def test_an_index_of_no_sense(sharded):
    for text in (
        "[]",
        "{}",
        '{"weight_map": []}',
        '{"weight_map": {}}',
        "{",
        "\xff",
        "[" * 100_000,
    ):
        (sharded / INDEX).write_text(text)
        refused(sharded, INDEX)
    with (sharded / INDEX).open("wb") as file:
        file.truncate(MAX_INDEX_BYTES + 1)
    refused(sharded, "at most")


def test_links_out_of_the_folder_are_refused(folder, tmp_path):
    outside = tmp_path / "secret.safetensors"
    (folder / SINGLE).rename(outside)
    (folder / SINGLE).symlink_to(outside)
    refused(folder, "secret.safetensors", "outside")
    (folder / "config.json").rename(tmp_path / "c.json")
    (folder / "config.json").symlink_to(tmp_path / "c.json")
    refused(folder, "c.json", "outside")


def test_links_of_a_hub_cache_are_followed_to_its_own_blobs(folder, tmp_path):
    own, other = tmp_path / "models--me--own", tmp_path / "models--me--other"
    for repository in (own, other):
        (repository / "blobs").mkdir(parents=True)
    snapshot = own / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    for name in ("config.json", SINGLE):
        (folder / name).rename(own / "blobs" / name[:5])
        (snapshot / name).symlink_to(f"../../blobs/{name[:5]}")
    assert torch.equal(Checkpoint.open(snapshot).read(["a"])["a"], TENSORS["a"])

    (own / "blobs" / "model").rename(other / "blobs" / "model")
    (snapshot / SINGLE).unlink()
    (snapshot / SINGLE).symlink_to("../../../models--me--other/blobs/model")
    refused(snapshot, "outside")


def test_a_pipe_is_no_file(folder):
    (folder / SINGLE).unlink()
    os.mkfifo(folder / SINGLE)
    refused(folder, "regular")


def test_pickles_are_never_opened(folder):
    class Bomb:
        def __reduce__(self):
            return pytest.fail, ("it was unpickled",)

    (folder / SINGLE).unlink()
    for name in ("pytorch_model.bin", "model.pt", "model.pth"):
        (folder / name).write_bytes(pickle.dumps(Bomb()))
    refused(folder, "pytorch_model.bin", "pickle", "safetensors")


def test_code_of_the_checkpoint_is_refused(folder):
    config = {"model_type": "llama", "auto_map": {"AutoConfig": "evil.Config"}}
    (folder / "config.json").write_text(json.dumps(config))
    refused(folder, "auto_map", "never run")


def test_folders_without_a_checkpoint(folder, tmp_path):
    refused(tmp_path / "nothing", "not a folder")
    refused(folder / SINGLE, "not a folder")
    (folder / SINGLE).unlink()
    refused(folder, SINGLE, INDEX)
    (folder / "config.json").write_text('{"hidden_size": 1, "hidden_size": 2}')
    refused(folder, "twice")
    (folder / "config.json").unlink()
    refused(folder, "config.json")


@pytest.mark.parametrize(
    ("header", "word"),
    [
        ({"x": entry(0, 16), "y": entry(8, 24)}, "overlaps"),
        ({"x": entry(0, 8), "y": entry(16, 24)}, "gap"),
        ({"x": entry(4, 24)}, "gap"),
        ({"x": entry(0, 16)}, "end at"),
        ({"x": entry(0, 32)}, "end at"),
        ({"x": entry(0, 24, shape=[7])}, "28 bytes"),
        ({"x": entry(0, 24, shape=[1 << 62, 1 << 62])}, "bytes, but"),
        ({"x": entry(0, 24, shape=[1] * 9)}, "at most 8"),
        ({"x": entry(0, 24, shape=[-2, -3])}, "whole numbers"),
        ({"x": entry(0, 24, shape=[6.0])}, "whole numbers"),
        ({"x": entry(0, 24, shape=[True, 6])}, "whole numbers"),
        ({"x": entry(0, 24, shape=6)}, "whole numbers"),
        ({"x": {**entry(0, 24), "data_offsets": [0, 12, 24]}}, "offsets two"),
        ({"x": {**entry(0, 24), "data_offsets": [24, 0]}}, "hold -24"),
        ({"x": entry(0, 24, dtype="F8_E4M3", shape=[24])}, "quantisation"),
        ({"x": entry(0, 24, dtype=["F32"])}, "dtype"),
        ({"x": {**entry(0, 24), "more": 1}}, "no more"),
        ({"x": [0, 24]}, "must have dtype"),
        ([1, 2], "not an object"),
        (b'{"x": {}, "x": {}}', "twice"),
        (b"{", "not JSON"),
        (b"\xff\xfe", "not JSON"),
        (b'{"x": ' + b"9" * 5000 + b"}", "not JSON"),
    ],
)
def test_a_header_that_lies(tmp_path, header, word):
    path = tmp_path / SINGLE
    write_header(path, header, data=bytes(24))
    with pytest.raises(ConversionError, match=word):
        read_header(path)


@pytest.mark.parametrize("length", [MAX_HEADER_BYTES + 1, 2**64 - 1, 100])
def test_the_length_of_a_header_is_bounded(tmp_path, length):
    path = tmp_path / SINGLE
    write_header(path, {}, length=length)
    if length == MAX_HEADER_BYTES + 1:  # as much as it says is there, in a file full of holes
        os.truncate(path, length + 8)
    with pytest.raises(ConversionError, match="header has"):
        read_header(path)
    path.write_bytes(b"1234")
    with pytest.raises(ConversionError, match="no safetensors file"):
        read_header(path)


@given(st.data())
def test_no_damage_to_a_header_goes_further_than_one_clear_error(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("damaged") / SINGLE
    save_file(TENSORS, path)
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(bytes(content[: data.draw(st.integers(0, len(content)))]))
    try:
        entries = read_header(path)
    except ConversionError:
        return
    assert sum(entry.nbytes for entry in entries.values()) < path.stat().st_size
