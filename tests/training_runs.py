"""Small training runs: data, options, and what a run leaves behind."""

import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from llava.systems.fakereasoning import answer as words
from llava.train.train import main
from tests.trained import CAPTIONS, picture

ROOT = Path(__file__).parents[1]
QUICK = {
    "use_cpu": True,
    "max_steps": 3,
    "per_device_train_batch_size": 2,
    "learning_rate": 1e-3,
    "logging_steps": 1,
    "save_strategy": "no",
    "dataloader_num_workers": 0,
}
LORA = {"lora_enable": True, "lora_r": 4, "lora_alpha": 8}


def write_records(folder: Path, count: int = 12, seed: int = 0, text_only: int = 0) -> Path:
    """Writes images and a training file; answers have varied lengths, the last ``text_only`` records no image."""
    choice = random.Random(seed)
    images = folder / "images"
    images.mkdir(parents=True, exist_ok=True)
    records: list[dict[str, Any]] = []
    for index in range(count):
        label = words.LABELS[index % 2]
        reasoning = words.write_reasoning(label, {choice.choice(words.ATTRIBUTES[label]): "it is so."})
        answer = words.write_answer(label, caption=choice.choice(CAPTIONS), reasoning=reasoning)
        answer = answer.replace(words.SUMMARY, "I look. " * choice.randint(1, 6))
        record: dict[str, Any] = {"image": f"{index}.png"}
        question = f"<image>\n{words.QUESTION}"
        if index >= count - text_only:
            record, question = {}, words.QUESTION
        else:
            picture(index).save(images / f"{index}.png")
        record["conversations"] = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
        records.append(record)
    file = folder / "train.json"
    file.write_text(json.dumps(records), encoding="utf-8")
    return file


def options(output: Path, start: Path | None = None, data: Path | None = None, **changes: Any) -> list[str]:
    """A command line; ``None`` leaves an option out, a tuple gives several values."""
    values: dict[str, Any] = {"output_dir": output, **QUICK}
    if start is not None:
        values["model_name_or_path"] = start
    if data is not None:
        values |= {"data_path": data, "image_folder": data.parent / "images"}
    result = []
    for name, value in {**values, **changes}.items():
        if value is not None:
            result += [f"--{name}", *map(str, value if isinstance(value, tuple) else (value,))]
    return result


def train_here(*arguments: Any, **changes: Any) -> Path:
    """Runs a training in this process; returns its final folder."""
    given = options(*arguments, **changes)
    assert main(given) == 0, given
    return Path(given[given.index("--output_dir") + 1]) / "final"


def environment() -> dict[str, str]:
    """What a process that trains on the CPU needs."""
    return {**os.environ, "PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}


def start_on_two(*arguments: Any, **changes: Any) -> subprocess.Popen:
    """Starts a training in two processes, in a process group of its own."""
    launcher = [sys.executable, "-m", "llava.train.launch", "--standalone", "--nproc_per_node", "2", "-m"]
    command = [*launcher, "llava.train.train", *options(*arguments, **changes)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, env=environment(), start_new_session=True, **pipes)


def errors_of(process: subprocess.Popen, timeout: float = 240) -> str:
    """Waits for processes that ``start_on_two`` started and returns what they wrote to standard error.

    Processes that wait for each other for ever are ended, so that a test fails and no other is slowed.
    """
    try:
        return process.communicate(timeout=timeout)[1]
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise AssertionError(f"no end after {timeout} s: {process.communicate()[1][-4000:]}") from None


def train_on_two(output: Path, *arguments: Any, **changes: Any) -> Path:
    """Runs a training in two processes; returns its final folder."""
    process = start_on_two(output, *arguments, **changes)
    message = errors_of(process)
    assert process.returncode == 0, message[-4000:]
    return output / "final"


def steps(final: Path, *names: str) -> list[Any]:
    """One metric at each step of the log, or several as tuples."""
    history = json.loads((final.parent / "log.json").read_text("utf-8"))
    found = [tuple(entry[name] for name in names) for entry in history if all(name in entry for name in names)]
    return [values[0] for values in found] if len(names) == 1 else found


def adapter_weights(final: Path) -> dict[str, torch.Tensor]:
    """All that a run with LoRA trained."""
    beside = torch.load(final / "non_lora_trainables.bin", weights_only=True)
    return {**load_file(final / "adapter_model.safetensors"), **beside}


def largest_gap(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> float:
    """The largest difference between the tensors of two runs."""
    assert set(first) == set(second)
    return max((first[name].double() - second[name].double()).abs().max().item() for name in first)
