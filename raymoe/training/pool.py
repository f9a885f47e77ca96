"""The slots of one rank: the experts that live there, of all layers, and this step's copies of others.

N kept experts, C copy slots, S = N + C slots, E experts of a layer, L MoE layers, m copies a layer that the rank may hold.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from raymoe.models import ExpertLayout, MoELayer, weights_of

Place = tuple[int, int]
"""(layer, expert)."""


def shared_layout(layers: list[MoELayer]) -> ExpertLayout:
    """The layout of every layer's experts.

    Raises:
        ValueError: layers differ, so that an expert of one does not fit a slot of another.
    """
    layout = layers[0].layout
    for layer in layers[1:]:
        if layer.layout != layout:
            shapes = [{field.name: field.shape for field in each.layout.fields} for each in (layers[0], layer)]
            raise ValueError(
                f"experts of '{layers[0].name}' are {shapes[0]}, those of '{layer.name}' {shapes[1]}; training keeps the "
                "experts of all layers in one pool of slots and needs them equal"
            )
    return layout


class ExpertPool:
    """Flat experts [S, numel] with their gradients beside them, allocated once; the kept ones come first.

    The kernels see the pool as a whole, whatever the layer. Copies of a layer have m slots of their own: one set a layer, or,
    with re-materialisation, two sets that the layers take in turns.
    """

    def __init__(self, layers: list[MoELayer], kept: Iterable[Place], dtype: torch.dtype, device: torch.device):
        self._layers = layers
        self.layout = shared_layout(layers)
        self.slots: dict[Place, int] = {place: slot for slot, place in enumerate(sorted(kept))}
        """Slot of each expert that lives here."""
        self.num_kept = len(self.slots)
        self.num_sets, self.copies_a_layer = len(layers), 0
        self.parameters = torch.zeros(self.num_kept, self.layout.numel, dtype=dtype, device=device)
        self._bind()

    @property
    def num_slots(self) -> int:
        return len(self.parameters)

    @property
    def kept(self) -> Tensor:
        """[N, numel], a view: the parameters that live here."""
        return self.parameters[: self.num_kept]

    @property
    def kept_gradients(self) -> Tensor:
        """[N, numel], a view."""
        return self.gradients[: self.num_kept]

    def reserve(self, copies_a_layer: int, num_sets: int) -> None:
        """Makes room for so many copies a layer in so many sets; kept experts keep their values, copies lose them."""
        self.copies_a_layer, self.num_sets = copies_a_layer, num_sets
        self._resize(self.num_kept)

    def rehome(self, kept: Iterable[Place]) -> dict[Place, int]:
        """Says which experts live here from now on; those that stay keep their slots and values.

        Returns:
            The slots of the new ones, which hold what was there before.
        """
        wanted = set(kept)
        stays = {place: slot for place, slot in self.slots.items() if place in wanted}
        free = sorted(set(range(self.num_kept)) - set(stays.values()))
        coming = sorted(wanted - stays.keys())
        missing = len(coming) - len(free)
        if missing > 0:
            free += range(self.num_kept, self.num_kept + missing)
            self.num_kept += missing
            self._resize(self.num_kept - missing)
        fresh = dict(zip(coming, free, strict=False))
        self.slots = stays | fresh
        return fresh

    def copy_slot(self, layer: int, number: int) -> int:
        """Slot of the `number`-th copy that the layer holds in this step."""
        assert number < self.copies_a_layer, "plans keep to the slots"
        return self.num_kept + (layer % self.num_sets) * self.copies_a_layer + number

    def layer_slots(self, layer: int) -> dict[int, int]:
        """{expert: slot} of the layer's experts that live here."""
        return {expert: slot for (place, expert), slot in self.slots.items() if place == layer}

    def slot_table(self, slots: dict[int, int], num_experts: int) -> Tensor:
        """int64 [E + 1]: slot of each expert; the number of slots for those that are not here and for "no expert"."""
        table = torch.full((num_experts + 1,), self.num_slots, dtype=torch.int64)
        if slots:
            table[list(slots)] = torch.tensor(list(slots.values()))
        return table.to(self.parameters.device)

    def weights(self, layer: MoELayer) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor] | None]:
        """(gate_up, down, biases) over all slots, as the kernels take them."""
        return weights_of(layer, self.leaves)

    def weight_gradients(self, layer: MoELayer) -> tuple[Tensor, Tensor]:
        """Where the gradients of gate_up and down are added up, over all slots. Those of biases come by autograd."""
        gate_up, down, _ = weights_of(layer, self._gradient_views)
        return gate_up, down

    def _resize(self, num_before: int) -> None:
        num_slots = self.num_kept + self.num_sets * self.copies_a_layer
        if num_slots == self.num_slots:
            return
        before = self.parameters
        self.parameters = before.new_empty(num_slots, before.shape[1])
        self.parameters[:num_before] = before[:num_before]
        self._bind()

    def _bind(self) -> None:
        # nobody reads a gradient slot that was not zeroed; pages that no copy ever uses cost nothing on a CPU
        self.gradients = torch.empty_like(self.parameters)
        self._gradient_views = self.layout.views(self.gradients)
        # .data: copies come and go between forward and backward, which autograd would take for a mistake
        self.leaves = {name: view.detach() for name, view in self.layout.views(self.parameters.data).items()}
        for name, leaf in self.leaves.items():
            if name.endswith("_bias"):
                leaf.requires_grad_().grad = self._gradient_views[name]
