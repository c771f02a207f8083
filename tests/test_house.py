"""What a further system needs of the model, and none of it here yet: a branch, a token of its own, inputs, a loss."""

import json
import shutil
from typing import ClassVar

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn

from llava import ForgeryDetector, load_pretrained_model
from llava.constants import IMAGE_TOKEN_INDEX
from llava.data.collator import Sample, collate
from llava.data.prompting import fitting_length
from llava.errors import CheckpointError
from llava.mm_utils import tokenize_placeholders
from llava.model.multimodal_encoder.builder import VISION_TOWERS
from llava.model.multimodal_fusion.base import Fusion, FusionOutput
from llava.model.multimodal_fusion.builder import FUSIONS
from llava.model.objective import LossTerm, ObjectiveStep
from llava.model.token_sources import TokenSource, VisionContext
from llava.systems import registry
from llava.systems.base import SystemSpec
from tests.conftest import GOLDENS
from tests.small_models import CLIP_CONFIG, DINO_CONFIG, MeanTower, small_model

PIXELS = torch.randn(2, 3, 28, 28, generator=torch.Generator().manual_seed(3))
DETECTOR = -300
PROMPT = torch.tensor([[1, IMAGE_TOKEN_INDEX, 5, DETECTOR, 6], [2, IMAGE_TOKEN_INDEX, 7, DETECTOR, 8]])


class AllBranches(Fusion):
    """The tokens of three branches, one after the other."""

    branches: ClassVar = ("clip", "dino", "cnn")

    @classmethod
    def from_config(cls, hidden_size, heads, config):
        assert heads == {"clip": 2, "dino": 3, "cnn": 1}
        return cls()

    def num_tokens(self, patches):
        return sum(patches.values())

    def forward(self, inputs, *, return_attention=False):
        return FusionOutput(torch.cat([inputs[branch] for branch in self.branches], dim=1))


class ScoreToken(TokenSource):
    """One token of a score that comes with the image, and of what the first tower gives."""

    placeholder, index = "<detector>", DETECTOR

    def __init__(self, config, hidden_size):
        super().__init__(config, hidden_size)
        self.project = nn.Linear(1 + CLIP_CONFIG["hidden_size"], hidden_size)

    def forward(self, context: VisionContext):
        seen = context.tower_outputs["clip"].mean(dim=1)
        return self.project(torch.cat((context.extras["score"][:, None], seen), dim=1))[:, None]


class ScoreObjective:
    """Ties the likelier of two words to the score."""

    trained_whole = ("mm_projector", "token_sources")
    searches_predictions = False

    def __init__(self, config):
        self.weight = 0.5

    def terms(self, step: ObjectiveStep):
        rows = torch.arange(len(step.inputs["score"]))
        logits = step.logits_at(rows, torch.full_like(rows, step.length - 1))[:, [10, 11]]
        targets = (step.inputs["score"] > 0.5).long()
        total = F.cross_entropy(logits, targets, reduction="sum")
        right = (logits.argmax(dim=1) == targets).sum()
        return {"score": LossTerm(total, torch.tensor(len(rows)), self.weight, {"right": right})}

    def count(self, batch):
        return {"score": torch.tensor(len(batch["input_ids"]))}

    def sample_inputs(self, record):
        return {"score": torch.tensor(0.5)}

    def metrics(self, sums):
        return {"score_right": sums["score_right"] / sums["score_items"]}


@pytest.fixture
def guest(monkeypatch):
    """A system whose parts only this test knows."""
    spec = SystemSpec(
        "guest",
        "Guest",
        identify=lambda files: False,
        system="nowhere:System",
        checkpoint_format="llava.model.checkpoint:PLAIN",
        objective=ScoreObjective,
        components={"score": ScoreToken},
    )
    known = {**registry.specs(), "guest": spec}
    monkeypatch.setattr(registry, "specs", lambda: known)
    monkeypatch.setitem(VISION_TOWERS, "mean", MeanTower)
    monkeypatch.setitem(FUSIONS, "all", AllBranches)
    return small_model(
        system="guest",
        dino_tower_config=DINO_CONFIG,
        extra_tower_configs={"cnn": {"type": "mean"}},
        mm_fusion_type="all",
        mm_fusion_config=None,
        token_source_configs={"score": {"type": "guest:score"}},
    )


def batch(score: float) -> dict:
    return {"input_ids": PROMPT, "images": PIXELS, "extras": {"score": torch.tensor([score, score])}}


def test_a_further_branch_has_a_tower_and_a_projector_of_its_name(guest):
    core = guest.get_model()
    assert {name.split(".")[1] for name in guest.state_dict() if "cnn" in name} == {"cnn_tower", "cnn_mm_projector"}
    assert core.placeholder_tokens() == {IMAGE_TOKEN_INDEX: 12, DETECTOR: 1}
    tokens = core.encode_images(PIXELS).tokens
    assert tokens.shape == (2, 12, 32)
    mean = F.avg_pool2d(PIXELS, 14).flatten(2).transpose(1, 2) * core.cnn_tower.scale
    assert torch.allclose(tokens[:, 8:], core.cnn_mm_projector(mean), atol=1e-6)


def test_a_token_source_fills_its_placeholder_and_the_answer_follows_it(guest):
    embeddings = guest.prepare_inputs_labels_for_multimodal(PROMPT, PIXELS, extras=batch(0.25)["extras"]).inputs_embeds
    outputs = guest.get_model().run_towers(PIXELS)
    source = guest.get_model().token_sources["score"]
    token = source(VisionContext(PIXELS, outputs, batch(0.25)["extras"]))
    assert torch.allclose(embeddings[:, 14:15], token, atol=1e-6)
    with torch.no_grad():
        low, high = (guest(**batch(score)).logits[:, -1] for score in (0.0, 1.0))
    assert (low - high).abs().max() > 1e-3
    answers = guest.generate(PROMPT, images=PIXELS, extras=batch(1.0)["extras"], max_new_tokens=2, do_sample=False)
    assert answers.shape == (2, 2)


def test_a_systems_loss_joins_the_language_models_and_trains_its_source(guest):
    labels = torch.where(PROMPT[:, -1:] == PROMPT, PROMPT, -100)
    full = guest(**batch(1.0), labels=labels)
    assert torch.allclose(full.loss, full.lm_loss + 0.5 * full.terms["score"].mean)
    sparse = guest(**batch(1.0), labels=labels, loss_only=True)
    assert torch.allclose(sparse.loss, full.loss, atol=1e-6) and sparse.logits is None
    sparse.loss.backward()
    assert guest.get_model().token_sources["score"].project.weight.grad.abs().sum() > 0


def test_branches_and_sources_are_saved_and_come_back(guest, tmp_path, bundled):
    guest.set_tokenizer(bundled.base[0])
    guest.save_pretrained(tmp_path / "saved")
    _, again, _, _ = load_pretrained_model(tmp_path / "saved", device="cpu")
    with torch.no_grad():
        assert torch.equal(again(**batch(0.3)).logits, guest(**batch(0.3)).logits)
    tensors = load_file(tmp_path / "saved" / "model.safetensors")
    tensors.pop("model.token_sources.score.project.bias")
    save_file(tensors, tmp_path / "saved" / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"missing: model\.token_sources\.score\.project\.bias"):
        load_pretrained_model(tmp_path / "saved", device="cpu")


def test_a_type_that_no_system_has_is_named(guest):
    with pytest.raises(CheckpointError, match="unknown token source type 'guest:other'"):
        small_model(token_source_configs={"score": {"type": "guest:other"}})


def test_every_placeholder_is_tokenised_and_counted(bundled):
    tokenizer = bundled.base[0]
    marks = {"<image>": IMAGE_TOKEN_INDEX, "<detector>": DETECTOR}
    ids = tokenize_placeholders("USER: <image>\n<detector> real?", tokenizer, marks)
    assert (ids.count(IMAGE_TOKEN_INDEX), ids.count(DETECTOR)) == (1, 1)
    assert ids.count(tokenizer.bos_token_id) == 1
    assert fitting_length([1, IMAGE_TOKEN_INDEX, DETECTOR, 4], {IMAGE_TOKEN_INDEX: 5, DETECTOR: 2}, 8) == 3


def test_a_batch_takes_a_systems_further_inputs():
    one = Sample(torch.tensor([1, 2]), torch.tensor([1, 2]), torch.zeros(3, 4, 4), 0, extras={"mask": torch.ones(2, 2)})
    other = Sample(torch.tensor([1]), torch.tensor([1]), torch.zeros(3, 4, 4), 1, extras={"mask": torch.ones(2, 2)})
    assert collate([one, other], 0, 8)["extras"]["mask"].shape == (2, 2, 2)
    larger = Sample(torch.tensor([1]), torch.tensor([1]), torch.zeros(3, 4, 4), 1, extras={"mask": torch.ones(3, 2)})
    assert [mask.shape for mask in collate([one, larger], 0, 8)["extras"]["mask"]] == [(2, 2), (3, 2)]
    assert "extras" not in collate([Sample(torch.tensor([1]), torch.tensor([1]), torch.zeros(3, 4, 4), 0)], 0, 8)


@pytest.fixture
def plain(tmp_path):
    """A LLaVA with one branch, in LLaVA's own layout, without a word about a system."""
    folder = tmp_path / "plain"
    shutil.copytree(GOLDENS / "base", folder)
    tensors = load_file(folder / "model.safetensors")
    own = {name: value for name, value in tensors.items() if "dino" not in name and "crossattention" not in name}
    assert len(own) < len(tensors)
    save_file(own, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "mm_vision_tower": str(GOLDENS / "clip")}))
    return folder


def test_a_plain_llava_is_named_as_what_it_is(plain):
    with pytest.raises(CheckpointError, match=r"is a plain LLaVA checkpoint.*--system"):
        ForgeryDetector.from_pretrained(plain, device="cpu")
    _, model, _, _ = load_pretrained_model(plain, device="cpu")
    assert model.config.system == "" and model.config.cpm_tokens is None
    assert model.get_model().branches == ("clip",)


def test_a_plain_llava_is_used_as_the_named_system(plain):
    detector = ForgeryDetector.from_pretrained(plain, system="FakeReasoning", device="cpu")
    assert detector.system.model.config.system == "fakereasoning"
    with pytest.raises(ValueError, match="unknown system 'other'"):
        ForgeryDetector.from_pretrained(plain, system="other")
