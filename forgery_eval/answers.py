"""What the answers of a system can have, asked of the registry, which knows every system's words. Imports no torch."""

from collections.abc import Mapping
from dataclasses import dataclass

from llava.labels import Label
from llava.systems import registry
from llava.systems.base import AnswerFormat, ParsedAnswer

DEFAULT_SYSTEM = registry.DEFAULT
"""Whose words are assumed where nothing names a system: in other programs' predictions and in MMFR's annotations."""


@dataclass(frozen=True)
class AnswerKind:
    """The answers of one system.

    Attributes:
        system: The system's short name.
        title: Its name as people write it.
        format: Its words; None for a system without answers.
    """

    system: str
    title: str
    format: AnswerFormat | None

    @classmethod
    def of(cls, system: str) -> "AnswerKind":
        """Returns the kind of a system's answers.

        Raises:
            OptionError: There is no such system.
        """
        spec = registry.spec(system)
        return cls(spec.name, spec.title, registry.answer_format(spec.name))

    def parse(self, text: str) -> ParsedAnswer:
        """Reads an answer; nothing can be read of a system without answers."""
        return self.format.parse(text) if self.format else ParsedAnswer()

    @property
    def constant_stages(self) -> tuple[str, ...]:
        """The stages whose text is the same for every image."""
        return tuple(getattr(self.format, "constant_stages", ()))

    def explanation(self, stages: Mapping[str, str]) -> str:
        """Returns the text that says why; an empty string if there is none."""
        return stages.get(self.format.explanation, "") if self.format and self.format.explanation else ""

    @property
    def without_text(self) -> str:
        """Why there are no metrics of the answers' verdicts; empty where there are."""
        return "" if self.format else f"{self.title} gives no answers"

    @property
    def without_explanation(self) -> str:
        """Why there are no metrics of explanations; empty where there are."""
        if self.format and not self.format.explanation:
            return f"answers of {self.title} have no explanation"
        return self.without_text

    @property
    def without_attributes(self) -> str:
        """Why there are no metrics of attributes; empty where there are."""
        if self.format and not any(self.format.attributes.values()):
            return f"answers of {self.title} name no attributes"
        return self.without_text


def attribute_names(system: str = DEFAULT_SYSTEM) -> Mapping[Label, tuple[str, ...]]:
    """Returns the attribute names of each class that a system's answers can name."""
    words = registry.answer_format(system)
    return words.attributes if words else {}


def attribute_name(name: str, system: str = DEFAULT_SYSTEM) -> str | None:
    """Returns the one spelling of an attribute's name in a system's words; None if there is no such attribute."""
    words = registry.answer_format(system)
    return words.attribute_name(name) if words else None
