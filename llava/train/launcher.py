"""Starts a training by a recipe: the flags, the batch, the processes, and the checks before they start.

``forgery train`` and ``scripts/finetune_task_lora.sh`` stand on it. Imports no torch, so that a plan costs nothing.
"""

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

from llava.cli import run_cli
from llava.errors import OptionError
from llava.files import file_errors
from llava.train.option_names import is_on, read_flags
from llava.train.recipes import GLOBAL_BATCH, deepspeed_config, describe_recipes, read_recipe, recipe_options

ROOT = Path(__file__).parents[2]
OWN_FLAGS = ("recipe", "dry_run", "list_recipes")
"""Flags of the launcher, which the training does not get."""
NEEDED = ("data_path", "image_folder", "model_name_or_path")
_PER_DEVICE, _GLOBAL_BATCH, _PORT = 8, 128, "29500"
_PROBE = """
import importlib.util, torch
print(torch.cuda.device_count(), importlib.util.find_spec("deepspeed") is not None)"""

Flags = dict[str, list[str]]


@dataclass(frozen=True)
class Environment:
    """The environment variables that the launcher reads, in small letters; empty where they are not set."""

    num_gpus: str = ""
    nnodes: str = ""
    node_rank: str = ""
    master_addr: str = ""
    master_port: str = ""
    hostfile: str = ""
    global_batch: str = ""
    zero: str = ""
    device: str = ""
    dry_run: str = ""
    python: str = ""
    pythonpath: str = ""
    omp_num_threads: str = ""

    @classmethod
    def read(cls, variables: Mapping[str, str]) -> "Environment":
        """Reads them and checks those that stand for themselves.

        Raises:
            OptionError: A value is invalid.
        """
        env = cls(**{field.name: variables.get(field.name.upper(), "") for field in fields(cls)})
        if env.device not in ("", "cuda", "cpu"):
            raise OptionError(f"DEVICE must be cuda or cpu, not '{env.device}'")
        if env.dry_run not in ("", "0", "1"):
            raise OptionError(f"DRY_RUN must be 0 or 1, not '{env.dry_run}'")
        if env.zero not in ("", "0", "2", "3"):
            raise OptionError(f"ZERO must be 2, 3 or 0, not '{env.zero}'")
        return env


@dataclass(frozen=True)
class Processes:
    """How many processes run where.

    Attributes:
        per_node: On each machine.
        nodes: Machines.
        total: On all machines.
        hostfile: DeepSpeed's list of several hosts; empty where this machine, or each by itself, starts its own.
    """

    per_node: int
    nodes: int
    total: int
    hostfile: str = ""


@dataclass(frozen=True)
class Batch:
    """Samples: of a device in a micro-batch, micro-batches in an optimizer step, and of the whole step."""

    per_device: int
    accumulation: int
    total: int


@dataclass(frozen=True)
class Plan:
    """What will run: processes, batch, flags of the training, device, ZeRO stage, and the training's module."""

    processes: Processes
    batch: Batch
    flags: Flags
    on_cpu: bool
    zero: str
    module: str = "llava.train.train"

    def __str__(self) -> str:
        batch = self.batch
        return (
            f"batch: {batch.per_device} per device x {batch.accumulation} accumulation x {self.processes.total} "
            f"processes = {batch.total} global"
        )


# --- processes and batch


def positive(name: str, text: str) -> int:
    """Reads a whole number above zero.

    Raises:
        OptionError: It is none.
    """
    if not re.fullmatch(r"[1-9][0-9]*", text):
        raise OptionError(f"{name} must be a whole number of at least 1, not '{text}'")
    return int(text)


def count_processes(env: Environment, *, on_cpu: bool, starts: bool) -> Processes:
    """Returns how many processes run where.

    Args:
        env: The environment.
        on_cpu: Whether one process, and not eight, is the default.
        starts: Whether they are started, which takes the address and number of each of several machines.

    Raises:
        OptionError: A value is invalid, missing, or excluded by another.
        FileError: The host file cannot be read.
    """
    positive("MASTER_PORT", env.master_port or _PORT)
    if env.hostfile:
        if env.num_gpus or env.nnodes:
            raise OptionError("HOSTFILE already says how many GPUs there are; leave out NUM_GPUS and NNODES")
        slots = read_hostfile(Path(env.hostfile))
        if len(slots) > 1:
            if re.search(r"\s", str(Path.cwd())):
                raise OptionError("DeepSpeed starts several hosts only from a folder without a space in its name")
            return Processes(max(slots), 1, sum(slots), env.hostfile)
        return Processes(slots[0], 1, slots[0])  # one host is this machine, which needs no ssh
    per_node = positive("NUM_GPUS", env.num_gpus or ("1" if on_cpu else "8"))
    nodes = positive("NNODES", env.nnodes or "1")
    if nodes > 1 and starts:
        if not env.master_addr:
            raise OptionError(f"NNODES={nodes} needs MASTER_ADDR, the address of the first node")
        if not re.fullmatch("[0-9]+", env.node_rank):
            raise OptionError(f"NNODES={nodes} needs NODE_RANK, this node's number from 0")
    return Processes(per_node, nodes, per_node * nodes)


def read_hostfile(file: Path) -> list[int]:
    """Returns the number of processes on each host of a DeepSpeed host file.

    Raises:
        OptionError: There is no such file, or a line is invalid.
    """
    if not file.is_file():
        raise OptionError(f"there is no hostfile {file}")
    with file_errors(file, "read"):
        lines = [line.partition("#")[0].split() for line in file.read_text("utf-8", "replace").splitlines()]
    found = [re.fullmatch(r"slots=([1-9][0-9]*)", line[1] if len(line) > 1 else "") for line in lines if line]
    slots = [int(match[1]) for match in found if match]
    if not slots or len(slots) < len(found):
        raise OptionError(f"each line of {file} must read '<host> slots=<GPUs>'")
    return slots


def plan_batch(options: Mapping[str, Sequence[str]], processes: Processes, global_batch: str) -> Batch:
    """Divides the global batch over devices and accumulation.

    Args:
        options: Flags and recipe.
        processes: Where it runs.
        global_batch: The global batch that was asked for; empty: what follows from ``options``, else 128.

    Raises:
        OptionError: It cannot be divided so; the message says what would work.
    """
    per_device = positive("--per_device_train_batch_size", _first(options, "per_device_train_batch_size", _PER_DEVICE))
    each = per_device * processes.total
    given = _first(options, "gradient_accumulation_steps")
    if given:
        accumulation = positive("--gradient_accumulation_steps", given)
        total = positive("GLOBAL_BATCH", global_batch or str(each * accumulation))
    else:
        total = positive("GLOBAL_BATCH", global_batch or str(_GLOBAL_BATCH))
        accumulation = total // each
    if total % each:
        ways = ", ".join(batch_proposals(total, per_device, processes))
        raise OptionError(
            f"a global batch of {total} is no multiple of {per_device} per device x {processes.total} processes; "
            f"what works: {ways}"
        )
    if each * accumulation != total:
        raise OptionError(
            f"--gradient_accumulation_steps {accumulation} gives a global batch of {each * accumulation}, but "
            f"GLOBAL_BATCH is {total}; leave one of them out"
        )
    return Batch(per_device, accumulation, total)


def batch_proposals(total: int, per_device: int, processes: Processes) -> list[str]:
    """Returns settings near a global batch that the devices cannot share evenly, each of which would work."""
    each, ways = per_device * processes.total, []
    if total % processes.total == 0:
        share = total // processes.total
        size = next(size for size in range(min(per_device, share), 0, -1) if share % size == 0)
        ways.append(f"--per_device_train_batch_size {size}")
    elif not processes.hostfile:
        count = processes.per_node
        for numbers in (range(count - 1, 0, -1), range(count + 1, 2 * count + 1)):
            near = (number for number in numbers if total % (number * processes.nodes * per_device) == 0)
            ways += [f"NUM_GPUS={number}" for number in list(near)[:1]]
    if total > each:
        ways.append(f"GLOBAL_BATCH={total // each * each}")
    return [*ways, f"GLOBAL_BATCH={(total // each + 1) * each}"]


def _first(options: Mapping[str, Sequence[str]], name: str, default: object = "") -> str:
    return next(iter(options.get(name, ())), "") or str(default)


# --- the plan


def make_plan(flags: Flags, recipe: Flags, env: Environment, *, starts: bool) -> Plan:
    """Joins flags, recipe and environment.

    Args:
        flags: Flags of the training that were given.
        recipe: What ``read_recipe`` gives.
        env: The environment.
        starts: Whether it is to be started.

    Raises:
        OptionError: They contradict each other, or the batch cannot be divided.
    """
    on_cpu = env.device == "cpu" or is_on(flags, "use_cpu") or is_on(flags, "no_cuda")
    if env.zero and "deepspeed" in flags:
        raise OptionError("ZERO and --deepspeed both choose a configuration; leave one of them out")
    added = recipe_options(recipe, flags, on_cpu=on_cpu)
    processes = count_processes(env, on_cpu=on_cpu, starts=starts)
    published = "" if "gradient_accumulation_steps" in flags else _first(recipe, GLOBAL_BATCH)
    batch = plan_batch({**added, **flags}, processes, env.global_batch or published)
    zero = env.zero or "3"
    if zero != "0" and "deepspeed" not in flags and (env.zero or "deepspeed" not in added):
        added["deepspeed"] = [deepspeed_config(f"zero{zero}")]
    sizes = {"per_device_train_batch_size": batch.per_device, "gradient_accumulation_steps": batch.accumulation}
    added |= {name: [str(number)] for name, number in sizes.items()}
    whole = {**flags, **{name: values for name, values in added.items() if not flags.get(name)}}
    return Plan(processes, batch, whole, on_cpu, zero)


def make_network_plan(flags: Flags, recipe: Flags, env: Environment, *, starts: bool) -> Plan:
    """Joins flags, recipe and environment for a plain network: one process unless more are asked for, no ZeRO.

    Raises:
        OptionError: They contradict each other.
    """
    on_cpu = env.device == "cpu" or is_on(flags, "use_cpu") or is_on(flags, "no_cuda")
    whole = {**recipe_options(recipe, flags, on_cpu=on_cpu), **flags}
    processes = count_processes(replace(env, num_gpus=env.num_gpus or "1"), on_cpu=on_cpu, starts=starts)
    each = positive("--per_device_train_batch_size", _first(whole, "per_device_train_batch_size", _PER_DEVICE))
    accumulation = int(_first(whole, "gradient_accumulation_steps", 1))
    batch = plan_batch(whole, processes, env.global_batch or str(each * accumulation * processes.total))
    whole["gradient_accumulation_steps"] = [str(batch.accumulation)]
    return Plan(processes, batch, whole, on_cpu, "0", "llava.train.networks")


def missing_flags(flags: Mapping[str, Sequence[str]]) -> list[str]:
    """Returns the flags without which nothing can be trained, of those that were not given."""
    new_model = bool(_first(flags, "model_config"))
    return [name for name in NEEDED if not _first(flags, name) and not (name == NEEDED[-1] and new_model)]


def launch_line(plan: Plan, env: Environment) -> list[str]:
    """Returns the command that starts all processes of this machine, or of all hosts of a host file."""
    processes, python = plan.processes, env.python or sys.executable
    line = ["env", *_python_path(env.pythonpath)]
    if plan.on_cpu:
        # Processes that share a CPU must share its cores as well, or they wait for each other's threads.
        share = max(1, (os.cpu_count() or 1) // processes.per_node)
        line += ["DS_ACCELERATOR=cpu", f"OMP_NUM_THREADS={env.omp_num_threads or share}"]
    if processes.hostfile:
        line += [python, "-m", "deepspeed.launcher.runner", "--hostfile", processes.hostfile]
        line += ["--master_addr", env.master_addr] if env.master_addr else []
        line += ["--master_port", env.master_port] if env.master_port else []
        line += ["--no_local_rank", "--module"]
    else:
        line += [python, "-m", "llava.train.launch", *_torchrun_options(processes, env), "-m"]
    words = [word for name, values in plan.flags.items() for word in (f"--{name}", *values)]
    return [*line, plan.module, *words]


def _torchrun_options(processes: Processes, env: Environment) -> list[str]:
    count = ["--nproc_per_node", str(processes.per_node)]
    if processes.nodes == 1 and not env.master_port:
        return ["--standalone", *count]
    address = "127.0.0.1" if processes.nodes == 1 else env.master_addr or "<MASTER_ADDR>"
    rank = ["--nnodes", str(processes.nodes), "--node_rank", env.node_rank or "0"]
    return [*rank, *count, "--master_addr", address, "--master_port", env.master_port or _PORT]


def _python_path(given: str) -> list[str]:
    """The setting by which another interpreter finds this package; an installed one is found without."""
    if ROOT.name in ("site-packages", "dist-packages"):
        return []
    others = [folder for folder in given.split(os.pathsep) if folder and Path(folder) != ROOT]
    return [f"PYTHONPATH={os.pathsep.join([str(ROOT), *others])}"]


# --- what must be there before anything starts


def check_files(flags: Mapping[str, Sequence[str]]) -> None:
    """Checks that files and folders of the command line exist.

    Raises:
        OptionError: One does not.
    """
    for file in flags["data_path"]:
        if not Path(file).is_file():
            raise OptionError(f"--data_path: there is no file {file}")
    for folder in flags["image_folder"]:
        if not Path(folder).is_dir():
            raise OptionError(f"--image_folder: there is no folder {folder}")
    for name in ("model_name_or_path", "vision_tower", "dino_weights"):
        path = _first(flags, name)
        # Other names may be a hub's; the model's loader tells.
        if path.startswith(("/", "./", "../")) and not Path(path).exists():
            raise OptionError(f"--{name}: there is no {path}")
    config = deepspeed_config(_first(flags, "deepspeed"))
    if config and not config.startswith("{") and not Path(config).is_file():
        raise OptionError(f"--deepspeed: there is no file {config}")


def check_machine(plan: Plan, env: Environment) -> None:
    """Checks that the interpreter has the libraries, and this machine the GPUs.

    Raises:
        OptionError: Something is missing.
    """
    python, wanted = env.python or sys.executable, plan.processes.per_node
    try:
        probe = subprocess.run([python, "-c", _PROBE], capture_output=True, text=True, check=True, timeout=300)
        gpus, has_deepspeed = probe.stdout.split()
    except (OSError, subprocess.SubprocessError, ValueError):
        raise OptionError(
            f"{python} cannot import torch; install the project there, or name another interpreter with PYTHON=…"
        ) from None
    if has_deepspeed == "False" and (plan.zero != "0" or plan.processes.hostfile or "deepspeed" in plan.flags):
        raise OptionError(
            f"DeepSpeed is not installed in {python}; DS_BUILD_OPS=0 pip install deepspeed brings it, ZERO=0 trains "
            "without it"
        )
    if plan.on_cpu or plan.processes.hostfile:
        return
    if not int(gpus):
        raise OptionError("torch sees no GPU on this machine; DEVICE=cpu trains on its CPU")
    if int(gpus) < wanted:
        raise OptionError(f"NUM_GPUS is {wanted}, but torch sees {gpus} on this machine; set NUM_GPUS={gpus}")


# --- the command


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status.

    Without ``--recipe`` it trains in this process, with the flags of ``llava.train.train``.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not any(word[2:].partition("=")[0].replace("-", "_") in OWN_FLAGS for word in words if word.startswith("--")):
        if any(word.partition("=")[0] == "--network" for word in words):
            from llava.train.networks import main as train_network

            return train_network(words)
        from llava.train.train import main as train

        return train(words)
    return run_cli(lambda: launch(words))


def launch(words: Sequence[str]) -> None:
    """Plans a training, shows the plan, and becomes the process that starts it.

    Raises:
        OptionError: Flags or environment are invalid; nothing was started.
    """
    asks_help = any(word in ("--help", "-h") for word in words)
    flags = read_flags([word for word in words if word not in ("--help", "-h")])
    if is_on(flags, "list_recipes"):
        print(describe_recipes())
        return
    own = {name: flags.pop(name) for name in OWN_FLAGS if name in flags}
    name, *stray = own.get("recipe") or [""]
    if stray:
        raise OptionError(f"'{stray[0]}' stands where a flag is expected")
    if not name:
        raise OptionError("--recipe needs the name or file of a recipe; --list-recipes shows those that there are")
    recipe = read_recipe(name)
    if asks_help and "network" in recipe:
        print(HELP + _listed(recipe) + EXAMPLES)
        return
    if asks_help:
        print(HELP + _listed(make_plan({}, recipe, Environment(), starts=False).flags) + EXAMPLES)
        return
    env = Environment.read(os.environ)
    plans_only = is_on(own, "dry_run")
    if "network" in recipe or "network" in flags:
        _launch_network(flags, recipe, env, starts=not plans_only and env.dry_run != "1")
        return
    if (missing := missing_flags(flags)) and not plans_only:
        raise OptionError(f"--{missing[0]} is needed; --help explains")
    starts = not plans_only and env.dry_run != "1"
    plan = make_plan(flags, recipe, env, starts=starts)
    if starts:
        check_files(plan.flags)
        check_machine(plan, env)
    line = launch_line(plan, env)
    print(plan, flush=True)
    if starts:
        os.execvp(line[0], line)
    print(shlex.join(line))
    if missing:
        print(f"to start it, add {', '.join(f'--{name}' for name in missing)}", file=sys.stderr)


def _launch_network(flags: Flags, recipe: Flags, env: Environment, *, starts: bool) -> None:
    """Plans the training of a plain network, shows the plan, and becomes the process that starts it."""
    plan = make_network_plan(flags, recipe, env, starts=starts)
    line = launch_line(plan, env)
    if starts:
        if not _first(flags, "data_path"):
            raise OptionError("--data_path is needed; --help explains")
        check_machine(plan, env)
    print(plan, flush=True)
    if starts:
        os.execvp(line[0], line)
    print(shlex.join(line))


def _listed(flags: Flags) -> str:
    return "".join(f"  --{name} {' '.join(values)}\n" for name, values in flags.items())


HELP = """\
Trains by a recipe, on 8 GPUs, one GPU, several nodes, or a CPU. scripts/finetune_task_lora.sh is this command with the
recipe fakereasoning, which fine-tunes with LoRA as published.

  bash scripts/finetune_task_lora.sh --data_path train.json --image_folder images \\
      --model_name_or_path path/or/hub-id --vision_tower openai/clip-vit-large-patch14-336 [any other flag]

Flags go to `python -m llava.train.train`, whose --help lists them all: LLaVA's, and those of transformers'
TrainingArguments, also by the names of older versions. `--flag value`, `--flag=value`, `-` and `_` are alike. A flag
that is given overrides the recipe's; given twice, the last one counts. It runs from any folder; relative paths are
those of the folder where it was called.

  --recipe NAME|FILE.yaml     options that hold where no flag is given; --list-recipes names those in the package
  --dry-run                   prints the batch and the launch line, also without data, and starts nothing
  --data_path FILE…           training records (JSON); needed
  --image_folder FOLDER       what the records' image paths start from; needed
  --model_name_or_path PATH   weights to start from, folder or hub id; needed, or --model_config for a new model
  --vision_tower PATH         CLIP tower, folder or hub id, where the weights do not hold it
  --dino_weights PATH         DINOv2 tower, .pth or folder, where the weights do not hold it
  --output_dir FOLDER         where checkpoints and the result go
  --resume auto               resumes from the newest checkpoint in --output_dir

Environment:
  NUM_GPUS=8                  processes on each machine, one a GPU (with DEVICE=cpu the default is 1)
  GLOBAL_BATCH=…              samples an optimizer step (default: the recipe's, else 128).
                              --gradient_accumulation_steps is computed from it; a batch that
                              cannot be made exactly is refused. Who gives --gradient_accumulation_steps but no
                              GLOBAL_BATCH gets the batch that follows from it; both must agree.
  ZERO=3                      2 or 3: DeepSpeed's ZeRO stage by the package's zero<stage>.json; 0: without DeepSpeed.
                              --deepspeed FILE takes another configuration.
  DEVICE=cuda                 cpu: processes on the CPU, without bf16 and tf32 unless they are asked for
  NNODES=1 NODE_RANK=0        machines, and the number of this one. Run the command on each; MASTER_ADDR (the first
  MASTER_ADDR MASTER_PORT     machine; needed) and MASTER_PORT (default 29500) are the same everywhere. See
                              scripts/finetune_slurm.sh for Slurm.
  HOSTFILE=FILE               several machines from one: lines '<host> slots=<GPUs>', started by DeepSpeed over ssh,
                              instead of NUM_GPUS and NNODES; needs pdsh
  DRY_RUN=1                   as --dry-run, but checks that no needed flag is missing; looks at no file and no GPU
  PYTHON=…                    interpreter; the script's default: .venv/bin/python of its repository, else python

The recipe:
"""
EXAMPLES = """
Examples:
  NUM_GPUS=1 bash scripts/finetune_task_lora.sh …                              one GPU, the same global batch
  NUM_GPUS=4 GLOBAL_BATCH=64 bash scripts/finetune_task_lora.sh …              another global batch
  DEVICE=cpu NUM_GPUS=2 ZERO=2 bash scripts/finetune_task_lora.sh … --max_steps 10
  DRY_RUN=1 NNODES=2 bash scripts/finetune_task_lora.sh …                      what two machines of 8 would run
  python -m llava.train.launcher --recipe my.yaml --dry-run                    a recipe of your own
"""

if __name__ == "__main__":
    sys.exit(main())
