"""Embeddings in the place of placeholders."""

import pytest
import torch
from torch import nn

from llava.constants import IGNORE_INDEX
from llava.model.llava_arch import features_by_row, splice
from tests.small_models import small_model

IMAGE, OTHER = -200, -300


@pytest.fixture
def embed() -> nn.Embedding:
    torch.manual_seed(0)
    return nn.Embedding(50, 6)


def naive(ids: list[int], embed: nn.Embedding, given: dict[int, list[torch.Tensor]]) -> torch.Tensor:
    waiting = {key: iter(value) for key, value in given.items()}
    return torch.cat([next(waiting[i]) if i in waiting else embed(torch.tensor([i])) for i in ids])


@pytest.mark.parametrize("side", ["right", "left"])
def test_rows_equal_a_naive_join(embed, side):
    ids = torch.tensor([[1, IMAGE, 5, OTHER, 6, 0], [IMAGE, 3, IMAGE, 4, 8, 9]])
    mask = torch.tensor([[1, 1, 1, 1, 1, 0], [1, 1, 1, 1, 1, 1]])
    labels = torch.where(ids > 4, ids, IGNORE_INDEX)
    images = [torch.randn(n, 6) for n in (3, 2, 4)]
    extra = [torch.randn(1, 6)]
    given = {IMAGE: features_by_row(ids, IMAGE, images), OTHER: [extra, []]}
    batch = splice(ids, embed, given, attention_mask=mask, labels=labels, padding_side=side)
    rows = [
        naive([1, IMAGE, 5, OTHER, 6], embed, {IMAGE: images[:1], OTHER: extra}),
        naive([IMAGE, 3, IMAGE, 4, 8, 9], embed, {IMAGE: images[1:], OTHER: []}),
    ]
    said = [[-100] * 4 + [5, -100, 6], [-100] * 2 + [-100] * 5 + [-100, 8, 9]]
    for row, (expected, labelled) in enumerate(zip(rows, said, strict=True)):
        keep = batch.attention_mask[row]
        assert torch.equal(batch.inputs_embeds[row][keep], expected)
        assert batch.labels[row][keep].tolist() == labelled
        assert batch.position_ids[row][keep].tolist() == list(range(len(expected)))
        assert (batch.inputs_embeds[row][~keep] == 0).all()
        assert (batch.labels[row][~keep] == IGNORE_INDEX).all()
    padded = batch.attention_mask[0].logical_not().nonzero().flatten().tolist()
    assert padded == ([0, 1, 2] if side == "left" else [7, 8, 9])


def test_rows_are_cut_after_the_splice(embed):
    ids = torch.tensor([[1, IMAGE, 5, 6]])
    batch = splice(ids, embed, {IMAGE: [[torch.ones(3, 6)]]}, labels=ids, max_length=5)
    assert batch.labels.tolist() == [[1, -100, -100, -100, 5]]


def test_a_text_only_row_keeps_its_unused_image_in_the_graph(embed):
    ids = torch.tensor([[1, IMAGE, 5], [1, 2, 3]])
    images = torch.randn(2, 3, 6, requires_grad=True)
    shares = features_by_row(ids, IMAGE, list(images))
    batch = splice(ids, embed, {IMAGE: shares})
    assert batch.attention_mask.sum(dim=1).tolist() == [5, 3]
    batch.inputs_embeds[1].sum().backward()
    assert images.grad is not None and images.grad.abs().sum() == 0


@pytest.mark.parametrize(("rows", "images"), [([[1, IMAGE]], 2), ([[IMAGE, IMAGE]], 1), ([[IMAGE, IMAGE], [1, 1]], 1)])
def test_numbers_that_do_not_fit_are_refused(rows, images):
    with pytest.raises(ValueError, match=r"placeholders .* for \d images"):
        features_by_row(torch.tensor(rows), IMAGE, [torch.zeros(1, 6)] * images)


def test_a_prompt_and_its_images_must_belong_together():
    model = small_model()
    ids = torch.tensor([[1, IMAGE, 5]])
    with pytest.raises(ValueError, match="no images were given"):
        model(input_ids=ids)
    with pytest.raises(ValueError, match=r"\[N, 3, S, S\]"):
        model(input_ids=ids, images=torch.zeros(3, 28, 28))
    with pytest.raises(ValueError, match="no vision tower"):
        small_model(vision_tower_config=None)(input_ids=ids, images=torch.zeros(1, 3, 28, 28))


def test_generation_gives_only_new_ids_equal_alone_and_in_a_padded_batch():
    model = small_model()
    pixels = torch.randn(2, 3, 28, 28)
    ids = torch.tensor([[1, IMAGE, 5, 6, 7], [1, IMAGE, 9, 0, 0]])
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    together = model.generate(ids, images=pixels, attention_mask=mask, **options)
    alone = [
        model.generate(ids[row : row + 1, : 5 - 2 * row], images=pixels[row : row + 1], **options) for row in (0, 1)
    ]
    assert together.shape == (2, 6)
    assert torch.equal(together, torch.cat(alone))


def test_generation_takes_text_alone():
    model = small_model()
    answer = model.generate(torch.tensor([[1, 5, 6]]), max_new_tokens=3, do_sample=False, eos_token_id=None)
    assert answer.shape == (1, 3)


def test_cached_and_uncached_decoding_agree():
    model = small_model()
    pixels, ids = torch.randn(1, 3, 28, 28), torch.tensor([[1, IMAGE, 5]])
    options = {"images": pixels, "max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    assert torch.equal(model.generate(ids, **options), model.generate(ids, **options, use_cache=False))
