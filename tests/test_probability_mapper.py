"""The mapper on crafted sequences; the authors' own cases are in the reference comparison."""

import pytest
import torch

from llava.model.verdict import VerdictTokens
from llava.systems.fakereasoning.answer import VERDICT_PREFIX, VERDICT_WORDS
from llava.systems.fakereasoning.probability_mapper import ProbabilityMapper
from tests.small_models import published_llama_pieces, small_model

TOKENS = VerdictTokens(pattern=(7, 8, 9), real=10, fake=11)


def spelled(*rows: list[int]) -> torch.Tensor:
    """Logits whose argmax is the given ids."""
    ids = torch.tensor(rows)
    return torch.nn.functional.one_hot(ids, 16).float() * 5


def test_the_pattern_of_the_published_tokenizer():
    tokens = VerdictTokens.from_tokenizer(published_llama_pieces(), VERDICT_PREFIX, VERDICT_WORDS)
    assert tokens.pattern == (6007, 6154, 3308, 2725, 29958, 910, 1967, 338)
    assert (tokens.real, tokens.fake) == (1855, 25713)
    assert VerdictTokens.from_dict(tokens.to_dict()) == tokens


def test_words_that_are_spelled_alike_are_refused():
    with pytest.raises(ValueError, match="alike"):
        VerdictTokens.from_tokenizer(published_llama_pieces(), VERDICT_PREFIX, ("real", "real"))


def test_the_probability_is_a_softmax_over_two_scaled_logits():
    logits = torch.randn(4, 16)
    mapper = ProbabilityMapper(TOKENS, temperature=4.0)
    pair = torch.stack((logits[:, 10], logits[:, 11]), dim=1) / 4
    assert torch.allclose(mapper.fake_probability(logits), pair.softmax(dim=1)[:, 1])
    assert mapper.fake_probability(logits.half()).dtype == torch.float32


def test_both_searches_find_the_position_that_predicts_the_verdict():
    labels = torch.tensor([[-100, -100, 5, 7, 8, 9, 11, 2], [-100, 7, 8, 9, 10, 2, -100, -100]])
    predicted = spelled(*[[*row[1:], 0] for row in labels.clamp(min=0).tolist()])
    classes = torch.tensor([1, 0])
    by_labels = ProbabilityMapper(TOKENS, search="labels").loss(predicted, classes, labels)
    by_predictions = ProbabilityMapper(TOKENS, search="predictions").loss(predicted, classes)
    assert by_labels.positions.tolist() == by_predictions.positions.tolist() == [5, 3]
    assert by_labels.rows == 2
    assert torch.equal(by_labels.loss, by_predictions.loss)


def test_the_search_in_labels_needs_no_right_prediction_and_the_other_does():
    labels = torch.tensor([[-100, 7, 8, 9, 11, 2]])
    logits = torch.zeros(1, 6, 16)
    classes = torch.tensor([1])
    assert ProbabilityMapper(TOKENS, search="labels").loss(logits, classes, labels).rows == 1
    assert ProbabilityMapper(TOKENS, search="predictions").loss(logits, classes, labels).rows == 0


def test_the_loss_averages_over_matched_rows_alone():
    logits = spelled([7, 8, 9, 0, 0], [7, 8, 0, 9, 0], [0, 0, 7, 8, 9], [7, 8, 9, 0, 0])
    logits[0, 3, 10], logits[0, 3, 11] = 1.0, 3.0
    logits.requires_grad_()
    output = ProbabilityMapper(TOKENS, 10.0, "predictions").loss(logits, torch.tensor([1, 1, 1, -100]))
    assert output.positions.tolist() == [3, -1, -1, -1]
    expected = -torch.log_softmax(torch.tensor([0.1, 0.3]), dim=0)[1]
    assert torch.allclose(output.loss, expected)
    output.loss.backward()
    touched = logits.grad.nonzero()
    assert touched.tolist() == [[0, 3, 10], [0, 3, 11]]


def test_no_match_is_a_zero_loss_with_zero_gradients():
    for length in (2, 3, 6):
        logits = torch.zeros(2, length, 16, requires_grad=True)
        output = ProbabilityMapper(TOKENS, search="predictions").loss(logits, torch.tensor([0, 1]))
        output.loss.backward()
        assert output.loss == 0 and output.rows == 0
        assert logits.grad.abs().max() == 0


def test_the_first_of_several_matches_counts():
    logits = spelled([7, 8, 9, 7, 8, 9, 0, 0])
    output = ProbabilityMapper(TOKENS, search="predictions").loss(logits, torch.tensor([0]))
    assert output.positions.tolist() == [3]


def test_wrong_settings_are_refused():
    with pytest.raises(ValueError, match="unknown cpm_search"):
        ProbabilityMapper(TOKENS, search="argmax")
    with pytest.raises(ValueError, match="above 0"):
        ProbabilityMapper(TOKENS, temperature=0)
    with pytest.raises(ValueError, match="no labels were given"):
        ProbabilityMapper(TOKENS).loss(torch.zeros(1, 4, 16), torch.tensor([0]))


def batch(model):
    ids = torch.tensor([[1, -200, 5, 7, 8, 9, 11, 2], [1, -200, 7, 8, 9, 10, 2, 0]])
    labels = torch.where(torch.arange(8) > 1, ids, -100)
    pixels = torch.randn(2, 3, 28, 28, generator=torch.Generator().manual_seed(1))
    return {
        "input_ids": ids,
        "attention_mask": torch.tensor([[1] * 8, [1] * 7 + [0]]),
        "labels": labels,
        "images": pixels,
        "forgery_labels": torch.tensor([1, 0]),
    }


@pytest.mark.parametrize("weight", [1.0, 0.25])
def test_the_models_loss_is_the_sum_of_both(weight):
    model = small_model(cpm_weight=weight)
    output = model(**batch(model))
    mapped = output.terms["mapper"]
    assert mapped.items == 2
    assert torch.allclose(output.loss, output.lm_loss + weight * mapped.mean)
    logits = output.logits
    assert logits.shape[1] == 8 - 1 + 4
    positions = [5 + 3, 4 + 3]
    mapper = model.objective.mapper
    chances = torch.stack([mapper.fake_probability(logits[row, k]) for row, k in enumerate(positions)])
    expected = -(chances[0].log() + (1 - chances[1]).log()) / 2
    assert torch.allclose(output.terms["mapper"].mean, expected, atol=1e-6)


def test_a_config_file_without_the_field_means_the_authors_search():
    model = small_model()
    assert model.config.cpm_search == "labels"
    values = model.config.to_dict()
    assert type(model.config).from_dict(values).cpm_search == "labels"
    del values["cpm_search"]
    assert type(model.config).from_dict(values).cpm_search == "predictions"


def test_losses_without_what_they_need_are_refused():
    model = small_model()
    inputs = batch(model)
    with pytest.raises(ValueError, match="logits_to_keep must stay 0"):
        model(**inputs, logits_to_keep=1)
    model.config.cpm_tokens = None
    with pytest.raises(ValueError, match="how its tokenizer spells the verdict"):
        model(**inputs)
