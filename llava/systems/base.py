"""What a published system must offer to live here: four small protocols. Imports no torch.

A system is a room in ``llava/systems`` (or a package of a third party) with a ``SystemSpec`` that the registry finds.
All that is particular to it, its words, its files, its pixels, its losses, stands behind these protocols; everything
else in this project knows them and no system's name.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, get_args, runtime_checkable

from llava.cli import option
from llava.errors import OptionError
from llava.labels import Label

if TYPE_CHECKING:
    from PIL import Image

    from llava.report import ForgeryReport

ScoreKind = Literal["auto", "answer", "prompt"]
SCORE_KINDS: tuple[ScoreKind, ...] = get_args(ScoreKind)


# --- answers: all that is words


@dataclass(frozen=True)
class ParsedAnswer:
    """What an answer says.

    Attributes:
        stages: Text of each named part, in the order of the answer.
        verdict: ``"real"`` or ``"fake"``; None when the answer says neither.
        attributes: Sentence of each attribute that the answer names.
        problem: Why there is no verdict; empty when there is one.
    """

    stages: dict[str, str] = field(default_factory=dict)
    verdict: Label | None = None
    attributes: dict[str, str] = field(default_factory=dict)
    problem: str = ""


@runtime_checkable
class AnswerFormat(Protocol):
    """The words of a system: what it is asked, and how its answers are read and written.

    Nothing outside a system's room knows its grammar.

    Attributes:
        question: What the system is asked unless the user asks something else.
        stages: Names of an answer's parts, in order; the keys of ``ParsedAnswer.stages``.
        explanation: The stage that says why; None if the answers have no explanation.
        attributes: Attribute names of each class that answers name; empty if they name none.
        verdict_prefix: What stands before the verdict word in an answer that is brought to it.
        verdict_words: The words for real and fake that follow the prefix.
    """

    question: str
    stages: tuple[str, ...]
    explanation: str | None
    attributes: Mapping[Label, tuple[str, ...]]
    verdict_prefix: str
    verdict_words: tuple[str, str]

    def parse(self, text: str, *, tolerant: bool = False) -> ParsedAnswer:
        """Reads an answer; ``tolerant`` also accepts verdicts that are not in the strict published form."""
        ...

    def is_complete(self, text: str) -> bool:
        """Whether an answer has said all it has to say, so that decoding can stop before the end mark."""
        ...

    def complete_to_verdict(self, answer: str) -> str:
        """Brings any answer to the point where only the verdict word is missing; ends in ``verdict_prefix``."""
        ...

    def parse_training(self, answers: Sequence[str]) -> ParsedAnswer:
        """Reads the verdict of a training conversation from its answers."""
        ...

    def shorten(self, answer: str) -> str | None:
        """Returns the part of a training answer that gives the verdict alone; None if it has no verdict."""
        ...

    def attribute_name(self, name: str) -> str | None:
        """Returns the one spelling of an attribute's name; None if there is no such attribute."""
        ...


# --- options


@dataclass(frozen=True)
class AnalyzeOptions:
    """How images are analysed: what every system understands.

    A system that has options of its own extends this class. A field with a help text is an option of the commands.

    Attributes:
        question: What is asked instead of the system's own question.
        score_only: No answer, only P(fake).
        tolerant: Also read verdicts that are not in the strict published format.
        max_new_tokens: Longest answer, in tokens.
        temperature: 0 decodes greedily; above, answers are sampled.
        top_p: Sample from the smallest set of words that has this probability; None means all.
        num_beams: Above 1, beam search.
        samples: Number of answers an image; above 1 they are sampled and P(fake) is their mean.
        seed: Of sampling; an image's answer depends on it and on the image, not on its place or batch.
        attention: Also say where the model looked.
    """

    question: str | None = option(None, "ask this instead of the system's own question")
    score_only: bool = option(False, "only P(fake), without an answer")
    temperature: float = option(0.0, "0 (default): greedy decoding; above, answers are sampled")
    top_p: float | None = option(None, "sample from the likeliest words of this probability", name="--top_p")
    num_beams: int = option(1, "beam search if above 1", name="--num_beams")
    max_new_tokens: int = option(512, "longest answer, in tokens (default: 512)", name="--max_new_tokens")
    samples: int = option(1, "answers an image; P(fake) is their mean")
    seed: int = option(0, "of sampling")
    tolerant: bool = option(False, "also read verdicts that are not in the strict format")
    attention: bool = False

    def __post_init__(self) -> None:
        """Checks ranges.

        Raises:
            OptionError: A value is out of range, or two exclude each other.
        """
        for name in ("max_new_tokens", "num_beams", "samples"):
            if getattr(self, name) < 1:
                raise OptionError(f"{name} must be at least 1, not {getattr(self, name)}")
        if not (self.temperature == 0 or 1e-6 <= self.temperature <= 1e6):
            raise OptionError(f"temperature must be 0 or from 0.000001 to 1000000, not {self.temperature}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise OptionError(f"top_p must be above 0 and at most 1, not {self.top_p}")
        if self.samples > 1 and self.temperature == 0:
            raise OptionError("samples above 1 need a temperature above 0, or all answers would be the same")
        if self.num_beams > 1 and self.temperature > 0:
            raise OptionError("beam search and sampling exclude each other: set num_beams to 1 or temperature to 0")
        if self.score_only and self.samples > 1:
            raise OptionError("score_only asks for no answer, so samples has no meaning")


# --- checkpoints


@dataclass(frozen=True)
class CheckpointFiles:
    """What can be told of a checkpoint before any weight is read.

    Attributes:
        folder: Where the files lie; a file for a system whose checkpoint is one.
        config: Contents of ``config.json``; empty where there is none.
    """

    folder: Path
    config: dict[str, Any]

    @cached_property
    def tensor_names(self) -> frozenset[str]:
        """Names of the tensors as they stand in the files; those of a LoRA folder are its own, not its base's."""
        from llava.model.checkpoint_files import stored_names

        return frozenset(stored_names(self.folder))

    def has_tensor(self, *parts: str) -> bool:
        """Whether some tensor's name contains one of these parts."""
        return any(part in name for name in self.tensor_names for part in parts)


@runtime_checkable
class CheckpointFormat(Protocol):
    """How a system's published files correspond to the models here; see ``llava.model.checkpoint_layout``.

    Attributes:
        key_map: Names of published tensors and ours, both ways (a ``KeyMap``).
        lora_prefix: What stands before every name in published LoRA and non-LoRA files.
        non_lora_file: The file beside an adapter that holds what was trained whole.
        tower_types: Type of each tower that the published layout can hold, by branch.
    """

    key_map: Any
    lora_prefix: str
    non_lora_file: str
    tower_types: Mapping[str, str]

    def infer_config(self, config: Mapping[str, Any], tensors: Mapping[str, Any]) -> dict[str, Any]:
        """Returns config fields that the published config lacks and the tensors (by our names) tell."""
        ...


# --- training


@runtime_checkable
class TrainingObjective(Protocol):
    """What a system is trained on and for; see ``llava.model.objective`` for the losses' shape.

    Attributes:
        trained_whole: Parts that are trained whole beside the LoRA adapters, by the names in ``llava.model.parts``.
    """

    trained_whole: tuple[str, ...]


# --- systems


@runtime_checkable
class System(Protocol):
    """One way to analyse an image, from files to reports.

    Attributes:
        name: As reports give it.
        notice: What whoever reads this model's answers must know; empty for most.
        answer_format: The system's words; None for a system without answers.
        options: The dataclass of its options, ``AnalyzeOptions`` or a child of it.
    """

    name: str
    notice: str
    answer_format: AnswerFormat | None
    options: ClassVar[type[AnalyzeOptions]]

    @classmethod
    def load(cls, path: str, **options: Any) -> "System":
        """Opens the checkpoint; ``options`` are those of ``load_pretrained_model``."""
        ...

    def prepare(self, image: "Image.Image") -> Any:
        """Turns an RGB image into what ``analyze_batch`` takes; runs beside the model, in another thread."""
        ...

    def batch_size(self, options: AnalyzeOptions) -> int:
        """A batch that fits and is fast on this device."""
        ...

    def describe(self, options: AnalyzeOptions) -> dict[str, Any]:
        """All that changes an answer beside weights, options and pixels, as plain JSON values; part of a run's key."""
        ...

    def analyze_batch(self, prepared: Sequence[Any], options: AnalyzeOptions) -> "list[ForgeryReport]":
        """Analyses a batch; one report an image, in order."""
        ...


Reference = str
"""``module:name`` of an object, imported when it is needed."""


@dataclass(frozen=True)
class SystemSpec:
    """What the registry knows of a system without importing it.

    Attributes:
        name: Short name, lower case, as in ``--system``.
        title: Name as people write it.
        identify: Whether files are a checkpoint of this system, by config and tensor names; imports no torch itself.
        system: The ``System`` class, or its reference.
        options: The dataclass of its options, or its reference.
        answer_format: The ``AnswerFormat``, its reference, or None.
        checkpoint_format: Reference of the ``CheckpointFormat``; None for a system that reads its files itself.
        objective: Reference of the ``TrainingObjective``; None for a system that is not trained here.
        protocol: Reference of the module with the paper's evaluation protocol and published numbers, or None.
        token_sources: References of the ``TokenSource`` classes that its models splice into a prompt, by type.
        weights: Hub ids of its published weights and of the towers that these need.
    """

    name: str
    title: str
    identify: Callable[[CheckpointFiles], bool]
    system: "Reference | type[System]"
    options: "Reference | type[AnalyzeOptions]" = AnalyzeOptions
    answer_format: "Reference | AnswerFormat | None" = None
    checkpoint_format: Reference | None = None
    objective: Reference | None = None
    protocol: Reference | None = None
    token_sources: Mapping[str, Reference] = field(default_factory=dict)
    weights: tuple[str, ...] = ()


def resolve(reference: Any) -> Any:
    """Returns the object behind a ``module:name`` (or a whole ``module``); anything else as it is."""
    if not isinstance(reference, str):
        return reference
    module, _, name = reference.partition(":")
    found: Any = import_module(module)
    return getattr(found, name) if name else found


def quoted(names: Iterable[str]) -> str:
    """Returns names for a message."""
    return ", ".join(sorted(names))
