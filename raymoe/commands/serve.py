"""`raymoe serve`: a model directory behind the OpenAI API until Ctrl-C."""

import threading
from contextlib import ExitStack

from rich.console import Console

from raymoe.commands.client import get_json
from raymoe.commands.progress import stage
from raymoe.config import ServeConfig
from raymoe.inference.lossy import lossy_line
from raymoe.serving.run import serving


def serve(config: ServeConfig, console: Console) -> None:
    """Starts the Serve application, says where it is, and waits."""
    with ExitStack() as stack:
        with stage(console, "starting") as say:
            url = stack.enter_context(serving(config))
            say(url)
        status = get_json(f"{url}/v1/raymoe/status")
        engine = status["engines"][0]
        console.print(describe_engine(engine), highlight=False)
        if engine["expert_loss"] is not None:
            console.print(
                lossy_line(engine["expert_precision"], engine["expert_loss"]), style="yellow", highlight=False
            )
        console.print(f"try: {url}/v1/models, {url}/v1/raymoe/status; Ctrl-C stops", highlight=False)
        threading.Event().wait()


def describe_engine(engine: dict) -> str:
    """One line of what an engine's status says about its experts."""
    return (
        f"[bold]experts[/bold]     {engine['slots']} of {engine['num_experts']} fit the budget of "
        f"{engine['budget_bytes'] / 1e6:.1f} MB; kernels: {', '.join(engine['kernels']) or 'none yet'}"
    )
