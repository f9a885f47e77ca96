"""The benchmark's rows, from a run of a few steps."""

from raymoe.benchmarks import quality_compression


def test_rows_have_the_columns_and_a_full_arm_recovers_itself(monkeypatch):
    monkeypatch.setattr(quality_compression, "_HELD_OUT", 8)
    monkeypatch.setattr(quality_compression, "_FITTED", dict(list(quality_compression._FITTED.items())[:3]))
    monkeypatch.setattr(quality_compression, "_UNTRAINED", ("drop",))
    small = {"hidden_size": 32, "intermediate_size": 16, "num_hidden_layers": 1}
    monkeypatch.setattr(quality_compression, "_SHAPE", quality_compression._SHAPE | small)
    said = []
    rows = quality_compression.recovery([0], said.append, 2, 1)
    assert {row["arm"] for row in rows} == {"full", "drop", "compressed_experts", "drop, untrained"}
    assert {row["seed"] for row in rows} == {0, None}
    by_arm = {row["arm"]: row for row in rows}
    assert by_arm["full"]["recovery"] == 1
    # two steps leave nothing to tell apart, or a gap that dropping by definition closes nothing of
    assert by_arm["drop"]["gap_closed"] in (None, 0)
    assert any("sha256" in line for line in said)


def test_active_parameters_beside_the_papers():
    said = []
    rows = quality_compression.published_shapes(said.append)
    active = {row["arm"]: row["active_parameters"] for row in rows}
    assert active["olmoe, compressed_experts"] / active["olmoe, full"] - 1 < -0.31
    assert active["phimoe, compressed_experts"] / active["phimoe, full"] - 1 < -0.33
