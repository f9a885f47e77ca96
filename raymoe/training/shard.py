"""What one rank holds of one layer's experts: those it owns, and this step's copies of others.

N owned experts, C copies, E experts of the layer.
"""

import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn

from raymoe.models import MoELayer, weights_of

# a pool's parameters are strided views on purpose, and so are their gradients
warnings.filterwarnings("ignore", message="grad and param do not obey the gradient layout contract")


class ExpertShard:
    """A pool of flat experts [N + C, numel] with a gradient pool beside it; the owned ones come first.

    The kernels see the pool as a whole; the optimizer sees the owned rows as one parameter.
    """

    def __init__(self, layer: MoELayer, owned: list[int], dtype: torch.dtype, device: torch.device):
        self.layer = layer
        self.owned = owned
        """Experts this rank owns, ascending; expert `owned[i]` lies in slot i."""
        self.on_gradient: Callable[[int], None] | None = None
        """Called with the layer's index once per backward, when the gradients of all its experts are there."""
        self._fields_done = 0
        self._dtype, self._device = dtype, device
        self.pool = torch.zeros(len(owned), layer.layout.numel, dtype=dtype, device=device)
        self.parameter = nn.Parameter(self.pool)
        self._bind()
        self.slots = {expert: slot for slot, expert in enumerate(owned)}

    def reserve(self, num_copies: int) -> None:
        """Makes room for `num_copies` copies beside the owned experts, which keep their values."""
        num_slots = len(self.owned) + num_copies
        if num_slots == len(self.pool):
            return
        pool = torch.zeros(num_slots, self.layer.layout.numel, dtype=self._dtype, device=self._device)
        pool[: len(self.owned)] = self.pool[: len(self.owned)]
        self.pool = pool
        self.parameter.data = pool[: len(self.owned)]
        self._bind()

    def place(self, copies: list[int]) -> None:
        """Gives this step's copies their slots, in the order given."""
        if len(self.owned) + len(copies) > len(self.pool):
            self.reserve(len(copies))
        self.slots = {expert: slot for slot, expert in enumerate([*self.owned, *copies])}

    def slot_table(self) -> Tensor:
        """int64 [E + 1]: slot of each expert that is here; the number of slots for the others and for "no expert"."""
        table = torch.full((self.layer.num_experts + 1,), len(self.pool), dtype=torch.int64)
        if self.slots:
            table[list(self.slots)] = torch.tensor(list(self.slots.values()))
        return table.to(self._device)

    def weights(self) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor] | None]:
        """(gate_up, down, biases) over all slots; their gradients land in `gradient`."""
        return weights_of(self.layer, self.leaves)

    def weight_gradients(self) -> tuple[Tensor, Tensor]:
        """Where the gradients of gate_up and down are added up, over all slots."""
        gate_up, down, _ = weights_of(self.layer, self._gradients)
        return gate_up, down

    @property
    def owned_gradient(self) -> Tensor:
        """[N, numel], a view."""
        return self.gradient[: len(self.owned)]

    def zero_gradient(self) -> None:
        self.gradient.zero_()

    def publish_gradient(self) -> None:
        """Shows the optimizer the gradient of the owned experts."""
        self.parameter.grad = self.owned_gradient

    def _bind(self) -> None:
        self.gradient = torch.zeros_like(self.pool)
        self._gradients = self.layer.layout.views(self.gradient)
        self.leaves = {
            name: view.detach().requires_grad_() for name, view in self.layer.layout.views(self.pool).items()
        }
        for name, leaf in self.leaves.items():
            leaf.grad = self._gradients[name]
            leaf.register_post_accumulate_grad_hook(self._field_done)

    def _field_done(self, _leaf: Tensor) -> None:
        self._fields_done += 1
        if self._fields_done == len(self.leaves):
            self._fields_done = 0
            if self.on_gradient is not None:
                self.on_gradient(self.layer.index)
