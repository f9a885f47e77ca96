"""Which experts follow which, from layer to layer and from token to token: counted while serving, nothing to train.

T tokens, K choices per token, L MoE layers, E experts, M ranks, R requests; an expert index of E is "not known".
"""

from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor

from raymoe.inference.predictors.base import RankCalibration, chosen_mask, keeps_state, num_ranks, sampled_rows, union

_LEARN_ROWS = 256
_SMOOTHING = 2.0
_LARGEST_UNIT = 1e4
_SHARE_STEPS = 8


class TransitionTable:
    """Counts, per layer, which experts a token takes after those it took one layer before, and after those that the token before
    it in its request took at this layer. Both together order the experts (their evidence is taken as independent, as in naive
    Bayes), and the hit rate observed at each rank makes the order a probability.

    Error correction is in what it conditions on: `routed` answers from the experts that the router really chose, so its answer
    for the next layer replaces the one that `step_begins` gave, and its answer for the same layer is for the next step.

    Memory: 8 L (E + 1)^2 bytes of counts (6.4 MB for 48 layers of 128 experts, 32 MB for 58 of 256), and per request 2 L (K + M)
    bytes, of the `max_requests` last used. On the CPU: give it an `expert_index` that is there already.
    """

    name = "transitions"

    def __init__(self, num_layers: int, num_experts: int, *, half_life: float = 50_000.0, max_requests: int = 1024):
        """`half_life`: tokens after which one counts half.

        Raises:
            ValueError: a size below 1.
        """
        for name, value in (("num_layers", num_layers), ("num_experts", num_experts), ("max_requests", max_requests)):
            if value < 1:
                raise ValueError(f"{name} = {value}: must be at least 1")
        self._num_layers, self._num_experts = num_layers, num_experts
        self._growth = 2.0 ** (1.0 / half_life)
        self._counts = torch.zeros(2, num_layers, num_experts + 1, num_experts + 1)
        # older counts are not shrunk, newer ones are counted in a unit that grows
        self._unit = [1.0] * num_layers
        self._max_requests = max_requests
        self._slots: OrderedDict[str, int] = OrderedDict()
        self._free: list[int] = []
        self._memory: _Memory | None = None
        self._step: _Step | None = None
        self._steps = 0
        self._shares: list[tuple[Tensor, Tensor] | None] = [None] * num_layers

    @keeps_state
    def step_begins(self, token_ids: Tensor, requests: Sequence[str]) -> dict[int, Tensor]:
        """As `Predictor.step_begins`: for all layers, from what the requests' last tokens took; nothing for a step that begins none
        but new requests."""
        self._steps += 1
        self._step = _Step(requests, self._slots_of(requests) if self._memory is not None else None)
        memory, step = self._memory, self._step
        if memory is None or step.slots is None:
            return {}
        known = step.first_rows[step.slots >= 0]
        if not len(known):
            return {}
        orders = memory.order[step.slots[step.slots >= 0]].long()
        found = {}
        for layer in range(self._num_layers):
            is_known = orders[:, layer, 0] >= 0
            if not is_known.any():
                continue
            step.expected[layer] = (known[is_known], orders[is_known, layer])
            if is_known.all():
                # requests of which nothing is known, and later tokens of the known ones, count as the average of those
                probability = memory.calibration[1][layer].probability(orders[:, layer])
                found[layer] = union(probability, step.num_tokens / len(known))
        return found

    @keeps_state
    def routed(self, layer: int, hidden: Tensor, expert_index: Tensor) -> dict[int, Tensor]:
        """As `Predictor.routed`: for the next layer of this step, and for this layer in the next step."""
        index = expert_index.detach().to("cpu")
        if not len(index):
            return {}
        step = self._step
        if step is None or step.num_tokens != len(index):
            step = self._step = _Step([], None, len(index))
        if self._memory is None:
            self._memory = _Memory(self._num_layers, self._num_experts, index.shape[1])
            if step.requests:
                step.slots = self._slots_of(step.requests)
        memory = self._memory
        self._learn(layer, index, step, memory)
        found = {}
        rows = sampled_rows(len(index))
        if layer + 1 < self._num_layers:
            scores = self._prior(layer + 1) + self._evidence(0, layer + 1, index[rows])
            before = step.before(memory, layer + 1)
            if before is not None:
                scores += self._evidence(1, layer + 1, before[rows])
            order = scores.topk(memory.num_ranks, dim=-1).indices
            step.following = (layer + 1, rows, order)
            probability = memory.calibration[0][layer + 1].probability(order)
            found[layer + 1] = union(probability, len(index) / len(rows))
        if step.slots is not None:
            last = index[step.last_rows]
            order = (self._prior(layer) + self._evidence(1, layer, last)).topk(memory.num_ranks, dim=-1).indices
            memory.remember(step.slots, layer, last, order)
            # a request that reads its prompt has one token in a decode step, as all others
            found[layer] = union(memory.calibration[1][layer].probability(order))
        return found

    @keeps_state
    def forget(self, request: str) -> None:
        """The request's slot is free for another."""
        slot = self._slots.pop(request, None)
        if slot is not None:
            self._release(slot)

    def nbytes(self) -> int:
        """Bytes held now."""
        return self._counts.nbytes + (self._memory.nbytes() if self._memory is not None else 0)

    def _learn(self, layer: int, index: Tensor, step: "_Step", memory: "_Memory") -> None:
        checks = [step.following[1:] if step.following is not None and step.following[0] == layer else None]
        checks.append(step.expected.pop(layer, None))
        for calibration, check in zip(memory.calibration, checks, strict=True):
            if check is not None and calibration[layer].wants(self._steps):
                rows, order = check
                calibration[layer].learn(order, chosen_mask(index[rows], self._num_experts))
        learnt = index[-_LEARN_ROWS:]
        if layer > 0 and step.previous is not None:
            self._count(0, layer, step.previous[-_LEARN_ROWS:], learnt)
        # with nothing known before, the pair still counts the frequency of what was chosen
        before = step.before(memory, layer)
        if before is None:
            before = torch.full_like(index, self._num_experts)
        before = step.within(index, before)
        self._count(1, layer, before[-_LEARN_ROWS:], learnt)
        step.previous = index
        if self._steps % _SHARE_STEPS == 0:
            self._shares[layer] = None
        self._unit[layer] *= self._growth ** len(learnt)
        if self._unit[layer] > _LARGEST_UNIT:
            self._counts[:, layer] /= self._unit[layer]
            self._unit[layer] = 1.0

    def _count(self, kind: int, layer: int, before: Tensor, after: Tensor) -> None:
        pairs = before[:, :, None] * (self._num_experts + 1) + after[:, None, :]
        table = self._counts[kind, layer].view(-1)
        table.index_add_(0, pairs.flatten(), torch.full((pairs.numel(),), self._unit[layer]))

    def _share(self, layer: int) -> tuple[Tensor, Tensor]:
        """float32 [E]: how often an expert of the layer is chosen, as a share of all choices; and its logarithm."""
        shares = self._shares[layer]
        if shares is None:
            seen = self._counts[1, layer].sum(0)[: self._num_experts] + self._unit[layer]
            share = seen / seen.sum()
            shares = self._shares[layer] = share, share.log()
        return shares

    def _prior(self, layer: int) -> Tensor:
        return self._share(layer)[1]

    def _evidence(self, kind: int, layer: int, before: Tensor) -> Tensor:
        """float32 [T, E]: how much the experts `before` [T, K] speak for each expert, as a sum of log ratios."""
        share = self._share(layer)[0]
        smoothing = _SMOOTHING * self._unit[layer]
        is_known = before < self._num_experts
        counts = self._counts[kind, layer, before, : self._num_experts]
        ratio = (counts / share + smoothing) / (counts.sum(-1, keepdim=True) + smoothing)
        return (ratio.log() * is_known[..., None]).sum(1)

    def _slots_of(self, requests: Sequence[str]) -> Tensor:
        """int64 [R]: a slot for each request of the step, -1 for those that find none."""
        assert self._memory is not None
        names = list(dict.fromkeys(requests))
        for name in names:
            if name in self._slots:
                self._slots.move_to_end(name)
        slots = []
        for name in names:
            if name not in self._slots:
                slot = self._new_slot(set(names))
                if slot is not None:
                    self._slots[name] = slot
            slots.append(self._slots.get(name, -1))
        return torch.tensor(slots)

    def _new_slot(self, in_step: set[str]) -> int | None:
        assert self._memory is not None
        if self._free:
            return self._free.pop()
        if len(self._slots) < self._max_requests:
            slot = len(self._slots)
            self._memory.grow(slot + 1)
            return slot
        oldest = next(iter(self._slots))
        if oldest in in_step:
            return None
        slot = self._slots.pop(oldest)
        self._memory.clear(slot)
        return slot

    def _release(self, slot: int) -> None:
        assert self._memory is not None
        self._memory.clear(slot)
        self._free.append(slot)


class _Step:
    """Whose tokens are in this step, and what was expected of them."""

    def __init__(self, requests: Sequence[str], slots: Tensor | None, num_tokens: int = 0):
        self.requests = list(requests)
        self.num_tokens = len(self.requests) or num_tokens
        self.slots = slots
        starts = [row for row, name in enumerate(self.requests) if row == 0 or name != self.requests[row - 1]]
        self.first_rows = torch.tensor(starts, dtype=torch.int64)
        self.last_rows = torch.tensor([*(row - 1 for row in starts[1:]), self.num_tokens - 1], dtype=torch.int64)
        self.previous: Tensor | None = None
        """int64 [T, K]: the layer before."""
        self.following: tuple[int, Tensor, Tensor] | None = None
        """(next layer, rows, their order [., M])."""
        self.expected: dict[int, tuple[Tensor, Tensor]] = {}
        """{layer: (rows, their order [., M])} from the step before."""

    def before(self, memory: "_Memory", layer: int) -> Tensor | None:
        """int64 [T, K]: what the last token of each row's request took at `layer`, where the row is its request's first here."""
        if self.slots is None:
            return None
        before = torch.full((self.num_tokens, memory.top_k), memory.num_experts)
        has_slot = self.slots >= 0
        before[self.first_rows[has_slot]] = memory.taken[self.slots[has_slot], layer].long()
        return before

    def within(self, index: Tensor, before: Tensor) -> Tensor:
        """`before` with the rows that follow another of their request in this step filled in from `index` [T, K]."""
        if not self.requests or len(self.first_rows) == self.num_tokens:
            return before
        is_first = torch.zeros(self.num_tokens, dtype=torch.bool)
        is_first[self.first_rows] = True
        return torch.where(is_first[:, None], before, index.roll(1, 0))


class _Memory:
    """Of each request's last token: the experts it took, and the order expected of the next one. And the calibrations."""

    def __init__(self, num_layers: int, num_experts: int, top_k: int):
        self.num_layers, self.num_experts, self.top_k = num_layers, num_experts, top_k
        self.num_ranks = num_ranks(num_experts, top_k)
        self.taken = torch.zeros(0, num_layers, top_k, dtype=torch.int16)
        self.order = torch.zeros(0, num_layers, self.num_ranks, dtype=torch.int16)
        self.calibration = [
            [RankCalibration(num_experts, top_k, self.num_ranks) for _ in range(num_layers)] for _ in range(2)
        ]
        """Of the orders for the next layer, and of those for the next step."""

    def grow(self, num_slots: int) -> None:
        """Room for at least `num_slots`."""
        have = len(self.taken)
        if num_slots <= have:
            return
        more = max(num_slots, 2 * have, 8) - have
        self.taken = torch.cat([self.taken, torch.zeros(more, *self.taken.shape[1:], dtype=torch.int16)])
        self.order = torch.cat([self.order, torch.zeros(more, *self.order.shape[1:], dtype=torch.int16)])
        for slot in range(have, have + more):
            self.clear(slot)

    def clear(self, slot: int) -> None:
        """Nothing is known of the slot's request."""
        self.taken[slot] = self.num_experts
        self.order[slot] = -1

    def remember(self, slots: Tensor, layer: int, taken: Tensor, order: Tensor) -> None:
        """Of the requests of a step [R]: what their last tokens took [R, K], and the order for the next [R, M]."""
        has_slot = slots >= 0
        self.taken[slots[has_slot], layer] = taken[has_slot].to(torch.int16)
        self.order[slots[has_slot], layer] = order[has_slot].to(torch.int16)

    def nbytes(self) -> int:
        """Bytes held now."""
        return self.taken.nbytes + self.order.nbytes
