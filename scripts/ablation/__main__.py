"""Trains and evaluates small models of several variants and seeds, and compares them in one table and page.

    python -m scripts.ablation --out FOLDER [--variants clip facl] [--seeds 1 2 3] [--on ray]

Every finished run is kept, so the same command resumes, here or on another machine with the same disk. A run that fails
is named at the end and tried again next time; the table then has the rows that are there.

Exit status: 0 all runs are there, 1 nothing could be done, 3 some runs are not there yet.
"""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from llava.cli import SOME_FAILED, OptionParser, log, positive_int, run_cli
from llava.errors import OptionError, UserError
from llava.files import make_folder
from scripts.ablation import probe, results, runs
from scripts.ablation.runs import VARIANTS, Plan, Workplace

Task = Callable[[], bool]


def build_parser() -> argparse.ArgumentParser:
    """Returns the command line's parser."""
    parser = OptionParser(prog="python -m scripts.ablation", description=__doc__)
    add, plan = parser.add_argument, Plan()
    add("--out", type=Path, required=True, help="where everything is written")
    add("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS), help="rows (default: all)")
    add("--seeds", nargs="+", type=int, default=[1, 2, 3], help="seeds of every row (default: 1 2 3)")
    add("--probe", action="store_true", help="also probe the towers after FACL and after plain cross-entropy")
    add("--data", type=Path, help="training tree of MMFR-Synthetic (default: rendered into the output folder)")
    add("--test", type=Path, help="evaluation tree (default: rendered)")
    add("--config", default=plan.config, help=f"config.json of the small model (default: {plan.config})")
    add("--images", type=positive_int, default=plan.images, help=f"training images (default: {plan.images})")
    add(
        "--evaluated",
        type=positive_int,
        default=plan.evaluated,
        help=f"evaluated images of each class and set (default: {plan.evaluated})",
    )
    add("--sampled", type=positive_int, default=plan.sampled, help="the same with sampled answers (default: 5)")
    add("--epochs", type=float, default=plan.epochs, help=f"of the language model (default: {plan.epochs:g})")
    add("--tower_epochs", type=float, default=plan.tower_epochs, help=f"of towers (default: {plan.tower_epochs:g})")
    add("--batch_size", type=positive_int, default=plan.batch_size, help=f"default: {plan.batch_size}")
    add("--new_tokens", type=positive_int, default=plan.new_tokens, help="longest answer")
    add("--threads", type=positive_int, help="threads of a run (default: all)")
    add("--on", choices=("here", "ray"), default="here", help="where runs are done: here one by one, or by Ray")
    add("--table", action="store_true", help="no run: only compare those that are there")
    return parser


def workplace(options: argparse.Namespace) -> Workplace:
    """Returns where everything lies, and keeps the plan."""
    names = ("config", "images", "evaluated", "sampled", "epochs", "tower_epochs", "batch_size", "new_tokens")
    given = {name: getattr(options, name) for name in names}
    # Ray's workers have other working folders.
    plan = Plan(**{**given, "config": str(Path(options.config).absolute())})
    if min(plan.epochs, plan.tower_epochs) <= 0:
        raise OptionError("--epochs and --tower_epochs must be above 0")
    out = options.out.absolute()
    make_folder(out, "--out")
    runs.keep_plan(plan, out)
    data, test = options.data or out / "data", options.test or out / "test"
    return Workplace(out, data.absolute(), test.absolute(), plan)


def one(kind: str, place: Workplace, name: str, seed: int, threads: int | None) -> bool:
    """Does one task of a kind (``towers``, ``run`` or ``probe``), in whatever process."""
    import torch

    if threads:
        torch.set_num_threads(threads)
    work = {"towers": runs.train_towers, "run": runs.train_and_evaluate, "probe": probe.probe_towers}
    return work[kind](place, name, seed)


def tasks(options: argparse.Namespace) -> list[list[tuple[str, str, int]]]:
    """Returns the tasks, kind and name and seed: those of a later list need all earlier ones."""
    kinds = list(dict.fromkeys(VARIANTS[name].towers for name in options.variants))
    probed = list(probe.KINDS) if options.probe else []
    towers = [("towers", kind, seed) for seed in options.seeds for kind in dict.fromkeys([*kinds, *probed])]
    last = [("probe", kind, seed) for seed in options.seeds for kind in probed]
    last += [("run", name, seed) for seed in options.seeds for name in options.variants]
    return [towers, last]


def work_here(place: Workplace, options: argparse.Namespace) -> list[str]:
    """Does the tasks one by one; returns what is wrong with those that are not done."""
    faults = []
    for kind, name, seed in [task for part in tasks(options) for task in part]:
        log(f"== {kind} {name}, seed {seed}")
        try:
            if not one(kind, place, name, seed, options.threads):
                faults.append(f"{kind} {name}, seed {seed}: another process is at it")
        except UserError as error:
            faults.append(f"{kind} {name}, seed {seed}: {error}")
    return faults


def work_on_ray(place: Workplace, options: argparse.Namespace) -> list[str]:
    """Does the tasks in processes of Ray, on this machine or the cluster that ``RAY_ADDRESS`` names.

    Raises:
        OptionError: Ray is not installed.
    """
    try:
        import ray
    except ImportError:
        raise OptionError("--on ray needs Ray: pip install -c constraints.txt -e '.[cluster]'") from None
    from scripts.ablation.__main__ import one as do  # by its name, which the workers can import

    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # or Ray would tell its makers
    root = str(Path(__file__).parents[2])
    address = os.environ.get("RAY_ADDRESS") or "local"  # without one, not a cluster that was here once either
    ray.init(address, include_dashboard=False, runtime_env={"env_vars": {"PYTHONPATH": root}})
    remote = ray.remote(num_cpus=options.threads or 1)(do)
    faults = []
    try:
        for part in tasks(options):
            waiting = {task: remote.remote(task[0], place, *task[1:], options.threads or 1) for task in part}
            for (kind, name, seed), reference in waiting.items():
                try:
                    if not ray.get(reference):
                        faults.append(f"{kind} {name}, seed {seed}: another process is at it")
                except ray.exceptions.RayTaskError as error:
                    if not isinstance(error.cause, UserError):
                        raise
                    faults.append(f"{kind} {name}, seed {seed}: {error.cause}")
    finally:
        ray.shutdown()
    return faults


def work(options: argparse.Namespace) -> int:
    """Does what the options say; returns the exit status."""
    place = workplace(options)
    faults = []
    if not options.table:
        runs.prepare(place)
        faults = (work_on_ray if options.on == "ray" else work_here)(place, options)
    print(results.write(place, options.seeds))
    for fault in faults:
        log(f"not done: {fault}")
    return SOME_FAILED if faults else 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    return run_cli(lambda: work(build_parser().parse_args(arguments)))


if __name__ == "__main__":
    sys.exit(main())
