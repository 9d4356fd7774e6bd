"""`efficient-attn info`: what it shows, also where torch cannot be imported."""

import json
import subprocess
import sys
from pathlib import Path

from typer.testing import CliRunner

from efficient_attn import diagnostics
from efficient_attn.cli import app

runner = CliRunner()


def test_json_names_an_answer_for_every_op_on_this_machine():
    result = runner.invoke(app, ["info", "--json"])
    assert result.exit_code == 0
    report = json.loads(result.stdout)
    assert set(report["kernels"]) == set(diagnostics.OPS)
    for devices in report["kernels"].values():
        assert any(entry["answers"] for entry in devices["cpu"])
        for entries in devices.values():
            assert all(entry["answers"] != bool(entry["reason"]) for entry in entries)


def test_the_table_says_why_a_kernel_does_not_answer():
    result = runner.invoke(app, ["info"])
    assert result.exit_code == 0
    assert "merge_states" in result.stdout and "answers" in result.stdout


def test_a_report_without_torch():
    script = (
        "import sys, runpy; sys.modules['torch'] = None; "
        f"runpy.run_path({diagnostics.__file__!r}, run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "cannot be imported" in json.loads(done.stdout)["machine"]["torch"]


def test_python_dash_m_is_the_command():
    done = subprocess.run(
        [sys.executable, "-m", "efficient_attn.cli", "--help"],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    assert done.returncode == 0 and "demo" in done.stdout
