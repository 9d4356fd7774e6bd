"""A few steps of further training: what they improve, log and fix."""

import copy
import json
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
sys.path.insert(0, str(EXAMPLES))

transformers = pytest.importorskip("transformers")

from train_language_model import MODEL_FOLDER  # noqa: E402
from typer.testing import CliRunner  # noqa: E402
from uptrain import app, distilled, group_sizes, optimizers_of, uptrain  # noqa: E402

from efficient_attn.convert.gqa.learned import fold_averages  # noqa: E402
from efficient_attn.integrations.grouping import group_heads  # noqa: E402
from efficient_attn.layers import KDGQA  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def source():
    return transformers.AutoModelForCausalLM.from_pretrained(MODEL_FOLDER, dtype=torch.float32)


def batches():
    torch.manual_seed(0)
    batch = torch.randint(3, 4000, (2, 24))
    while True:
        yield batch


def test_training_lowers_the_loss_and_its_parts_are_those_of_the_source(source):
    model = copy.deepcopy(source)
    group_heads(model, 1, pooling="learned")
    averages = [p for n, p in model.named_parameters() if n.endswith("weight.0.weight")]
    before = [p.clone() for p in averages]
    log = uptrain(model, batches(), 6, optimizers=optimizers_of(model), log_every=3)
    assert [entry["step"] for entry in log] == [3, 6] and log[-1]["tokens"] == 6 * 48
    assert log[-1]["train_loss"] < log[0]["train_loss"] - 0.1
    assert all(not torch.equal(a, b) for a, b in zip(averages, before, strict=True))
    assert fold_averages(model) == 12
    assert model.model.layers[0].self_attn.k_proj.weight.shape == (32, 256)


def test_a_teacher_pulls_towards_itself(source):
    model, row = copy.deepcopy(source), next(batches())[0]
    assert distilled(source, source, 1.0)(row).item() == pytest.approx(0, abs=1e-5)
    group_heads(model, 1, pooling="first")
    loss = distilled(model, source, 1.0)
    before = loss(row).item()
    uptrain(model, batches(), 4, optimizers=optimizers_of(model), loss_of=loss)
    assert loss(row).item() < before


class KeyDriven(nn.Module):
    """One layer whose groups follow its keys, with the outputs of a language model."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(4000, 16)
        self.attention = KDGQA(16, 4, num_kv_heads=2)
        self.head = nn.Linear(16, 4000)

    def forward(self, ids, labels, use_cache):
        logits = self.head(self.attention(self.embedding(ids)))
        loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return type("Out", (), {"loss": loss})


def test_groups_that_follow_their_keys_are_logged_and_frozen():
    model = KeyDriven()
    optimizers = [torch.optim.SGD(model.parameters())]
    log = uptrain(model, batches(), 4, optimizers=optimizers, log_every=1)
    assert model.attention.is_frozen
    assert sum(log[-1]["groups"]["attention"]) == 4
    assert log[-1]["groups"] == group_sizes(model)
    assert all(entry["empty_groups"] >= 0 and entry["map_changes"] >= 0 for entry in log)


def test_a_run_is_one_line_and_is_not_repeated(tmp_path, monkeypatch):
    import uptrain as module

    monkeypatch.setattr(module, "TEST_TOKENS", 1025)
    monkeypatch.setattr(module, "CALIBRATION_ROWS", 1)
    monkeypatch.setattr(module, "one_run", lambda *args: {"perplexity_before": 2.0})
    out = tmp_path / "runs.jsonl"
    for _ in range(2):
        options = ["run", "--out", str(out), "--pooling", "source", "--pooling", "mean"]
        result = CliRunner().invoke(app, options)
        assert result.exit_code == 0, result.output
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(r["pooling"], r["heads"]) for r in lines] == [("source", 2), ("mean", 1)]
