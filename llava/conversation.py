"""Prompt templates by LLaVA's names."""

from dataclasses import dataclass, field, replace

_ASSISTANT = "artificial intelligence assistant. The assistant gives helpful, detailed, and polite answers to the"


@dataclass
class Conversation:
    """A dialogue in Vicuna's style: ``<system> USER: … ASSISTANT: …</s>USER: …``.

    Attributes:
        system: What stands first.
        roles: Names of the two speakers.
        sep: What follows the system text and each of the user's turns.
        sep2: What closes each of the assistant's turns.
        between: What stands between an assistant's turn and the next question, where only the last turn is closed.
        messages: Speaker and text of each turn; a text of None is a turn that is still to come.
    """

    system: str
    roles: tuple[str, str] = ("USER", "ASSISTANT")
    sep: str = " "
    sep2: str = "</s>"
    between: str | None = None
    messages: list[tuple[str, str | None]] = field(default_factory=list)

    def append_message(self, role: str, message: str | None) -> None:
        """Adds a turn."""
        self.messages.append((role, message))

    def copy(self) -> "Conversation":
        """Returns a conversation that can go on without changing this one."""
        return replace(self, messages=list(self.messages))

    def turns(self) -> list[tuple[str, str]]:
        """Returns the prompt in pieces: what is given, and what the assistant says to it with the closing mark.

        Raises:
            ValueError: The speakers do not take turns, the user first.
        """
        pieces: list[tuple[str, str]] = []
        for index in range(0, len(self.messages), 2):
            pair = self.messages[index : index + 2]
            if tuple(role for role, _ in pair) != self.roles:
                raise ValueError(f"turn {index}: speakers must alternate, {self.roles[0]} first")
            (user, question), (assistant, answer) = pair
            opening = self._opening() if index == 0 else self.between or ""
            given = f"{opening}{user}: {question}{self.sep}{assistant}:"
            is_closed = self.between is None or index + 2 >= len(self.messages)
            pieces.append((given, "" if answer is None else f" {answer}{self.sep2 if is_closed else ''}"))
        return pieces

    def _opening(self) -> str:
        return f"{self.system}{self.sep}" if self.system else ""

    def get_prompt(self) -> str:
        """Returns the whole prompt."""
        return "".join(question + answer for question, answer in self.turns())


conv_templates: dict[str, Conversation] = {
    "v1": Conversation(f"A chat between a curious user and an {_ASSISTANT} user's questions."),
    "llava_v1": Conversation(f"A chat between a curious human and an {_ASSISTANT} human's questions."),
}
conv_templates["vicuna_v1"] = conv_templates["v1"]
# The chat template of transformers' LLaVA, and the same after a system sentence.
conv_templates["chat"] = Conversation("", sep2=" </s>", between=" ")
conv_templates["chat_system"] = conv_templates["v1"]
