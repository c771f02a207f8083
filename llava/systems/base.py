"""What a published system must offer to live here: some small protocols. Imports no torch.

A system is a room in ``llava/systems`` (or a package of a third party) with a ``SystemSpec`` that the registry finds.
All that is particular to it, its words, its files, its pixels, its losses, stands behind these protocols; everything
else in this project knows them and no system's name.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, get_args, runtime_checkable

from safetensors import SafetensorError, safe_open

from llava.cli import option
from llava.errors import OptionError, UserError
from llava.files import read_json
from llava.labels import Label

if TYPE_CHECKING:
    from random import Random

    import numpy as np
    from PIL import Image

    from llava.report import ForgeryReport
    from llava.tampered import TamperedImage

ScoreKind = Literal["auto", "answer", "prompt"]
SCORE_KINDS: tuple[ScoreKind, ...] = get_args(ScoreKind)
ColorManagement = Literal["srgb", "none"]
COLOR_MANAGEMENTS: tuple[ColorManagement, ...] = get_args(ColorManagement)


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

    Nothing outside a system's room knows its grammar. A format may also have ``constant_stages``, the stages whose text
    is the same for every image; they are left out where answers are printed for reading; ``constant_texts``, texts
    that answers may begin with word for word, which decoding may guess; and ``screen(answers)``, which
    says what in the texts of a training conversation must not be learnt (see ``llava.screening``), or nothing. It may
    have ``marks``, texts that no other system's answers hold, and ``write_training(label, explanation)``, which writes
    a training answer from a verdict and what speaks for it; so that records of several systems can be mixed.

    Attributes:
        question: What the system is asked unless the user asks something else.
        stages: Names of an answer's parts, in order; the keys of ``ParsedAnswer.stages``.
        explanation: The stage that says why; None if the answers have no explanation.
        attributes: Attribute names of each class that answers name; empty if they name none.
        verdict_prefix: What stands before the verdict word in an answer that is completed up to it.
        verdict_words: The words for real and fake that follow the prefix.
        closing: What ends an answer, so that decoding can stop before the end mark; empty if nothing does.
    """

    question: str
    stages: tuple[str, ...]
    explanation: str | None
    attributes: Mapping[Label, tuple[str, ...]]
    verdict_prefix: str
    verdict_words: tuple[str, str]
    closing: str

    def parse(self, text: str, *, tolerant: bool = False) -> ParsedAnswer:
        """Reads an answer; ``tolerant`` also accepts verdicts that are not in the strict published form."""
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


class WithoutAttributes:
    """The part of an ``AnswerFormat`` whose answers name no attributes, and end where their text ends."""

    attributes: Mapping[Label, tuple[str, ...]] = {"real": (), "fake": ()}
    closing = ""

    def attribute_name(self, name: str) -> str | None:
        """Returns None: these answers name no attributes."""
        return None


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
        color_management: ``srgb`` converts colours to sRGB by an image's profile, ``none`` takes them as they are.
        seed: Of sampling; an image's answer depends on it and on the image, not on its batch.
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
    color_management: ColorManagement = option(
        "srgb",
        "srgb (default): convert by the image's colour profile; none: take the numbers as they are",
        choices=COLOR_MANAGEMENTS,
    )
    tolerant: bool = option(False, "also read verdicts that are not in the strict format")
    attention: bool = False

    def __post_init__(self) -> None:
        """Checks ranges.

        Raises:
            OptionError: A value is out of range, or two exclude each other.
        """
        if self.question is not None and not self.question.strip():
            raise OptionError("question must not be empty; leave it out to ask the system's own question")
        for name in ("max_new_tokens", "num_beams", "samples"):
            if getattr(self, name) < 1:
                raise OptionError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.color_management not in COLOR_MANAGEMENTS:
            raise OptionError(f"color_management must be srgb or none, not {self.color_management!r}")
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
        source: Path or hub id by which the checkpoint was named; empty if that is not known.
    """

    folder: Path
    config: dict[str, Any]
    source: str = ""

    @cached_property
    def tensor_names(self) -> frozenset[str]:
        """Names of the tensors as they stand in the files; those of a LoRA folder are its own, not its base's.

        Only pickled files need torch for that.
        """
        names = None if (self.folder / "adapter_config.json").is_file() else _names_without_torch(self.folder)
        if names is None:
            from llava.model.checkpoint_files import stored_names

            names = stored_names(self.folder)
        return frozenset(names)

    def has_tensor(self, *parts: str) -> bool:
        """Whether some tensor's name contains one of these parts."""
        return any(part in name for name in self.tensor_names for part in parts)


def _names_without_torch(folder: Path) -> list[str] | None:
    """Tensor names of safetensors, sharded or not, and of any shards that an index lists; None for other files.

    A file that cannot be read has none: whoever opens it says why.
    """
    file = folder if folder.suffix == ".safetensors" else folder / "model.safetensors"
    for index in (Path(f"{file}.index.json"), folder / "pytorch_model.bin.index.json"):
        try:
            if index.is_file():
                return list(read_json(index)["weight_map"])
            if file.is_file():
                with safe_open(file, framework="np") as tensors:
                    return list(tensors.keys())
        except (UserError, SafetensorError, OSError, KeyError, TypeError):
            return []
    return None


@runtime_checkable
class CheckpointFormat(Protocol):
    """How a system's published files correspond to the models here; see ``llava.model.checkpoint_layout``.

    A layout whose files describe the whole model, towers and image processor too, also has ``published_files(model)``:
    the contents of the files that lie beside weights and tokenizer, by name, JSON values or text.

    Attributes:
        key_map: Names of published tensors and native ones, both ways (a ``KeyMap``).
        tower_types: Type of each tower that the published layout can hold, by branch.
        tower_variables: Environment variable that may say where a branch's tower lies, by branch.
    """

    key_map: Any
    tower_types: Mapping[str, str]
    tower_variables: Mapping[str, str]

    def infer_config(self, config: Mapping[str, Any], tensors: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the config of a published checkpoint with what its tensors (by our names) tell and it lacks."""
        ...

    def infer_tower(self, branch: str, tensors: Mapping[str, Any]) -> dict[str, Any]:
        """Returns fields of a tower's config that only tensors outside the tower tell."""
        ...


# --- training


@runtime_checkable
class TrainingObjective(Protocol):
    """What a system is trained on and for; see ``llava.model.objective`` for the losses' shape.

    An instance belongs to one model's config.

    Attributes:
        trained_whole: Parts that are trained whole beside LoRA adapters, by the names in ``llava.model.branches``.
        searches_predictions: Whether a loss looks through what the model predicts at every position.
    """

    trained_whole: tuple[str, ...]
    searches_predictions: bool

    def terms(self, step: Any) -> "dict[str, Any]":
        """Returns the losses beside the language model's, each a ``LossTerm``, from an ``ObjectiveStep``."""
        ...

    def count(self, batch: Mapping[str, Any]) -> "dict[str, Any]":
        """Returns over how many items each of these losses is averaged; None for what only the forward tells."""
        ...

    def sample_inputs(self, record: Any) -> "Mapping[str, Any]":
        """Returns the further inputs of a training record, tensors by name; reads what it needs itself."""
        ...

    def metrics(self, sums: Mapping[str, float]) -> dict[str, float]:
        """Returns what is logged of these losses, from the sums of each term's values, ``<term>_<value>``."""
        ...


@runtime_checkable
class NetworkTraining(Protocol):
    """How a plain network, one without a language model, is trained: images in, logits of some classes out.

    An instance holds one network; ``llava.train.networks`` does the rest.

    Attributes:
        classes: Words of the classes, by number.
        network: A module that turns a batch of what ``prepare`` gives into logits ``[B, K]``. What has no gradient is
            neither trained nor written into a run's checkpoints, so it must follow from how the network was opened.
    """

    classes: tuple[str, ...]
    network: Any

    @classmethod
    def open(cls, path: str | None, config: Mapping[str, Any]) -> "NetworkTraining":
        """Opens what ``save`` wrote, or a published file, or makes a new network.

        Args:
            path: The file or folder; None for a new network.
            config: Settings of a new network, or those that go before the file's; empty for the file's own.

        Raises:
            CheckpointError: It cannot be opened, or the settings describe no network.
        """
        ...

    def prepare(self, image: "Image.Image", random: "Random | None") -> Any:
        """Returns an RGB image as a tensor; ``random`` augments it in training, None makes it as it is used."""
        ...

    def optimizer(self, learning_rate: float, weight_decay: float) -> Any:
        """Returns the optimizer of the published training; None for the one that the options name."""
        ...

    def save(self, folder: Path) -> None:
        """Writes the network into an empty folder that ``open`` and the system's own loader open."""
        ...


@runtime_checkable
class MaskTraining(Protocol):
    """How a network that says where an image was changed is trained; named and started like a ``NetworkTraining``.

    Attributes:
        network: A module whose forward turns a batch of ``collate``, by name, into losses, each a ``LossTerm``. What
            has no gradient is neither trained nor written into a run's checkpoints.
        described_by: Whose descriptions of the images are taken, see ``llava.tampered.read_tampered``.
    """

    network: Any
    described_by: str

    @classmethod
    def open(cls, path: str | None, config: Mapping[str, Any]) -> "MaskTraining":
        """Opens what ``save`` wrote, or a published folder, or makes a new network; see ``NetworkTraining.open``."""
        ...

    def described(self, images: "Sequence[TamperedImage]") -> "list[TamperedImage]":
        """Returns the images with the descriptions that the settings name, if any."""
        ...

    def sample(self, image: "TamperedImage", pixels: "Image.Image", random: "Random") -> Any:
        """Returns a sample of a changed image, its RGB pixels, and what is drawn at random."""
        ...

    def collate(self, samples: Sequence[Any]) -> dict[str, Any]:
        """Joins samples to a batch."""
        ...

    def stored(self) -> dict[str, Any]:
        """Returns the tensors that ``save`` writes, by name."""
        ...

    def save(self, folder: Path) -> None:
        """Writes the network into an empty folder that ``open`` and the system's own loader open."""
        ...


# --- evaluation


@dataclass(frozen=True)
class EvaluatedAnswer:
    """One image's answer and what is true of it, as a paper's evaluation protocol takes it.

    Attributes:
        label: 0 real, 1 fake.
        text: The answer as decoded; empty if there is none.
        fake_probability: P(fake), None where there is none.
        reference: The reference explanation; empty if there is none.
        video: Video that the image is a frame of; empty for a single image.
    """

    label: int
    text: str
    fake_probability: float | None = None
    reference: str = ""
    video: str = ""


CompareTexts = Callable[[str, str], Mapping[str, float]]
"""Text metrics (``bleu_1`` … ``bleu_4``, ``rouge_l``) of a text against its reference."""
CompareMeanings = Callable[[Sequence[str], Sequence[str]], list[float]]
"""Similarity of each text to its reference by embeddings."""


@runtime_checkable
class EvaluationProtocol(Protocol):
    """A paper's evaluation, quirks included, and what it published: the module behind ``SystemSpec.protocol``.

    Attributes:
        SETTINGS: Where the authors' defaults of the evaluation's options differ from those here.
        PUBLISHED_ACCURACY: Their accuracy on each evaluation set, by the set's name.
        PUBLISHED_MEAN: Their means over those sets, by the metric's name in a report.
        PUBLISHED_OVER: What the means are over, in words.

    A protocol may also have ``PUBLISHED``: by the set's name all that was published of it, under the keys of
    ``metrics``.
    """

    SETTINGS: Mapping[str, Any]
    PUBLISHED_ACCURACY: Mapping[str, float]
    PUBLISHED_MEAN: Mapping[str, float]
    PUBLISHED_OVER: str

    def metrics(
        self, answers: Sequence[EvaluatedAnswer], compare: CompareTexts, similarity: CompareMeanings | None
    ) -> dict[str, float | None]:
        """Returns the authors' metrics of one evaluation set in their order; None where one is undefined."""
        ...

    def metric_line(self, name: str, values: Mapping[str, float | None]) -> str:
        """Returns a set's line of the authors' ``metric.txt``."""
        ...


# --- systems


@runtime_checkable
class System(Protocol):
    """One way to analyse an image, from files to reports.

    Attributes:
        name: As reports give it.
        notice: What whoever reads this model's answers must know; empty for most.
        answer_format: The system's words; None for a system without answers.
        options: The dataclass of its options, ``AnalyzeOptions`` or a child of it.

    A system that can say where it looked also has ``has_attention``, which is true then.
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


@runtime_checkable
class FeatureSource(Protocol):
    """What a system offers besides, if it can tell images unlike all known ones: features of its towers."""

    def image_features(self, prepared: Sequence[Any]) -> "np.ndarray":
        """Returns features of a batch of prepared images, float32, shape (B, D), each by its image alone."""
        ...


class Listener(Protocol):
    """Who follows answers while they are decoded; rows are the images' numbers in the batch."""

    def heard(self, row: int, piece: str, logprob: float, fake_probability: float) -> None:
        """Takes the next piece of an answer.

        Args:
            row: Of the answer.
            piece: Its text.
            logprob: Logarithm of its probability under the model.
            fake_probability: What P(fake) would be if this piece were the verdict; of the piece that is, it is P(fake).
        """
        ...

    def is_gone(self, row: int) -> bool:
        """Whether nobody waits for an answer any more, so that its decoding may end."""
        ...


@runtime_checkable
class AnswerStream(Protocol):
    """What a system offers besides, if its answers can be followed while they are decoded."""

    def listening(self, listener: Listener) -> AbstractContextManager[None]:
        """Lets somebody follow the answers of ``analyze_batch`` inside the block."""
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
        objective: Reference of the ``TrainingObjective``'s class, called with the model's config; None for a system
            without a loss of its own.
        protocol: Reference of the module with the paper's evaluation (an ``EvaluationProtocol``), or None.
        components: References of classes that only its models are built from (towers, fusions, token sources), by type;
            a config names them ``<system>:<type>``.
        networks: References of ``NetworkTraining`` and ``MaskTraining`` classes, by the name of the part;
            ``<system>:<part>`` names one.
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
    components: Mapping[str, Reference] = field(default_factory=dict)
    networks: Mapping[str, Reference] = field(default_factory=dict)
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
