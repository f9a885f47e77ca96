"""The cpu backend on any CPU: where there is no matrix unit for bfloat16, oneDNN and ATen compute the same slowly."""

from collections import Counter
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from raymoe.kernels import ExpertSpec, cpu_products, expert_rows, plan
from raymoe.kernels import backend as backend_module
from tests.kernels.oracle import SPECS, Case, make_case, relative_error, routed, truth

# relative, over a whole tensor: bfloat16's rounding of three products, of the gate between them and of the rows
TOLERANCE = {torch.bfloat16: 2e-2, torch.float16: 4e-3}
# a batched product may add up in another order than a single one, and then a last bit flips here and there
OTHER_ORDER = 1e-3

CPU_SPECS = {name: replace(spec, is_transposed=False) for name, spec in SPECS.items()} | {
    "functions": ExpertSpec(
        gate_fn=lambda pre: F.silu(pre[..., :24]).clamp(max=0.2) * pre[..., 24:],
        post_norm=lambda rows: rows / rows.pow(2).mean(-1, keepdim=True).add(1e-3).sqrt(),
    )
}
# rows of each expert: alone and side by side, few and many, alike and not, idle experts in between and at the ends
COUNTS = {
    "single_rows": [1, 0, 1, 0, 0, 1],
    "narrow": [0, 3, 0, 5, 2, 0],
    "alike": [16] * 11,
    "padded": [13, 16, 14, 12, 11, 15, 0, 13, 9, 16, 12, 14, 16, 10, 0],
    "few_each": [3, 4, 2, 4, 1, 3, 4] * 3,
    "wide": [33, 40],
    "skewed": [90, 1, 2, 0, 1, 0, 0, 1, 3, 1],
    "one": [0, 0, 21, 0],
    "only_one": [17],
    "idle": [0, 0, 0],
}


@pytest.fixture(autouse=True)
def everywhere(monkeypatch):
    monkeypatch.delenv("RAYMOE_KERNELS", raising=False)
    monkeypatch.setattr(backend_module, "has_fast_half", lambda dtype: True)


def make(name: str, spec: ExpertSpec = CPU_SPECS["silu"], **options) -> Case:
    counts = COUNTS[name]
    index = routed(counts, top_k=3, without=4)
    sizes = {"hidden": 40, "inner": 24, "dtype": torch.bfloat16, "with_extras": True}
    return make_case(spec, experts=len(counts), index=index, **(sizes | options))


@torch.no_grad()
def run(case: Case) -> torch.Tensor:
    out = case.run("cpu")
    assert out.dtype == case.hidden.dtype
    return out


def at_slots(case: Case) -> tuple[Case, dict[int, int]]:
    """The case as serving holds it: experts in an order of their own in one buffer, which batches none of them."""
    experts = case.gate_up.shape[0]
    slots = dict(enumerate(torch.randperm(experts + 3, generator=torch.Generator().manual_seed(1)).tolist()[:experts]))
    return case.pooled(slots, experts + 3), slots


@pytest.mark.parametrize("name", CPU_SPECS)
@pytest.mark.parametrize("counts", ["narrow", "padded", "skewed"])
def test_matches_oracle(counts, name):
    case = make(counts, CPU_SPECS[name])
    assert relative_error(run(case), truth(case)[0]) <= TOLERANCE[torch.bfloat16]


@pytest.mark.parametrize("is_large", [False, True], ids=["small", "large"])
@pytest.mark.parametrize("hidden", [40, 37])
@pytest.mark.parametrize("counts", COUNTS)
def test_every_load(monkeypatch, counts, hidden, is_large):
    # from this size on matrices get products of their own
    monkeypatch.setattr(cpu_products, "LARGE_BYTES", 1 if is_large else 1 << 40)
    case = make(counts, hidden=hidden, inner=24 if hidden == 40 else 19)
    want = truth(case)[0]
    assert relative_error(run(case), want) <= TOLERANCE[torch.bfloat16]
    pooled, slots = at_slots(case)
    # in two calls, the rows of other experts are NaN
    experts = list(slots)
    assert relative_error(pooled.rows([experts[::2], experts[1::2]], "cpu", slots), want) <= TOLERANCE[torch.bfloat16]


@pytest.mark.parametrize("counts", ["single_rows", "narrow", "padded", "wide"])
def test_plain_layer_in_float16(counts):
    case = make(counts, dtype=torch.float16, with_extras=False)
    assert relative_error(run(case), truth(case)[0]) <= TOLERANCE[torch.float16]


def products(monkeypatch, case: Case, *, is_large: bool = False) -> Counter[str]:
    """Which products of torch a layer takes, how often."""
    seen: Counter[str] = Counter()

    def spy(module, name):
        real = getattr(module, name)

        def count(*args, **kwargs):
            seen[name] += 1
            return real(*args, **kwargs)

        monkeypatch.setattr(module, name, count)

    monkeypatch.setattr(cpu_products, "LARGE_BYTES", 1 if is_large else 1 << 40)
    spy(F, "grouped_mm")
    for name in ("mv", "mm", "bmm"):
        spy(torch, name)
    run(case)
    return seen


def test_each_way_is_taken(monkeypatch):
    # the tests above reach them all; both projections count
    assert products(monkeypatch, make("single_rows")) == {"mv": 6}
    assert products(monkeypatch, make("narrow")) == {"grouped_mm": 2}
    assert products(monkeypatch, make("narrow"), is_large=True) == {"mm": 6}
    assert products(monkeypatch, make("narrow", hidden=37)) == {"mm": 6}
    assert products(monkeypatch, make("wide")) == {"mm": 4}
    # 8 + 2 + 1 experts: an odd batch is slow
    assert products(monkeypatch, make("alike"))["bmm"] == 2
    assert products(monkeypatch, make("padded"))["bmm"] >= 2
    assert products(monkeypatch, make("few_each"))["bmm"] >= 2
    assert not products(monkeypatch, make("idle"))


@pytest.mark.parametrize("counts", ["narrow", "padded", "skewed", "single_rows"])
def test_idle_experts_and_choices_without_one_reach_nothing(counts):
    case = make(counts)
    want = run(case)
    assert not want.isnan().any()
    assert case.weight.isnan().any()
    with torch.no_grad():
        for e, count in enumerate(COUNTS[counts]):
            if not count:
                case.gate_up[e] = case.down[e] = float("nan")
        case.hidden[(case.index == len(COUNTS[counts])).all(dim=1)] = float("nan")
    assert torch.equal(run(case), want)


def test_nan_of_a_token_stays_with_it():
    case = make("padded")
    with torch.no_grad():
        case.hidden[7] = float("nan")
        # padding computes token 0
        case.hidden[0] = float("nan")
    has_expert = (case.index < len(COUNTS["padded"])).any(dim=1)
    assert has_expert[[0, 7]].all()
    assert run(case).isnan().any(dim=1).nonzero().flatten().tolist() == [0, 7]


@pytest.mark.parametrize("counts", ["alike", "padded", "skewed", "few_each"])
def test_leaves_other_rows_alone(counts):
    # neighbours but for one expert between them, which has rows: no product may take it along
    case = make(counts)
    routing = plan(case.index, len(COUNTS[counts]))
    out = torch.full((case.index.numel(), 40), 7.0, dtype=torch.bfloat16)
    theirs = list(range(0, routing.num_experts, 2))
    weights = (case.gate_up.detach().clone(), case.down.detach().clone())
    for weight in weights:
        weight[1::2] = float("nan")
    expert_rows(case.hidden, *weights, routing, theirs, out=out, backend="cpu")
    is_theirs = torch.isin(routing.expert, torch.tensor(theirs))
    assert (out[~is_theirs] == 7).all()
    assert not (out[is_theirs] == 7).any()
    assert not out.isnan().any()


def splits(experts: int) -> list[list[list[int]]]:
    order = torch.randperm(experts, generator=torch.Generator().manual_seed(2)).tolist()
    third = -(-experts // 3)
    return [
        [[e] for e in reversed(range(experts))],
        [order[:third], order[third:]],
        [list(range(third)), list(range(third, experts))],
    ]


@pytest.mark.parametrize("sizes", [(40, 24), (37, 19), (1024, 32)], ids=str)
@pytest.mark.parametrize("counts", ["single_rows", "narrow", "padded", "skewed", "wide"])
def test_split_and_order_do_not_matter_in_a_slot_buffer(counts, sizes):
    case = make(counts, hidden=sizes[0], inner=sizes[1])
    pooled, slots = at_slots(case)
    want = pooled.rows([list(slots)], "cpu", slots)
    for parts in splits(len(slots)):
        assert torch.equal(pooled.rows(parts, "cpu", slots), want)


@pytest.mark.parametrize("counts", COUNTS)
def test_split_of_dense_weights(counts):
    case = make(counts, hidden=512)
    want = run(case)
    # one call for all experts is what the layer does itself
    assert torch.equal(case.rows([list(range(len(COUNTS[counts])))], "cpu"), want)
    for parts in splits(len(COUNTS[counts])):
        assert relative_error(case.rows(parts, "cpu"), want) <= OTHER_ORDER


@pytest.mark.parametrize("counts", ["single_rows", "narrow", "padded", "skewed", "few_each"])
def test_threads_do_not_matter(counts):
    case = make(counts, hidden=512, inner=64)
    want = run(case)
    torch.set_num_threads(2)
    assert torch.equal(run(case), want)


def test_no_tokens_and_no_choices():
    for index in (torch.empty(0, 2, dtype=torch.int64), torch.empty(5, 0, dtype=torch.int64)):
        case = make_case(dtype=torch.bfloat16, index=index, with_extras=True)
        out = run(case)
        assert out.shape == (index.shape[0], 37)
        assert not out.any()


def test_strided_inputs():
    case = make("padded")
    want = run(case)
    for name in ("hidden", "weight", "scale", "gate_up_bias", "down_bias", "index"):
        tensor = getattr(case, name)
        setattr(case, name, torch.stack([tensor, tensor], dim=-1)[..., 0])
    assert torch.equal(run(case), want)


def test_wants_no_gradient():
    case = make("narrow")
    with pytest.raises(ValueError, match="backend='cpu' cannot run this: a gradient is wanted"):
        case.run("cpu")
    for leaf in case.leaves.values():
        leaf.requires_grad_(False)
    assert not case.run("cpu").requires_grad
