"""What is printed before a run, for configurations that need no workers to be asked."""

import io
import re

import pytest
from rich.console import Console

from raymoe.actors.orders import WorkerFacts
from raymoe.commands.progress import TrainingProgress, duration
from raymoe.commands.train_opening import memory_rows, opening_lines, print_opening, reserved_copy_bytes
from raymoe.config import TrainConfig, parse_config
from raymoe.training.job import prepare_job, prepare_text
from raymoe.training.link_probe import LinkMeasurement
from tests.actors.conftest import TINY

EXPERT_BYTES = 3 * 32 * 16 * 4


@pytest.fixture(scope="module")
def make(tmp_path_factory):
    folder = tmp_path_factory.mktemp("opening")
    (folder / "text.txt").write_text("\n\n".join(f"the {i}th line says {i % 7} times seven" for i in range(400)))

    def job(**changes):
        tree = {
            "model": {"config": TINY},
            "data": {"source": str(folder / "text.txt"), "sequence_length": 16},
            "tokenizer": {"vocab_size": 300},
            "output": str(folder / "run"),
        }
        config = parse_config(TrainConfig, tree | changes)
        return prepare_job(config, config.output, prepare_text(config, config.output))

    return job


def facts(job, *state_bytes, nodes=None):
    nodes = nodes or (0,) * job.config.workers.max
    held = state_bytes or [{"parameters": 100, "gradients": 100, "optimizer": 200, "copies": 0}] * len(nodes)
    links = LinkMeasurement.__new__(LinkMeasurement)  # what was measured is not told before the run
    owners = job.owners_among(len(nodes))
    return [WorkerFacts(nodes, links, job.first_publication(nodes), owners, 0, each) for each in held]


def told(job, tokens=1617, is_all_text=True, nodes=None):
    return dict(opening_lines(job, tokens, is_all_text, facts(job, nodes=nodes)))


def test_one_worker_has_nothing_to_send(make):
    job = make(workers=1)
    lines = told(job)
    assert lines["m"] == "no copies: one worker has all experts"
    assert lines["t"] == "nothing travels"
    assert lines["re-sharding"] == "never: experts stay where they are"
    assert reserved_copy_bytes(job, job.first_publication((0,))) == 0


@pytest.mark.parametrize(
    ("experts", "key", "said"),
    [
        ({}, "policy", r"fssdp \(by default\): hot experts are copied"),
        ({"policy": "lazarus"}, "policy", r"lazarus \(as configured\): Lazarus \(arXiv 2407.04656\)"),
        ({}, "m", r"4 copies a layer at most on a worker: as many as it owns$"),
        ({"overlap_degree": 2}, "t", r"from costs that the first steps measure; .*, 2 experts a layer at most"),
        ({"policy": "fssdp-paper", "overlap_degree": 2}, "t", r"from loads alone, 2 experts a layer at most"),
        ({"policy": "ep"}, "t", r"from loads alone$"),
        ({"policy": "ep"}, "re-sharding", r"never: experts stay where they are"),
        ({}, "re-sharding", r"asked every 100 steps \(the policy has it so\)"),
        ({"dispatch": "level"}, "dispatch", r"level \(as configured\): copies are filled so that all"),
        ({"policy": "lazarus"}, "dispatch", r"capacity \(the policy's\): copies take equal shares"),
        ({"transport": "a2a"}, "transport", r"a2a \(as configured\): all workers are on one node"),
    ],
)
def test_choices_come_with_their_reasons(make, experts, key, said):
    assert re.match(said, told(make(experts=experts))[key])


def test_nodes_decide_the_transport(make):
    assert told(make(workers=4), nodes=(0, 0, 1, 1))["transport"] == "hierarchical (by default): workers are on 2 nodes"


def test_passes_over_the_data_are_counted_from_what_is_there(make):
    job = make(steps=50, batch=8)
    # 1617 tokens make 101 sequences of 16 and one token to predict from
    assert told(job)["data"] == "1,617 tokens, 101 sequences of 16; 50 steps take 400: 3.96 passes over them"
    assert told(job, is_all_text=False)["data"].endswith("3.96 passes over what is there")
    assert "1,617 tokens so far" in told(job, is_all_text=False)["data"]


def test_masters_are_named_where_there_are_any(make):
    bfloat16 = make(model={"config": TINY, "dtype": "bfloat16"})
    assert told(bfloat16)["precision"] == "bfloat16; the optimizer keeps float32 masters and moments"
    assert told(make())["precision"].startswith("float32 throughout")


@pytest.mark.parametrize(("policy", "sets"), [("fssdp", 2), ("fssdp-rm", 2), ("fssdp-paper", 2)])
def test_copies_to_come_count_in_memory(make, policy, sets):
    job = make(experts={"policy": policy, "extra_slots": 3})
    [row] = memory_rows(job, facts(job))
    assert row["worker"] == "each of 2"
    assert row["copies"] == pytest.approx(2 * sets * 3 * EXPERT_BYTES / 1e6)
    assert row["total"] == pytest.approx((400 + 2 * sets * 3 * EXPERT_BYTES) / 1e6)


def test_rematerialised_copies_take_two_sets_however_many_layers(make):
    model = {"config": TINY | {"num_hidden_layers": 5}}
    kept, given_up = (make(model=model, experts={"policy": name, "extra_slots": 1}) for name in ("fssdp", "fssdp-rm"))
    assert reserved_copy_bytes(kept, kept.first_publication((0, 0))) == 2 * 5 * EXPERT_BYTES
    assert reserved_copy_bytes(given_up, given_up.first_publication((0, 0))) == 2 * 2 * EXPERT_BYTES


def test_of_many_workers_the_fullest_the_median_and_the_emptiest_are_listed(make):
    job = make(workers=12, experts={"extra_slots": 0})
    held = [
        {"parameters": 1_000_000 * (rank * 5 % 12), "gradients": 0, "optimizer": 0, "copies": 0} for rank in range(12)
    ]
    rows = memory_rows(job, facts(job, *held))
    assert [(row["worker"], row["total"]) for row in rows] == [("most: 7", 11.0), ("median: 6", 6.0), ("least: 0", 0.0)]
    job = make(workers=3, experts={"extra_slots": 0})
    assert [row["total"] for row in memory_rows(job, facts(job, *held[:3]))] == [0.0, 5.0, 10.0]


def test_markup_in_names_is_shown_as_it_stands():
    screen = io.StringIO()
    console = Console(file=screen, width=100)
    print_opening(console, [("goes on", "from /runs/[bold]x[/bold]")], [{"worker": "0", "total": 1234.56}])
    with TrainingProgress(console, 10) as progress:
        progress.say("saved       /runs/[red]x")
    assert "from /runs/[bold]x[/bold]" in screen.getvalue()
    assert "/runs/[red]x" in screen.getvalue()
    assert "1,234.6" in screen.getvalue()


@pytest.mark.parametrize(
    ("seconds", "said"), [(0, "0:00"), (9.6, "0:10"), (59.7, "1:00"), (3599, "59:59"), (3723, "1:02:03")]
)
def test_durations(seconds, said):
    assert duration(seconds) == said
