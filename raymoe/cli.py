"""The `raymoe` command."""

import logging
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console

from raymoe import env
from raymoe.cli_compress import COMPRESS_HELP, compress_command
from raymoe.cli_plan import PLAN_HELP, plan_command
from raymoe.cli_shared import Json, shown_command, shown_console
from raymoe.errors import RunFailed

app = typer.Typer(
    help="Train and serve Hugging Face Mixture-of-Experts models on whatever workers a Ray cluster has right now.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
Overrides = Annotated[list[str] | None, typer.Argument(help="key=value, laid over the file; dots reach down.")]


@app.command()
def demo(
    data: Annotated[str, typer.Option(help="Text, JSONL or Parquet file, or a folder of them.")] = "stdlib",
    steps: Annotated[int, typer.Option(min=1, help="Training steps.")] = 320,
    output: Annotated[Path, typer.Option(help="Folder for checkpoint, trace and report.")] = Path("runs/demo"),
    json: Json = None,
) -> None:
    """Train a small MoE model on real text with its experts in Ray actors, save it, serve it, and report."""
    from raymoe.commands.demo import run_demo

    run_demo(data, steps, output, shown_console(), shown_command(), json)


@app.command()
def train(
    config: Annotated[Path, typer.Argument(help="YAML file.")],
    overrides: Overrides = None,
    json: Json = None,
    profile: Annotated[int | None, typer.Option(min=1, help="Steps to trace with the torch profiler.")] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the newest checkpoint, which must be there.")
    ] = False,
) -> None:
    """Train the model that CONFIG describes."""
    from raymoe.config import TrainConfig, load_config

    if profile is not None:
        overrides = [*(overrides or []), f"profile_steps={profile}"]
    checked = load_config(TrainConfig, config, overrides)
    # after the check: it imports torch, transformers and Ray
    from raymoe.commands.train import train as run

    run(checked, shown_console(), shown_command(), json, must_resume=resume)


Run = Annotated[str | None, typer.Option(help="Name of the run, or the beginning of it.")]


@app.command()
def status(
    run: Run = None,
    watch: Annotated[bool, typer.Option("--watch", help="Again and again, until the run ends.")] = False,
    json: Json = None,
) -> None:
    """Show the training runs in the cluster: epoch, workers, experts, snapshots, speed, events."""
    from raymoe.commands.runs import status as show

    show(run, 1.0 if watch else None, shown_console(), shown_command(), json)


@app.command()
def scale(workers: Annotated[int, typer.Argument(min=1, help="Workers to have.")], run: Run = None) -> None:
    """Change the number of workers of a training run while it trains."""
    from raymoe.commands.runs import scale as change

    change(workers, run, shown_console())


@app.command()
def drain(node: Annotated[str, typer.Argument(help="Id or address of a node.")], run: Run = None) -> None:
    """Move the workers of training runs off NODE, so that it can be taken away."""
    from raymoe.commands.runs import drain as leave

    leave(node, run, shown_console())


@app.command()
def serve(model: Annotated[Path, typer.Argument(help="Hugging Face directory.")], overrides: Overrides = None) -> None:
    """Serve MODEL behind an OpenAI-compatible API until Ctrl-C. Overrides: expert_memory=25% port=8000 ..."""
    from raymoe.config import ServeConfig, parse_config

    checked = parse_config(ServeConfig, {"model": str(model)}, overrides)
    from raymoe.commands.serve import serve as run

    run(checked, shown_console())


@app.command()
def generate(
    model: Annotated[Path, typer.Argument(help="Hugging Face directory.")],
    data: Annotated[str, typer.Option(help="Inputs: text, one a line; JSONL or Parquet, one a row; or a folder.")],
    out: Annotated[Path, typer.Option(help="JSONL file to write, an answer a line, as they end.")],
    expert_memory: Annotated[
        str, typer.Option(help="For experts: a share of them all, or bytes such as 512MiB.")
    ] = "50%",
    batch: Annotated[int, typer.Option(help="Inputs that a forward pass holds.")] = 8,
    unit: Annotated[int, typer.Option(help="Batches that exchange inputs which want the same experts.")] = 1,
    max_new_tokens: Annotated[int | None, typer.Option(help="Of an answer; default: the model's own.")] = None,
    temperature: Annotated[float | None, typer.Option(help="0: greedy; default: the model's own way.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Draw among the likeliest tokens of that probability.")] = None,
    top_k: Annotated[int | None, typer.Option(help="Draw among that many likeliest tokens.")] = None,
    seed: Annotated[int, typer.Option(help="Of the first input; each further one has the next.")] = 0,
    text_field: Annotated[str, typer.Option(help="JSONL key or Parquet column that holds the input.")] = "text",
    dtype: Annotated[Literal["float32", "bfloat16"], typer.Option(help="Of weights and computation.")] = "float32",
    expert_precision: Annotated[
        str, typer.Option(help="native (exact), or what `raymoe experts` has made: bf16, int8, int4, int4:32.")
    ] = "native",
    predictors: Annotated[
        str, typer.Option(help="What foretells experts: look_ahead,token_table,transitions,path, or nothing.")
    ] = "look_ahead,token_table,path",
    json: Json = None,
) -> None:
    """Answer a file of inputs in static batches, with the experts of MODEL in a cache of a chosen size; encoder-decoders too."""
    from raymoe.commands.generate import Drawing
    from raymoe.commands.generate import generate as run

    run(model, data, out, expert_memory=expert_memory, batch=batch, unit=unit, text_field=text_field, dtype=dtype,
        expert_precision=expert_precision, predictors=[name.strip() for name in predictors.split(",") if name.strip()],
        drawing=Drawing(max_new_tokens, temperature, top_p, top_k, seed), console=shown_console(), command=shown_command(),
        json=json)  # fmt: skip


@app.command()
def trace(
    model: Annotated[Path, typer.Argument(help="Hugging Face directory.")],
    data: Annotated[str, typer.Option(help="Text, JSONL or Parquet file, or a folder of them.")] = "stdlib",
    output: Annotated[Path, typer.Option(help="Parquet file to write.")] = Path("trace.parquet"),
    ranks: Annotated[int, typer.Option(help="Ranks that the sequences are split over.")] = 1,
    batch: Annotated[int, typer.Option(help="Sequences a step.")] = 16,
    sequence_length: Annotated[int, typer.Option(help="Tokens a sequence.")] = 256,
    steps: Annotated[int, typer.Option(help="Steps.")] = 16,
    seed: int = 0,
    json: Json = None,
) -> None:
    """Run MODEL over text and write down which experts its tokens took, for `raymoe plan --trace`."""
    from raymoe.commands.trace import trace as run

    run(model, data, output, ranks=ranks, batch=batch, sequence_length=sequence_length, steps=steps, seed=seed,
        console=shown_console(), command=shown_command(), json=json)  # fmt: skip


@app.command()
def experts(
    model: Annotated[Path, typer.Argument(help="Hugging Face directory.")],
    precision: Annotated[str, typer.Option(help="bf16, int8, int4, or int4:32 with the size of a group.")],
    data: Annotated[
        str | None, typer.Option(help="Text that the model was not trained on; its loss is measured on it.")
    ] = None,
    sequences: Annotated[int, typer.Option(min=1, help="Of the text.")] = 32,
    sequence_length: Annotated[int, typer.Option(min=2, help="Tokens a sequence.")] = 256,
    expert_memory: Annotated[str, typer.Option(help="For experts while that is measured.")] = "50%",
    seed: int = 0,
    json: Json = None,
) -> None:
    """Put MODEL's experts in fewer bits beside the checkpoint, for `expert_precision`, and measure what that loses."""
    from raymoe.commands.experts import make_experts

    make_experts(model, precision, data, sequences=sequences, sequence_length=sequence_length, expert_memory=expert_memory,
        seed=seed, console=shown_console(), command=shown_command(), json=json)  # fmt: skip


app.command(name="compress", help=COMPRESS_HELP)(compress_command)
app.command(name="plan", help=PLAN_HELP)(plan_command)


predictor = typer.Typer(help="What foretells which experts a model will want.", no_args_is_help=True)
app.add_typer(predictor, name="predictor")


@predictor.command(name="train")
def predictor_train(
    model: Annotated[Path, typer.Argument(help="Hugging Face directory.")],
    data: Annotated[str, typer.Option(help="Text, JSONL or Parquet file, or a folder of them.")] = "stdlib",
    sequences: Annotated[int, typer.Option(help="Sequences to run; one in ten is held out.")] = 400,
    sequence_length: Annotated[int, typer.Option(help="Tokens a sequence.")] = 256,
    steps: Annotated[int, typer.Option(help="Training steps.")] = 600,
    batch: Annotated[int, typer.Option(help="Sequences a training step.")] = 16,
    learning_rate: Annotated[float, typer.Option(help="Of the head; the rest has a tenth of it.")] = 5e-2,
    seed: int = 0,
    json: Json = None,
) -> None:
    """Train a routing-path predictor for MODEL on real text and store it beside the checkpoint."""
    from raymoe.commands.predictor import train_predictor

    train_predictor(model, data, sequences=sequences, sequence_length=sequence_length, steps=steps, batch=batch, seed=seed,
        learning_rate=learning_rate, console=shown_console(), command=shown_command(), json=json)  # fmt: skip


bench = typer.Typer(help="Measure raymoe on this machine.", no_args_is_help=True)
app.add_typer(bench, name="bench")


@bench.command()
def kernels(
    shapes: Annotated[str | None, typer.Option(help="Names, comma-separated: olmoe,mixtral-8x7b*0.5 ...")] = None,
    tokens: Annotated[str | None, typer.Option(help="Batch sizes, comma-separated; on CUDA the planned ones.")] = None,
    tune: Annotated[
        bool, typer.Option("--tune", help="First find this GPU's tiles, and keep them as its table.")
    ] = False,
    output: Annotated[Path, typer.Option(help="Folder for results and logs on CUDA.")] = Path("runs/kernels"),
    json: Json = None,
) -> None:
    """Time the expert kernels of this machine beside others' on the same operands, each with its error."""
    from raymoe.commands.bench import bench_kernels

    bench_kernels(shapes, tokens, tune, output, shown_console(), json)


@bench.command(name="train")
def bench_train(
    workers: Annotated[int, typer.Option(min=1)] = 2,
    load: Annotated[str, typer.Option(help="balanced, hot and smartmoe, comma-separated.")] = "balanced,hot,smartmoe",
    policies: Annotated[
        str | None, typer.Option(help="Placement policies; name:dispatch for another dispatch.")
    ] = None,
    rivals: Annotated[str, typer.Option(help="Other systems, see raymoe.benchmarks.train_rivals.")] = "",
    steps: Annotated[int, typer.Option(min=2, help="Timed steps of each system under each load.")] = 8,
    json: Json = None,
) -> None:
    """Time training steps under placement policies and in other systems, in turns, on one workload."""
    from raymoe.commands.bench import bench_train as run

    run(workers, load, policies, rivals, steps, shown_console(), shown_command(), json)


@bench.command(name="elastic")
def bench_elastic(
    workers: Annotated[int, typer.Option(min=2)] = 3,
    kills: Annotated[int, typer.Option(min=1, help="Workers killed at random, one after another.")] = 20,
    snapshots: Annotated[str, typer.Option(help="Steps between two snapshots in memory, or auto.")] = "auto",
    dense: Annotated[
        Literal["replicated", "sharded"], typer.Option(help="What workers have of parameters that are not experts.")
    ] = "replicated",
    dtype: Annotated[
        Literal["float32", "float64"], typer.Option(help="float64 compares all losses of a long run.")
    ] = "float32",
    seed: int = 0,
    json: Json = None,
) -> None:
    """Kill, add and remove workers of a training run, and time how it goes on."""
    from raymoe.commands.bench import bench_elastic as run

    run(workers, kills, snapshots, dense, dtype, seed, shown_console(), shown_command(), json)


@bench.command(name="inference")
def bench_inference(
    arms: Annotated[
        str | None, typer.Option(help="Names of raymoe.benchmarks.inference_arms, comma-separated.")
    ] = None,
    budgets: Annotated[str, typer.Option(help="Expert memory in percent, comma-separated.")] = "5,10,25,50,100",
    batches: Annotated[str, typer.Option(help="Requests at once, comma-separated.")] = "1,4,16,32",
    rounds: Annotated[int, typer.Option(min=1, help="Timed rounds of each engine.")] = 3,
    tokens: Annotated[int, typer.Option(min=2, help="Tokens generated for each request.")] = 48,
    rivals: Annotated[str, typer.Option(help="Budgets under which other systems run as well; '' for none.")] = "25",
    crowded: Annotated[str, typer.Option(help="Budgets for more requests than a step holds; '' for none.")] = "25",
    dtype: Annotated[
        Literal["float32", "bfloat16"],
        typer.Option(help="bfloat16 says which tokens differ, and whether they are near-ties."),
    ] = "float32",
    folder: Annotated[
        Path | None, typer.Option(help="Where the trained model is kept; it is made there if it is not.")
    ] = None,
    json: Json = None,
) -> None:
    """Compare engines whose experts do not fit: caching, prediction, batching by routes, and what others do."""
    from raymoe.commands.bench import bench_inference as run

    run(arms, budgets, batches, rounds, tokens, rivals, crowded, dtype, folder, shown_console(), shown_command(), json)


@bench.command(name="engines")
def bench_engines(
    batches: Annotated[str, typer.Option(help="Requests at once, comma-separated.")] = "1,4,16,32",
    rounds: Annotated[int, typer.Option(min=1, help="Timed rounds of each system.")] = 7,
    tokens: Annotated[int, typer.Option(min=2, help="Tokens generated for each request.")] = 48,
    json: Json = None,
) -> None:
    """Compare the engine, everything resident, with transformers' `generate` and its own continuous batching."""
    from raymoe.commands.bench import bench_engines as run

    run(batches, rounds, tokens, shown_console(), shown_command(), json)


@bench.command(name="quality")
def bench_quality(
    experiments: Annotated[
        str | None, typer.Option(help="Names of raymoe.benchmarks.quality_compression, comma-separated; default: all.")
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Small models that are trained, one a seed.")] = 3,
    json: Json = None,
) -> None:
    """Train small models on real text, and see what compressed experts lose beside cheaper ways to run fewer."""
    from raymoe.commands.bench import bench_quality as run

    run(experiments, seeds, shown_console(), shown_command(), json)


@bench.command(name="cache")
def bench_cache(
    model: Annotated[Path, typer.Argument(help="Hugging Face directory of a MoE model, with its tokenizer.")],
    data: Annotated[
        str, typer.Option(help="Text, as `raymoe train` takes it; best what the model was not trained on.")
    ],
    sequences: Annotated[int, typer.Option(min=1)] = 32,
    sequence_length: Annotated[int, typer.Option(min=2)] = 192,
    batches: Annotated[str, typer.Option(help="Sequences that decode at once, comma-separated.")] = "1,4,16",
    budgets: Annotated[str, typer.Option(help="Slots in percent of all experts, comma-separated.")] = "5,10,25,50",
    tokens: Annotated[int, typer.Option(min=1, help="Tokens that are replayed, for each batch.")] = 1536,
    json: Json = None,
) -> None:
    """Compare cache policies on a model's own routes with the fewest fetches that anybody could do with."""
    from raymoe.commands.bench import bench_cache as run

    run(model, data, sequences, sequence_length, batches, budgets, tokens, shown_console(), shown_command(), json)


def main() -> None:
    """Entry point: bad input and failed runs are one clear message on stderr, not a traceback."""
    logging.basicConfig(level=env.log_level(), format="%(levelname)s %(name)s: %(message)s")
    try:
        app()
    except (ValueError, FileNotFoundError, RunFailed) as error:
        if env.log_level() == "DEBUG":
            raise
        Console(stderr=True).print(f"[red]error:[/red] {error}", highlight=False, soft_wrap=True)
        sys.exit(1 if isinstance(error, RunFailed) else 2)
    except KeyboardInterrupt:
        Console(stderr=True).print("stopped")
        sys.exit(130)
