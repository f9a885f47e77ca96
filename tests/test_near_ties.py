import pytest
import torch

from raymoe.benchmarks.near_ties import Differences, NearTies
from tests.tiny_models import tiny_model

PROMPTS = [[5, 9, 31, 7], [64, 2, 18, 40, 11]]


@pytest.fixture
def judged(tmp_path):
    """(a judge of a bf16 model, the tokens that it chooses, those that come last)."""
    torch.manual_seed(0)
    model = tiny_model("olmoe").to(torch.bfloat16).eval()
    with torch.no_grad():
        logits = torch.stack([model(torch.tensor([prompt])).logits[0, -1] for prompt in PROMPTS]).float()
        # another word for each of the chosen ones, which says the same
        best = logits.argmax(dim=1)
        twins = [(int(token) + 1) % logits.shape[1] for token in best]
        for token, twin in zip(best.tolist(), twins, strict=True):
            model.lm_head.weight[twin] = model.lm_head.weight[token]
    model.save_pretrained(tmp_path)
    return NearTies(tmp_path, torch.bfloat16), best.tolist(), twins, logits.argmin(dim=1).tolist()


def test_only_what_rounding_decides_is_a_near_tie(judged):
    ties, best, twins, worst = judged
    reference = [[token, 3] for token in best]
    assert ties.count(PROMPTS, reference, reference) == Differences(0, 0)
    # what comes after the first difference is another text
    assert ties.count(PROMPTS, [[token, 4] for token in twins], reference) == Differences(2, 0)
    assert ties.count(PROMPTS, [[worst[0], 3], [twins[1], 3]], reference) == Differences(1, 1)
