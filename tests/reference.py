"""Compares this implementation with numbers that the authors' code produced on a small random model.

Such a folder has ``base/``, ``lora/``, ``clip/``, ``dino.pth``, ``images/``, ``train.json`` and the numbers in
``goldens*.safetensors`` and ``goldens.json``. Every size is taken from the folder.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from llava.conversation import conv_templates
from llava.data.collator import Sample, collate
from llava.data.prompting import fill_template, tokenize_conversation
from llava.labels import FAKE, REAL
from llava.mm_utils import process_images, tokenizer_image_token
from llava.model.builder import load_pretrained_model
from llava.model.checkpoint_layout import LORA_PREFIX
from llava.model.verdict import VerdictTokens
from llava.systems.fakereasoning import checkpoint as layout
from llava.systems.fakereasoning.answer import QUESTION, parse_answer
from llava.systems.fakereasoning.probability_mapper import ProbabilityMapper

FEATURES = {"atol": 1e-5, "rtol": 1e-5}
LOGITS = {"atol": 1e-4, "rtol": 0.0}
UNMERGED = {"atol": 2e-4, "rtol": 0.0}
PIXELS = {"atol": 1e-6, "rtol": 0.0}
LM_LOSS = {"atol": 1e-5, "rtol": 0.0}
MAPPER_LOSS = {"atol": 1e-6, "rtol": 0.0}
GRADIENTS = {"atol": 1e-5, "rtol": 0.0}
EXACT = {"atol": 0.0, "rtol": 0.0}

Loaded = tuple[Any, Any, Any, int]


@dataclass
class Outcome:
    """What a round of comparisons found."""

    passed: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    absent: list[str] = field(default_factory=list)

    @property
    def compared(self) -> int:
        return len(self.passed) + len(self.failed)

    def __str__(self) -> str:
        lines = [f"{self.compared} comparisons, {len(self.failed)} failed"]
        lines += [f"  {name}: {why}" for name, why in self.failed.items()]
        lines += [f"  absent from the folder: {name}" for name in self.absent]
        return "\n".join(lines)


@dataclass
class Reference:
    """A folder of reference numbers with the models opened from it."""

    folder: Path

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        found: dict[str, Tensor] = load_file(self.folder / "goldens.safetensors")
        for part, prefix in (("goldens_lora", "lora/"), ("goldens_extra", "")):
            file = self.folder / f"{part}.safetensors"
            if file.is_file():
                found |= {f"{prefix}{name}": value for name, value in load_file(file).items()}
        return found

    @cached_property
    def facts(self) -> dict[str, Any]:
        return json.loads((self.folder / "goldens.json").read_text(encoding="utf-8"))

    def fact(self, *path: Any) -> Any:
        """Returns an entry of ``goldens.json``, or None."""
        value: Any = self.facts
        for part in path:
            try:
                value = value[part]
            except (KeyError, IndexError, TypeError):
                return None
        return value

    @cached_property
    def images(self) -> list[Image.Image]:
        files = sorted((self.folder / "images").glob("img*.png"), key=lambda file: int(file.stem[3:]))
        return [Image.open(file) for file in files]

    def load(self, part: str = "base", **options: Any) -> Loaded:
        base = None if part == "base" else self.folder / "base"
        return load_pretrained_model(
            self.folder / part,
            base,
            vision_tower=self.folder / "clip",
            dino_weights=self.folder / "dino.pth",
            device="cpu",
            **options,
        )

    @cached_property
    def base(self) -> Loaded:
        return self.load()

    @cached_property
    def pixels(self) -> Tensor:
        _, model, processor, _ = self.base
        return process_images(self.images, processor, model.config)

    @cached_property
    def prompt_ids(self) -> Tensor:
        return tokenizer_image_token(self.fact("prompt_llava_v1"), self.base[0], return_tensors="pt")[None]

    def train_batch(self, pixels: Tensor | None = None) -> dict[str, Tensor]:
        tokenizer, model, processor, max_length = self.base
        records = json.loads((self.folder / "train.json").read_text(encoding="utf-8"))
        samples = []
        for record in records:
            conversation = fill_template(record["conversations"], conv_templates["v1"])
            tokenized = tokenize_conversation(conversation, tokenizer)
            image = Image.open(self.folder / "images" / record["image"])
            verdict = parse_answer(record["conversations"][-1]["value"]).verdict
            samples.append(
                Sample(
                    torch.tensor(tokenized.input_ids),
                    torch.tensor(tokenized.labels),
                    process_images([image], processor, model.config)[0],
                    FAKE if verdict == "fake" else REAL,
                )
            )
        return collate(samples, tokenizer.pad_token_id, max_length)


class Comparer:
    """Collects outcomes."""

    def __init__(self, reference: Reference) -> None:
        self.reference = reference
        self.outcome = Outcome()

    def tensor(
        self, name: str, compute: Callable[[], Tensor], tolerance: dict[str, float], optional: bool = False
    ) -> None:
        expected = self.reference.tensors.get(name)
        self.value(name, compute, expected, tolerance, optional=optional)

    def value(
        self,
        name: str,
        compute: Callable[[], Any],
        expected: Any,
        tolerance: dict[str, float] = EXACT,
        optional: bool = False,
    ) -> None:
        if expected is None:
            if not optional:
                self.outcome.absent.append(name)
            return
        try:
            actual = compute()
        except Exception as error:  # a crash is a failed comparison, with its reason
            self.outcome.failed[name] = f"{type(error).__name__}: {error}"
            return
        why = _difference(actual, expected, tolerance)
        if why:
            self.outcome.failed[name] = why
        else:
            self.outcome.passed.append(name)


def _difference(actual: Any, expected: Any, tolerance: dict[str, float]) -> str:
    if actual is None:
        return "there is nothing"
    if not isinstance(expected, Tensor) and isinstance(expected, list):
        return "" if list(actual) == expected else f"{actual} instead of {expected}"
    actual, expected = (torch.as_tensor(value).detach() for value in (actual, expected))
    if actual.shape != expected.shape:
        return f"shape {list(actual.shape)} instead of {list(expected.shape)}"
    if not actual.is_floating_point() and not expected.is_floating_point():
        return "" if torch.equal(actual.long(), expected.long()) else "ids, labels or masks differ"
    gap = (actual.double() - expected.double()).abs()
    if bool((gap <= tolerance["atol"] + tolerance["rtol"] * expected.double().abs()).all()):
        return ""
    return f"differs by up to {gap.max():.3g} (allowed {tolerance})"


def compare_vision(reference: Reference, comparer: Comparer) -> None:
    """Pixels, towers, projectors, bias, fusion and its norms."""
    model = reference.base[1].get_model()
    given = reference.tensors
    with torch.no_grad():
        comparer.tensor("pixel_values", lambda: reference.pixels, PIXELS)
        comparer.tensor("clip/features", lambda: model.vision_tower(given["pixel_values"]).features, FEATURES)
        dino = model.dino_tower(given["pixel_values"], with_attention=True)
        comparer.tensor("dino/features", lambda: dino.features, FEATURES)
        comparer.tensor("dino/attn_last", lambda: dino.attention, FEATURES)
        comparer.tensor("proj/clip", lambda: model.mm_projector(given["clip/features"]), FEATURES)
        comparer.tensor("proj/dino", lambda: model.dino_mm_projector(given["dino/features"]), FEATURES)
        patches = given["dino/attn_last"][:, :, 1:, 1:]
        comparer.tensor("fusion/attn_bias", lambda: model.fusion.attention_bias(patches), FEATURES)
        comparer.tensor("fusion/out", lambda: model.encode_images(given["pixel_values"]).tokens, FEATURES)
        for index, norm in enumerate((model.fusion.attention_norm, model.fusion.ffn_norm)):
            comparer.tensor(f"norm_small/out_{index}", lambda norm=norm: norm(given["norm_small/in"]), FEATURES)


def compare_text(reference: Reference, comparer: Comparer) -> None:
    """Prompt, ids, logits and greedy answers."""
    tokenizer, model, _, _ = reference.base
    pixels, prompt = reference.pixels, reference.prompt_ids
    comparer.value("question", lambda: [QUESTION], [reference.fact("question")])
    conversation = conv_templates["llava_v1"].copy()
    conversation.append_message(conversation.roles[0], f"<image>\n{QUESTION}")
    conversation.append_message(conversation.roles[1], None)
    comparer.value("prompt_llava_v1", lambda: [conversation.get_prompt()], [reference.fact("prompt_llava_v1")])
    comparer.tensor("prompt_ids", lambda: prompt, EXACT)
    for case in reference.fact("tokenizer_image_token_cases") or []:
        if not any(chunk.startswith(" ") for chunk in case["text"].split("<image>")):
            comparer.value(
                f"tokenizer_image_token {case['text']!r}",
                lambda case=case: tokenizer_image_token(case["text"], tokenizer),
                case["ids"],
            )
    batch = prompt.expand(len(pixels), -1)
    with torch.no_grad():
        comparer.tensor("eval_logits", lambda: model(input_ids=batch, images=pixels).logits, LOGITS)
    for index in range(len(pixels)):
        ids = reference.fact(f"generate_greedy{index}", "ids") or reference.fact("generate_greedy", str(index), "ids")
        comparer.value(
            f"generate_greedy{index}",
            lambda ids=ids, index=index: _greedy(model, prompt, pixels[index : index + 1], len(ids) - 1)[0],
            None if ids is None else ids[1:],
        )
        new_tokens = 24 if ids is None else len(ids) - 1
        comparer.tensor(
            f"generate/ids_{index}",
            lambda index=index, new_tokens=new_tokens: torch.tensor(
                [[tokenizer.bos_token_id, *_greedy(model, batch, pixels, new_tokens)[index]]], dtype=torch.long
            ),
            EXACT,
        )


def _greedy(model: Any, prompts: Tensor, pixels: Tensor, new_tokens: int) -> list[list[int]]:
    answers = model.generate(prompts, images=pixels, max_new_tokens=new_tokens, do_sample=False).tolist()
    eos = model.generation_config.eos_token_id
    return [answer[: answer.index(eos) + 1] if eos in answer else answer for answer in answers]


def compare_training(reference: Reference, comparer: Comparer) -> None:
    """The training batch, its expansion, logits and language-model loss."""
    model = reference.base[1]
    batch = reference.train_batch()
    for name in ("input_ids", "labels", "attention_mask", "forgery_labels"):
        comparer.tensor(f"train/{name}", lambda name=name: batch[name], EXACT)
    comparer.tensor("train/images", lambda: batch["images"], PIXELS)
    with torch.no_grad():
        for side, prefix in (("right", "train"), ("left", "train_left")):
            spliced = model.prepare_inputs_labels_for_multimodal(
                batch["input_ids"],
                batch["images"],
                attention_mask=batch["attention_mask"],
                labels=batch["labels"],
                padding_side=side,
            )
            optional = side == "left"
            comparer.tensor(f"{prefix}/exp_labels", lambda s=spliced: s.labels, EXACT, optional)
            comparer.tensor(f"{prefix}/exp_attention_mask", lambda s=spliced: s.attention_mask, EXACT, optional)
            embeds = f"{prefix}/exp_inputs_embeds"
            comparer.tensor(embeds, lambda s=spliced: s.inputs_embeds, FEATURES, optional=True)
        output = model(**batch)
        comparer.tensor("train/logits", lambda: output.logits, LOGITS)
        comparer.tensor("train/lm_loss", lambda: output.lm_loss, LM_LOSS)
        comparer.value("lm_loss", lambda: output.lm_loss, reference.fact("lm_loss"), LM_LOSS)
        comparer.value("compute_loss_total", lambda: output.loss, reference.fact("compute_loss_total"), LM_LOSS)
        model.config.tokenizer_padding_side = "left"
        left = model(**batch)
        model.config.tokenizer_padding_side = "right"
        comparer.value("lm_loss_left", lambda: left.lm_loss, reference.fact("lm_loss_left"), LM_LOSS)


def compare_mapper(reference: Reference, comparer: Comparer) -> None:
    """Pattern, ids and every case of the probability mapper's loss."""
    model = reference.base[1]
    given = reference.tensors
    own: VerdictTokens = model.verdict_tokens
    comparer.value("ce.pattern", lambda: own.pattern, reference.fact("ce", "pattern"))
    comparer.value("ce.real_id", lambda: [own.real], reference.fact("ce", "real_id"))
    comparer.value("ce.fake_id", lambda: [own.fake], reference.fact("ce", "fake_id"))
    mapper = ProbabilityMapper(own, reference.fact("ce", "temperature"), "predictions")
    labels = given["train/forgery_labels"].long()
    matched = mapper.loss(given["ce/match_all_logits"], labels)
    comparer.value("ce.match_all", lambda: matched.loss, reference.fact("ce", "match_all"), MAPPER_LOSS)
    comparer.value(
        "ce.match_all_positions", lambda: matched.positions.tolist(), reference.fact("ce", "match_all_positions")
    )
    total = reference.fact("compute_loss_total_with_match_logits")
    comparer.value(
        "compute_loss_total_with_match_logits", lambda: given["train/lm_loss"] + matched.loss, total, LM_LOSS
    )
    logits = given["ce/short_logits"].clone().requires_grad_()
    short = mapper.loss(logits, given["ce/short_labels"].long())
    short.loss.backward()
    comparer.value("ce.short", lambda: short.loss, reference.fact("ce", "short"), MAPPER_LOSS)
    comparer.tensor("ce/short_grad", lambda: logits.grad, MAPPER_LOSS)
    nothing = given["ce/none_logits"].clone().requires_grad_()
    none = mapper.loss(nothing, torch.zeros(len(nothing), dtype=torch.long))
    none.loss.backward()
    comparer.value("ce.none", lambda: none.loss, reference.fact("ce", "none"), MAPPER_LOSS)
    comparer.value("ce.none gradient", lambda: nothing.grad.abs().max(), 0.0, EXACT)
    end = mapper.loss(given["ce/end_logits"], torch.zeros(len(given["ce/end_logits"]), dtype=torch.long))
    comparer.value("ce.end is finite", lambda: [bool(end.loss.isfinite())], [True])


def compare_lora(reference: Reference, comparer: Comparer) -> None:
    """The LoRA folder over its base, merged and not, its gradients among them."""
    pixels, prompt = reference.pixels, reference.prompt_ids
    prompts = prompt.expand(len(pixels), -1)
    batch = reference.train_batch()
    for merge, name, tolerance in ((True, "merged", LOGITS), (False, "unmerged", UNMERGED)):
        _, model, _, _ = reference.load("lora", merge_lora=merge)
        with torch.no_grad():
            logits = model(input_ids=prompts, images=pixels).logits[:, -16:]
            comparer.tensor(f"lora/{name}_eval_logits_last16", lambda logits=logits: logits, tolerance)
            loss = model(**batch).lm_loss
        expected = reference.fact("lora", "train_lm_loss")
        comparer.value(f"lora.train_lm_loss ({name})", lambda loss=loss: loss, expected, LM_LOSS)
        if merge:
            with torch.no_grad():
                fused = model.encode_images(pixels).tokens
            comparer.tensor("lora/fusion_out", lambda fused=fused: fused, FEATURES)
            for index in range(len(pixels)):
                ids = reference.fact("lora", "generate_greedy", index, "ids")
                comparer.value(
                    f"lora.generate_greedy[{index}]",
                    lambda ids=ids, index=index, model=model: _greedy(
                        model, prompt, pixels[index : index + 1], len(ids) - 1
                    )[0],
                    None if ids is None else ids[1:],
                )
    for name, gradient in lora_gradients(model, batch):
        comparer.tensor(f"lora/grad/{name}", lambda gradient=gradient: gradient, GRADIENTS, optional=True)
        norm = reference.fact("extra", "lora_grad", "norms", name)
        comparer.value(f"gradient norm {name}", lambda g=gradient: g.norm(), norm, GRADIENTS, optional=True)


def lora_gradients(model: Any, batch: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Gradients of the training loss by the authors' names, as the LoRA recipe trains."""
    model.requires_grad_(False)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name or name.startswith(layout.NON_LORA_PARTS))
    model(**batch).loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    for name, gradient in layout.KEY_MAP.to_published(gradients).items():
        yield f"{LORA_PREFIX}{name}", gradient


def compare_all(reference: Reference) -> Outcome:
    """Runs every comparison that the folder has numbers for."""
    comparer = Comparer(reference)
    for part in (compare_vision, compare_text, compare_training, compare_mapper, compare_lora):
        try:
            part(reference, comparer)
        except KeyError as missing:
            comparer.outcome.absent.append(f"{missing.args[0]}, so the rest of {part.__name__} was not compared")
    return comparer.outcome
