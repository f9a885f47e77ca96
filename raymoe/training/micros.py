"""A rank's share of the global batch, cut into micro-batches that all ranks take in lock step."""

from collections.abc import Iterator
from dataclasses import dataclass

from raymoe.training.batches import Batch
from raymoe.training.world import World


@dataclass(frozen=True)
class Micro:
    """One forward and backward pass of one rank."""

    batch: Batch
    num_sequences: int
    """Of all ranks in this pass."""
    is_first: bool
    is_last: bool


def num_micros(num_sequences: int, num_ranks: int, micro_batch: int | None) -> int:
    """Passes that a global batch takes if no rank has more than `micro_batch` sequences in one; None: one.

    Raises:
        ValueError: some rank would have no sequence in some pass.
    """
    if micro_batch is None:
        return 1
    most, least = -(-num_sequences // num_ranks), num_sequences // num_ranks
    passes = -(-most // micro_batch)
    if least < passes:
        raise ValueError(
            f"batch: {num_sequences} sequences on {num_ranks} workers are {least} to {most} each, and micro_batch: "
            f"{micro_batch} cuts these into {passes} passes, more than some worker has sequences; make batch a multiple of "
            "the workers"
        )
    return passes


def micro_batches(mine: Batch, num_sequences: int, world: World, passes: int) -> Iterator[Micro]:
    """This rank's passes, in order, on its device.

    Args:
        mine: this rank's sequences of the global batch.
        num_sequences: of the global batch.
    """
    sizes = [
        num_sequences * (rank + 1) // world.size - num_sequences * rank // world.size for rank in range(world.size)
    ]
    for number in range(passes):
        bounds = [(size * number // passes, size * (number + 1) // passes) for size in sizes]
        part = mine.rows(*bounds[world.rank])
        yield Micro(
            Batch(part.tokens.to(world.device), part.counts.to(world.device)),
            sum(stop - start for start, stop in bounds),
            number == 0,
            number == passes - 1,
        )
