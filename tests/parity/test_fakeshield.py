"""FakeShield against the numbers of its authors' code.

``REFERENCE_GOLDENS`` names another folder of the same form: every size comes from the folder. What a folder does not
have is not compared, but at least ``LEAST`` comparisons must be made.
"""

import copy
import gzip
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoTokenizer, SamModel

from forgery_eval.metrics.localization import FIXED, Pixels, authors_giou, curves, pixel_metrics
from llava import ForgeryDetector, load_pretrained_model
from llava.conversation import Conversation, conv_templates
from llava.data.prompting import fill_template, tokenize_conversation
from llava.mm_utils import process_images, tokenizer_image_token
from llava.model import decoding
from llava.model.checkpoint import Checkpoint, check_keys, complete_config
from llava.model.checkpoint_files import read_tensors
from llava.model.checkpoint_layout import KeyMap
from llava.model.configuration import LlavaConfig
from llava.model.decoding import Sampler, decode
from llava.systems.fakeshield import answer as words
from llava.systems.fakeshield import checkpoint, sam, segmenter, tagger, training
from llava.systems.fakeshield.options import FakeShieldOptions
from llava.systems.fakeshield.system import FakeShield
from llava.tampered import read_changed
from tests.goldens import lay_out

DEFAULT = Path(__file__).parents[1] / "data" / "goldens_fakeshield"
FOLDER = Path(os.environ.get("REFERENCE_GOLDENS", DEFAULT))
LEAST = 60
FEATURES = {"atol": 2e-5, "rtol": 1e-5}
LOGITS = {"atol": 1e-4, "rtol": 0.0}
TAGGER = {"atol": 2e-5, "rtol": 1e-5}
PIXELS = {"atol": 1e-6, "rtol": 0.0}
SURE = 1e-4
"""Masks are compared where their logits are farther from 0."""


DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64}
HAS_PUBLISHED = pytest.mark.skipif(
    not (FOLDER / "published_keys.json.gz").is_file(), reason="only one folder has the published names"
)


class Compared:
    """What was compared, and what of it differs."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.wrong: list[str] = []

    def same(self, name: str, found: object, wanted: object) -> None:
        self.names.append(name)
        if found != wanted:
            self.wrong.append(name)

    def close(self, name: str, found: Tensor | float, wanted: Tensor | float, atol: float, rtol: float) -> None:
        self.names.append(name)
        found, wanted = torch.as_tensor(found).float(), torch.as_tensor(wanted).float()
        if found.shape != wanted.shape or not torch.allclose(found, wanted, atol=atol, rtol=rtol):
            self.wrong.append(name)

    def golden(self, file: str, name: str, found: Tensor | np.ndarray, bound: dict[str, float] | None) -> None:
        """Compares with the folder's tensor of that name, if any; without a bound it must be equal."""
        wanted = numbers(file).get(name)
        if wanted is not None and bound is None:
            self.same(name, torch.as_tensor(np.array(found)).long().tolist(), wanted.long().tolist())
        elif wanted is not None:
            self.close(name, torch.as_tensor(found), wanted, **bound)


@cache
def numbers(name: str) -> dict[str, Tensor]:
    file = FOLDER / f"{name}.safetensors"
    return load_file(file) if file.is_file() else {}


@cache
def facts(name: str) -> dict:
    return json.loads((FOLDER / f"{name}.json").read_text())


@cache
def published_keys() -> dict:
    file = next(
        folder / "published_keys.json.gz"
        for folder in (FOLDER, DEFAULT)
        if (folder / "published_keys.json.gz").is_file()
    )
    with gzip.open(file, "rt") as stream:
        return json.load(stream)


def photo(name: str) -> Image.Image:
    return Image.open(FOLDER / name)


# --- models


@pytest.fixture(scope="session")
def clip(tmp_path_factory) -> str:
    """The tower that both language models name; where the folder has only its config, from the explainer's copy."""
    if (FOLDER / "clip" / "model.safetensors").is_file():
        return str(FOLDER / "clip")
    folder = tmp_path_factory.mktemp("clip")
    for name in ("config.json", "preprocessor_config.json"):
        (folder / name).write_bytes((FOLDER / "clip" / name).read_bytes())
    prefix = "model.vision_tower.vision_tower."
    copy = {n.removeprefix(prefix): t[...] for n, t in read_tensors(FOLDER / "DTE-FDM").items() if n.startswith(prefix)}
    save_file(copy, folder / "model.safetensors", {"format": "pt"})
    return str(folder)


def dtg_tensors() -> dict[str, Tensor]:
    """The tagger's weights by the recipe of the goldens."""
    recipe, fc = json.loads((FOLDER / "dtg_recipe.json").read_text()), load_file(FOLDER / "dtg_fc.safetensors")
    tensors = {}
    for index, (name, (_, shape)) in enumerate(published_keys()["DTG.pth"].items()):
        if name in fc:
            tensors[name] = fc[name]
            continue
        if name.endswith("num_batches_tracked"):
            tensors[name] = torch.tensor(1)
            continue
        x = np.random.RandomState(recipe["base"] + index).standard_normal(shape)
        if len(shape) == 4:
            x = x * np.sqrt(2 / np.prod(shape[1:]))
        elif name.endswith("running_var"):
            x = 1 + 0.3 * np.abs(x)
        elif name.endswith(".weight"):
            x = (1 + 0.1 * x) * (0.3 if "bn3" in name else 1)
        else:
            x = 0.1 * x
        tensors[name] = torch.from_numpy(np.asarray(x, np.float64)).float()
    for name, (total, first) in recipe["check"].items():
        assert float(tensors[name].double().sum()) == pytest.approx(total, rel=1e-4)
        assert float(tensors[name].flatten()[0]) == pytest.approx(first, rel=1e-5)
    return tensors


@pytest.fixture(scope="session")
def whole(tmp_path_factory) -> Path:
    """The published folder: the three parts side by side, and what no shape tells in the segmenter's config."""
    folder = tmp_path_factory.mktemp("fakeshield")
    torch.save(dtg_tensors(), folder / "DTG.pth")
    (folder / "DTE-FDM").symlink_to(FOLDER / "DTE-FDM")
    lay_out(FOLDER / "MFLM", folder / "MFLM")
    (folder / "MFLM" / "config.json").unlink()
    heads = facts("sizes")["sam"]["dec_heads"]
    config = json.loads((FOLDER / "MFLM" / "config.json").read_text())
    config["sam"] = {"decoder": {"num_attention_heads": heads}}
    (folder / "MFLM" / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="session")
def detector(whole, clip) -> ForgeryDetector:
    return ForgeryDetector.from_pretrained(whole, device="cpu", dtype="float32", vision_tower=clip)


@pytest.fixture
def shield(detector) -> FakeShield:
    return detector.system


# --- comparisons


def compare_tagger(net: tagger.Tagger) -> Compared:
    found = Compared()
    cases = facts("dte")["cases"]
    for index, case in enumerate(cases):
        crop = tagger.crop_image(photo(f"images/{case['image']}"))
        found.golden("dte", f"dtg/{index}/crop_u8", crop, None)
        pixels = tagger.normalize([crop])
        found.golden("dte", f"dtg/{index}/pixels_row8", pixels[0, :, 8], PIXELS)
        with torch.inference_mode():
            resnet = net.net.resnet
            stages = resnet(pixels, output_hidden_states=True).hidden_states
            logits = net(pixels)[0]
        for stage, state in enumerate(stages):
            found.golden("dte", f"dtg/{index}/pool{stage}", state.mean((2, 3))[0], TAGGER)
        found.golden("dte", f"dtg/{index}/logits", logits, TAGGER)
        found.same(f"dtg/{index}/label", int(logits.argmax()), case["label"])
        found.same(f"dtg/{index}/tag", words.tag_sentence(case["label"]), facts("dte")["tags"][case["label"]])
    return found


@torch.inference_mode()
def compare_explainer(system: FakeShield, only: int | None = None) -> Compared:
    found, model = Compared(), system.model
    found.same("question", words.QUESTION, facts("dte")["question"])
    found.same("pad_color", [int(v * 255) for v in system.image_processor.image_mean], list(facts("dte")["pad_color"]))
    mean, std = (np.array(getattr(system.image_processor, name)) for name in ("image_mean", "image_std"))
    for index, case in enumerate(facts("dte")["cases"]):
        if only not in (None, index):
            continue
        at = f"dte/{index}"
        prompt = system.tagged_prompt(FakeShieldOptions(), case["label"])
        ids = tokenizer_image_token(prompt, system.tokenizer)
        found.same(f"{at}/prompt", prompt, case["prompt"])
        found.same(f"{at}/prompt_ids", ids, case["prompt_ids"])
        pixels = process_images([photo(f"images/{case['image']}")], system.image_processor, model.config)
        crop = (pixels[0].permute(1, 2, 0).double().numpy() * std + mean) * 255
        found.golden("dte", f"{at}/crop_u8", crop.round().astype(np.uint8), None)
        found.golden("dte", f"{at}/pixels_row8", pixels[0, :, 8], PIXELS)
        features = model.model.run_towers(pixels)["clip"]
        found.golden("dte", f"{at}/clip_features", features[0], FEATURES)
        found.golden("dte", f"{at}/projected", model.encode_images(pixels).tokens[0], FEATURES)
        batch = model.prepare_inputs_labels_for_multimodal(torch.tensor([ids]), pixels)
        found.same(f"{at}/expanded_len", batch.inputs_embeds.shape[1], case["expanded_len"])
        found.golden("dte", f"{at}/inputs_embeds", batch.inputs_embeds[0], FEATURES)
        states = model.model(inputs_embeds=batch.inputs_embeds).last_hidden_state
        found.golden("dte", f"{at}/hidden_last", states[0, -1], {"atol": 1e-4, "rtol": 1e-4})
        found.golden("dte", f"{at}/logits_last16", model.lm_head(states[0, -16:]), LOGITS)
        every = range(model.config.vocab_size)
        decoded, _ = decode(
            model,
            batch.inputs_embeds,
            sampler=Sampler(0.0, None, [""]),
            max_new_tokens=len(case["new_ids"]) + 4,
            kept_words=every,
            is_complete=lambda new: new[-1] == system.tokenizer.eos_token_id,
        )
        found.same(f"{at}/new_ids", decoded[0].ids, case["new_ids"])
        if f"{at}/scores" in numbers("dte") and decoded[0].ids == case["new_ids"]:
            found.golden("dte", f"{at}/scores", decoded[0].kept_logits, LOGITS)
        text = system.tokenizer.decode(decoded[0].ids, skip_special_tokens=True).strip()
        found.same(f"{at}/text", text, case["text"])
        found.same(f"{at}/gate", not words.gate_is_open(text), case["gate_untampered"])
    return found


@torch.inference_mode()
def compare_segmenter(answering: segmenter.SegmenterAnswering) -> Compared:
    found, net, file = Compared(), answering.segmenter, "mflm"
    names = [case["image"] for case in facts("dte")["cases"]]
    mean, std = (np.array(getattr(net.language_model.image_processor, n)) for n in ("image_mean", "image_std"))
    for case_name, case in facts("mflm")["cases"].items():
        index, at = names.index(case["image"]), case_name
        image = net.prepare(photo(f"images/{case['image']}"))
        crop = (image.clip.permute(1, 2, 0).double().numpy() * std + mean) * 255
        found.golden(file, f"clip/{index}/crop_u8", crop.round().astype(np.uint8), None)
        found.golden(file, f"clip/{index}/pixels_row8", image.clip[:, 8], PIXELS)
        features = net.language_model.model.run_towers(image.clip[None])["clip"][0]
        found.golden(file, f"clip/{index}/features", features, FEATURES)
        found.golden(
            file, f"mm_projector/{index}", net.language_model.encode_images(image.clip[None]).tokens[0], FEATURES
        )
        found.golden(file, f"sam/{index}/resized_u8", image.sam, None)
        square = sam.normalize(image.sam, net.side)
        found.golden(file, f"sam/{index}/pixels_row8", square[:, 8], PIXELS)
        embedding = net.embed_images([image.sam])[0]
        found.golden(file, f"sam/{index}/image_embedding", embedding, FEATURES)
        if f"sam/{index}/block0" in numbers(file):
            _compare_blocks(found, net, square, index)
        found.golden(file, "sam/image_pe", net.sam.get_image_wide_positional_embeddings()[0], PIXELS)
        ids = tokenizer_image_token(segmenter.build_prompt(case["text_in"]), answering.tokenizer)
        found.same(f"{at}/prompt_ids", ids, case["prompt_ids"])
        _, new_ids, states = answering._answer([image], [case["text_in"]])
        found.same(f"{at}/new_ids", new_ids[0], case["new_ids"])
        found.same(f"{at}/n_seg", len(states[0]), case["n_seg"])
        patches = net.language_model.model.num_image_tokens()
        together = [*case["prompt_ids"], *new_ids[0]]
        at_seg = [t + patches - 1 for t, own in enumerate(together) if own == answering.seg_id]
        found.same(f"{at}/seg_positions", [t - 1 for t in at_seg], case.get("seg_positions_expanded", []))
        if len(states[0]):
            _compare_mask(found, net, image, embedding, states[0], at)
    return found


def _compare_blocks(found: Compared, net: segmenter.Segmenter, square: Tensor, index: int) -> None:
    encoder = net.sam.vision_encoder
    state = encoder.patch_embed(square[None])
    found.golden("mflm", f"sam/{index}/patch_embed", state[0], FEATURES)
    state = state + encoder.pos_embed
    for number, layer in enumerate(encoder.layers):
        state = layer(state)
        state = state[0] if isinstance(state, tuple) else state
        found.golden("mflm", f"sam/{index}/block{number}", state[0], FEATURES)


def _compare_mask(
    found: Compared,
    net: segmenter.Segmenter,
    image: segmenter.SegmenterPixels,
    embedding: Tensor,
    states: Tensor,
    at: str,
) -> None:
    file = "mflm"
    found.golden(file, f"{at}/seg_hidden", states, FEATURES)
    prompts = net.mask_prompts(states)
    found.golden(file, f"{at}/seg_embed", prompts, FEATURES)
    found.golden(file, f"{at}/sparse", prompts[:, None], FEATURES)
    found.golden(file, f"{at}/dense_pixel", net.sam.prompt_encoder.no_mask_embed.weight[0], PIXELS)
    found.golden(file, f"{at}/low_res_masks", sam.decode_masks(net.sam, embedding, prompts), LOGITS)
    logits = net.mask_logits(states, embedding, image.sam.shape[:2], image.shape)
    found.golden(file, f"{at}/mask_logits", logits, LOGITS)
    wanted = numbers(file).get(f"{at}/mask")
    if wanted is not None:
        sure = logits.abs() > SURE
        is_equal = wanted.shape == logits.shape and bool(((logits > 0) == (wanted > 0))[sure].all())
        found.same(f"{at}/mask", is_equal, True)


def training_batch(answering: segmenter.SegmenterAnswering) -> dict:
    """The authors' batch: their conversations, images and masks, made with our functions."""
    net, samples = answering.segmenter, []
    told = facts("mflm_train")["batch"]
    for name, text in zip(told["images"], told["conversations"], strict=True):
        own = training.tokenize(_conversation(text), answering.tokenizer)
        image = photo(name)
        prepared = net.prepare(image)
        mask = read_changed([FOLDER / name.replace("/image/", "/mask/").replace(".jpg", ".png")])
        samples.append(
            {
                "input_ids": own.input_ids,
                "labels": own.labels,
                "clip": prepared.clip,
                "sam": torch.from_numpy(np.array(prepared.sam)),
                "masks": torch.from_numpy(mask)[None],
            }
        )
    return training.collate(samples, 0)


def _conversation(text: str) -> Conversation:
    conversation = conv_templates["llava_v1"].copy()
    question, _, said = text.removeprefix(f"{conversation.system} USER: ").partition(" ASSISTANT: ")
    conversation.append_message("USER", question)
    conversation.append_message("ASSISTANT", said.removesuffix("</s>"))
    assert conversation.get_prompt() == text
    return conversation


def compare_training(answering: segmenter.SegmenterAnswering) -> Compared:
    found, told, file = Compared(), facts("mflm_train"), "mflm_train"
    batch = training_batch(answering)
    found.golden(file, "input_ids", batch["input_ids"], None)
    found.golden(file, "labels", batch["labels"], None)
    found.golden(file, "attention_mask", batch["attention_mask"], None)
    for index, masks in enumerate(batch["masks"]):
        found.golden(file, f"gt_mask/{index}", masks, None)
    sizes = [list(image.shape[:2]) for image in batch["sam"]]
    found.same("resize_list", sizes, told["batch"]["resize_list"])
    found.same("orig_hw", [list(masks.shape[1:]) for masks in batch["masks"]], told["batch"]["orig_hw"])
    network = training.SegmenterInTraining(answering.segmenter, answering.seg_id)
    terms = network(**batch)
    for name, key in (("lm", "ce_loss"), ("bce", "mask_bce_loss"), ("dice", "mask_dice_loss")):
        found.close(key, float(terms[name].mean * terms[name].weight), told["losses"][key], 0.0, 1e-5)
    loss = sum(term.weight * term.mean for term in terms.values())
    found.close("loss", float(loss), told["losses"]["loss"], 0.0, 1e-5)
    loss.backward()
    _compare_gradients(found, answering.segmenter, told)
    cut = told["truncation"]
    tokens = {-200: answering.segmenter.language_model.model.num_image_tokens()}
    kept = max(
        training.fitting_length(row[mask].tolist(), tokens, cut["model_max_length"])
        for row, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
    )
    found.same("truncation", (batch["input_ids"].shape[1], kept), (cut["before"], cut["after"]))
    return found


def _compare_gradients(found: Compared, net: segmenter.Segmenter, told: dict) -> None:
    own = dict(net.named_parameters())
    names = {
        name: next(iter(checkpoint.KEY_MAP.to_native({name.replace(".default", ""): torch.empty(0)})))
        for name in told["grad_norm"]
        if not name.startswith(checkpoint.UNUSED)
    }
    for name, native in names.items():
        native = native.replace("_proj.lora_A", "_proj.lora_A.default").replace("_proj.lora_B", "_proj.lora_B.default")
        gradient, norm = own[native].grad, told["grad_norm"][name]
        found.close(f"norm/{name}", 0.0 if gradient is None else gradient.norm().item(), norm or 0.0, 2e-6, 1e-4)
        wanted = numbers("mflm_train").get(f"grad/{name}")
        if wanted is not None:
            scale = float(wanted.abs().max())
            found.close(f"grad/{name}", gradient, wanted, 1e-4 * scale + 1e-7, 1e-4)


@pytest.fixture(scope="module")
def in_training(whole, clip) -> Iterator[segmenter.SegmenterAnswering]:
    """The segmenter with the goldens' LoRA weights."""
    files = checkpoint.read_segmenter(whole / "MFLM", vision_tower=clip)
    tokenizer, net = checkpoint.load_segmenter(files, device="cpu", dtype="float32")
    sizes = facts("mflm_train")["lora"]
    training.add_lora(net, rank=sizes["r"], alpha=sizes["alpha"], dropout=0.0)
    training.choose_trained(net, training.PUBLISHED_PARTS)
    own = dict(net.named_parameters())
    with torch.no_grad():
        for name, tensor in numbers("mflm_lora").items():
            own[f"language_model.{name}"].copy_(tensor)
    yield segmenter.SegmenterAnswering(net, tokenizer, files.context_length)


def compare_explainer_training(model: nn.Module, tokenizer: object, merged: nn.Module) -> Compared:
    found, told, file = Compared(), facts("dte_train"), "dte_train"
    records = json.loads((FOLDER / "train_dte.json").read_text())
    template = conv_templates["v1"]
    rows = [tokenize_conversation(fill_template(r["conversations"], template), tokenizer) for r in records]
    pad = torch.nn.utils.rnn.pad_sequence
    ids = pad([torch.tensor(row.input_ids) for row in rows], batch_first=True, padding_value=tokenizer.pad_token_id)
    labels = pad([torch.tensor(row.labels) for row in rows], batch_first=True, padding_value=-100)
    mask = torch.arange(ids.shape[1]) < torch.tensor([len(row.input_ids) for row in rows])[:, None]
    found.golden(file, "input_ids", ids, None)
    found.golden(file, "labels", labels, None)
    images = [photo(record["image"]) for record in records]
    pixels = process_images(images, model.image_processor, model.config)
    output = model(input_ids=ids, labels=labels, attention_mask=mask, images=pixels)
    found.golden(file, "expanded_labels", output.labels, None)
    found.close("lm_loss_lora", output.lm_loss.item(), told["lm_loss_lora"], 0.0, 1e-5)
    output.lm_loss.backward()
    own = {f"base_model.model.{name}": parameter.grad for name, parameter in model.named_parameters()}
    for name, norm in told["grad_norm"].items():
        found.close(f"norm/{name}", own[name].norm().item(), norm, 1e-6, 1e-4)
        wanted = numbers(file).get(f"grad/{name}")
        if wanted is not None:
            found.close(f"grad/{name}", own[name], wanted, 1e-4 * float(wanted.abs().max()), 1e-4)
    with torch.inference_mode():
        again = merged(input_ids=ids, labels=labels, attention_mask=mask, images=pixels)
        found.close("lm_loss_lora_merged", again.lm_loss.item(), told["lm_loss_lora_merged"], 0.0, 1e-5)
        case = facts("dte")["cases"][0]
        first = process_images([photo(f"images/{case['image']}")], model.image_processor, model.config)
        logits = merged(input_ids=torch.tensor([case["prompt_ids"]]), images=first).logits[0, -16:]
        found.golden(file, "lora_merged_logits_last16", logits, LOGITS)
    return found


def compare_metrics() -> Compared:
    found, told, file = Compared(), facts("metrics"), "metrics"
    images = []
    for index, row in enumerate(told["own_definition_pixel"]["rows"]):
        if f"iou/{index}/logits" not in numbers(file):
            continue
        grey = ((numbers(file)[f"iou/{index}/logits"][0] > 0).numpy() * 255).astype(np.uint8)
        pixels = Pixels.count(grey, numbers(file)[f"iou/{index}/gt"][0].numpy() > 0)
        images.append(pixels)
        counts = {key: values[0, FIXED] for key, values in curves([pixels]).items()}
        found.same(
            f"counts/{index}",
            [int(counts[k]) for k in ("tp", "fp", "fn", "tn")],
            [row[k] for k in ("tp", "fp", "fn", "tn")],
        )
        values = pixel_metrics(counts)
        for key in ("iou", "f1", "precision", "recall"):
            if row[key] is not None:
                found.close(f"{key}/{index}", float(values[key]), row[key], 1e-6, 0.0)
        single = told["authors_validator"]["single"][index]
        found.close(f"giou/{index}", float(authors_giou(counts)), single[0], 2e-5, 0.0)
    if images:
        counts = {key: values[:, FIXED] for key, values in curves(images).items()}
        union = (counts["tp"] + counts["fp"] + counts["fn"]).sum()
        found.close("giou", float(authors_giou(counts).mean()), told["authors_validator"]["all"][0], 1e-5, 0.0)
        found.close("ciou", float(counts["tp"].sum() / union), told["authors_validator"]["all"][1], 1e-5, 0.0)
    for case in told["gate"]:
        verdict = words.parse_answer(case["text"]).verdict
        found.same(f"gate/{case['text']}", int(words.gate_is_open(case["text"])), case["authors_fake"])
        found.same(f"verdict/{case['text']}", {"real": 0, "fake": 1, None: None}[verdict], case["intended"])
    for height, width, *wanted in told["resize_longest_1024"]:
        found.same(
            f"resized/{height}x{width}", list(sam.resized_shape(height, width, 1024)), [max(1, w) for w in wanted]
        )
    for case in told["resize_longest_1024_images"]:
        height, width = case["hw"]
        pixels = np.random.RandomState(height).randint(0, 256, (height, width, 3)).astype(np.uint8)
        resized = sam.resize_image(Image.fromarray(pixels), 1024)
        found.same(f"sha256/{height}x{width}", hashlib.sha256(resized.tobytes()).hexdigest(), case["sha256"])
    _compare_canned(found, told)
    return found


def _compare_canned(found: Compared, told: dict) -> None:
    canned, own = facts("mflm_train")["canned"], numbers("mflm_train")
    if "canned/logits" in own:
        logits = own["canned/logits"].clone().requires_grad_()
        bce, dice = training.mask_bce(logits, own["canned/target"]), training.mask_dice(logits, own["canned/target"])
        found.close("canned/bce", bce, torch.tensor(canned["bce"]), 1e-6, 1e-5)
        found.close("canned/dice", dice, torch.tensor(canned["dice"]), 1e-6, 1e-5)
        (2 * bce.mean() + 0.5 * dice.mean()).backward()
        found.close("canned/grad", logits.grad, own["canned/grad"], 1e-6, 1e-4)
    low = numbers("metrics").get("post/low")
    for index, (resized, original) in enumerate(told["post"] if low is not None else []):
        final = sam.mask_over_image(low, facts("sizes")["sam"]["image"], tuple(resized), tuple(original))
        found.golden("metrics", f"post/{index}", final[:, None], {"atol": 1e-5, "rtol": 1e-5})


def compare_norms(net: segmenter.Segmenter) -> Compared:
    found, own = Compared(), numbers("metrics")
    decoder, encoder = net.sam.mask_decoder.transformer, net.sam.vision_encoder
    layers: dict[str, tuple[str, Callable]] = {
        "decoder_layers.0.norm1": ("decoder_in", decoder.layers[0].layer_norm1),
        "decoder_norm_final_attn": ("decoder_in", decoder.layer_norm_final_attn),
        "encoder_blocks.0.norm1": ("encoder_in", encoder.layers[0].layer_norm1),
        "neck.1": ("neck_in", encoder.neck.layer_norm1),
    }
    with torch.inference_mode():
        for name, (given, layer) in layers.items():
            if f"norm_small/{given}" in own:
                output = layer(own[f"norm_small/{given}"])
                found.golden("metrics", f"norm_small/{name}", output, {"atol": 1e-5, "rtol": 1e-5})
    return found


# --- tests


@pytest.fixture(scope="module")
def found(detector) -> dict[str, Compared]:
    """All that is compared of the system at work."""
    system: FakeShield = detector.system
    return {
        "tagger": compare_tagger(system.tagger.net),
        "explainer": compare_explainer(system),
        "segmenter": compare_segmenter(system.segmenter.answering),
        "norms": compare_norms(system.segmenter.answering.segmenter),
        "metrics": compare_metrics(),
    }


@pytest.mark.parametrize("part", ["tagger", "explainer", "segmenter", "norms", "metrics"])
def test_a_part_gives_the_authors_numbers(found, part):
    assert not found[part].wrong


def test_enough_is_compared(found):
    names = {name for one in found.values() for name in one.names}
    assert len(names) >= LEAST, f"only {len(names)} comparisons: {sorted(names)}"


def test_the_segmenters_training(in_training):
    in_training.segmenter.zero_grad()
    assert not compare_training(in_training).wrong


@pytest.fixture(scope="module")
def adapted(clip):
    """The explainer with the goldens' adapter apart, and merged."""
    options = {"model_base": FOLDER / "DTE-FDM", "vision_tower": clip, "device": "cpu", "dtype": "float32"}
    tokenizer, model, _, _ = load_pretrained_model(
        FOLDER / "DTE-FDM-lora", system="fakeshield", merge_lora=False, **options
    )
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name or ".mm_projector." in name)
    _, merged, _, _ = load_pretrained_model(FOLDER / "DTE-FDM-lora", system="fakeshield", **options)
    return model, tokenizer, merged


def test_the_explainers_training(adapted):
    adapted[0].zero_grad()
    assert not compare_explainer_training(*adapted).wrong


# --- wrong implementations


def last_parts(names: list[str]) -> set[str]:
    """What differs, whatever case or image it is of."""
    return {name.rpartition("/")[2] for name in names}


@contextmanager
def changed(monkeypatch, target: str, value: object) -> Iterator[None]:
    with monkeypatch.context() as patch:
        patch.setattr(target, value)
        yield


def test_a_state_at_the_token_is_seen(shield, monkeypatch):
    """The state of the step behind ``[SEG]`` instead of the one that predicts it."""
    run = decoding._run
    seg_id = shield.segmenter.answering.seg_id

    def late(model, cache, padding, **inputs):
        logits, states = run(model, cache, padding, **inputs)
        chosen = logits.argmax(dim=-1)
        embedded = model.get_input_embeddings()(chosen)[:, None]
        behind = run(model, copy.deepcopy(cache), padding and padding.extended(), inputs_embeds=embedded)[1]
        return logits, torch.where((chosen == seg_id)[:, None], behind, states)

    with changed(monkeypatch, "llava.model.decoding._run", late):
        wrong = compare_segmenter(shield.segmenter.answering).wrong
    assert {"seg_hidden", "seg_embed"} <= last_parts(wrong)


def test_another_epsilon_of_the_decoder_is_seen(shield):
    net = shield.segmenter.answering.segmenter
    norms = [m for m in net.sam.mask_decoder.transformer.modules() if isinstance(m, nn.LayerNorm)]
    before = [norm.eps for norm in norms]
    try:
        for norm in norms:
            norm.eps = 1e-6
        wrong = compare_norms(net).wrong
    finally:
        for norm, eps in zip(norms, before, strict=True):
            norm.eps = eps
    assert "norm_small/decoder_layers.0.norm1" in wrong and not [name for name in wrong if "encoder" in name]


def test_a_padded_clip_branch_is_seen(shield):
    config = shield.segmenter.answering.segmenter.language_model.config
    config.image_aspect_ratio = "pad"
    try:
        wrong = compare_segmenter(shield.segmenter.answering).wrong
    finally:
        config.image_aspect_ratio = "square"
    assert {"new_ids", "seg_hidden"} & last_parts(wrong)


def test_padding_before_normalising_is_seen(shield, monkeypatch):
    def early(image: np.ndarray, side: int) -> Tensor:
        padded = np.zeros((side, side, 3), np.uint8)
        padded[: image.shape[0], : image.shape[1]] = image
        return right(padded, side)

    right = sam.normalize
    with changed(monkeypatch, "llava.systems.fakeshield.sam.normalize", early):
        wrong = compare_segmenter(shield.segmenter.answering).wrong
    assert {"pixels_row8", "image_embedding", "mask", "low_res_masks"} & last_parts(wrong)


def test_another_mask_decoder_is_seen(shield):
    """That of SAM's own file, or where the folder has none, one with other weights of its own."""
    net = shield.segmenter.answering.segmenter
    decoder = net.sam.mask_decoder
    kept = {name: tensor.clone() for name, tensor in decoder.state_dict().items()}
    file = FOLDER / "sam_tiny.pth"
    if file.is_file():
        rules = KeyMap(tuple(sam.sam_rules("", "")))
        stored = rules.to_native(torch.load(file, weights_only=True))
        other = {n.removeprefix("mask_decoder."): t for n, t in stored.items() if n.startswith("mask_decoder.")}
    else:
        other = {name: tensor.roll(1, 0) for name, tensor in kept.items()}
    try:
        decoder.load_state_dict(other)
        wrong = compare_segmenter(shield.segmenter.answering).wrong
    finally:
        decoder.load_state_dict(kept)
    assert {"mask", "low_res_masks"} & last_parts(wrong)
    assert not [name for name in wrong if "seg_" in name or "image_embedding" in name]


def test_one_id_more_is_seen(shield, whole):
    """The tokenizer as it is loaded by itself, which keeps a blank before an added token."""
    answering = shield.segmenter.answering
    plain = AutoTokenizer.from_pretrained(str(whole / "MFLM"), config=LlavaConfig())
    other = segmenter.SegmenterAnswering(answering.segmenter, plain, answering.context_length)
    assert "prompt_ids" in last_parts(compare_segmenter(other).wrong)


def test_another_template_tag_or_padding_of_the_explainer_is_seen(shield, monkeypatch):
    system = "llava.systems.fakeshield.system.tag_sentence"
    with changed(monkeypatch, system, lambda domain: words.tag_sentence((domain + 1) % 3)):
        assert {"dte/0/prompt", "dte/0/logits_last16"} & set(compare_explainer(shield, only=0).wrong)
    config = shield.model.config
    config.image_aspect_ratio = "square"
    try:
        assert "dte/0/hidden_last" in compare_explainer(shield, only=0).wrong
    finally:
        config.image_aspect_ratio = "pad"


def test_a_dice_loss_without_its_scale_is_seen(monkeypatch):
    with changed(monkeypatch, "llava.systems.fakeshield.training.DICE_SMOOTH", 1.0):
        assert "canned/dice" in compare_metrics().wrong


# --- real sizes


@HAS_PUBLISHED
def test_the_published_segmenter_maps_both_ways():
    names = published_keys()["MFLM"]
    with torch.device("meta"):
        tensors = {name: torch.empty(shape, dtype=DTYPES[kind]) for name, (kind, shape) in names.items()}
    assert sum(tensor.numel() * tensor.dtype.itemsize for tensor in tensors.values()) == 16_752_883_392
    used = {n: t for n, t in tensors.items() if not n.startswith(checkpoint.UNUSED) and "inv_freq" not in n}
    native = checkpoint.KEY_MAP.to_native(used)
    bare = {name.removeprefix("sam."): t for name, t in native.items() if name.startswith("sam.")}
    config = sam.infer_config(bare, {}, "the published file")
    vision = config.vision_config
    assert (vision.image_size, vision.hidden_size, vision.num_attention_heads) == (1024, 1280, 16)
    assert vision.window_size == 14 and list(vision.global_attn_indexes) == [7, 15, 23, 31]
    with torch.device("meta"):
        own = SamModel(config).state_dict()
    assert {n: list(t.shape) for n, t in own.items() if n != sam.REPEATED_POSITIONS} == {
        name: list(tensor.shape) for name, tensor in bare.items()
    }
    assert checkpoint.KEY_MAP.to_published(native).keys() == used.keys()
    assert len(tensors) - len(used) == 43 + 32


@HAS_PUBLISHED
def test_the_published_explainer_and_tagger_map_both_ways():
    names = published_keys()["DTE-FDM"]
    with torch.device("meta"):
        tensors = {name: torch.empty(shape, dtype=DTYPES[kind]) for name, (kind, shape) in names.items()}
    assert sum(tensor.numel() * tensor.dtype.itemsize for tensor in tensors.values()) == 27_308_693_504
    values = {
        **{"hidden_size": 5120, "num_hidden_layers": 40, "num_attention_heads": 40, "intermediate_size": 13824},
        **{"vocab_size": 32000, "mm_vision_tower": "openai/clip-vit-large-patch14-336", "rms_norm_eps": 1e-5},
    }
    opened = Checkpoint(Path("DTE-FDM"), values, tensors, Path("DTE-FDM"), system="fakeshield")
    complete, config = complete_config(opened)
    check_keys(config, complete)
    own = published_keys()["DTG.pth"]
    with torch.device("meta"):
        net = tagger.Tagger()
        assert {n: list(t.shape) for n, t in net.published_state().items()} == {n: list(s) for n, (_, s) in own.items()}
        net.load_published({name: torch.empty(shape) for name, (_, shape) in own.items()}, "DTG.pth")
