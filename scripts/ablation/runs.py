"""What is compared, and the steps of one run: towers, training, evaluation. Each step is done once.

A run's folder has ``done.json`` when it is finished. Folders may lie on a disk that several machines share: a run that
another process works at is passed over.
"""

import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from llava.errors import OptionError, UserError
from llava.files import exclusive_lock, read_json, write_json

DONE = "done.json"
BASE = "forgery_aware"
"""The variant that all others are compared with."""
CONTRAST = '{"temperature": 0.1, "intra_weight": 0.5, "weight": 0.1}'
"""Contrast in the language model's stage; chosen before any run, and not tuned."""
TOWERS_OF_A_STAGE = ("vision_tower", "dino_tower")
PLAIN = {"vision_tower": "caption=1", "dino_tower": "verdict=1,attributes=1,reasoning=1"}
ALIGNED = dict.fromkeys(PLAIN, "facl=1")
LABELLED = dict.fromkeys(PLAIN, "verdict=1,attributes=1")


@dataclass(frozen=True)
class Variant:
    """One row of the table.

    Attributes:
        title: In words.
        fusion: ``mm_fusion_type``.
        towers: How towers are trained, a key of ``TOWER_STAGES``.
        mapper: Weight of the probability mapper's loss.
        verdict_only: Share of the training answers that are only a verdict.
        contrast: Whether the language model's stage has contrast as well.
        score: Which P(fake) is reported.
    """

    title: str
    fusion: str = "forgery_aware"
    towers: str = "plain"
    mapper: float = 1.0
    verdict_only: float = 0.3
    contrast: bool = False
    score: str = "prompt"


VARIANTS = {
    "clip": Variant("CLIP only", fusion="clip"),
    "dino": Variant("DINO only", fusion="dino"),
    "interleave": Variant("interleaved", fusion="interleave"),
    "cross_attention": Variant("cross-attention without bias", fusion="cross_attention"),
    BASE: Variant("forgery-aware fusion"),
    "no_mapper": Variant("without mapper", mapper=0.0),
    "no_reasoning": Variant("without reasoning (verdict only)", verdict_only=1.0),
    "facl": Variant("with FACL", towers="facl", contrast=True),
    "random_towers": Variant("frozen random towers", towers="random", verdict_only=0.0, score="answer"),
}
"""The rows; the last one knows nothing of its images and is for an observation alone."""

TOWER_STAGES: dict[str, tuple[tuple[float, dict[str, str]], ...]] = {
    "plain": ((1.0, PLAIN),),
    "facl": ((0.5, ALIGNED), (0.5, PLAIN)),
    "random": (),
    "facl_alone": ((1.0, ALIGNED),),
    "cross_entropy": ((1.0, LABELLED),),
}
"""Stages of the towers one after the other: share of the epochs, and the losses; all in all equally many steps."""


@dataclass(frozen=True)
class Plan:
    """Sizes that all runs share; written beside them, so that runs of other sizes are not mixed.

    Attributes:
        config: The small model's config.
        images: Training images.
        evaluated: Images of each class and evaluation set that are evaluated.
        sampled: The same for the evaluation with sampled answers.
        epochs: Of the language model's stage.
        tower_epochs: Of the towers.
        batch_size: Of both.
        new_tokens: Longest answer.
    """

    config: str = "scripts/ablation_model.json"
    images: int = 3000
    evaluated: int = 10
    sampled: int = 5
    epochs: float = 4.0
    tower_epochs: float = 4.0
    batch_size: int = 16
    new_tokens: int = 220


def keep_plan(plan: Plan, out: Path) -> None:
    """Writes the plan, or compares it with the one that is there.

    Raises:
        OptionError: The folder holds runs of another plan.
    """
    file, content = out / "plan.json", {**asdict(plan), "config": read_json(Path(plan.config))}
    if not file.is_file():
        write_json(file, content, indent=2)
    kept = read_json(file)
    other = [f"{name} was {kept.get(name)}, is {value}" for name, value in content.items() if kept.get(name) != value]
    if other:
        raise OptionError(f"{out} holds runs of another plan ({'; '.join(other)}); name another --out")


@dataclass(frozen=True)
class Workplace:
    """Where everything lies.

    Attributes:
        out: Folder of all that is made.
        data: Training tree of MMFR-Synthetic.
        test: Evaluation tree, of another seed.
        plan: The sizes.
    """

    out: Path
    data: Path
    test: Path
    plan: Plan

    def run(self, variant: str, seed: int) -> Path:
        """Folder of a run."""
        return self.out / "runs" / f"{variant}_{seed}"

    def towers(self, kind: str, seed: int) -> Path:
        """Folder of a pair of towers."""
        return self.out / "towers" / f"{kind}_{seed}"


Step = Callable[[], None]


def once(folder: Path, step: Step) -> bool:
    """Does a step unless its folder says that it is done; False if another process is at it.

    Raises:
        UserError: It fails; what it left is resumed next time.
    """
    if (folder / DONE).is_file():
        return True
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with exclusive_lock(folder / DONE):
            if not (folder / DONE).is_file():
                start = time.monotonic()
                step()
                now = datetime.now(timezone.utc).isoformat(timespec="minutes")
                about = {"seconds": round(time.monotonic() - start), "date": now, "machine": machine()}
                write_json(folder / DONE, about, indent=2)
        return True
    except UserError as error:
        if "another process" in str(error):
            return False
        raise


def machine() -> str:
    """Says in words what this machine computes with."""
    import torch

    cores = f"{torch.get_num_threads()} threads"
    return f"{platform.machine()}, {torch.cuda.get_device_name() if torch.cuda.is_available() else cores}"


def call(main: Callable[[Sequence[str]], int], *words: Any) -> None:
    """Runs a command of ours in this process.

    Raises:
        UserError: It says on standard error what is wrong.
    """
    if main([str(word) for word in words]) != 0:
        raise UserError(f"{getattr(main, '__module__', 'a command')} failed; its message stands above")


def prepare(place: Workplace) -> None:
    """Renders what is not rendered yet, and builds the tokenizer."""
    from llava.demo import tokenizer
    from mmfr_generation.synthetic.__main__ import main as render

    def rendered(folder: Path, *sizes: Any) -> None:
        if not (folder / "manifest.jsonl").is_file():
            call(render, "--out", folder, *sizes, "--size", 112, "--delivery", "none")

    # The seeds are not those of any other data here; no image of the test is trained on.
    rendered(place.data, "--train", place.plan.images, "--eval", 1, "--seed", 22)
    rendered(place.test, "--train", 0, "--eval", place.plan.evaluated, "--seed", 1022)
    if not (place.out / "tokenizer").is_dir():
        call(tokenizer.main, place.data / "forgery_reasoning_cot.json", "--output_dir", place.out / "tokenizer")


def train_towers(place: Workplace, kind: str, seed: int) -> bool:
    """Trains a pair of towers by its stages; False if another process is at it."""
    folder = place.towers(kind, seed)
    return once(folder, lambda: _train_towers(place, kind, seed, folder))


def _train_towers(place: Workplace, kind: str, seed: int, folder: Path) -> None:
    from llava.demo import towers

    plan, start = place.plan, None
    stages = TOWER_STAGES[kind] or ((0.0, PLAIN),)
    for number, (share, losses) in enumerate(stages, start=1):
        out = folder / f"stage_{number}"
        # Without a stage the towers stay as they began: one step, at a rate that moves nothing.
        steps = ("--epochs", plan.tower_epochs * share) if share else ("--max_steps", 1, "--learning_rate", 1e-12)
        named = [word for name in TOWERS_OF_A_STAGE for word in (f"--{name}_loss", losses[name])]
        call(
            towers.main,
            *("--data", place.data, "--config", plan.config, "--output_dir", out, "--seed", seed),
            *("--batch_size", 2 * plan.batch_size, "--validation_share", 0, "--bf16"),
            *steps,
            *named,
            *(("--start", start) if start else ()),
        )
        start = out


def last_stage(place: Workplace, kind: str, seed: int) -> Path:
    """Folder that the towers of a pair are read from."""
    return place.towers(kind, seed) / f"stage_{max(1, len(TOWER_STAGES[kind]))}"


def train_and_evaluate(place: Workplace, name: str, seed: int) -> bool:
    """Does one run; False if another process is at it.

    Raises:
        UserError: A step failed, or the towers are not there yet.
    """
    variant = VARIANTS[name]
    if not (place.towers(variant.towers, seed) / DONE).is_file():
        raise OptionError(f"the towers {variant.towers} of seed {seed} are not trained yet")
    folder = place.run(name, seed)

    def run() -> None:
        _train(place, variant, seed, folder)
        _evaluate(place, folder, "results", "--score", variant.score)
        if name == BASE:
            sampled = ("--score", "answer", "--samples", 4, "--temperature", 0.8)
            _evaluate(place, folder, "sampled", *sampled, images=place.plan.sampled)

    return once(folder, run)


def _train(place: Workplace, variant: Variant, seed: int, folder: Path) -> None:
    from llava.model.branches import tower_name
    from llava.model.multimodal_fusion.builder import fusion_class
    from llava.train.train import main as train

    plan, towers = place.plan, last_stage(place, variant.towers, seed)
    config = {**read_json(Path(plan.config)), "mm_fusion_type": variant.fusion}
    write_json(folder / "config.json", config, indent=2)
    call(
        train,
        *("--output_dir", folder / "model", "--model_config", folder / "config.json"),
        *("--tokenizer", place.out / "tokenizer"),
        *("--vision_tower", towers / tower_name("clip")),
        *(("--dino_weights", towers / tower_name("dino")) if "dino" in fusion_class(variant.fusion).branches else ()),
        *("--data_path", place.data / "forgery_reasoning_cot.json", "--image_folder", place.data),
        *("--cache_features", place.out / "features" / f"{variant.towers}_{seed}_{variant.fusion}"),
        *("--contrast", CONTRAST if variant.contrast else "none", "--cpm_weight", variant.mapper),
        *("--verdict_only_share", variant.verdict_only, "--num_train_epochs", plan.epochs, "--seed", seed),
        *("--per_device_train_batch_size", plan.batch_size, "--learning_rate", 1.5e-3, "--model_max_length", 320),
        *(
            "--lr_scheduler_type",
            "cosine",
            "--warmup_steps",
            0.03,
            "--logging_steps",
            2,
            "--dataloader_num_workers",
            0,
        ),
        *("--bf16", True, "--use_cpu", True, "--save_steps", 200, "--save_total_limit", 1, "--resume", "auto"),
        *("--default_score", variant.score, "--notice", config.get("notice", "A small model of an ablation.")),
    )


def _evaluate(place: Workplace, folder: Path, results: str, *options: Any, images: int | None = None) -> None:
    from forgery_eval import eval as evaluation

    call(
        evaluation.run,
        *("--model-path", folder / "model" / "final", "--dataset_path", place.test),
        *("--result_folder", folder / results, "--max_sample", images or place.plan.evaluated, "--no-abstain"),
        *("--max_new_tokens", place.plan.new_tokens, "--batch-size", 32, *options),
    )
