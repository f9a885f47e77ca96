"""The wheel has everything that the repository has, asks for everything it imports, and works where nothing else is."""

import ast
import importlib.metadata
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.test_cli import EXAMPLE, TINY

REPOSITORY = Path(__file__).parents[1]
# rivals that a benchmark measures where somebody has installed them
RIVALS = {"liger_kernel", "moe_ops", "deepspeed"}


def run(*command: str | Path, cwd: Path) -> str:
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "VIRTUAL_ENV"))}
    done = subprocess.run(
        [str(word) for word in command], cwd=cwd, capture_output=True, text=True, timeout=280, env=clean
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("packaging")
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder, REPOSITORY, cwd=folder)
    (built,) = folder.glob("raymoe-*.whl")
    return built


@pytest.fixture(scope="module")
def unpacked(wheel) -> Path:
    folder = wheel.parent / "site"
    run(sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", folder, wheel, cwd=wheel.parent)
    return folder


def test_it_has_every_file(unpacked):
    rooms = {
        "raymoe": "raymoe",
        "kernels": "raymoe/kernels",
        "actors": "raymoe/actors",
        "benchmarks": "raymoe/benchmarks",
    }
    tracked = subprocess.run(["git", "ls-files", *rooms], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    wanted = [Path(name) for name in tracked.stdout.splitlines() if name.endswith((".py", ".json", ".yaml"))]
    wanted = [Path(rooms[path.parts[0]], *path.parts[1:]) for path in wanted if "results" not in path.parts]
    assert len(wanted) > 200
    assert [str(path) for path in wanted if not (unpacked / path).is_file()] == []


def test_it_asks_for_what_it_imports(unpacked):
    (metadata,) = unpacked.glob("raymoe-*.dist-info")
    required = importlib.metadata.Distribution.at(metadata).requires or []
    asked = {re.split(r"[\[ <>=!;~]", line)[0].lower().replace("_", "-") for line in required}
    homes = importlib.metadata.packages_distributions()
    lacking = set()
    for path in (unpacked / "raymoe").rglob("*.py"):
        for name in top_level_imports(path):
            if name in sys.stdlib_module_names or name in ("raymoe", "__future__") or name in RIVALS:
                continue
            if not {home.lower().replace("_", "-") for home in homes.get(name, [name])} & asked:
                lacking.add((name, str(path.relative_to(unpacked))))
    assert lacking == set()


def top_level_imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module is not None:
            found.add(node.module.split(".")[0])
    return found


def test_it_runs_from_elsewhere(unpacked, tmp_path):
    code = "import raymoe.kernels, raymoe.actors, raymoe.cli; print(raymoe.kernels.__file__); raymoe.cli.main()"
    shown = run("env", f"PYTHONPATH={unpacked}", sys.executable, "-c", code, "--help", cwd=tmp_path)
    assert str(unpacked) in shown
    assert "demo" in shown


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_it_trains_in_an_empty_environment(wheel, tmp_path):
    run(sys.executable, "-m", "venv", tmp_path / "env", cwd=tmp_path)
    binaries = tmp_path / "env" / "bin"
    install = [binaries / "pip", "install", "--quiet", "-c", REPOSITORY / "requirements.lock"]
    run(*install, "torch", cwd=tmp_path)
    run(*install, wheel, cwd=tmp_path)
    (tmp_path / "text.txt").write_text("\n\n".join(f"the {i}th line says {i % 7} times seven" for i in range(900)))
    out = run(binaries / "raymoe", "train", EXAMPLE, *TINY, "data.source=text.txt", "steps=3", cwd=tmp_path)
    assert "step     3/3  loss " in out
    assert (tmp_path / "runs/train/checkpoint/config.json").is_file()
