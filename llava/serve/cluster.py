"""Several processes, one a GPU, behind one port: the application as a deployment of Ray Serve. Imports no torch."""

import argparse
import os
import signal
from collections.abc import Sequence
from typing import Any

from llava.errors import OptionError
from llava.serve.limits import Limits


class _Replica:
    """One process with one model."""


def run_replicas(arguments: argparse.Namespace, limits: Limits, keys: Sequence[str]) -> None:
    """Serves with ``arguments.replicas`` processes, each with a model of its own, until it is stopped.

    Each has a GPU if there are enough of them; without any, they share the CPUs.

    Raises:
        OptionError: Ray is not installed, or there are fewer GPUs than processes.
    """
    try:
        import ray
        from ray import serve
    except ImportError:
        raise OptionError("--replicas needs Ray: pip install -c constraints.txt -e '.[cluster]'") from None
    from llava.serve.app import make_app
    from llava.serve.command import open_service

    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # or Ray would tell its makers
    # Not a cluster that the environment names, or that was here once: the replicas are for this machine.
    ray.init("local", include_dashboard=False, log_to_driver=False)
    gpus = int(ray.cluster_resources().get("GPU", 0))
    if 0 < gpus < arguments.replicas:
        raise OptionError(f"--replicas {arguments.replicas}: there are only {gpus} GPUs here")
    # A whole CPU each would leave none for Ray itself on a small machine, which then waits for ever.
    resources: dict[str, Any] = {"num_gpus": 1} if gpus else {"num_cpus": 0.2}

    ingress: Any = serve.ingress(lambda: make_app(open_service(arguments), keys))(_Replica)
    deployed: Any = serve.deployment(
        ingress,
        num_replicas=arguments.replicas,
        ray_actor_options=resources,
        max_ongoing_requests=2 * limits.queue,
    )
    # Ray ends gracefully on Ctrl-C alone.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    serve.start(http_options={"host": arguments.host, "port": arguments.port})
    serve.run(deployed.bind(), blocking=True)
