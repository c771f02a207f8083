"""The launch script: what it would run, on how many processes and with which batch, and what it refuses."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "scripts" / "finetune_task_lora.sh"
NEEDED = ["--data_path", "train.json", "--image_folder", "images", "--model_name_or_path", "org/base"]
OWN_VARIABLES = ("NUM_GPUS", "NNODES", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT", "HOSTFILE", "GLOBAL_BATCH")
OWN_VARIABLES += ("ZERO", "DEVICE", "DRY_RUN", "PYTHON", "PYTHONPATH", "OMP_NUM_THREADS")


def run_script(*arguments: object, cwd: Path = ROOT, script: Path = SCRIPT, **variables: object):
    clean = {name: value for name, value in os.environ.items() if name not in OWN_VARIABLES}
    return subprocess.run(
        ["bash", str(script), *map(str, arguments)],
        cwd=cwd,
        env={**clean, "PYTHON": sys.executable, **{name: str(value) for name, value in variables.items()}},
        capture_output=True,
        text=True,
        timeout=60,
    )


def dry_run(*arguments: object, **options) -> tuple[list[str], list[int]]:
    """The launch line's words, and per device, accumulation, processes, global."""
    done = run_script(*NEEDED, *arguments, DRY_RUN=1, **options)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    batch, line = done.stdout.splitlines()
    return shlex.split(line), [int(number) for number in re.findall(r"\d+", batch)]


def flags_of(words: list[str]) -> dict[str, list[str]]:
    """The training flags of a launch line; each stands there once."""
    flags: dict[str, list[str]] = {}
    for word in words[words.index("llava.train.train") + 1 :]:
        if word.startswith("--"):
            assert word not in flags, f"{word} stands twice"
            values = flags[word] = []
        else:
            values.append(word)
    return flags


def error_line(*arguments: object, **options) -> str:
    """The one line that a refused call prints."""
    done = run_script(*arguments, **options)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
    return done.stderr


FAKE_PYTHON = """#!/bin/sh
if [ "$1" = -c ]; then echo {gpus} {deepspeed}
elif [ "$2" = llava.train.launcher ]; then exec {real} "$@"
else printf "%s\\n" "$@"
fi
"""


@pytest.fixture
def machine(tmp_path):
    """A folder with the files that are needed, and an interpreter that prints the training it would start."""
    folder = tmp_path / "my data"
    (folder / "all images").mkdir(parents=True)
    (folder / "train set.json").write_text("[]")

    def interpreter(gpus: int = 8, deepspeed: bool = True) -> Path:
        fake = folder / "python"
        fake.write_text(FAKE_PYTHON.format(real=sys.executable, gpus=gpus, deepspeed=deepspeed))
        fake.chmod(0o755)
        return fake

    return folder, interpreter


FILES = ["--data_path", "train set.json", "--image_folder", "./all images", "--model_name_or_path", "org/base"]


@pytest.mark.parametrize(
    ("machines", "gpus", "accumulation"), [(1, 8, 2), (1, 4, 4), (1, 2, 8), (1, 1, 16), (2, 8, 1), (4, 2, 2)]
)
def test_the_global_batch_stays_128(machines, gpus, accumulation):
    words, batch = dry_run(NUM_GPUS=gpus, NNODES=machines)
    assert batch == [8, accumulation, gpus * machines, 128]
    assert flags_of(words)["--gradient_accumulation_steps"] == [str(accumulation)]
    assert words[words.index("--nproc_per_node") + 1] == str(gpus)


def test_eight_gpus_are_the_default():
    assert dry_run()[1] == [8, 2, 8, 128]


def test_three_gpus_are_refused_with_what_works():
    message = error_line(*NEEDED, DRY_RUN=1, NUM_GPUS=3)
    assert "3 processes" in message and "128" in message
    assert message.strip().endswith("what works: NUM_GPUS=2, NUM_GPUS=4, GLOBAL_BATCH=120, GLOBAL_BATCH=144")


@pytest.mark.parametrize(
    ("gpus", "machines", "per_device", "wanted"),
    [(3, 1, 8, 128), (7, 1, 4, 128), (8, 1, 5, 128), (1, 1, 8, 4), (2, 3, 8, 128), (5, 1, 8, 128), (6, 2, 16, 100)],
)
def test_every_proposal_works(gpus, machines, per_device, wanted):
    variables = {"NUM_GPUS": gpus, "NNODES": machines, "GLOBAL_BATCH": wanted}
    arguments = ["--per_device_train_batch_size", per_device]
    message = error_line(*NEEDED, *arguments, DRY_RUN=1, **variables)
    proposals = message.strip().split("what works: ")[1].split(", ")
    for proposal in proposals:
        if proposal.startswith("--"):
            _, batch = dry_run(*arguments, *proposal.split(), **variables)
        else:
            name, value = proposal.split("=")
            _, batch = dry_run(*arguments, **{**variables, name: value})
        assert batch[0] * batch[1] * batch[2] == batch[3]


def test_a_new_model_needs_no_weights():
    assert run_script(*NEEDED[:4], "--model_config=config.json", DRY_RUN=1).returncode == 0


def test_the_batch_follows_from_what_is_given():
    assert dry_run("--per_device_train_batch_size", 2)[1] == [2, 8, 8, 128]
    assert dry_run("--per_gpu_train_batch_size", 4)[1] == [4, 4, 8, 128]
    assert dry_run(GLOBAL_BATCH=256)[1] == [8, 4, 8, 256]
    assert dry_run("--gradient_accumulation_steps", 1, NUM_GPUS=3)[1] == [8, 1, 3, 24]
    assert dry_run("--gradient_accumulation_steps", 4, GLOBAL_BATCH=128, NUM_GPUS=4)[1] == [8, 4, 4, 128]


def test_accumulation_that_contradicts_the_batch_is_refused():
    message = error_line(*NEEDED, "--gradient_accumulation_steps", 4, DRY_RUN=1, GLOBAL_BATCH=128)
    assert "gives a global batch of 256" in message and "GLOBAL_BATCH is 128" in message


def test_the_recipe_is_the_published_one():
    words, _ = dry_run()
    flags = {name: value[0] for name, value in flags_of(words).items()}
    published = {
        "--version": "v1",
        "--lora_enable": "True",
        "--lora_r": "128",
        "--lora_alpha": "256",
        "--lora_dropout": "0.05",
        "--learning_rate": "2e-5",
        "--mm_projector_lr": "2e-5",
        "--lr_scheduler_type": "cosine",
        "--warmup_ratio": "0.03",
        "--weight_decay": "0",
        "--num_train_epochs": "3",
        "--model_max_length": "2048",
        "--image_aspect_ratio": "pad",
        "--group_by_modality_length": "True",
        "--cpm_search": "predictions",
        "--bf16": "True",
        "--tf32": "True",
        "--gradient_checkpointing": "True",
        "--deepspeed": str(ROOT / "llava" / "train" / "recipes" / "zero3.json"),
        "--per_device_train_batch_size": "8",
        "--report_to": "none",
    }
    assert published.items() <= flags.items()
    assert flags.items() >= dict(zip(NEEDED[::2], NEEDED[1::2], strict=True)).items()


@pytest.mark.parametrize("given", [["--lora_r", "64"], ["--lora-r", "64"], ["--lora_r=64"], ["--lora-r=64"]])
def test_a_flag_overrides_the_recipe_in_every_spelling(given):
    assert flags_of(dry_run(*given)[0])["--lora_r"] == ["64"]


def test_the_last_of_several_counts_and_lists_stay_whole():
    words, _ = dry_run("--lora_r=64", "--report_to", "wandb", "tensorboard", "--lora-r", "32", "--drop_invalid")
    flags = flags_of(words)
    assert flags["--lora_r"] == ["32"]
    assert flags["--report_to"] == ["wandb", "tensorboard"]
    assert flags["--drop_invalid"] == []


@pytest.mark.parametrize(
    ("given", "dropped"),
    [
        (["--warmup_steps", "10"], "--warmup_ratio"),
        (["--group_by_length", "True"], "--group_by_modality_length"),
        (["--evaluation_strategy", "no"], "--eval_strategy"),
        (["--no_cuda", "True"], "--use_cpu"),
    ],
)
def test_old_names_pass_and_stand_for_the_new(given, dropped):
    flags = flags_of(dry_run(*given)[0])
    assert flags[given[0]] == [given[1]] and dropped not in flags


def test_the_batch_that_is_shown_is_the_one_that_acts_under_both_names():
    words, batch = dry_run("--per_device_train_batch_size", "8", "--per_gpu_train_batch_size", "4")
    assert flags_of(words)["--per_device_train_batch_size"] == ["4"] and batch == [4, 4, 8, 128]


def test_half_precision_of_another_kind_takes_the_place_of_bf16():
    assert flags_of(dry_run("--fp16", "True")[0])["--bf16"] == ["False"]
    assert flags_of(dry_run("--fp16", "False")[0])["--bf16"] == ["True"]


def test_the_configuration_of_deepspeed_is_chosen_once():
    assert flags_of(dry_run(ZERO=2)[0])["--deepspeed"] == [str(ROOT / "llava" / "train" / "recipes" / "zero2.json")]
    assert flags_of(dry_run("--deepspeed", "own.json")[0])["--deepspeed"] == ["own.json"]
    assert "--deepspeed" not in flags_of(dry_run(ZERO=0)[0])
    assert "leave one of them out" in error_line(*NEEDED, "--deepspeed", "own.json", ZERO=2, DRY_RUN=1)


@pytest.mark.parametrize("stage", [2, 3])
def test_the_configurations_leave_sizes_to_the_flags(stage):
    config = json.loads((ROOT / "llava" / "train" / "recipes" / f"zero{stage}.json").read_text())
    assert config["zero_optimization"]["stage"] == stage
    assert config["gradient_clipping"] == config["train_micro_batch_size_per_gpu"] == "auto"
    assert config["bf16"]["enabled"] == config["fp16"]["enabled"] == "auto"
    # Stage 3 checks the whole batch against a world of one process while weights are read on a CPU.
    assert "train_batch_size" not in config and "optimizer" not in config and "scheduler" not in config


def test_cpu_processes():
    words, batch = dry_run(DEVICE="cpu", NUM_GPUS=2, ZERO=2)
    flags = flags_of(words)
    assert batch == [8, 8, 2, 128]
    assert (flags["--use_cpu"], flags["--bf16"], flags["--tf32"]) == (["True"], ["False"], ["False"])
    assert "DS_ACCELERATOR=cpu" in words and any(word.startswith("OMP_NUM_THREADS=") for word in words)
    assert flags_of(dry_run("--bf16", "True", DEVICE="cpu")[0])["--bf16"] == ["True"]
    assert dry_run(DEVICE="cpu")[1] == [8, 16, 1, 128]
    assert "OMP_NUM_THREADS=3" in dry_run(DEVICE="cpu", OMP_NUM_THREADS=3)[0]


def test_use_cpu_as_a_flag_means_the_cpu():
    assert dry_run("--use_cpu", "True") == dry_run("--use_cpu", "True", DEVICE="cpu")
    assert dry_run("--use_cpu", "False")[1] == [8, 2, 8, 128]


def test_several_machines():
    variables = {"NNODES": 2, "NODE_RANK": 1, "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": 23456}
    words, _ = dry_run(**variables)
    launcher = words[: words.index("llava.train.train")]
    for option, value in (("nnodes", "2"), ("node_rank", "1"), ("master_addr", "10.0.0.1"), ("master_port", "23456")):
        assert launcher[launcher.index(f"--{option}") + 1] == value


def test_several_machines_need_an_address_and_a_number(machine):
    folder, interpreter = machine
    variables = {"NNODES": 2, "cwd": folder, "PYTHON": interpreter()}
    assert "MASTER_ADDR" in error_line(*FILES, **variables)
    assert "NODE_RANK" in error_line(*FILES, MASTER_ADDR="10.0.0.1", **variables)


def test_one_machine_finds_a_free_port_or_takes_the_one_given():
    assert "--standalone" in dry_run()[0]
    words, _ = dry_run(MASTER_PORT=23456)
    assert "--standalone" not in words and words[words.index("--master_port") + 1] == "23456"


def test_hostfile(tmp_path):
    hosts = tmp_path / "the hosts"
    hosts.write_text("# ours\nnode1 slots=8\n\nnode2 slots=8  # new\n")
    words, batch = dry_run(HOSTFILE=hosts)
    assert batch == [8, 1, 16, 128]
    assert words[words.index("--hostfile") + 1] == str(hosts)
    assert "deepspeed.launcher.runner" in words and "--no_local_rank" in words
    assert "NUM_GPUS" in error_line(*NEEDED, HOSTFILE=hosts, NUM_GPUS=8, DRY_RUN=1)
    hosts.write_text("node1 slots=3\nnode2 slots=3\n")
    assert "what works: GLOBAL_BATCH=96, GLOBAL_BATCH=144" in error_line(*NEEDED, HOSTFILE=hosts, DRY_RUN=1)
    hosts.write_text("node1 slots=4\n")
    assert dry_run(HOSTFILE=hosts) == dry_run(NUM_GPUS=4)
    hosts.write_text("node1\n")
    assert "slots=" in error_line(*NEEDED, HOSTFILE=hosts, DRY_RUN=1)
    assert "no hostfile" in error_line(*NEEDED, HOSTFILE=tmp_path / "none", DRY_RUN=1)


@pytest.mark.slow
def test_deepspeed_understands_the_line_for_several_hosts(tmp_path):
    """DeepSpeed's own launcher, with ssh and pdsh that only say what they would run on each host."""
    for name, body in (("ssh", "echo 10.0.0.1"), ("pdsh", 'printf "%s\\n" "$@"')):
        (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / name).chmod(0o755)
    (tmp_path / "all images").mkdir()
    (tmp_path / "train set.json").write_text("[]")
    (tmp_path / "hosts").write_text("node1 slots=2\nnode2 slots=2\n")
    options = {"HOSTFILE": "hosts", "DEVICE": "cpu", "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = run_script(*FILES, cwd=tmp_path, **options)
    assert done.returncode == 0, done.stderr
    remote = shlex.split(done.stdout[done.stdout.index("cd ") :])
    assert "--module" in remote and "--no_local_rank" in remote and "--master_addr=10.0.0.1" in remote
    assert remote[remote.index("llava.train.train") + 1 :][:2] == ["--data_path", "train set.json"]
    assert f"export PYTHONPATH={tmp_path}:{ROOT}; " in done.stdout
    assert "space" in error_line(*FILES, cwd=tmp_path / "all images", **{**options, "HOSTFILE": "../hosts"})


def test_the_line_that_is_shown_is_the_one_that_runs(machine):
    folder, interpreter = machine
    variables = {"cwd": folder, "PYTHON": interpreter()}
    flags = [*FILES, "--vision_tower", "it's $HOME", "--output_dir=out put", "--run_name", ""]
    shown = run_script(*flags, DRY_RUN=1, **variables).stdout.splitlines()
    ran = run_script(*flags, **variables)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.splitlines()[0] == shown[0]
    words = shlex.split(shown[1])
    assert words[:3] == ["env", f"PYTHONPATH={ROOT}", str(folder / "python")]
    assert ran.stdout.splitlines()[1:] == words[3:]
    values = flags_of(words)
    assert values["--data_path"] == ["train set.json"] and values["--vision_tower"] == ["it's $HOME"]
    assert values["--output_dir"] == ["out put"] and values["--run_name"] == [""]


def test_it_runs_from_any_folder_also_by_a_relative_path(machine):
    folder, interpreter = machine
    relative = Path(os.path.relpath(SCRIPT, folder))
    done = run_script(*FILES, cwd=folder, script=relative, PYTHON=interpreter(), CDPATH="/:..")
    assert done.returncode == 0 and str(ROOT / "llava" / "train" / "recipes" / "zero3.json") in done.stdout.splitlines()


@pytest.mark.parametrize("left_out", NEEDED[::2])
def test_a_needed_flag_that_is_missing_is_named(left_out):
    place = NEEDED.index(left_out)
    without = NEEDED[:place] + NEEDED[place + 2 :]
    assert left_out in error_line(*without, DRY_RUN=1)
    assert left_out in error_line(*without, left_out, DRY_RUN=1)


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"NUM_GPUS": "eight"}, "NUM_GPUS must be a whole number of at least 1, not 'eight'"),
        ({"NUM_GPUS": "0"}, "NUM_GPUS"),
        ({"NNODES": "-1"}, "NNODES"),
        ({"GLOBAL_BATCH": "12.8"}, "GLOBAL_BATCH"),
        ({"MASTER_PORT": "http"}, "MASTER_PORT"),
        ({"ZERO": "1"}, "ZERO must be 2, 3 or 0, not '1'"),
        ({"DEVICE": "tpu"}, "DEVICE must be cuda or cpu, not 'tpu'"),
        ({"DRY_RUN": "yes"}, "DRY_RUN must be 0 or 1"),
    ],
)
def test_wrong_variables_are_refused(variables, message):
    assert message in error_line(*NEEDED, **{"DRY_RUN": 1, **variables})


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["stray", *NEEDED], "'stray' stands where a flag is expected"),
        ([*NEEDED, "--"], "'--' is no flag"),
        ([*NEEDED, "--lora r", "1"], "'--lora r' is no flag"),
        ([*NEEDED, "--per_device_train_batch_size", "0"], "--per_device_train_batch_size must be"),
        ([*NEEDED, "--gradient_accumulation_steps", "two"], "--gradient_accumulation_steps must be"),
    ],
)
def test_wrong_flags_are_refused(flags, message):
    assert message in error_line(*flags, DRY_RUN=1)


def test_missing_files_are_named_before_anything_starts(machine):
    folder, interpreter = machine
    variables = {"cwd": folder, "PYTHON": interpreter()}
    assert "--data_path: there is no file none.json" in error_line(*FILES, "--data_path=none.json", **variables)
    assert "--image_folder: there is no folder none" in error_line(*FILES, "--image_folder", "none", **variables)
    assert "--data_path" in error_line(*FILES, "--data_path", "all images", **variables)
    assert "no file second.json" in error_line(*FILES, "--data_path", "train set.json", "second.json", **variables)
    assert "--model_name_or_path" in error_line(*FILES, "--model_name_or_path", folder / "none", **variables)
    assert "--vision_tower" in error_line(*FILES, "--vision_tower", "./none", **variables)
    assert "--deepspeed" in error_line(*FILES, "--deepspeed", "none.json", **variables)


def test_the_machine_must_have_what_is_asked_for(machine):
    folder, interpreter = machine
    assert "set NUM_GPUS=4" in error_line(*FILES, cwd=folder, PYTHON=interpreter(gpus=4))
    assert "DEVICE=cpu" in error_line(*FILES, cwd=folder, PYTHON=interpreter(gpus=0))
    assert run_script(*FILES, cwd=folder, PYTHON=interpreter(gpus=4), NUM_GPUS=4).returncode == 0
    assert run_script(*FILES, cwd=folder, PYTHON=interpreter(gpus=0), DEVICE="cpu").returncode == 0
    without = interpreter(deepspeed=False)
    assert "DeepSpeed is not installed" in error_line(*FILES, cwd=folder, PYTHON=without)
    assert run_script(*FILES, cwd=folder, PYTHON=without, ZERO=0).returncode == 0
    assert "DeepSpeed" in error_line(*FILES, "--deepspeed", "train set.json", cwd=folder, PYTHON=without)
    assert "PYTHON=" in error_line(*FILES, cwd=folder, PYTHON="/bin/false")


def test_what_this_machine_has_is_asked_of_torch(machine):
    """The real probe: this interpreter has torch, and no machine has so many GPUs."""
    message = error_line(*FILES, cwd=machine[0], NUM_GPUS=1024, GLOBAL_BATCH=8192, ZERO=0)
    assert "torch sees" in message


def test_help_names_everything():
    done = run_script("--help")
    assert done.returncode == 0 and done.stderr == ""
    words, _ = dry_run()
    for flag in flags_of(words):
        assert flag in done.stdout, flag
    for variable in OWN_VARIABLES[:-2]:
        assert variable in done.stdout, variable
    assert run_script(*NEEDED, "-h", DEVICE="cpu").stdout == done.stdout


def test_slurm_starts_each_node_with_its_number(tmp_path):
    stubs = {
        "scontrol": 'printf "node7\\nnode9\\n"',
        "srun": 'for SLURM_NODEID in 0 1; do export SLURM_NODEID; "$@"; done',
    }
    for name, body in stubs.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / name).chmod(0o755)
    done = run_script(
        *NEEDED,
        "--output_dir",
        "out put",
        script=ROOT / "scripts" / "finetune_slurm.sh",
        PATH=f"{tmp_path}:{os.environ['PATH']}",
        DRY_RUN=1,
        SLURM_JOB_NODELIST="node[7,9]",
        SLURM_JOB_ID=12345,
        SLURM_NNODES=2,
        SLURM_GPUS_ON_NODE=4,
    )
    assert done.returncode == 0, done.stderr
    lines = [shlex.split(line) for line in done.stdout.splitlines() if line.startswith("env ")]
    assert [line[line.index("--node_rank") + 1] for line in lines] == ["0", "1"]
    for line in lines:
        assert line[line.index("--master_addr") + 1] == "node7"
        flags = flags_of(line)
        assert flags["--resume"] == ["auto"] and flags["--output_dir"] == ["out put"]
        assert flags["--gradient_accumulation_steps"] == ["2"]
