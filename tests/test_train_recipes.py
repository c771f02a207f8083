"""Recipes as files of the package, and the launcher that starts trainings by them."""

import subprocess
import sys
from pathlib import Path

import pytest

from llava.errors import OptionError
from llava.train import launcher, networks, recipes
from llava.train import train as train_module
from llava.train.arguments import TrainingArguments, parse_arguments, parse_groups
from llava.train.launcher import Batch, Environment, Plan, Processes, batch_proposals, launch_line, plan_batch
from llava.train.option_names import read_flags
from llava.train.recipes import deepspeed_config, list_recipes, read_recipe, recipe_options
from tests.test_finetune_script import NEEDED, OWN_VARIABLES
from tests.training_runs import ROOT

ONE = Processes(1, 1, 1)


@pytest.fixture(autouse=True)
def own_environment(monkeypatch):
    for name in OWN_VARIABLES:
        monkeypatch.delenv(name, raising=False)


def error_of(capsys, *arguments: str) -> str:
    """The one line that a refused command prints."""
    assert launcher.main(list(arguments)) == 1
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith("error: ") and captured.err.count("\n") == 1, captured.err
    return captured.err


# --- recipes


NETWORKS = [name for name in list_recipes() if "network" in read_recipe(name)]


@pytest.mark.parametrize("name", NETWORKS)
def test_every_recipe_of_a_plain_network_is_one_that_its_training_understands(name):
    kinds = (networks.NetworkArguments, TrainingArguments)
    options, training = parse_groups(networks.build_parser(), kinds, ["--recipe", name, "--use_cpu"])
    assert options.network in networks.known_networks() and training.output_dir


@pytest.mark.parametrize("name", [name for name in list_recipes() if name not in NETWORKS])
def test_every_recipe_is_one_that_training_understands(name):
    model, data, training = parse_arguments([*NEEDED, "--recipe", name, "--use_cpu"])
    assert training.output_dir and data.version and model.lora_r > 0
    assert not {"per_device_train_batch_size", "gradient_accumulation_steps"} & set(read_recipe(name))


def test_flags_override_the_recipe_under_all_of_their_names():
    given = ["--lora-r=64", "--warmup_steps", "5", "--model_max_len", "77", "--use_cpu"]
    model, data, training = parse_arguments([*NEEDED, *given, "--recipe", "fakereasoning"])
    assert (model.lora_r, model.lora_alpha, model.lora_dropout) == (64, 256, 0.05)
    assert (training.warmup_steps, data.model_max_length, training.learning_rate) == (5, 77, 2e-5)
    assert (training.use_cpu, training.bf16, training.tf32) == (True, False, False)


def test_a_recipe_fits_the_device():
    recipe = read_recipe("fakereasoning")
    assert recipe_options(recipe, {}, on_cpu=False)["bf16"] == ["True"]
    assert recipe_options(recipe, {"fp16": ["True"]}, on_cpu=False)["bf16"] == ["False"]
    on_cpu = recipe_options(recipe, {"bf16": ["True"]}, on_cpu=True)
    assert on_cpu["use_cpu"] == ["True"] and on_cpu["tf32"] == ["False"] and "bf16" not in on_cpu


def test_a_file_is_a_recipe_too(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("# mine\nlora-r: 4\nlora_enable: True\nreport_to: [none]\noutput_dir: x\n")
    model, _, training = parse_arguments([*NEEDED, "--recipe", str(file), "--use_cpu"])
    assert model.lora_r == 4 and training.report_to == [] and training.output_dir == "x"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("lerning_rate: 1\n", "unrecognized argument --lerning_rate; did you mean --learning-rate?"),
        ("lora_r: many\n", "lora_r"),
        ("lora_r: {a: 1}\n", "lora_r: the value must be one value or a list"),
        ("lora_r: [1\n", "is not YAML"),
        ("- lora_r\n", "option: value"),
        ("", "option: value"),
    ],
)
def test_a_faulty_recipe_is_named_in_one_line(tmp_path, capsys, content, message):
    file = tmp_path / "mine.yaml"
    file.write_text(content)
    assert train_module.main([*NEEDED, "--use_cpu", "--recipe", str(file)]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ") and message in error


def test_an_unknown_recipe_is_refused_with_those_that_there_are(capsys):
    assert "fakereasoning" in error_of(capsys, "--recipe", "fakereasonin", "--dry-run")
    assert train_module.main([*NEEDED, "--recipe", "fakereasonin"]) == 1
    assert f"neither a recipe ({', '.join(list_recipes())}) nor a file" in capsys.readouterr().err
    assert "--list-recipes" in error_of(capsys, "--dry-run")


def test_recipes_are_listed(capsys):
    assert launcher.main(["--list-recipes"]) == 0
    listed = capsys.readouterr().out
    assert listed.startswith("fakereasoning ") and "2503.21210" in listed
    assert [line.split()[0] for line in listed.splitlines()] == list_recipes()
    with pytest.raises(SystemExit) as ended:
        parse_arguments(["--list_recipes"])
    assert ended.value.code == 0 and capsys.readouterr().out == listed


@pytest.mark.parametrize("name", ["zero2", "scripts/zero2.json", str(ROOT / "scripts" / "zero2.json")])
def test_the_packaged_configurations_of_deepspeed_have_short_and_old_names(name):
    assert deepspeed_config(name) == str(recipes.FOLDER / "zero2.json")


def test_a_file_of_ones_own_configures_deepspeed(tmp_path):
    (tmp_path / "scripts").mkdir()
    own = tmp_path / "scripts" / "zero2.json"
    own.write_text("{}")
    for value in (str(own), '{"bf16": {}}', "nowhere.json", "scripts/zero1.json"):
        assert deepspeed_config(value) == value


# --- the launcher


def test_a_plan_needs_neither_data_nor_torch(tmp_path):
    program = "import sys; from llava.train.launcher import main; status = main(sys.argv[1:]); "
    program += "sys.exit(9 if {'torch', 'transformers'} & set(sys.modules) else status)"
    done = subprocess.run(
        [sys.executable, "-c", program, "--recipe", "fakereasoning", "--dry-run"],
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    batch, line = done.stdout.splitlines()
    assert batch == "batch: 8 per device x 2 accumulation x 8 processes = 128 global"
    assert "-m llava.train.train --version v1" in line
    assert done.stderr == "to start it, add --data_path, --image_folder, --model_name_or_path\n"


def test_without_a_recipe_it_is_plain_training(monkeypatch):
    calls = []
    monkeypatch.setattr(train_module, "main", lambda words: calls.append(words) or 7)
    assert launcher.main(["--data_path", "x", "--lora-r=4"]) == 7
    assert calls == [["--data_path", "x", "--lora-r=4"]]


def test_a_bug_keeps_its_traceback(monkeypatch):
    monkeypatch.setattr(launcher, "make_plan", lambda *_, **__: [][0])
    with pytest.raises(IndexError):
        launcher.main(["--recipe", "fakereasoning", "--dry-run"])


def test_flags_are_read_in_every_spelling():
    words = ["--a-b", "1", "2", "--c=x y", "--d", "--a_b=3", "--per-gpu-train-batch-size", "4"]
    assert read_flags(words) == {"a_b": ["3"], "c": ["x y"], "d": [], "per_device_train_batch_size": ["4"]}


def test_the_batch_is_divided_or_refused_with_what_works():
    assert plan_batch({}, Processes(4, 2, 8), "") == Batch(8, 2, 128)
    assert plan_batch({"gradient_accumulation_steps": ["3"]}, ONE, "") == Batch(8, 3, 24)
    with pytest.raises(OptionError, match=r"what works: --per_device_train_batch_size 4, GLOBAL_BATCH=95"):
        plan_batch({"per_device_train_batch_size": ["5"]}, ONE, "96")
    near = ["NUM_GPUS=2", "NUM_GPUS=4", "GLOBAL_BATCH=120", "GLOBAL_BATCH=144"]
    assert batch_proposals(128, 8, Processes(3, 1, 3)) == near


def test_an_installed_package_is_found_without_a_path(monkeypatch):
    plan = Plan(ONE, Batch(8, 16, 128), {"lora_r": ["4"]}, on_cpu=False, zero="0")
    line = launch_line(plan, Environment(python="py", pythonpath="/a"))
    assert line[1] == f"PYTHONPATH={ROOT}:/a" and line[-2:] == ["--lora_r", "4"]
    monkeypatch.setattr(launcher, "ROOT", Path("/usr/lib/python3/site-packages"))
    assert launch_line(plan, Environment(python="py"))[:3] == ["env", "py", "-m"]
