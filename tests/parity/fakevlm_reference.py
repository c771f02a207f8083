"""Compares FakeVLM here with numbers of its authors' code on a small random model; every size comes from the folder.

Suffixes: B images, P patches, T tokens, V words.
"""

import json
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from llava.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava.conversation import conv_templates
from llava.data.collator import Sample, collate
from llava.data.prompting import fill_template, tokenize_conversation
from llava.labels import FAKE, REAL
from llava.mm_utils import expand2square, process_images, tokenizer_image_token
from llava.model.answering import Answering
from llava.model.builder import load_pretrained_model
from llava.model.checkpoint_layout import stored_state_dict
from llava.systems.fakevlm import protocol
from llava.systems.fakevlm.answer import FORMAT, QUESTION, complete_to_verdict
from llava.systems.fakevlm.checkpoint import KEY_MAP
from llava.systems.fakevlm.system import fill_prompt
from llava.train.lora import choose_trainable, parameter_part
from tests.reference import Comparer, Loaded, Outcome

PIXELS = {"atol": 1e-6, "rtol": 0.0}
FEATURES = {"atol": 2e-5, "rtol": 1e-5}
LOGITS = {"atol": 5e-5, "rtol": 0.0}
LOSS = {"atol": 1e-5, "rtol": 0.0}
GRADIENTS = {"atol": 1e-5, "rtol": 0.0}
PROBABILITY = {"atol": 1e-5, "rtol": 0.0}
WEIGHTS = {"atol": 1e-6, "rtol": 0.0}
EXACT = {"atol": 0.0, "rtol": 0.0}


class FakeVLMReference:
    """A folder of reference numbers, with the models opened from it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        files = sorted(self.folder.glob("goldens*.safetensors"))
        return {name: value for file in files for name, value in load_file(file).items()}

    @cached_property
    def facts(self) -> dict[str, Any]:
        return json.loads((self.folder / "goldens.json").read_text(encoding="utf-8"))

    @cached_property
    def trained_facts(self) -> dict[str, Any]:
        file = self.folder / "goldens_trained.json"
        return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}

    @cached_property
    def metrics(self) -> dict[str, Any]:
        return json.loads((self.folder / "metrics.json").read_text(encoding="utf-8"))

    def load(self, part: str = "base", **options: Any) -> Loaded:
        base = None if part == "base" else self.folder / "base"
        return load_pretrained_model(self.folder / part, base, system="fakevlm", device="cpu", **options)

    @cached_property
    def base(self) -> Loaded:
        return self.load()

    @cached_property
    def images(self) -> list[Image.Image]:
        return [Image.open(self.folder / entry["path"]) for entry in self.facts["images"]]

    @cached_property
    def pixels(self) -> Tensor:
        _, model, processor, _ = self.base
        return process_images(self.images, processor, model.config)

    def expanded(self, ids: list[int]) -> list[int]:
        """Ids as the authors have them, a word for each patch."""
        tokenizer, model, _, _ = self.base
        patches = [tokenizer.convert_tokens_to_ids("<image>")] * model.get_model().num_image_tokens()
        return [one for index in ids for one in (patches if index == IMAGE_TOKEN_INDEX else [index])]

    def records(self, name: str) -> list[dict[str, Any]]:
        return json.loads((self.folder / "fakeclue" / "data_json" / name).read_text(encoding="utf-8"))

    def train_pixels(self, name: str = "train.json") -> Tensor:
        _, model, processor, _ = self.base
        files = [self.folder / "fakeclue" / "train" / record["image"] for record in self.records(name)]
        return process_images([Image.open(file) for file in files], processor, model.config)

    def samples(self) -> list[Sample]:
        tokenizer = self.base[0]
        samples = []
        for record, pixels in zip(self.records("train.json"), self.train_pixels(), strict=True):
            done = tokenize_conversation(fill_template(record["conversations"], conv_templates["chat"]), tokenizer)
            label = REAL if record["label"] == 1 else FAKE
            samples.append(Sample(torch.tensor(done.input_ids), torch.tensor(done.labels), pixels, label))
        return samples

    def batch(self, rows: list[int] | None = None) -> dict[str, Any]:
        samples = self.samples()
        chosen = samples if rows is None else [samples[row] for row in rows]
        batch = collate(chosen, self.base[0].pad_token_id, self.facts["train"]["model_max_length"])
        return {name: value for name, value in batch.items() if name != "forgery_labels"}

    def padded_train(self, length: int) -> tuple[Tensor, Tensor, Tensor]:
        """Ids, labels and attention of the training rows as the authors pad them, a word for each patch."""
        pad = self.base[0].pad_token_id
        ids, labels = [], []
        patches = self.base[1].get_model().num_image_tokens()
        for sample in self.samples():
            row = self.expanded(sample.input_ids.tolist())[:length]
            own = [
                label
                for index, label in zip(sample.input_ids.tolist(), sample.labels.tolist(), strict=True)
                for label in [label] * (patches if index == IMAGE_TOKEN_INDEX else 1)
            ][:length]
            ids.append(row + [pad] * (length - len(row)))
            labels.append(own + [IGNORE_INDEX] * (length - len(own)))
        found = torch.tensor(ids)
        return found, torch.tensor(labels), found != pad


def greedy(model: Any, ids: Tensor, pixels: Tensor, new_tokens: int) -> list[list[int]]:
    answers = model.generate(ids, images=pixels, max_new_tokens=new_tokens, do_sample=False).tolist()
    eos = model.generation_config.eos_token_id
    return [answer[: answer.index(eos) + 1] if eos in answer else answer for answer in answers]


def compare_pixels(reference: FakeVLMReference, comparer: Comparer) -> None:
    """Both image modes, from files to pixels."""
    _, model, processor, _ = reference.base
    comparer.tensor("pixel_values", lambda: reference.pixels, PIXELS)
    comparer.tensor("train/pixel_values", reference.train_pixels, PIXELS, optional=True)
    levels = type(processor)(**{**processor.to_dict(), "do_rescale": False, "do_normalize": False})
    for index, image in enumerate(reference.images):
        comparer.tensor(
            f"u8_crop/{index}",
            lambda image=image: process_images([image], levels, model.config)[0].permute(1, 2, 0).to(torch.uint8),
            EXACT,
        )
        background = tuple(int(value * 255) for value in processor.image_mean)
        comparer.tensor(
            f"pad/square_u8/{index}",
            lambda image=image, b=background: torch.tensor(np.array(expand2square(image.convert("RGB"), b))),
            EXACT,
            optional=True,
        )
    padded = reference.load(image_aspect_ratio="pad")
    pixels = process_images(reference.images, padded[2], padded[1].config)
    comparer.tensor("pad/pixel_values", lambda: pixels, PIXELS, optional=True)
    comparer.tensor("pad/logits_last12", lambda: _raw_logits(reference, padded, pixels)[:, -12:], LOGITS, optional=True)


def _raw_logits(reference: FakeVLMReference, loaded: Loaded, pixels: Tensor) -> Tensor:
    ids = tokenizer_image_token(reference.facts["prompts"]["raw"]["text"], loaded[0], return_tensors="pt")
    with torch.no_grad():
        return loaded[1](input_ids=ids[None].expand(len(pixels), -1), images=pixels).logits


@torch.no_grad()
def compare_vision(reference: FakeVLMReference, comparer: Comparer) -> None:
    """The tower from its embeddings to its features, and the projector."""
    core = reference.base[1].get_model()
    tower, given = core.vision_tower.vision_tower, reference.tensors
    pixels = given["pixel_values"]
    states = tower(pixels, output_hidden_states=True).hidden_states
    comparer.tensor("vision/embeddings_prenorm", lambda: tower.embeddings(pixels), FEATURES, optional=True)
    comparer.tensor("vision/hidden_0", lambda: tower.pre_layrnorm(tower.embeddings(pixels)), FEATURES, optional=True)
    comparer.tensor("vision/hidden_m2", lambda: states[-2], FEATURES)
    comparer.tensor("vision/features", lambda: core.vision_tower(pixels).features, FEATURES)
    comparer.tensor("proj/hidden", lambda: core.mm_projector[:2](given["vision/features"]), FEATURES)
    comparer.tensor("proj/out", lambda: core.encode_images(pixels).tokens, FEATURES)


def compare_prompts(reference: FakeVLMReference, comparer: Comparer) -> None:
    """Texts, ids, spliced embeddings, logits and greedy answers of every prompt."""
    tokenizer, model, _, _ = reference.base
    prompts = reference.facts["prompts"]
    for style in ("raw", "chat", "chat_system"):
        comparer.value(f"text of {style}", lambda style=style: [fill_prompt(style, QUESTION)], [prompts[style]["text"]])
    for name, prompt in prompts.items():
        ids = tokenizer_image_token(prompt["text"], tokenizer)
        comparer.value(f"ids of {name}", lambda ids=ids: reference.expanded(ids), prompt["ids"])
        comparer.tensor(f"prompt/{name}/ids", lambda ids=ids: torch.tensor([reference.expanded(ids)]), EXACT)
        pixels = reference.pixels[: len(prompt["greedy"])]
        rows = torch.tensor(ids)[None].expand(len(pixels), -1)
        length = max(len(answer["ids"]) for answer in prompt["greedy"])
        answers = greedy(model, rows, pixels, length)
        for index, (found, wanted) in enumerate(zip(answers, prompt["greedy"], strict=True)):
            comparer.value(f"greedy ids of {name}, image {index}", lambda found=found: found, wanted["ids"])
            text = tokenizer.decode(found, skip_special_tokens=True)
            comparer.value(
                f"greedy text of {name}, image {index}", lambda t=text: [t.strip()], [wanted["text"].strip()]
            )
        with torch.no_grad():
            comparer.tensor(
                f"prompt/{name}/logits",
                lambda rows=rows, pixels=pixels: model(input_ids=rows, images=pixels).logits,
                LOGITS,
                optional=True,
            )
            comparer.tensor(
                f"prompt/{name}/inputs_embeds",
                lambda rows=rows, px=pixels: model.prepare_inputs_labels_for_multimodal(rows, px).inputs_embeds,
                FEATURES,
                optional=True,
            )
    _compare_evaluation(reference, comparer)


def _compare_evaluation(reference: FakeVLMReference, comparer: Comparer) -> None:
    """The authors' own run of their evaluation: one padded batch."""
    tokenizer, model, _, _ = reference.base
    given = reference.tensors
    if "eval/input_ids" not in given:
        return
    ids = tokenizer_image_token(reference.facts["prompts"]["raw"]["text"], tokenizer)
    own = reference.expanded(ids)
    width = given["eval/input_ids"].shape[1]
    padded = [tokenizer.pad_token_id] * (width - len(own)) + own
    comparer.tensor("eval/input_ids", lambda: torch.tensor([padded] * len(reference.pixels)), EXACT)
    pixels, new = reference.pixels, given["eval/new_ids"]
    rows = torch.tensor(ids)[None].expand(len(pixels), -1)
    found = greedy(model, rows, pixels, new.shape[1])
    comparer.value("eval/new_ids", lambda: [index for row in found for index in row], new.flatten().tolist())
    steps = given["eval/step_logits"].shape[1]
    with torch.no_grad():
        forced = model(input_ids=torch.cat((rows, new[:, : steps - 1]), dim=1), images=pixels).logits
    comparer.tensor("eval/step_logits", lambda: forced[:, -steps:], LOGITS)


def compare_training(reference: FakeVLMReference, comparer: Comparer) -> None:
    """The collated batch at both lengths, rows of several turns, losses, logits and gradient norms."""
    facts, model = reference.facts["train"], reference.base[1]
    for name, length in (("train", facts["model_max_length"]), ("train_trunc", facts["trunc_length"])):
        ids, labels, attention = reference.padded_train(length)
        comparer.tensor(f"{name}/input_ids", lambda ids=ids: ids, EXACT)
        comparer.tensor(f"{name}/labels", lambda labels=labels: labels, EXACT)
        comparer.tensor(f"{name}/attention_mask", lambda attention=attention: attention, EXACT)
    _compare_mixed(reference, comparer)
    batch = reference.batch()
    with torch.no_grad():
        comparer.value("train.lm_loss", lambda: model(**batch).lm_loss, facts["lm_loss"], LOSS)
        for row, wanted in enumerate(facts["lm_loss_row"]):
            comparer.value(
                f"train.lm_loss_row[{row}]", lambda r=row: model(**reference.batch([r])).lm_loss, wanted, LOSS
            )
        output = model(**batch)
        rows, positions = (output.labels[:, 1:] != IGNORE_INDEX).nonzero(as_tuple=True)
        comparer.tensor("train/sup_logits", lambda: output.logits[rows, positions], LOGITS, optional=True)
        kept = model.config.tokenizer_model_max_length
        model.config.tokenizer_model_max_length = facts["trunc_length"]
        comparer.value("train.trunc_loss", lambda: model(**batch).lm_loss, facts["trunc_loss"], LOSS)
        model.config.tokenizer_model_max_length = kept
    _compare_gradients(reference, comparer)


def _compare_mixed(reference: FakeVLMReference, comparer: Comparer) -> None:
    """Rows of several turns, with a system prompt, two images, a question before the image.

    The authors also supervise the next speaker's first piece after an inner answer; here that piece is masked.
    """
    tokenizer = reference.base[0]
    for row, record in enumerate(reference.records("train_mixed.json")):
        wanted = reference.tensors.get(f"mixed/{row}/input_ids")
        if wanted is None:
            continue
        conversation = fill_template(record["conversations"], conv_templates["chat"], record.get("system_prompt", ""))
        done = tokenize_conversation(conversation, tokenizer)
        ids = reference.expanded(done.input_ids)
        length = int((wanted[0] != tokenizer.pad_token_id).sum())
        comparer.value(f"mixed/{row}/input_ids", lambda ids=ids: ids, wanted[0, :length].tolist())
        theirs = reference.tensors[f"mixed/{row}/labels"][0]
        supervised = theirs[theirs != IGNORE_INDEX].tolist()
        own = [label for label in done.labels if label != IGNORE_INDEX]
        speakers = [tokenizer.convert_tokens_to_ids(piece) for piece in ("▁USER", "USER")]
        inner = len(record["conversations"]) // 2 - 1
        masked = [label for label in supervised if not (inner and label in speakers)]
        comparer.value(f"mixed/{row}/labels", lambda own=own: own, masked)
        comparer.value(f"mixed/{row}, masked", lambda m=masked, s=supervised: len(s) - len(m), inner)


def _compare_gradients(reference: FakeVLMReference, comparer: Comparer) -> None:
    model = reference.load()[1]
    choose_trainable(model, {parameter_part(name) for name, _ in model.named_parameters()})
    model.get_model().freeze_behind_outputs()
    model(**reference.batch()).loss.backward()
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    stored = stored_state_dict(model, dict(model.named_parameters()))
    gradients = {
        theirs: parameter.grad for theirs, parameter in KEY_MAP.to_published(stored).items() if id(parameter) in names
    }
    for name, wanted in reference.facts["train"]["grad_norm"].items():
        found = gradients.get(name)
        if wanted is None:
            comparer.value(f"no gradient of {name}", lambda found=found: [found is None], [True])
        else:
            comparer.value(f"gradient norm of {name}", lambda found=found: found.norm(), wanted, GRADIENTS)
            comparer.tensor(f"grad/{name}", lambda found=found: found, GRADIENTS, optional=True)
    total = torch.stack([grad.norm() for grad in gradients.values() if grad is not None]).norm()
    comparer.value("total gradient norm", lambda: total, reference.facts["train"]["total_grad_norm"], LOSS)


def compare_probabilities(reference: FakeVLMReference, comparer: Comparer) -> None:
    """P(fake) forced at the verdict's opening, and at the verdict of given answers."""
    tokenizer, model, _, length = reference.base
    facts = reference.facts["pfake"]
    comparer.value("pfake.real_id", lambda: model.verdict_tokens.real, facts["real_id"])
    comparer.value("pfake.fake_id", lambda: model.verdict_tokens.fake, facts["fake_id"])
    answering = Answering(model, tokenizer, length, FORMAT)
    with torch.no_grad():
        embeddings = {IMAGE_TOKEN_INDEX: answering.encode_images(reference.pixels)}
        embeddings = {index: output.tokens for index, output in embeddings.items()}
        for style in ("raw", "chat"):
            prompt = fill_prompt(style, QUESTION)
            scores = answering.prompt_scores(prompt, embeddings, len(reference.pixels))
            for case in (case for case in facts["cases"] if case["prompt"] == style):
                score, name = scores[case["image"]], f"pfake of {style}, image {case['image']}"
                comparer.value(name, lambda score=score: score, case["p_fake"], PROBABILITY)
        prompt, first = fill_prompt("raw", QUESTION), {i: tokens[:1] for i, tokens in embeddings.items()}
        for case in facts["teacher_forced"]:
            before = complete_to_verdict(case["answer"])
            at = len(tokenizer_image_token(answering._continued(prompt, before), tokenizer))
            at -= len(tokenizer_image_token(prompt, tokenizer))
            name = f"teacher-forced {case['answer']!r}"
            if case["verdict_index"] is None:
                comparer.value(f"{name}, forced", lambda before=before: [before], [FORMAT.verdict_prefix])
                continue
            comparer.value(f"{name}, index", lambda at=at: at, case["verdict_index"])
            text = answering._continued(prompt, before)
            score = answering._score_texts([text], first)[0]
            comparer.value(name, lambda score=score: score, case["p_fake"], PROBABILITY)


def compare_trained(reference: FakeVLMReference, comparer: Comparer) -> None:
    """What the authors' training left, whole and as LoRA, merged and not; the base's tokenizer is named."""
    cases = [
        ("trained", "trained", {}),
        *(("lora", f"lora_{m}", {"merge_lora": m == "merged"}) for m in ("merged", "unmerged")),
    ]
    for folder, name, options in cases:
        if f"{name}/logits_last12" not in reference.tensors:
            comparer.outcome.absent.append(f"{name}/logits_last12")
            continue
        loaded = reference.load(folder, **options)
        logits = _raw_logits(reference, loaded, reference.pixels)
        comparer.tensor(f"{name}/logits_last12", lambda logits=logits: logits[:, -12:], LOGITS)
        wanted = reference.trained_facts[name]["greedy_ids"]
        ids = tokenizer_image_token(reference.facts["prompts"]["raw"]["text"], loaded[0], return_tensors="pt")
        rows = ids[None].expand(len(reference.pixels), -1)
        found = greedy(loaded[1], rows, reference.pixels, len(wanted[0]))
        for index, answer in enumerate(wanted):
            comparer.value(f"{name}.greedy_ids[{index}]", lambda found=found, i=index: found[i], answer)


def compare_run(reference: FakeVLMReference, comparer: Comparer) -> None:
    """Losses, gradient norms and the weights after the authors' run of a few steps."""
    run = reference.trained_facts.get("run_full")
    if run is None:
        return
    model = reference.load()[1]
    choose_trainable(model, {parameter_part(name) for name, _ in model.named_parameters()})
    model.get_model().freeze_behind_outputs()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)
    # A log has the rate of the step that follows; the first one warms up from nothing.
    rates = [0.0, *(entry["learning_rate"] for entry in run["log"])]
    order, size = run["order"], run["flags"]["per_device_train_batch_size"]
    rows = len(reference.records("train.json"))
    epochs = [order[start : start + rows] for start in range(0, len(order), rows)]
    batches = [epoch[start : start + size] for epoch in epochs for start in range(0, rows, size)]
    for step, (chosen, entry) in enumerate(zip(batches, run["log"], strict=True)):
        for group in optimizer.param_groups:
            group["lr"] = rates[step]
        loss = model(**reference.batch(chosen)).loss
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        comparer.value(f"run, loss of step {step}", lambda loss=loss: loss, entry["loss"], {"atol": 1e-4, "rtol": 0.0})
        comparer.value(f"run, norm of step {step}", lambda n=norm: n, entry["grad_norm"], {"atol": 1e-4, "rtol": 1e-5})
    file = reference.folder / "trained" / "model.safetensors"
    if not file.is_file():
        comparer.outcome.absent.append("trained/model.safetensors")
        return
    own = KEY_MAP.to_published(stored_state_dict(model))
    # A key's bias moves all scores of a query alike, so that its gradient is nothing but rounding, which Adam blows up.
    norms = reference.facts["train"]["grad_norm"]
    rounding = {name for name, norm in norms.items() if norm is not None and norm < 1e-6}
    for name, wanted in load_file(file).items():
        if name in rounding:
            continue
        comparer.value(f"run, weights of {name}", lambda name=name: own[name], wanted, WEIGHTS)


def compare_protocol(reference: FakeVLMReference, comparer: Comparer) -> None:
    """The authors' reading of every canned answer, and their counts; a coin counts as wrong."""
    theirs = reference.metrics["by_the_authors_code"]
    class_of = {1: REAL, 0: FAKE, "random": None}
    answers: dict[str, list[Any]] = {}
    for case in theirs["cases"]:
        comparer.value(
            f"verdict of {case['text']!r}",
            lambda case=case: [protocol.parse(case["text"])],
            [class_of[case["vllm"]]],
        )
        own = protocol.EvaluatedAnswer(class_of[case["label"]], case["text"])
        answers.setdefault(case["cate"], []).append(own)
    results = theirs["eval_vllm_results"]
    for category, own in answers.items():
        found = protocol.metrics(own, lambda text, wanted: {}, None)
        fake, real = (results[f"random_as_{coin}"]["category_acc"][category]["overall"] for coin in (0, 1))
        comparer.value(f"right_real of {category}", lambda f=found: f["right_real"], fake["right_real"])
        comparer.value(f"right_fake of {category}", lambda f=found: f["right_fake"], real["right_fake"])


PARTS = (
    compare_pixels,
    compare_vision,
    compare_prompts,
    compare_training,
    compare_probabilities,
    compare_trained,
    compare_run,
    compare_protocol,
)


def compare_all(reference: FakeVLMReference, parts: Any = PARTS) -> Outcome:
    """Runs every comparison that the folder has numbers for."""
    comparer = Comparer(reference)  # type: ignore[arg-type]
    for part in parts:
        try:
            part(reference, comparer)
        except KeyError as missing:
            comparer.outcome.absent.append(f"{missing.args[0]}, so the rest of {part.__name__} was not compared")
    return comparer.outcome
