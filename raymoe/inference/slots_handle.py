"""How to reach `SharedSlots` of another process, and how large they are. Needs no torch: whoever passes it on stays small."""

from collections.abc import Sequence
from dataclasses import dataclass

_BLOCK = 4096


@dataclass(frozen=True)
class SlotsHandle:
    """What another process on the node needs to map them. Small, and can be pickled."""

    pid: int
    number: int
    """Of the descriptor in that process."""
    inode: int
    num_slots: int
    numel: tuple[int, ...]
    """Elements of one expert, for each MoE layer."""
    most_experts: int
    """Of the layer with the most."""
    dtype: str
    itemsize: int

    @property
    def table_bytes(self) -> int:
        """Of who is where, which comes first."""
        return _whole_blocks(self.num_slots * 16)

    @property
    def num_bytes(self) -> int:
        """Of all."""
        return self.table_bytes + self.num_slots * slot_bytes(self.numel, self.itemsize)


def slot_bytes(numel: Sequence[int], itemsize: int) -> int:
    """A slot holds the largest expert, and is whole blocks, so that direct I/O may write there."""
    return _whole_blocks(max(numel) * itemsize)


def _whole_blocks(num_bytes: int) -> int:
    return -(-num_bytes // _BLOCK) * _BLOCK
