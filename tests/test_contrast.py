"""Contrast: losses and gradients computed by hand, odd batches, several processes, and both stages that use it."""

import json
import math
import os
import socket

import pytest
import torch
import torch.multiprocessing as mp
import torch.nn.functional as F
from safetensors.torch import load_file

from llava.data.records import Record
from llava.demo import towers
from llava.errors import CheckpointError, OptionError
from llava.model import contrast
from llava.model.contrast import CROSS, INTRA_IMAGE, INTRA_TEXT, TERMS, Contrast, ContrastSettings, Entries
from llava.model.language_contrast import HAS_IMAGE, NO_WORD, WORDS, contrast_terms, language_contrast
from llava.systems.fakereasoning import answer as words
from llava.train.arguments import ModelArguments, read_contrast
from llava.train.contrast import ContrastInputs, ContrastObjective
from tests.test_train_equality import without_dropout
from tests.test_train_towers import train, weights, world  # noqa: F401 (a fixture)
from tests.training_runs import steps, train_here, train_on_two, write_records

TAU = 0.5


def entries(count: int = 4, seed: int = 0, **changes) -> Entries:
    """Images 0 and 3 share an attribute set, 1 has another, 2 is real and has none."""
    generator = torch.Generator().manual_seed(seed)
    vectors = [F.normalize(torch.randn(count, 3, generator=generator), dim=1).requires_grad_() for _ in range(2)]
    given = {
        "image": vectors[0],
        "text": vectors[1],
        "has_text": torch.tensor([True, True, False, True])[:count],
        "attributes": torch.tensor([[1, 0], [0, 1], [0, 0], [1, 0]]).bool()[:count],
        "labels": torch.tensor([1, 1, 0, 1])[:count],
    }
    return Entries(**{**given, **changes})


def settings(**changes) -> ContrastSettings:
    return ContrastSettings(**{"temperature": TAU, "intra_weight": 0.25, **changes})


def dot(first, second) -> float:
    return sum(float(a) * float(b) for a, b in zip(first, second, strict=True)) / TAU


def log_share(logits: list[float], at: int) -> float:
    return logits[at] - math.log(sum(math.exp(value) for value in logits))


def by_hand(given: Entries) -> dict[str, tuple[float, int]]:
    """The three sums and counts, written out for the batch of ``entries``, with same sets left out."""
    v, t = given.image.detach(), given.text.detach()
    cross = 0.0
    # Image 0 against texts 0 and 1 (text 3 has the same set), text 0 against images 0, 1 and 2; and so on.
    for own, texts, images in ((0, (0, 1), (0, 1, 2)), (1, (0, 1, 3), (0, 1, 2, 3)), (3, (3, 1), (3, 1, 2))):
        cross -= log_share([dot(v[own], t[j]) for j in texts], texts.index(own)) / 2
        cross -= log_share([dot(t[own], v[j]) for j in images], images.index(own)) / 2
    image = -log_share([dot(v[0], v[j]) for j in (1, 2, 3)], 2) - log_share([dot(v[3], v[j]) for j in (0, 1, 2)], 0)
    text = -log_share([dot(t[0], t[j]) for j in (1, 3)], 1) - log_share([dot(t[3], t[j]) for j in (0, 1)], 0)
    return {CROSS: (cross, 3), INTRA_IMAGE: (image, 2), INTRA_TEXT: (text, 2)}


def test_the_losses_are_those_computed_by_hand():
    given = entries()
    terms = Contrast(settings(weight=2.0))(given)
    for name, (total, items) in by_hand(given).items():
        assert terms[name].total.item() == pytest.approx(total, abs=1e-5) and terms[name].items == items
    assert [terms[name].weight for name in TERMS] == [2.0, 0.5, 0.5]
    kept = Contrast(settings(leave_out_same=False))(given)[CROSS].total
    assert kept > terms[CROSS].total + 0.01  # two more negatives


def test_gradients_are_those_of_the_formulas():
    given = entries()
    module = Contrast(settings(learn_temperature=True)).double()
    fields = {name: value.double() if value.is_floating_point() else value for name, value in vars(given).items()}

    def whole(image, text, log_temperature):
        with torch.enable_grad():
            terms = torch.func.functional_call(
                module,
                {"log_temperature": log_temperature},
                (Entries(**{**fields, "image": image, "text": text}),),
            )
        return sum(term.weight * term.total for term in terms.values())

    leaves = [fields["image"].detach().requires_grad_(), fields["text"].detach().requires_grad_()]
    leaves.append(torch.tensor(TAU, dtype=torch.float64).log().requires_grad_())
    # Losses are computed in float32, so differences are coarse and the step is large.
    loss = whole(*leaves)
    found = torch.autograd.grad(loss, leaves)
    for leaf, gradient in zip(leaves, found, strict=True):
        direction = torch.randn(leaf.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        with torch.no_grad():
            moved = [
                whole(*[other + sign * 1e-2 * direction if other is leaf else other for other in leaves])
                for sign in (1, -1)
            ]
        assert (moved[0] - moved[1]).item() / 2e-2 == pytest.approx((gradient * direction).sum().item(), rel=2e-2)


def test_a_batch_without_positives_has_the_cross_modal_loss_alone():
    given = entries(2)
    terms = Contrast(settings())(given)
    assert terms[INTRA_IMAGE].items == 0 and terms[INTRA_IMAGE].mean == 0 and terms[CROSS].items == 2
    sum(term.weight * term.mean for term in terms.values()).backward()
    assert given.image.grad.isfinite().all() and given.image.grad.abs().sum() > 0


def test_all_of_one_class_and_one_set_leaves_no_negative():
    same = entries(
        attributes=torch.tensor([[1, 0]] * 4).bool(), labels=torch.ones(4).long(), has_text=torch.ones(4).bool()
    )
    terms = Contrast(settings())(same)
    assert terms[CROSS].total.abs() < 1e-6  # each pair is alone with itself
    assert terms[INTRA_IMAGE].items == 4 and terms[INTRA_IMAGE].total > 0


def test_images_without_attributes_are_negatives_of_texts_and_positives_by_label():
    plain = entries(
        has_text=torch.zeros(4).bool(), attributes=torch.zeros(4, 2).bool(), labels=torch.tensor([0, 0, 1, -100])
    )
    terms = Contrast(settings())(plain)
    assert terms[CROSS].items == 0 and terms[CROSS].mean == 0 and terms[INTRA_TEXT].items == 0
    assert terms[INTRA_IMAGE].items == 2  # the two real ones; an unknown label has no company
    sum(term.weight * term.mean for term in terms.values()).backward()
    assert plain.image.grad.isfinite().all()
    without = entries(3)
    real = Contrast(settings())(without)[CROSS].total
    fewer = Contrast(settings())(without.map(lambda values: values[:2]))[CROSS].total
    assert real > fewer


def test_positives_by_label_ignore_attributes():
    by_label = Contrast(settings(positives="label"))(entries())
    assert by_label[INTRA_IMAGE].items == 3 and by_label[INTRA_TEXT].items == 3


def test_an_anchor_among_its_own_negatives_would_be_seen(monkeypatch):
    given = entries()
    monkeypatch.setattr(contrast, "_masked", lambda logits, left_out: logits)
    terms = Contrast(settings())(given)
    assert all(abs(terms[name].total.item() - total) > 1e-2 for name, (total, _) in by_hand(given).items())


def test_the_queue_gives_the_candidates_of_earlier_batches():
    first, second = entries(seed=1), entries(seed=2)
    module = Contrast(settings(queue=4, width=3), attributes=2)
    module(first)
    queued = module(second)
    joined = second.joined(first.map(lambda values: values.detach()))
    anchors = torch.arange(4)
    total, items = contrast.cross_modal(joined, anchors, torch.tensor(TAU), leave_out_same=True)
    assert queued[CROSS].total.item() == pytest.approx(total.item(), abs=1e-5) and queued[CROSS].items == items
    assert torch.equal(module.queue_image, second.image) and module.queued == 8
    with torch.no_grad():
        module(first)  # counting forwards leave it alone
    module.eval()(first)
    assert module.queued == 8
    assert {"queue_image", "queued"} <= set(module.state_dict())


def on_one_of_two(rank: int, port: int, folder: str) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    torch.set_num_threads(1)
    whole = entries()
    share = slice(0, 3) if rank == 0 else slice(3, 4)  # unequal shares
    own = whole.map(lambda values: values.detach()[share])
    image, text = own.image.requires_grad_(), own.text.requires_grad_()
    terms = Contrast(settings())(Entries(**{**vars(own), "image": image, "text": text}))
    # As the trainer does: sums of each process over the items of all.
    items = {name: term.items.clone() for name, term in terms.items()}
    for count in items.values():
        torch.distributed.all_reduce(count)
    loss = sum(term.weight * term.total / items[name].clamp(min=1) for name, term in terms.items())
    loss.backward()
    torch.save((loss.detach(), image.grad, text.grad), f"{folder}/{rank}.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def test_two_processes_equal_one(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(on_one_of_two, (port, str(tmp_path)), nprocs=2)
    parts = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1)]
    given = entries()
    loss = sum(term.weight * term.mean for term in Contrast(settings())(given).values())
    image, text = torch.autograd.grad(loss, (given.image, given.text))
    assert torch.allclose(parts[0][0] + parts[1][0], loss.detach(), atol=1e-5)
    assert torch.allclose(torch.cat((parts[0][1], parts[1][1])), image, atol=1e-5)
    assert torch.allclose(torch.cat((parts[0][2], parts[1][2])), text, atol=1e-5)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"temperature": 0.1}, "intra_weight is missing; there is no published value"),
        ({"temperature": 0, "intra_weight": 1}, "temperature must be above 0"),
        ({"temperature": True, "intra_weight": 1}, "temperature must be of type float"),
        ({"temperature": 0.1, "intra_weight": 1, "queue": 0.5}, "queue must be of type int"),
        ({"temperature": 0.1, "intra_weight": 1, "tau": 1}, "unknown 'tau'"),
        ({"temperature": 0.1, "intra_weight": 1, "positives": "colour"}, "positives must be one of"),
    ],
)
def test_wrong_settings_are_named(values, message):
    with pytest.raises(CheckpointError, match=message):
        ContrastSettings.from_dict(values)


def test_options_and_what_the_language_model_has_not():
    good = ModelArguments(model_name_or_path="x", contrast='{"temperature": 0.1, "intra_weight": 0.5}')
    assert read_contrast(good) == {"temperature": 0.1, "intra_weight": 0.5}
    assert read_contrast(ModelArguments(contrast="none")) is None
    for text in ("[", "[]", '{"temperature": 0.1}', '{"temperature": 0.1, "intra_weight": 1, "queue": 8}'):
        with pytest.raises(OptionError, match="--contrast"):
            read_contrast(ModelArguments(contrast=text))
    with pytest.raises(CheckpointError, match="for the tower stage"):
        language_contrast({"temperature": 0.1, "intra_weight": 1, "learn_temperature": True})


# --- records, and the language model's stage


class Letters:
    def __call__(self, text, add_special_tokens):
        return {"input_ids": [ord(letter) for letter in text]}


def record(label: str, attributes: dict[str, str], image: str | None = "0.png") -> Record:
    answer = words.write_answer(label, caption="A.", reasoning=words.write_reasoning(label, attributes))
    turns = ({"from": "human", "value": words.QUESTION}, {"from": "gpt", "value": answer})
    return Record(image, turns, f"file: {label} {image}")


def said(found: dict[str, torch.Tensor]) -> str:
    return "".join(chr(letter) for letter in found[WORDS].tolist() if letter != NO_WORD)


def test_a_record_brings_its_attributes_sentences_even_when_its_answer_is_short():
    fake = record("fake", {"Low Image Quality": "it is dim.", "Irregular Image Edges": "halos."})
    real = record("real", {"High Image Quality": "it is clear."}, image=None)
    make = ContrastInputs(settings(words=80), [fake, real], words.FORMAT, Letters())
    short = Record(fake.image, ({"from": "human", "value": ""}, {"from": "gpt", "value": ""}), fake.origin)
    found = make(short)
    assert said(found) == "Irregular Image Edges: halos. Low Image Quality: it is dim."
    assert found["contrast_attributes"].tolist() == [False, True, False, True, False] and found[HAS_IMAGE]
    assert said(make(real)) == "" and not make(real)[HAS_IMAGE]
    authentic = ContrastInputs(settings(words=12, authentic=True), [real], words.FORMAT, Letters())
    assert said(authentic(real)) == "High Image Q" and not authentic(real)["contrast_attributes"].any()


def test_a_system_without_objective_gets_contrast_alone():
    objective = ContrastObjective(ContrastInputs(settings(), [], words.FORMAT, Letters()), None)
    assert objective.terms(None) == {} and objective.count({}) == dict.fromkeys(TERMS)
    assert objective.metrics({}) == {} and objective.trained_whole == ()


def test_images_and_words_meet_in_the_language_models_space():
    embed = torch.nn.Embedding(10, 3)
    tokens = torch.randn(3, 5, 3, requires_grad=True)
    inputs = {
        WORDS: torch.tensor([[1, 2, NO_WORD], [3, NO_WORD, NO_WORD], [NO_WORD] * 3]),
        "contrast_attributes": torch.tensor([[True, False], [False, True], [False, False]]),
        HAS_IMAGE: torch.tensor([True, True, False]),
        "forgery_labels": torch.tensor([1, 1, 0]),
    }
    terms = contrast_terms(settings(), tokens, embed, inputs)
    v = F.normalize(tokens.detach().mean(1), dim=1)
    t = F.normalize(torch.stack((embed.weight[1] + embed.weight[2], embed.weight[3])), dim=1)
    logits = v[:2] @ t.T / TAU
    own = torch.arange(2)
    expected = (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2
    assert terms[CROSS].mean.item() == pytest.approx(expected.item(), abs=1e-5) and terms[CROSS].items == 2
    terms[CROSS].mean.backward()
    assert tokens.grad[:2].abs().sum() > 0 and tokens.grad[2].abs().sum() == 0 and embed.weight.grad.abs().sum() > 0
    embed.weight.grad = None
    contrast_terms(settings(text="frozen"), tokens, embed, inputs)[CROSS].mean.backward()
    assert embed.weight.grad is None


CONTRAST = json.dumps({"temperature": 0.1, "intra_weight": 0.5, "weight": 0.3})


def test_the_language_models_stage_has_the_losses_and_saves_their_settings(trained, tmp_path):
    data = write_records(tmp_path, text_only=2)
    whole = {"max_steps": 2, "per_device_train_batch_size": 4}
    final = train_here(tmp_path / "run", trained, data, **whole, contrast=CONTRAST)
    logged = steps(
        final, "loss", "lm_loss", "mapper_loss", "facl_cross_loss", "facl_intra_image_loss", "facl_intra_text_loss"
    )
    assert len(logged) == 2
    for loss, language, mapper, cross, image, text in logged:
        assert loss == pytest.approx(language + mapper + 0.3 * cross + 0.15 * (image + text), abs=2e-3)
        assert cross >= 0
    assert json.loads((final / "config.json").read_text())["contrast"]["weight"] == 0.3
    plain = train_here(tmp_path / "plain", final, data, **whole, contrast="none")
    assert not steps(plain, "facl_cross_loss")
    assert json.loads((plain / "config.json").read_text()).get("contrast") is None


@pytest.mark.slow
def test_two_processes_train_as_one(trained, tmp_path):
    data, start = write_records(tmp_path), without_dropout(trained, tmp_path / "start")
    names = ("loss", "grad_norm", "facl_cross_loss", "facl_intra_image_loss")
    shared = {"max_steps": 2, "contrast": CONTRAST, "trained_parts": "mm_projector,dino_mm_projector"}
    one = train_here(tmp_path / "one", start, data, **shared, per_device_train_batch_size=4)
    two = train_on_two(tmp_path / "two", start, data, **shared, per_device_train_batch_size=2)
    for first, second in zip(steps(one, *names), steps(two, *names), strict=True):
        assert second == pytest.approx(first, abs=2e-3)


# --- the tower stage


def contrasted(world, tmp_path, **more):  # noqa: F811
    config = json.loads((world / "config.json").read_text())
    file = tmp_path / "contrast.json"
    file.write_text(json.dumps({**config, "contrast": {"temperature": 0.2, "intra_weight": 0.5, **more}}))
    return ["--config", str(file)]


ALIGNED = ("--vision_tower_loss", "none", "--dino_tower_loss", "facl=1", "--learning_rate", "0.003")


def test_towers_learn_by_contrast_alone(world, tmp_path, monkeypatch):  # noqa: F811
    losses = []
    step = towers.Training._train_step

    def watched(self, index):
        losses.append(step(self, index)["dino_tower"])
        return {"dino_tower": losses[-1]}

    monkeypatch.setattr(towers.Training, "_train_step", watched)
    train(world, tmp_path / "out", *contrasted(world, tmp_path, learn_temperature=True), *ALIGNED, "--epochs", "10")
    assert sum(losses[-8:]) < sum(losses[:8])


def test_a_queue_is_resumed_with_its_tower(world, tmp_path, monkeypatch):  # noqa: F811
    given = [*contrasted(world, tmp_path, queue=16, authentic=True, text="frozen"), *ALIGNED]
    train(world, tmp_path / "whole", *given)
    step = towers.Training._train_step

    def dies(self, index):
        if self.step == 9:
            raise KeyboardInterrupt
        return step(self, index)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(towers.Training, "_train_step", dies)
        train(world, tmp_path / "parts", *given, "--save_minutes", "0")
    train(world, tmp_path / "parts", *given)
    first, second = ((tmp_path / name / "dino_tower" / "model.safetensors").read_bytes() for name in ("whole", "parts"))
    assert first == second


def test_a_clip_tower_is_aligned_by_lora(world, tmp_path):  # noqa: F811
    given = contrasted(world, tmp_path, text="frozen")
    train(world, tmp_path / "start", *given, "--epochs", "1", "--dino_tower_loss", "none")
    aligned = ("--vision_tower_loss", "facl=1", "--dino_tower_loss", "none", "--learning_rate", "0.003")
    more = ["--start", str(tmp_path / "start"), "--lora_r", "2", *aligned]
    train(world, tmp_path / "out", *given, *more)
    before, after = (load_file(tmp_path / name / "vision_tower" / "model.safetensors") for name in ("start", "out"))
    assert before.keys() == after.keys()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved and all(name.endswith(("proj.weight", "fc1.weight", "fc2.weight")) for name in moved)
    assert all(torch.linalg.matrix_rank(after[name] - before[name], rtol=1e-3) <= 2 for name in moved)


def test_lora_without_a_trained_clip_tower_is_explained(world, tmp_path):  # noqa: F811
    with pytest.raises(OptionError, match="--start must name"):
        train(world, tmp_path / "out", "--lora_r", "2")
    train(world, tmp_path / "start", "--epochs", "1")
    with pytest.raises(OptionError, match="--dino_tower_loss none"):
        train(world, tmp_path / "out", "--start", str(tmp_path / "start"), "--lora_r", "2")


def test_contrast_beside_labels_and_outliers(world, tmp_path):  # noqa: F811
    given = contrasted(world, tmp_path)
    given += ["--dino_tower_loss", "verdict=1,facl=0.5", "--vision_tower_loss", "facl=1", "--outliers", "0.5"]
    metrics = train(world, tmp_path / "out", *given, "--epochs", "1")
    assert set(metrics["towers"]["dino_tower"]) == {"verdict"} and metrics["towers"]["vision_tower"] == {}
    assert weights(tmp_path / "out")


def test_contrast_without_settings_or_words_is_explained(world, tmp_path):  # noqa: F811
    with pytest.raises(OptionError, match="field contrast"):
        train(world, tmp_path / "out", "--dino_tower_loss", "facl=1")
    with pytest.raises(OptionError, match="needs words"):
        train(world, tmp_path / "out", *contrasted(world, tmp_path), "--dino_tower_loss", "facl=1", "--max_words", "0")
    with pytest.raises(CheckpointError, match="intra_weight"):
        train(world, tmp_path / "out", *contrasted(world, tmp_path, intra_weight=-1), "--dino_tower_loss", "facl=1")
