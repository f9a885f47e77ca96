"""What a lossy precision of experts costs, in words. Without torch: who shows it stays small."""

from typing import Any


def lossy_line(precision: str, loss: dict[str, Any]) -> str:
    """One line. `loss`: as `raymoe experts` has measured it, and put into the precision's file."""
    errors: list[float] = loss["relative_error"]
    line = (
        f"experts in {precision} are not those of the checkpoint: their outputs differ by {sum(errors) / len(errors):.2%} "
        f"(at most {max(errors):.2%} in a layer)"
    )
    found = loss["held_out"]
    if found is None:
        return line + "; what that does to the model was not measured"
    return (
        f"{line}; loss {found['loss']:.4f} instead of {found['native_loss']:.4f} (perplexity {found['perplexity']:.2f} instead of "
        f"{found['native_perplexity']:.2f}) on {found['tokens']:,} tokens of {found['data']}"
    )
