"""What FakeReasoning is trained for beside its words: the verdict's probability (arXiv 2503.21210, section on CPM)."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from llava.constants import IGNORE_INDEX
from llava.errors import CheckpointError
from llava.model.configuration import LlavaConfig
from llava.model.objective import LossTerm, ObjectiveStep
from llava.model.verdict import VerdictTokens
from llava.systems.fakereasoning.probability_mapper import ProbabilityMapper

MAPPER = "mapper"
"""Name of the mapper's loss."""
LABELS_INPUT = "forgery_labels"


class FakeReasoningObjective:
    """The probability mapper's loss: mean over the rows whose verdict was found, weighted by ``cpm_weight``.

    Args:
        config: The model's.

    Raises:
        CheckpointError: The config does not say how the verdict is spelled.
    """

    trained_whole = ("mm_projector", "dino_mm_projector", "fusion")

    def __init__(self, config: LlavaConfig) -> None:
        if config.cpm_tokens is None:
            raise CheckpointError(
                "the model does not know how its tokenizer spells the verdict; call model.set_tokenizer(tokenizer, …)"
            )
        tokens = VerdictTokens.from_dict(config.cpm_tokens)
        self.mapper = ProbabilityMapper(tokens, config.cpm_temperature, config.cpm_search)
        self.weight = config.cpm_weight
        self.searches_predictions = self.mapper.search != "labels"

    def terms(self, step: ObjectiveStep) -> dict[str, LossTerm]:
        """Returns the mapper's loss; nothing where no row has a class."""
        classes_B = step.inputs.get(LABELS_INPUT)
        if classes_B is None:
            return {}
        if self.mapper.search == "labels":
            if step.labels is None:
                raise ValueError("cpm_search='labels' looks for the verdict in the labels, but no labels were given")
            positions_B = self.mapper.positions_in_labels(step.labels, classes_B)
        else:
            positions_B = self.mapper.positions(step.likeliest(), step.length, classes_B)
        rows_B = torch.arange(len(positions_B), device=positions_B.device)
        at_verdict_BV = step.logits_at(rows_B, positions_B.clamp(min=0))
        found = self.mapper.loss_at(at_verdict_BV, positions_B.to(at_verdict_BV.device), classes_B)
        verdicts = (classes_B != IGNORE_INDEX).sum()
        total = found.loss * found.rows
        return {MAPPER: LossTerm(total, found.rows, self.weight, {"correct": found.correct, "verdicts": verdicts})}

    def count(self, batch: Mapping[str, Any]) -> dict[str, Tensor | None]:
        """Returns how many rows match; None where the verdict is looked for in the model's own predictions."""
        if self.searches_predictions:
            return {MAPPER: None}
        return {MAPPER: (self.mapper.positions_in_labels(batch["labels"], batch[LABELS_INPUT]) >= 0).sum()}

    def sample_inputs(self, record: Any) -> Mapping[str, Tensor]:
        """Returns nothing: the class of a record is in every batch."""
        return {}

    def metrics(self, sums: Mapping[str, float]) -> dict[str, float]:
        """Returns the share of verdicts that were found, and how many of those have the likelier class right.

        The accuracy is teacher-forced and so no measure of skill: the reasoning before the verdict gives it away.
        """
        rows = sums[f"{MAPPER}_items"]
        return {
            "mapper_rows_share": rows / max(1, sums[f"{MAPPER}_verdicts"]),
            "verdict_accuracy_teacher_forced": sums[f"{MAPPER}_correct"] / max(1, rows),
        }
