"""What people point a cluster at: jobs and Serve applications, through Ray's own commands."""

import json
import os
import re
import secrets
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from contextlib import suppress
from itertools import takewhile
from pathlib import Path

import psutil
import pytest
import yaml
from ray.serve.schema import ServeDeploySchema

from raymoe.config import ServeConfig
from tests.test_cli import EXAMPLE, TINY
from tests.tiny_models import tiny_model
from tests.tiny_tokenizer import tiny_tokenizer

DEPLOY = Path(__file__).parents[2] / "deploy"
BIN = Path(sys.executable).parent


def test_the_serve_config_is_what_serve_and_raymoe_take(tmp_path):
    tree = yaml.safe_load((DEPLOY / "serve" / "raymoe.yaml").read_text())
    schema = ServeDeploySchema.model_validate(tree)
    assert schema.http_options.host == "127.0.0.1"
    (application,) = schema.applications
    assert application.import_path == "raymoe.serving:build_app"
    tiny_model("olmoe").config.save_pretrained(tmp_path)
    assert ServeConfig.model_validate(application.args | {"model": tmp_path}).expert_memory == "50%"


@pytest.fixture
def cluster(monkeypatch):
    """The dashboard's URL of a cluster that Ray's commands and jobs take for the one of this machine, whatever else runs on it.

    `ray.init` would do but for one port: jobs are taken by an agent on each node, at a port that it cannot be given, and a
    second cluster's agent on the machine goes without.
    """
    free = ["--port=0", "--dashboard-port=0", "--dashboard-agent-listen-port=0"]
    # sockets lie in it, and a socket's path has 107 characters at the most
    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as folder:
        monkeypatch.setenv("RAY_TMPDIR", folder)
        monkeypatch.setenv("RAY_AUTH_MODE", "token")
        monkeypatch.setenv("RAY_AUTH_TOKEN", secrets.token_hex(32))
        start = [BIN / "ray", "start", "--head", "--block", "--num-cpus=4", *free]
        head = subprocess.Popen([*map(str, start)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        try:
            said = "".join(takewhile(lambda line: "block forever" not in line, head.stdout))
            url = re.search(r"http://127\.0\.0\.1:\d+", said)
            assert url is not None, said
            monkeypatch.setenv("RAY_ADDRESS", (Path(folder) / "ray" / "ray_current_cluster").read_text())
            yield url[0]
        finally:
            processes = psutil.Process(head.pid).children(recursive=True)
            head.kill()
            head.wait()
            for process in processes:
                with suppress(psutil.NoSuchProcess):
                    process.kill()
            psutil.wait_procs(processes, timeout=30)


@pytest.mark.timeout(500)
def test_ray_job_submit_trains_and_serve_run_serves(tmp_path, cluster):
    (tmp_path / "text.txt").write_text("\n\n".join(f"the {i}th line says {i % 7} times seven" for i in range(900)))
    output = tmp_path / "run"
    # the cluster's token is in this process's environment, which the commands inherit
    job = [BIN / "ray", "job", "submit", "--address", cluster, "--working-dir", EXAMPLE.parent, "--"]
    train = [sys.executable, "-m", "raymoe", "train", EXAMPLE.name, *TINY, "steps=3", f"output={output}"]
    told = tmp_path / "out.json"
    submit = [*map(str, job), *train, f"data.source={tmp_path / 'text.txt'}", "--json", str(told)]
    until = time.monotonic() + 60
    while True:
        done = subprocess.run(submit, capture_output=True, text=True, timeout=280)
        # Ray's agent on the node comes up after `ray.init` returns
        if "No available agent" not in done.stderr or time.monotonic() > until:
            break
        time.sleep(1)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "step     3/3  loss " in done.stdout
    result = json.loads(told.read_text())
    assert [row["step"] for row in result["rows"]] == [0, 1, 2]
    assert result["meta"]["command"].endswith(f"--json {told}")
    assert set(result["meta"]["bits_per_byte"]) == {"raymoe model", "unigram", "gzip -9", "xz -9e"}
    assert (output / "report.html").read_text().startswith("<!doctype html>")
    assert (output / "checkpoint" / "tokenizer.json").is_file()
    assert (output / "trace" / "rank-1.parquet").is_file()

    serve = [
        BIN / "serve",
        "run",
        "raymoe.serving:build_app",
        f"model={output / 'checkpoint'}",
        "expert_memory=25%",
    ]
    server = subprocess.Popen([*map(str, serve)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=os.environ)
    try:
        # the gateway answers before its engines do; /health is 503 until then
        wait_for("http://127.0.0.1:8000/health", server)
        engine = wait_for("http://127.0.0.1:8000/v1/raymoe/status", server)["engines"][0]
        assert (engine["slots"], engine["num_experts"]) == (12, 48)
        assert wait_for("http://127.0.0.1:8000/v1/models", server)["data"][0]["id"] == "checkpoint"
    finally:
        server.terminate()
        server.wait(timeout=60)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_serve_deploy_runs_the_file(tmp_path, cluster):
    tokenizer = tiny_tokenizer()
    tiny_model("olmoe", vocab_size=len(tokenizer)).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    tree = yaml.safe_load((DEPLOY / "serve" / "raymoe.yaml").read_text())
    tree["applications"][0]["args"]["model"] = str(tmp_path / "model")
    (tmp_path / "raymoe.yaml").write_text(yaml.safe_dump(tree))
    deploy = [BIN / "serve", "deploy", "--address", cluster, tmp_path / "raymoe.yaml"]
    until = time.monotonic() + 60
    while (done := subprocess.run(deploy, capture_output=True, text=True)).returncode and time.monotonic() < until:
        time.sleep(1)
    assert done.returncode == 0, done.stdout + done.stderr
    wait_for("http://127.0.0.1:8000/health")
    assert wait_for("http://127.0.0.1:8000/v1/models")["data"][0]["id"] == "model"


def wait_for(url: str, server: subprocess.Popen | None = None) -> dict:
    deadline = time.monotonic() + 90
    while True:
        try:
            with urllib.request.urlopen(url, timeout=10) as answer:
                return json.load(answer)
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            assert server is None or server.poll() is None, "serve run ended"
            assert time.monotonic() < deadline, url
            time.sleep(0.5)
