"""Output that appears whole or not at all, whatever ends the process that writes it."""

import json
import os
import resource
import shutil
import signal
import sys
import traceback

import pytest
import torch
from safetensors.torch import load_file

from efficient_attn import ConversionError
from efficient_attn.convert import writer
from efficient_attn.convert.checkpoint import Checkpoint
from efficient_attn.convert.writer import StagedCheckpoint

PARTS = {
    "embedding": {"embed": torch.arange(12.0).view(3, 4)},
    "layer 0": {"b": torch.arange(5).bfloat16(), "a": torch.ones(2, 2).T},
    "layer 1": {"c": torch.zeros(0, 3)},
}
FILES = {"config.json": b'{"model_type": "llama"}', "note.txt": b"hello"}
IDENTITY = {"source": "abc", "options": {"mode": "exact", "ranks": [1, 2]}}


def convert(destination, identity=IDENTITY, **options):
    staged = StagedCheckpoint(destination, list(PARTS), identity, **options)
    for part, tensors in PARTS.items():
        if not staged.is_done(part):
            staged.write(part, tensors, {"error": len(part)})
    staged.finish(FILES)
    return staged


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def whole(tmp_path):
    convert(tmp_path / "whole")
    return contents(tmp_path / "whole")


def test_what_is_written_is_a_checkpoint(tmp_path):
    staged = convert(tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    checkpoint = Checkpoint.open(tmp_path / "out")
    expected = {name: tensor for part in PARTS.values() for name, tensor in part.items()}
    found = checkpoint.read(checkpoint.tensors)
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=0)
    assert (tmp_path / "out" / "note.txt").read_bytes() == b"hello"
    assert staged.digests == checkpoint.digests
    assert list(staged.notes.items())[1] == ("layer 0", {"error": 7})
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == checkpoint.nbytes


def test_no_file_is_larger_than_asked_unless_one_tensor_is(tmp_path, whole):
    """And however they are cut, damaged and resumed, the tensors are the same."""
    staged = convert(tmp_path / "out", shard_bytes=20)
    sizes = {path.name: path for path in (tmp_path / "out").glob("*.safetensors")}
    # The embedding alone is larger; of layer 0, one tensor goes to each file.
    assert sorted(sizes) == [
        "model-00001-of-00003.safetensors",
        "model-00002-of-00003-2.safetensors",
        "model-00002-of-00003.safetensors",
        "model-00003-of-00003.safetensors",
    ]
    assert sorted(load_file(sizes["model-00002-of-00003-2.safetensors"])) == ["b"]
    checkpoint = Checkpoint.open(tmp_path / "out")
    assert staged.digests == checkpoint.digests
    found = checkpoint.read(checkpoint.tensors)
    for part in PARTS.values():
        for name, tensor in part.items():
            torch.testing.assert_close(found[name], tensor, rtol=0, atol=0)
    # Enough room for all of a part makes what no bound makes.
    convert(tmp_path / "loose", shard_bytes=10**6)
    assert contents(tmp_path / "loose") == whole


EVENTS = {"open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.truncate"}


def killed_at(moment, work):
    """Run ``work`` in a child that is killed before its file operation number ``moment``."""
    child = os.fork()
    if child == 0:
        seen = 0

        def hook(event, _):
            nonlocal seen
            seen += event in EVENTS
            if event in EVENTS and seen > moment:
                os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(hook)
        try:
            work()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in (0, -signal.SIGKILL)
    return status < 0


@pytest.mark.parametrize("replaces", [False, True])
def test_killed_before_any_file_operation_it_resumes_to_the_same_bytes(tmp_path, whole, replaces):
    """Whichever it is; and the destination is at no time something in between."""
    old = {"config.json": b"{}", "old.safetensors": b""}
    moment = 0
    while True:
        folder = tmp_path / str(moment)
        out = folder / "out"
        folder.mkdir()
        if replaces:
            out.mkdir()
            for name, content in old.items():
                (out / name).write_bytes(content)
        killed = killed_at(moment, lambda out=out: convert(out, force=True))
        if out.exists():
            assert contents(out) in (whole, old), moment
        if not killed:
            break
        if not out.exists() or contents(out) != whole:
            convert(out, resume=True, force=True)
        assert contents(out) == whole, moment
        shutil.rmtree(folder)
        moment += 1
    assert moment > 20


def test_a_shard_that_was_damaged_is_written_again(tmp_path, whole):
    out = tmp_path / "out"
    assert killed_at(12, lambda: convert(out))
    shards = sorted((tmp_path / ".out.converting" / "model").glob("*.safetensors"))
    assert shards
    shards[0].write_bytes(b"?" * shards[0].stat().st_size)
    convert(out, resume=True)
    assert contents(out) == whole


def test_of_a_part_in_several_files_every_one_is_checked(tmp_path):
    convert(tmp_path / "whole", shard_bytes=20)
    staged = StagedCheckpoint(tmp_path / "out", list(PARTS), IDENTITY, shard_bytes=20)
    staged.write("layer 0", PARTS["layer 0"], {"error": 7})
    second = tmp_path / ".out.converting" / "model" / "model-00002-of-00003-2.safetensors"
    second.write_bytes(b"?")
    convert(tmp_path / "out", shard_bytes=20, resume=True)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_a_conversion_with_other_options_is_not_resumed(tmp_path):
    out = tmp_path / "out"
    assert killed_at(12, lambda: convert(out))
    with pytest.raises(ConversionError, match="pass resume"):
        convert(out)
    other = {**IDENTITY, "options": {"mode": "rorope"}}
    with pytest.raises(ConversionError, match="options.mode was 'exact' and is 'rorope'"):
        convert(out, other, resume=True)
    convert(out, other, force=True)
    assert not (tmp_path / ".out.converting").exists()


def test_a_destination_in_use_is_left_alone(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("years of work")
    for options, word in (({}, "not empty"), ({"force": True}, "no checkpoint")):
        with pytest.raises(ConversionError, match=word):
            convert(out, **options)
    with pytest.raises(ConversionError, match="not a folder"):
        convert(out / "thesis.txt", force=True)
    link = tmp_path / "link"
    link.symlink_to(out)
    with pytest.raises(ConversionError, match="not a folder"):
        convert(link, force=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "out"]
    assert (out / "thesis.txt").read_text() == "years of work"
    (out / "thesis.txt").unlink()
    convert(out)  # an empty folder may be filled


def test_too_little_room_is_seen_before_anything_is_written(tmp_path):
    with pytest.raises(ConversionError, match="GB free"):
        convert(tmp_path / "out", needed_bytes=10**18)
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_fails_leaves_the_destination_alone_and_resumes(tmp_path, whole):
    """A limit on the size of files stands for the disk; shard 2 is the first above it."""
    out = tmp_path / "out"
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (150, limits[1]))
    try:
        with pytest.raises(ConversionError, match="Nothing was changed there"):
            convert(out)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    assert not out.exists()
    convert(out, resume=True)
    assert contents(out) == whole


def test_a_full_disk_is_named(tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(writer, "save_file", full)
    with pytest.raises(ConversionError, match="the disk is full"):
        convert(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_parts_may_share_memory_with_what_they_came_from(tmp_path):
    """Mapped tensors of one file share a storage; each is written as it is."""
    convert(tmp_path / "one")
    checkpoint = Checkpoint.open(tmp_path / "one")
    staged = StagedCheckpoint(tmp_path / "two", ["all"], {})
    staged.write("all", checkpoint.read(["a", "b"]))
    staged.finish({})
    (shard,) = (tmp_path / "two").glob("*.safetensors")
    assert torch.equal(load_file(shard)["a"], PARTS["layer 0"]["a"])
