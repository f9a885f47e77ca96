"""Training on any number of workers equals one process with the untouched transformers model and plain AdamW."""

import functools

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

from raymoe.models import load_without_experts
from tests.tiny_models import FAMILIES
from tests.training.equality import Case, model_of, one_process, train
from tests.training.ranks import run_ranks

oracle = functools.cache(one_process)

POLICIES = [
    "ep",
    "fssdp",
    "fssdp-rm",
    "fssdp-paper",
    "fssdp-paper-rm",
    "fastermoe",
    "fastermoe-device",
    "smartmoe",
    "flexmoe",
    "pro-prophet",
    "eplb",
    "lazarus",
]


def run(size: int, cases: list[Case], folder) -> dict[str, list]:
    """Trains all cases, checks every parameter against one process; returns the ranks' reports by case."""
    paths = {}
    for case in cases:
        key = (case.family, case.dtype)
        if key not in paths:
            paths[key] = str(folder / f"{case.family}-{case.dtype}")
            model_of(case.family, case.dtype).save_pretrained(paths[key])
    work = [(case, paths[case.family, case.dtype], str(folder / f"out-{n}")) for n, case in enumerate(cases)]
    by_rank = run_ranks(size, train, work)
    for number, (case, _, written) in enumerate(work):
        kind = AutoModelForSeq2SeqLM if case.family == "switch_transformers" else AutoModelForCausalLM
        parameters = kind.from_pretrained(written, dtype=case.dtype).state_dict()
        for name, value in oracle(*case.oracle).items():
            error = ((parameters[name].double() - value.double()).norm() / value.double().norm()).item()
            assert error <= case.tolerance, f"{case}: {name} off by {error:.1e}"
        losses = [[report.loss for report in ranks[number]] for ranks in by_rank]
        assert all(loss == losses[0] for loss in losses), str(case)
    return {str(case): [ranks[number] for ranks in by_rank] for number, case in enumerate(cases)}


@pytest.mark.parametrize("size", [1, 2, 3])
def test_policies_and_uneven_owners(size, tmp_path):
    cases = [
        Case(family, policy, owners, dtype)
        for dtype, families in {torch.float64: ["olmoe", "gpt_oss"], torch.float32: ["deepseek_v3"]}.items()
        for family in families
        for policy in ("ep", "fssdp-paper", "fssdp", "fssdp-rm")
        for owners in ("even", "uneven")
    ]
    for name, reports in run(size, cases, tmp_path).items():
        copies = sum(report.copies for report in reports[0])
        assert (copies > 0) == ("-ep-" not in name and size > 1), name
        gathered = sum(report.moved_bytes.get("sparse_all_gather", 0) for rank in reports for report in rank)
        scattered = sum(report.moved_bytes.get("sparse_reduce_scatter", 0) for rank in reports for report in rank)
        path = tmp_path / "-".join([name.split("-")[0], f"torch.{'float32' if 'float32' in name else 'float64'}"])
        expert_bytes = load_without_experts(path, torch.float32 if "float32" in name else torch.float64)[1].expert_bytes
        # two MoE layers, two sets of slots: nothing has to be gathered twice
        assert gathered == scattered == copies * expert_bytes, name


def test_every_policy_that_keeps_experts_whole(tmp_path):
    cases = [Case(policy=policy, steps=8, config={"reshard_every": 3}) for policy in POLICIES]
    reports = run(3, cases, tmp_path)
    resharded = {name.split("-olmoe")[0] for name, ranks in reports.items() if any(r.resharded for r in ranks[0])}
    assert {name.removeprefix("olmoe-").split("-even")[0] for name in resharded} >= {"fssdp-paper", "smartmoe", "eplb"}


@pytest.mark.parametrize(
    "family", sorted(set(FAMILIES) - {"olmoe", "gpt_oss", "deepseek_v3"} | {"switch_transformers"})
)
def test_families(family, tmp_path):
    run(2, [Case(family, "fssdp"), Case(family, "fssdp-rm")], tmp_path)


def test_transports_and_dispatch(tmp_path):
    nodes = (0, 0, 1)
    cases = [
        *(Case(nodes=nodes, published={"transport": name}) for name in ("a2a", "hierarchical")),
        *(Case(policy="fssdp-rm", nodes=nodes, published={"transport": name}) for name in ("a2a", "hierarchical")),
        *(
            Case(policy=p, published={"dispatch": d})
            for p in ("fssdp", "lazarus")
            for d in ("even", "capacity", "level")
        ),
    ]
    run(3, cases, tmp_path)


def test_micro_batches_and_recomputation(tmp_path):
    # router losses are means over a pass: with several passes they are not those of one process
    cases = [
        Case(policy=policy, config=config, router_losses=False)
        for policy in ("ep", "fssdp", "fssdp-rm", "fastermoe")
        for config in ({"micro_batch": 2}, {"recompute": True}, {"micro_batch": 2, "recompute": True})
    ]
    run(2, cases, tmp_path)


def test_twenty_steps_with_resharding_in_the_middle(tmp_path):
    cases = [
        Case(policy=policy, steps=20, config={"reshard_every": every})
        for policy, every in (("fssdp-paper", 7), ("fssdp-rm", 0), ("smartmoe", 5))
    ]
    reports = run(2, cases, tmp_path)
    moved = [[report.resharded for report in ranks[0]] for ranks in reports.values()]
    assert any(moved[0]), "experts changed homes"
    assert not any(moved[1])
    steps = [step for step, number in enumerate(moved[0]) if number]
    assert all(step % 7 == 0 for step in steps[:1]), "counted from the first step"


def test_sharded_dense_parameters(tmp_path):
    cases = [
        Case(config={"dense": "sharded"}),
        Case("gpt_oss", config={"dense": "sharded", "micro_batch": 2}, router_losses=False),
    ]
    run(3, cases[:1], tmp_path)
    run(2, cases, tmp_path)
