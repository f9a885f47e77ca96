"""Serves a routing-path predictor: one token a request and step, with all it needs of the past in a few KiB.

With D the network's own width, far below a head's size times heads, attention is computed on the D-wide states themselves:
q_h . k_h = x A_h m with A_h = Wq_h^T Wk_h, and the values' projection joins the output's (as multi-head latent attention absorbs
its up-projections, DeepSeek-V2, arXiv 2405.04434, section 2.1.2). So a request keeps D numbers a position and block for the
decoder's past, and D a prompt position in all, instead of keys and values of every head.

T tokens of a step, R requests that decode, W window, P prompt tokens, N blocks, A heads, L MoE layers, E experts.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from raymoe.inference.predictors.base import MAX_ROWS, keeps_state, union
from raymoe.inference.predictors.path_model import PathNetwork, load_path_network

_FIRST_SLOTS = 4


class PathPredictor:
    """Predicts, when a token enters a step, which experts of all layers it will take: a lead of a whole step.

    A request's tokens are its prompt until a step has exactly one of them; from then on they are decoded tokens. Prompts are
    not predicted: they want nearly everything. A prompt is encoded in the step that decodes its first token.

    Memory per request, of the `max_requests` that decode at once: 4 D (N W + P) bytes (230 KB at the default sizes). On the CPU.
    """

    name = "path"

    def __init__(self, network: PathNetwork, *, max_requests: int = 256):
        """`network`: in eval mode, float32; `max_requests`: further ones that decode at once are not predicted."""
        self._network, self._shape = network, network.shape
        self._decoder = _StepDecoder(network)
        self._max_requests = max_requests
        self._requests: dict[str, _Request] = {}
        self._free: list[int] = []
        self._num_slots = 0

    @classmethod
    def beside(
        cls, model: Path, *, num_layers: int, num_experts: int, top_k: int, vocab_size: int, max_requests: int = 256
    ) -> "PathPredictor | None":
        """The one that `raymoe predictor train` stored in a checkpoint's directory; None if there is none.

        Raises:
            ValueError: it is there, but damaged or of another model.
        """
        network = load_path_network(
            model, num_layers=num_layers, num_experts=num_experts, top_k=top_k, vocab_size=vocab_size
        )
        return None if network is None else cls(network, max_requests=max_requests)

    @keeps_state
    def step_begins(self, token_ids: Tensor, requests: Sequence[str]) -> dict[int, Tensor]:
        """As `Predictor.step_begins`: for all layers, for the tokens of the step that are being decoded."""
        probability = self.paths(token_ids, requests)
        if probability is None:
            return {}
        said = union(probability.transpose(0, 1))
        return dict(enumerate(said))

    @keeps_state
    def paths(self, token_ids: Tensor, requests: Sequence[str]) -> Tensor | None:
        """`step_begins` before the union: float32 [R, L, E], or None if no request decodes; one or the other, once a step."""
        ids = token_ids.tolist()
        starts = [row for row, name in enumerate(requests) if row == 0 or name != requests[row - 1]]
        slots, decoded = [], []
        for start, end in zip(starts, [*starts[1:], len(ids)], strict=True):
            name = requests[start]
            slot = self._slot_of(name, ids[start:end])
            if slot is not None:
                slots.append(slot)
                decoded.append(ids[start])
        if not slots:
            return None
        logits = self._decoder.step(torch.tensor(slots), torch.tensor(decoded))
        return logits.sigmoid().unflatten(-1, (self._shape.num_layers, self._shape.num_experts))

    def routed(self, layer: int, hidden: Tensor, expert_index: Tensor) -> dict[int, Tensor]:
        """Nothing new: the path does not depend on what the routers said of this token."""
        return {}

    def forget(self, request: str) -> None:
        """The request's slot is free for another."""
        known = self._requests.pop(request, None)
        if known is not None and known.slot is not None:
            self._free.append(known.slot)

    def nbytes(self) -> int:
        """Bytes of requests' states held now."""
        return self._decoder.nbytes()

    def _slot_of(self, name: str, ids: list[int]) -> int | None:
        """Where the request's state is, if `ids` is its next decoded token."""
        known = self._requests.get(name)
        if known is None:
            self._requests[name] = _Request(ids[-self._shape.prompt_tokens :])
            return None
        if len(ids) > 1:
            if known.slot is not None:
                # it was pushed out and reads all it has again
                self._free.append(known.slot)
                known.slot, known.prompt = None, []
            known.prompt = (known.prompt + ids)[-self._shape.prompt_tokens :]
            return None
        if known.slot is None:
            if not self._free and self._num_slots == self._max_requests:
                return None
            known.slot = self._free.pop() if self._free else self._new_slot()
            self._decoder.begin(known.slot, torch.tensor([known.prompt]))
            known.prompt = []
        return known.slot

    def _new_slot(self) -> int:
        self._num_slots += 1
        self._decoder.grow(self._num_slots)
        return self._num_slots - 1


@dataclass
class _Request:
    prompt: list[int] = field(default_factory=list)
    slot: int | None = None


class _StepDecoder:
    """The decoder, a token at a time, over slots that are each at a position of their own."""

    def __init__(self, network: PathNetwork):
        shape = network.shape
        self._network, self._shape = network, shape
        decoder: Any = network.t5.decoder
        self._embed, self._final_norm = decoder.embed_tokens, decoder.final_layer_norm
        self._blocks = [_Block(block, shape.num_heads) for block in decoder.block]
        attention = decoder.block[0].layer[0].SelfAttention
        with torch.no_grad():
            bias = attention.compute_bias(1, shape.window, past_seen_tokens=shape.window - 1)[0, :, 0]
        self._bias_by_age = bias.flip(-1).T.contiguous()
        """[W, A]: of a position that many tokens ago."""
        self._past = torch.zeros(len(self._blocks), 0, shape.window, shape.d_model)
        self._prompt = torch.zeros(0, shape.prompt_tokens, shape.d_model)
        self._prompt_length = torch.zeros(0, dtype=torch.int64)
        self._count = torch.zeros(0, dtype=torch.int64)

    def grow(self, num_slots: int) -> None:
        """Room for at least `num_slots`."""
        have = len(self._count)
        if num_slots <= have:
            return
        more = max(num_slots, 2 * have, _FIRST_SLOTS) - have
        shape = self._shape
        self._past = torch.cat([self._past, torch.zeros(len(self._blocks), more, shape.window, shape.d_model)], dim=1)
        self._prompt = torch.cat([self._prompt, torch.zeros(more, shape.prompt_tokens, shape.d_model)])
        self._prompt_length = torch.cat([self._prompt_length, torch.zeros(more, dtype=torch.int64)])
        self._count = torch.cat([self._count, torch.zeros(more, dtype=torch.int64)])

    def begin(self, slot: int, prompt: Tensor) -> None:
        """A request begins to decode: int64 [1, p], p at most P."""
        encoded = self._network.t5.encoder(input_ids=prompt).last_hidden_state[0]
        self._prompt[slot, : len(encoded)] = encoded
        self._prompt_length[slot] = len(encoded)
        self._count[slot] = 0

    def step(self, slots: Tensor, decoded: Tensor) -> Tensor:
        """slots, decoded int64 [R], distinct slots -> logits float32 [R, L * E]."""
        parts = [self._few(*part) for part in zip(slots.split(MAX_ROWS), decoded.split(MAX_ROWS), strict=True)]
        return torch.cat(parts)

    def nbytes(self) -> int:
        """Bytes of all slots."""
        return self._past.nbytes + self._prompt.nbytes

    def _few(self, slots: Tensor, decoded: Tensor) -> Tensor:
        shape = self._shape
        count = self._count[slots]
        # no more columns than the oldest request fills
        width = min(shape.window, int(count.max()) + 1)
        here = count % shape.window
        age = (count[:, None] - torch.arange(width)) % shape.window
        bias = self._bias_by_age[age].masked_fill((age > count[:, None])[..., None], -torch.inf).transpose(1, 2)
        length = self._prompt_length[slots]
        prompt = self._prompt[slots, : int(length.max())]
        cross_bias = torch.zeros(len(slots), 1, prompt.shape[1])
        cross_bias.masked_fill_((torch.arange(prompt.shape[1]) >= length[:, None])[:, None], -torch.inf)
        hidden = self._embed(decoded)
        for number, block in enumerate(self._blocks):
            normed = block.self_norm(hidden)
            self._past[number, slots, here] = normed
            hidden = hidden + block.self_attention(normed, self._past[number, slots, :width], bias)
            hidden = hidden + block.cross_attention(block.cross_norm(hidden), prompt, cross_bias)
            hidden = block.feed_forward(hidden)
        self._count[slots] = count + 1
        return self._network.head(self._final_norm(hidden))


class _Block:
    def __init__(self, block: Any, num_heads: int):
        self.self_norm = block.layer[0].layer_norm
        self.self_attention = _Absorbed(block.layer[0].SelfAttention, num_heads)
        self.cross_norm = block.layer[1].layer_norm
        self.cross_attention = _Absorbed(block.layer[1].EncDecAttention, num_heads)
        self.feed_forward = block.layer[2]


class _Absorbed:
    """An attention of T5 with its four projections multiplied out, two a head."""

    @torch.no_grad()
    def __init__(self, attention: Any, num_heads: int):
        query, key, value = (
            linear.weight.unflatten(0, (num_heads, -1)) for linear in (attention.q, attention.k, attention.v)
        )
        output = attention.o.weight.unflatten(1, (num_heads, -1))
        self._scores = torch.einsum("akd,ake->ade", query, key)
        self._values = torch.einsum("ake,dak->aed", value, output)

    def __call__(self, hidden: Tensor, memory: Tensor, bias: Tensor) -> Tensor:
        """hidden [R, D], memory [R, W, D], bias [R, A or 1, W] -> [R, D]."""
        query = torch.einsum("rd,ade->rae", hidden, self._scores)
        weight = (torch.einsum("rae,rwe->raw", query, memory) + bias).softmax(-1)
        return torch.einsum("rae,aed->rd", torch.einsum("raw,rwe->rae", weight, memory), self._values)
