"""What a run records reaches Ray's own metrics endpoint, which Prometheus and the dashboard read."""

import re
import time
import urllib.request

import pytest
import ray

from raymoe.actors import WorkerGroup, ray_session


@pytest.fixture
def exported(monkeypatch):
    """Reads the metrics that the cluster exports: {name: sum over its series}."""
    monkeypatch.setenv("RAY_metrics_report_interval_ms", "500")
    with ray_session(min_cpus=4, own=True, dashboard=True):
        (node,) = ray.nodes()
        url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"

        def read() -> dict[str, float]:
            with urllib.request.urlopen(url, timeout=10) as answer:
                text = answer.read().decode()
            found: dict[str, float] = {}
            for name, value in re.findall(r"^(ray_raymoe_\w+)\{[^}]*\} (\S+)$", text, flags=re.MULTILINE):
                found[name] = found.get(name, 0.0) + float(value)
            return found

        yield read


def test_training_metrics_arrive(exported, job):
    with WorkerGroup(job(steps=20)) as group:
        group.start()
        steps = list(group.train())
        # workers and controller export each for itself
        last = {
            "ray_raymoe_train_tokens_total": 20 * steps[0].tokens,
            "ray_raymoe_train_expert_imbalance_ratio": pytest.approx(steps[-1].worker_imbalance),
        }
        deadline = time.monotonic() + 60
        while any((metrics := exported()).get(name) != value for name, value in last.items()):
            assert time.monotonic() < deadline, metrics
            time.sleep(0.5)
    assert metrics["ray_raymoe_train_loss"] == pytest.approx(steps[-1].loss, rel=1e-6)
    assert metrics["ray_raymoe_train_step_s_count"] == 20
    sent = sum(step.moved_bytes.get("all_to_all", 0) for step in steps)
    assert metrics["ray_raymoe_train_alltoall_bytes_total"] == sent
