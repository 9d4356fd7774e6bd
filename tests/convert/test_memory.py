"""Converting takes the memory of one layer, however many there are."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from efficient_attn.convert.families import FAMILIES, complete
from efficient_attn.convert.mla_targets import LIBRARIES

ROOT = Path(__file__).resolve().parents[2]
CONFIG = {
    "model_type": "llama",
    "vocab_size": 64,
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "dtype": "bfloat16",
    "tie_word_embeddings": True,
}
FEW, MANY = 3, 24

# Peaks never fall, so the run that should take most comes last.
PROGRAM = """
import json, re, sys
import torch
from efficient_attn.convert import convert
from efficient_attn.convert.checkpoint import Checkpoint
from efficient_attn.convert.mla import CompressOptions

torch.set_num_threads(1)
tiny, few, many, out = sys.argv[1:5]
options = json.loads(sys.argv[5])
if options["mode"] == "compress":
    options["choices"] = CompressOptions(refine=1)
    options["calib"] = torch.arange(512).view(8, 64) % 64

def peak():  # of this program alone; getrusage counts what it was forked from
    with open("/proc/self/status") as status:
        return 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", status.read())[1])

peaks, kept, read = [], [], Checkpoint.read

def hoard(self, names):
    found = read(self, names)
    kept.extend(x.clone() for x in found.values())
    return found

# The first run also loads libraries and their buffers.
for folder in (tiny, few, many, many):
    if len(peaks) == 3:
        Checkpoint.read = hoard
    report = convert(folder, f"{out}-{len(peaks)}", **options)
    peaks.append(peak())
print(json.dumps([peaks, report.memory_bytes]))
"""


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folders of a tiny model, of one with few layers and of one with many; bytes of a layer."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("models")
    tiny = {"hidden_size": 64, "intermediate_size": 64, "head_dim": 32}
    save(folder / "tiny", {**CONFIG, **tiny, "num_hidden_layers": FEW})
    for count in (FEW, MANY):
        size = save(folder / str(count), {**CONFIG, "num_hidden_layers": count})
    return folder / "tiny", folder / str(FEW), folder / str(MANY), size


def save(folder, config):
    """A model whose layers all have the same weights, in one file; bytes of a layer."""
    complete_config, family = complete(config), FAMILIES["llama"]
    shapes = {**family.attention_shapes(complete_config), **family.others(complete_config)}
    layer = {name: torch.randn(shape) * shape[-1] ** -0.5 for name, shape in shapes.items()}
    outside = family.outside(complete_config)
    tensors = {name: torch.randn(shape) for name, shape in outside.items()}
    for i in range(config["num_hidden_layers"]):
        tensors |= {family.layers.format(i) + name: x.clone() for name, x in layer.items()}
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    save_file({k: x.bfloat16() for k, x in tensors.items()}, folder / "model.safetensors")
    return 2 * sum(x.numel() for x in layer.values())


@pytest.mark.parametrize(
    "options",
    [
        {"mode": "rorope", "target": "hf-deepseek"},
        {"mode": "compress", "kv_lora_rank": 96, "rope_dim": 32},
    ],
    ids=["rorope", "compress"],
)
def test_memory_does_not_grow_with_the_number_of_layers(models, tmp_path, options):
    """And would be seen to, if the layers were kept: so it is when reading is made to hoard."""
    *folders, layer = models
    words = [sys.executable, "-c", PROGRAM, *folders, tmp_path / "out", json.dumps(options)]
    # What is freed is given back at once, so that peaks are of what is in use.
    giving = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
    ran = subprocess.run(
        [str(word) for word in words],
        cwd=ROOT,
        env={**os.environ, **giving},
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr
    (of_tiny, of_few, of_many, hoarded), estimate = json.loads(ran.stdout.splitlines()[-1])
    assert of_many - of_few < layer
    assert hoarded - of_many > (MANY - FEW) / 2 * layer
    # One layer, what is summed up over tokens, and a fifth more.
    assert of_many - of_tiny < 1.2 * (estimate - LIBRARIES)
    assert of_many < 1.2 * estimate
