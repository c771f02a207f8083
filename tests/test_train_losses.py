"""Losses, gradients, optimizer groups and what is trained: the authors' numbers on training's own path."""

import pytest
import torch
from peft import set_peft_model_state_dict
from safetensors.torch import load_file

from llava.conversation import conv_templates
from llava.data.collator import collate
from llava.data.dataset import SupervisedDataset
from llava.data.records import read_records
from llava.data.sampler import ModalityLengthSampler
from llava.model.builder import load_pretrained_model
from llava.model.checkpoint_files import read_tensor_file
from llava.model.checkpoint_layout import LORA_PREFIX, NON_LORA_FILE, strip_lora_prefix
from llava.systems.fakereasoning import checkpoint as layout
from llava.systems.fakereasoning.answer import FORMAT
from llava.train.arguments import parse_arguments
from llava.train.checkpointing import complete_checkpoints
from llava.train.loading import build_model, load_start
from llava.train.lora import apply_lora, choose_trainable, optimizer_groups, trainable_tensors
from llava.train.train import _grouped_order, main
from llava.train.trainer import ForgeryTrainer
from tests.conftest import GOLDENS
from tests.reference import GRADIENTS, LM_LOSS
from tests.training_runs import LORA, options, write_records

RECIPE = {"lora", "fusion", "mm_projector", "dino_mm_projector"}


def published_name(name: str) -> str:
    bare = name.removeprefix(LORA_PREFIX)
    return f"{LORA_PREFIX}{next(iter(layout.KEY_MAP.to_published({bare: torch.zeros(1)})))}"


@pytest.fixture(scope="module")
def adapted():
    """The goldens' LoRA weights in a model that was opened and adapted as a training does it."""
    towers = ["--vision_tower", str(GOLDENS / "clip"), "--dino_weights", str(GOLDENS / "dino.pth")]
    lora = ["--lora_enable", "--lora_r", "4", "--lora_alpha", "8", "--cpm_search", "predictions"]
    others = ["--data_path", "x.json", "--output_dir", "unused", "--use_cpu"]
    model_args, data_args, _ = parse_arguments(["--model_name_or_path", str(GOLDENS / "base"), *towers, *lora, *others])
    start = load_start(model_args, data_args)
    base = build_model(start, dtype=torch.float32, device=torch.device("cpu"), bits=16, attn_implementation="sdpa")
    model = apply_lora(base, rank=model_args.lora_r, alpha=model_args.lora_alpha)
    choose_trainable(model, RECIPE)
    set_peft_model_state_dict(model, load_file(GOLDENS / "lora" / "adapter_model.safetensors"))
    beside = strip_lora_prefix(read_tensor_file(GOLDENS / "lora" / NON_LORA_FILE))
    ours = {name: tensor[...] for name, tensor in layout.KEY_MAP.to_native(beside).items()}
    assert not base.load_state_dict(ours, strict=False).unexpected_keys
    return model.eval()


def test_loss_and_gradients_are_the_authors(adapted, bundled):
    adapted.zero_grad()
    output = ForgeryTrainer._forward(adapted, bundled.train_batch())
    output.loss.backward()
    expected = bundled.fact("extra", "lora_grad")
    assert abs(output.loss.item() - expected["loss"]) <= LM_LOSS["atol"]
    assert abs(output.lm_loss.item() - bundled.fact("lora", "train_lm_loss")) <= LM_LOSS["atol"]
    gradients = {published_name(name): p.grad for name, p in trainable_tensors(adapted).items()}
    assert set(gradients) == set(expected["norms"])
    for name, gradient in gradients.items():
        assert abs(gradient.norm().item() - expected["norms"][name]) <= GRADIENTS["atol"] * 10, name
        known = bundled.tensors.get(f"lora/grad/{name}", gradient)
        assert torch.allclose(gradient, known, **GRADIENTS), name


def test_the_optimizer_groups_are_the_authors(adapted, bundled):
    expected = bundled.fact("extra", "optimizer_groups")
    groups = optimizer_groups(
        adapted,
        learning_rate=1e-4,
        weight_decay=0.01,
        rates={"mm_projector": 2e-5, "dino_mm_projector": 2e-5},
    )
    names = {id(parameter): published_name(name) for name, parameter in trainable_tensors(adapted).items()}
    found = [
        {"lr": group["lr"], "weight_decay": group["weight_decay"], "params": {names[id(p)] for p in group["params"]}}
        for group in groups
    ]
    assert found == [{**group, "params": set(group["params"])} for group in expected]
    assert sum(len(group["params"]) for group in found) == len(trainable_tensors(adapted))


def test_nothing_but_the_recipes_parts_is_trained(adapted, bundled):
    trained = {published_name(name) for name in trainable_tensors(adapted)}
    assert trained == {name for group in bundled.fact("extra", "optimizer_groups") for name in group["params"]}
    inside = {name.rpartition(".lora_")[0].rpartition(".")[2] for name in trained if ".lora_" in name}
    assert sorted(inside) == bundled.fact("lora", "find_all_linear_names")
    assert not any("tower" in name for name in trained)


def test_the_trainers_order_is_the_authors(bundled):
    case = bundled.fact("extra", "sampler")[0]
    arguments = ["--model_name_or_path", "x", "--data_path", "x", "--output_dir", "x", "--use_cpu"]
    _, data_args, args = parse_arguments([*arguments, "--seed", str(case["seed"]), "--group_by_modality_length"])

    class Lengths:
        modality_lengths = case["lengths"]

    sampler = _grouped_order(data_args, args)(Lengths(), case["batch_size"], case["world_size"])
    assert isinstance(sampler, ModalityLengthSampler)
    assert list(sampler) == case["indices"]


# --- losses without the whole vocabulary


def batches(model, tokenizer, processor, folder):
    """Padded rows, rows without an image, a row without a verdict, and one of which truncation takes the verdict."""
    file = write_records(folder, count=6, text_only=2)
    records = read_records([file]), read_records([GOLDENS / "train_mixed.json"])
    own, mixed = (
        SupervisedDataset(
            found,
            image_folder=images,
            tokenizer=tokenizer,
            template=conv_templates["v1"],
            model_config=model.config,
            image_processor=processor,
            answer_format=FORMAT,
            placeholder_tokens=model.get_model().placeholder_tokens(),
            max_length=2048,
        )
        for found, images in zip(records, (folder / "images", GOLDENS / "images"), strict=True)
    )
    for dataset in (own, mixed):
        yield collate([dataset[index] for index in range(len(dataset))], tokenizer.pad_token_id, 2048)
    yield collate([own[4], own[5]], tokenizer.pad_token_id, 2048)
    without = collate([own[0], own[1]], tokenizer.pad_token_id, 2048)
    yield {**without, "forgery_labels": torch.full_like(without["forgery_labels"], -100)}
    yield collate([own[0]], tokenizer.pad_token_id, 100)


@pytest.mark.parametrize("search", ["labels", "predictions"])
@pytest.mark.parametrize("source", ["bundled", "trained"])
def test_losses_alone_equal_those_of_all_logits(request, tmp_path, source, search):
    if source == "bundled":
        tokenizer, model, processor, _ = request.getfixturevalue("bundled").load()
    else:
        tokenizer, model, processor, _ = load_pretrained_model(request.getfixturevalue("trained"), device="cpu")
    model.config.cpm_search = search
    matched = []
    for batch in batches(model, tokenizer, processor, tmp_path):
        found = []
        for loss_only in (False, True):
            model.zero_grad()
            output = model(**batch, loss_only=loss_only)
            output.loss.backward()
            gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
            mapped = output.terms["mapper"]
            losses = (output.loss, output.lm_loss, mapped.mean)
            found.append((losses, mapped.items, mapped.values["correct"], output.labels, gradients))
        full, alone = found
        assert torch.allclose(torch.stack(full[0]), torch.stack(alone[0]), atol=1e-6, rtol=1e-6)
        assert full[1] == alone[1] and full[2] == alone[2] and torch.equal(full[3], alone[3])
        assert full[4].keys() == alone[4].keys()
        for name, gradient in full[4].items():
            assert torch.allclose(gradient, alone[4][name], atol=2e-6, rtol=1e-5), name
        matched.append(int(full[1]))
    if search == "labels":
        assert matched == [6, 6, 2, 0, 0]
    elif source == "bundled":
        assert matched == [0, 0, 0, 0, 0]
    else:
        assert matched[0] >= 4 and matched[3:] == [0, 0]


def test_a_batch_without_supervised_tokens_has_a_loss_of_zero(trained):
    _, model, _, _ = load_pretrained_model(trained, device="cpu")
    size = model.image_processor.crop_size["height"]
    ids = torch.tensor([[1, -200, 5, 6]])
    output = model(
        input_ids=ids,
        images=torch.zeros(1, 3, size, size),
        labels=torch.full_like(ids, -100),
        forgery_labels=torch.tensor([-100]),
        loss_only=True,
    )
    output.loss.backward()
    assert output.loss == 0
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


@pytest.mark.parametrize(("logging_steps", "save_steps", "kept"), [(1, 1, 2), (50, 1, 2), (50, 2, 2), (50, 50, None)])
def test_a_run_whose_loss_is_no_number_stops_and_keeps_its_checkpoints(
    trained, tmp_path, monkeypatch, capsys, logging_steps, save_steps, kept
):
    original = ForgeryTrainer.training_step

    def poisoning(self, model, *arguments, **named):
        if self.state.global_step == 2:
            next(parameter for parameter in model.parameters() if parameter.requires_grad).data.fill_(torch.nan)
        return original(self, model, *arguments, **named)

    monkeypatch.setattr(ForgeryTrainer, "training_step", poisoning)
    saving = {"max_steps": 5, "save_strategy": "steps", "save_steps": save_steps, "save_total_limit": 1}
    saving["logging_steps"] = logging_steps
    given = options(tmp_path / "run", trained, write_records(tmp_path / "data"), **LORA, **saving)
    assert main(given) == 1
    message = capsys.readouterr().err
    found_at = 3 if logging_steps == 1 else min(5, -(-3 // save_steps) * save_steps)
    assert f"\nerror: the lm_loss is nan at step {found_at}" in message
    assert "--learning_rate" in message and "Traceback" not in message
    assert [path.name for path in complete_checkpoints(tmp_path / "run")] == ([f"checkpoint-{kept}"] if kept else [])
    assert not (tmp_path / "run" / "final").exists()
