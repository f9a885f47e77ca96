"""The command as a user runs it, in processes of its own."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

EXAMPLE = Path(__file__).parents[1] / "examples" / "train.yaml"
TINY = [
    "model.config.hidden_size=32",
    "model.config.intermediate_size=16",
    "model.config.num_hidden_layers=2",
    "tokenizer.vocab_size=300",
    "data.sequence_length=16",
    "data.held_out=0.3",
    "batch=4",
]


def raymoe(*arguments: str, cwd: Path, **options) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "raymoe", *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=240, **options)


@pytest.fixture
def text(tmp_path) -> str:
    (tmp_path / "text.txt").write_text("\n\n".join(f"the {i}th line says {i % 7} times seven" for i in range(900)))
    return "data.source=text.txt"


def test_help_names_the_commands(tmp_path):
    shown = raymoe("--help", cwd=tmp_path)
    assert shown.returncode == 0
    assert all(command in shown.stdout for command in ("demo", "train", "serve"))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["experts.polcy=ep"], "experts.polcy: unknown key; did you mean 'policy'?"),
        (["workers=0"], "workers: give a number of workers from 1 on, or bounds: {min: 1, max: 8} (got 0)"),
        (["model.config.num_attention_heads=7"], "model.config: transformers cannot run it"),
        (["experts.owners=[[0, 1]]"], "experts.owners: got [1, 2], the model has 2 MoE layers of 24 experts"),
    ],
)
def test_bad_input_is_one_clear_line(overrides, message, tmp_path, text):
    shown = raymoe("train", str(EXAMPLE), *TINY, text, *overrides, cwd=tmp_path)
    assert shown.returncode == 2
    assert message in shown.stderr
    assert shown.stderr.startswith("error: ")
    assert "Traceback" not in shown.stderr
    assert len(shown.stderr.strip().splitlines()) == 1


def test_serving_a_directory_without_a_model(tmp_path):
    shown = raymoe("serve", str(tmp_path), cwd=tmp_path)
    assert shown.returncode == 2
    assert "error: model: no config.json in" in shown.stderr


def test_ctrl_c_stops_at_once_and_leaves_no_process(tmp_path, text):
    command = [sys.executable, "-m", "raymoe", "train", str(EXAMPLE), *TINY, text, "workers=1", "steps=100000"]
    process = subprocess.Popen(
        command,
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONUNBUFFERED": "1"},
        # a shell starts what runs in the background with SIGINT ignored, and children inherit that
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("step"):
            break
    started = psutil.Process(process.pid).children(recursive=True)
    assert started
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=30) == 130
    deadline = time.monotonic() + 15
    while any(child.is_running() and child.status() != psutil.STATUS_ZOMBIE for child in started):
        assert time.monotonic() < deadline, [child.name() for child in started if child.is_running()]
        time.sleep(0.2)
