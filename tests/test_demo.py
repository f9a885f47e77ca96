"""`raymoe demo` itself, with fewer steps: the same path, real actors, real HTTP."""

import json

import pytest

from tests.test_cli import raymoe


@pytest.mark.timeout(600)
def test_demo_learns_serves_and_reports(tmp_path):
    shown = raymoe("demo", "--steps", "30", "--output", "run", "--json", "demo.json", cwd=tmp_path)
    assert shown.returncode == 0, shown.stderr
    result = json.loads((tmp_path / "demo.json").read_text())
    rows, meta = result["rows"], result["meta"]

    assert len(rows) == 30
    # from log(4096) = 8.3 nats; 30 steps reach about 6.5
    assert rows[0]["loss"] > 8.0
    assert rows[-1]["loss"] < 7.3
    assert meta["bits_per_byte"]["raymoe model"] < meta["bits_per_byte"]["unigram"] * 1.05
    assert 10e6 < meta["parameters"] < 20e6
    assert any(row["copies"] > 0 for row in rows)

    serving = meta["serving"]
    assert serving["clients"] == 8
    assert serving["tokens_per_s"] > 0
    assert 0.5 < serving["hit_rate"] < 1
    assert "the first one's answer as it streams" in shown.stdout
    report = (tmp_path / "run" / "report.html").read_text()
    assert f"{meta['bits_per_byte']['raymoe model']:.3f}" in report
    assert "http://" not in report.replace("http://www.w3.org", "")
    assert (tmp_path / "run" / "checkpoint" / "config.json").is_file()
