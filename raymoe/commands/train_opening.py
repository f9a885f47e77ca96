"""What a training run has chosen, and why: printed before its first step."""

import json
from collections.abc import Sequence

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from raymoe.actors.orders import WorkerFacts
from raymoe.placement import Base, Policy, policy
from raymoe.placement.state import PlacementState
from raymoe.training.batches import num_sequences
from raymoe.training.job import TrainJob
from raymoe.training.micros import num_micros
from raymoe.training.publication import Publication

_MOST_LISTED_WORKERS = 8
_IN_WORDS = {
    "ep": "experts stay with their owners and all rows travel to them; nothing is copied",
    "fssdp": "hot experts are copied to other workers for a step, where the costs say that it is faster than sending rows",
    "fssdp-rm": "as fssdp, and copies are given up after forward and gathered again in backward: less memory, more bytes",
    "fssdp-paper": "hot experts are copied to other workers for a step, as many as hide behind the attention",
    "fssdp-paper-rm": "as fssdp-paper, and copies are given up after forward and gathered again in backward",
}


def print_opening(console: Console, lines: Sequence[tuple[str, str]], memory: Sequence[dict[str, str | float]]) -> None:
    """Prints what `opening_lines` and `memory_rows` say."""
    for name, said in lines:
        console.print(f"[bold]{name:<11}[/bold] {escape(said)}", highlight=False)
    table = Table(*memory[0], title="memory, MB", title_justify="left")
    for row in memory:
        table.add_row(*(value if isinstance(value, str) else f"{value:,.1f}" for value in row.values()))
    console.print(table)


def opening_lines(
    job: TrainJob, train_tokens: int, is_all_text: bool, facts: Sequence[WorkerFacts]
) -> list[tuple[str, str]]:
    """(what, chosen and why) of everything that the run's speed and memory depend on.

    Args:
        train_tokens: tokens to train on, as far as they are there.
        is_all_text: whether these are all.
    """
    config, publication = job.config, facts[0].publication
    experts = config.experts
    this = policy(publication.policy)
    reason = _IN_WORDS.get(this.name, this.source)
    lines = [
        ("model", _model(job)),
        ("data", _data(job, train_tokens, is_all_text)),
        ("batch", _batch(job, len(facts))),
        ("precision", _precision(config.model.dtype)),
        ("policy", f"{this.name} ({_whose(experts, 'policy')}): {reason}"),
        ("m", _slots(job, len(facts))),
        ("t", _degree(job, this, publication)),
        ("transport", _transport(job, publication)),
        ("dispatch", _dispatch(job, this, publication)),
        ("re-sharding", _resharding(job, this, len(facts))),
        ("workers", _workers(job, len(facts))),
        ("snapshots", _snapshots(job, publication)),
    ]
    if job.resumes is not None:
        lines.append(("goes on", f"with step {facts[0].next_step}, from {job.resumes}"))
    return lines


def memory_rows(
    job: TrainJob, facts: Sequence[WorkerFacts], held: Sequence[dict[str, int]] | None = None
) -> list[dict[str, str | float]]:
    """A row a worker, in MB: the model's parts as the workers found them, and what copies of experts will take.

    Args:
        held: by worker, instead of what they found at their start: what they hold, copies included.
    """
    promised = reserved_copy_bytes(job, facts[0].publication)
    parts = held or [each.state_bytes | {"copies": max(each.state_bytes.get("copies", 0), promised)} for each in facts]
    names = [str(rank) for rank in range(len(parts))]
    if all(each == parts[0] for each in parts) and len(parts) > 1:
        names, parts = [f"each of {len(parts)}"], parts[:1]
    elif len(parts) > _MOST_LISTED_WORKERS:
        order = np.argsort([sum(each.values()) for each in parts], kind="stable")
        picked = order[[-1, len(order) // 2, 0]].tolist()
        names = [f"{word}: {names[rank]}" for word, rank in zip(("most", "median", "least"), picked, strict=True)]
        parts = [parts[rank] for rank in picked]
    return [
        {"worker": name}
        | {part: num_bytes / 1e6 for part, num_bytes in each.items()}
        | {"total": sum(each.values()) / 1e6}
        for name, each in zip(names, parts, strict=True)
    ]


def reserved_copy_bytes(job: TrainJob, publication: Publication) -> int:
    """Bytes that a worker sets aside for copies once costs are known: parameters and gradients of m experts, for every layer,
    or for two at a time with re-materialisation."""
    size = publication.cluster.num_devices
    if size == 1:
        return 0
    this = policy(publication.policy)
    slots = job.extra_slots(size) if waits_for_costs(job, publication) else publication.extra_slots
    num_sets = min(2, job.num_layers) if this.rematerialise else job.num_layers
    return 2 * num_sets * min(slots, job.num_experts) * job.workload.expert_bytes


def waits_for_costs(job: TrainJob, publication: Publication) -> bool:
    """Whether the workers go by a first publication that the controller will replace by one with measured costs."""
    experts = job.config.experts
    return (
        not publication.is_measured
        and experts.cluster is None
        and publication.cluster.num_devices > 1
        and policy(publication.policy).needs_costs(job.overlap_degree)
    )


def _model(job: TrainJob) -> str:
    kind = json.loads((job.model_path / "config.json").read_text(encoding="utf-8")).get("model_type", "model")
    idle = job.expert_parameters * (job.num_experts - job.workload.choices) // job.num_experts
    return (
        f"{kind}, {_millions(job.total_parameters)} parameters, {_millions(job.expert_parameters)} of them in "
        f"{job.num_layers} x {job.num_experts} experts; a token takes {job.workload.choices} a layer, and so "
        f"{_millions(job.total_parameters - idle)} parameters"
    )


def _data(job: TrainJob, train_tokens: int, is_all_text: bool) -> str:
    config = job.config
    sequences = num_sequences(train_tokens, config.data.sequence_length)
    wanted = config.steps * config.batch
    so_far = "" if is_all_text else " so far"
    return (
        f"{train_tokens:,} tokens{so_far}, {sequences:,} sequences of {config.data.sequence_length}; {config.steps} steps take "
        f"{wanted:,}: {wanted / max(sequences, 1):.2f} passes over {'them' if is_all_text else 'what is there'}"
    )


def _batch(job: TrainJob, size: int) -> str:
    config = job.config
    passes = num_micros(config.batch, size, config.micro_batch)
    each = f"{config.batch / (size * passes):.4g}"
    return (
        f"{config.batch} sequences a step ({config.batch * config.data.sequence_length:,} tokens) = {size} workers x "
        f"{passes} {'pass' if passes == 1 else 'passes'} x {each}"
    )


def _precision(dtype: str) -> str:
    if dtype == "bfloat16":
        return "bfloat16; the optimizer keeps float32 masters and moments"
    return f"{dtype} throughout: no masters beside the parameters"


def _slots(job: TrainJob, size: int) -> str:
    if size == 1:
        return "no copies: one worker has all experts"
    if job.config.experts.extra_slots is None:
        return f"{job.extra_slots(size)} copies a layer at most on a worker: as many as it owns"
    return f"{job.extra_slots(size)} copies a layer at most on a worker: experts.extra_slots"


def _degree(job: TrainJob, this: Policy, publication: Publication) -> str:
    experts = job.config.experts
    cap = (
        "" if job.overlap_degree is None else f", {job.overlap_degree} experts a layer at most: experts.overlap_degree"
    )
    if publication.cluster.num_devices == 1:
        return "nothing travels"
    if not this.needs_costs(job.overlap_degree):
        return f"from loads alone{cap}"
    if experts.cluster is not None:
        return f"from the costs in {experts.cluster}{cap}"
    if waits_for_costs(job, publication):
        return f"from costs that the first steps measure; no copies until then{cap}"
    return f"from the costs that were measured before the checkpoint{cap}"


def _transport(job: TrainJob, publication: Publication) -> str:
    num_nodes = publication.cluster.num_nodes
    where = "all workers are on one node" if num_nodes == 1 else f"workers are on {num_nodes} nodes"
    return f"{publication.transport} ({_whose(job.config.experts, 'transport')}): {where}"


def _dispatch(job: TrainJob, this: Policy, publication: Publication) -> str:
    words = {
        "local": "a row stays where it is if a copy is there",
        "node": "a row stays on its node if a copy is there",
        "even": "copies share an expert's rows evenly",
        "capacity": "copies take equal shares of all workers' rows",
        "level": "copies are filled so that all workers compute equally much",
    }
    if publication.dispatch is not None:
        return f"{publication.dispatch} ({_whose(job.config.experts, 'dispatch')}): {words[publication.dispatch]}"
    if this.weighs_dispatch:
        return "local or level (the policy's), step by step: a row stays where a copy is, or goes where there is least to do"
    size = publication.cluster.num_devices
    base = Base.of_owners(job.owners_among(size), size)
    state = PlacementState(base=base, cluster=publication.cluster, workload=publication.workload, extra_slots=0)
    state = PlacementState(
        base=this.start(base, state), cluster=publication.cluster, workload=publication.workload, extra_slots=0
    )
    chosen = this.prepare(np.zeros((0, job.num_layers, job.num_experts), dtype=np.int64), state).dispatch
    return f"{chosen} (the policy's): {words[chosen]}"


def _workers(job: TrainJob, size: int) -> str:
    workers = job.config.workers
    if workers.min == workers.max:
        return f"{size}; one that dies is replaced, and the run goes on when all are there again"
    return f"{size} now; goes on with {workers.min} or more, and takes in up to {workers.max} when there is room"


def _snapshots(job: TrainJob, publication: Publication) -> str:
    every = job.config.snapshots.every
    if publication.snapshot_every == 0:
        return "none (snapshots.every): when a worker dies the run goes back to its last checkpoint"
    if every == "auto":
        return (
            f"every {publication.snapshot_every} steps at first, then as often as {job.config.snapshots.share:.1%} of the time "
            "allows; in memory, a worker's also with its buddy"
        )
    return f"every {every} steps (snapshots.every), in memory, a worker's also with its buddy"


def _resharding(job: TrainJob, this: Policy, size: int) -> str:
    every = job.config.experts.reshard_every
    steps = this.interval if every == "auto" else every
    if not steps or size == 1:
        return "never: experts stay where they are"
    return f"asked every {steps} steps ({'the policy has it so' if every == 'auto' else 'experts.reshard_every'})"


def _whose(section: object, key: str) -> str:
    return "as configured" if key in section.model_fields_set else "by default"  # pyright: ignore[reportAttributeAccessIssue]


def _millions(count: int) -> str:
    return f"{count / 1e9:.2f} B" if count >= 1e9 else f"{count / 1e6:.2f} M"
