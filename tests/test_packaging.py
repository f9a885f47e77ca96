"""The wheel, installed where nothing else is, works from outside the repository."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.test_cli import EXAMPLE, TINY

REPOSITORY = Path(__file__).parents[1]


def run(*command: str | Path, cwd: Path) -> str:
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "VIRTUAL_ENV"))}
    done = subprocess.run(
        [str(word) for word in command], cwd=cwd, capture_output=True, text=True, timeout=280, env=clean
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """bin/ of an empty environment with nothing but our wheel and what it asks for."""
    folder = tmp_path_factory.mktemp("packaging")
    build = ["-m", "build", "--wheel", "--no-isolation", "--outdir", folder / "dist", REPOSITORY]
    run(sys.executable, *build, cwd=folder)
    (wheel,) = (folder / "dist").glob("raymoe-*.whl")
    run(sys.executable, "-m", "venv", folder / "env", cwd=folder)
    install = [folder / "env/bin/pip", "install", "--quiet", "-c", REPOSITORY / "requirements.lock"]
    run(*install, "torch", cwd=folder)
    run(*install, wheel, cwd=folder)
    return folder / "env/bin"


@pytest.mark.timeout(600)
def test_it_imports_runs_and_trains(installed, tmp_path):
    where = run(
        installed / "python", "-c", "import raymoe.kernels, raymoe.actors; print(raymoe.kernels.__file__)", cwd=tmp_path
    )
    assert str(installed.parent) in where
    assert "demo" in run(installed / "raymoe", "--help", cwd=tmp_path)
    (tmp_path / "text.txt").write_text("\n\n".join(f"the {i}th line says {i % 7} times seven" for i in range(900)))
    out = run(installed / "raymoe", "train", EXAMPLE, *TINY, "data.source=text.txt", "steps=3", cwd=tmp_path)
    assert "step     3/3  loss " in out
    assert (tmp_path / "runs/train/checkpoint/config.json").is_file()
