"""`raymoe compress`: its options."""

from pathlib import Path
from typing import Annotated

import typer

from raymoe.cli_shared import Json, shown_command, shown_console

COMPRESS_HELP = (
    "Let weaker experts of MODEL act through small vectors: fit them on text, compare on held-out text, write."
)


def compress_command(
    model: Annotated[Path, typer.Argument(help="Hugging Face directory.")],
    data: Annotated[str, typer.Option(help="Text, JSONL or Parquet file, or a folder of them.")],
    out: Annotated[Path, typer.Option(help="Directory to write.")],
    keep: Annotated[
        str, typer.Option(help="Experts of a token that run: a share, a number, or one for each layer: 4,4,2.")
    ] = "0.5",
    method: Annotated[
        str,
        typer.Option(
            help="compressed_experts, shared_vector, drop, drop_renormalised, mean_vector, magnitude or reap."
        ),
    ] = "compressed_experts",
    tie_input: Annotated[
        bool, typer.Option("--tie-input", help="One vector on an expert's input, not two: one product.")
    ] = False,
    train: Annotated[str, typer.Option(help="What is fitted: theta (the vectors), theta+main or all.")] = "theta",
    loss: Annotated[str, typer.Option(help="lm (the text), or distill (the full model's answers).")] = "lm",
    steps: Annotated[int, typer.Option(min=0, help="Of fitting.")] = 200,
    batch: Annotated[int, typer.Option(min=1, help="Sequences a step.")] = 8,
    sequence_length: Annotated[int, typer.Option(min=2, help="Tokens a sequence.")] = 256,
    held_out: Annotated[int, typer.Option(min=2, help="Sequences to compare on.")] = 64,
    learning_rate: Annotated[float, typer.Option(help="Of the vectors.")] = 1e-2,
    seed: int = 0,
    json: Json = None,
) -> None:
    from raymoe.commands.compress import compress_model

    compress_model(model, keep, method, data, out, tie_input=tie_input, train=train, loss=loss, steps=steps, batch=batch,
        sequence_length=sequence_length, held_out=held_out, learning_rate=learning_rate, seed=seed,
        console=shown_console(), command=shown_command(), json=json)  # fmt: skip
