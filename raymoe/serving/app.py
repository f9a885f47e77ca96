"""The application that `serve run raymoe.serving:build_app`, a Serve YAML and `raymoe serve` all start."""

from ray.serve import Application

from raymoe.config import ServeConfig
from raymoe.serving.engine import Engine
from raymoe.serving.gateway import Gateway
from raymoe.serving.hosts import ExpertHosts

_IDLE_CHECK_S = 0.2
_CLOSING_S = 10.0


def build_app(args: ServeConfig) -> Application:
    """Builds the Serve application: one `Gateway` in front of `engines` replicas of `Engine`, and who owns the expert hosts."""
    engine = Engine.options(
        num_replicas=args.engines,
        max_ongoing_requests=args.max_ongoing_requests,
        max_queued_requests=args.max_queued_requests,
        # a checkpoint or a budget that does not work now will not at the next attempt either
        max_constructor_retry_count=1,
        # how soon one that has died is replaced
        health_check_period_s=1.0,
        ray_actor_options={
            "num_cpus": args.num_cpus,
            "num_gpus": args.num_gpus,
            "runtime_env": {"env_vars": args.env},
        },
        graceful_shutdown_wait_loop_s=_IDLE_CHECK_S,
        graceful_shutdown_timeout_s=args.drain_s,
    )
    gateway = Gateway.options(
        # never the bottleneck: what waits, waits for an engine, where a full queue is answered in the API's own words
        max_ongoing_requests=args.engines * args.max_ongoing_requests + args.max_queued_requests + 64,
        ray_actor_options={"num_cpus": 0.1},
        graceful_shutdown_wait_loop_s=_IDLE_CHECK_S,
        graceful_shutdown_timeout_s=args.drain_s,
    )
    if args.expert_hosts is None:
        return gateway.bind(args, engine.bind(args))
    hosts = ExpertHosts.options(
        max_constructor_retry_count=1,
        ray_actor_options={"num_cpus": 0.1},
        graceful_shutdown_wait_loop_s=_IDLE_CHECK_S,
        graceful_shutdown_timeout_s=_CLOSING_S,
    )
    return gateway.bind(args, engine.bind(args, hosts.bind(args)))
