"""A small model that has learnt to answer in the published format, so that its answers have verdicts."""

import json
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from llava.conversation import conv_templates
from llava.data.collator import Sample, collate
from llava.data.prompting import fill_template, tokenize_conversation
from llava.labels import Label
from llava.mm_utils import process_images
from llava.model.builder import load_tokenizer
from llava.systems.fakereasoning import answer as words
from tests.small_models import small_model

NOTICE = "This is a stand-in & <nothing> else."
CAPTIONS = ("A dark street.", "A soft portrait of a house.", "A car.", "An image with light and a strange shadow.")


def picture(seed: int, size: tuple[int, int] = (40, 30)) -> Image.Image:
    """A random picture: a colour, a gradient and noise."""
    rng = np.random.default_rng(seed)
    width, height = size
    base = rng.uniform(0, 255, 3) + np.linspace(0, 1, width)[None, :, None] * rng.uniform(-90, 90, 3)
    noisy = base + rng.normal(0, 25, (height, width, 3))
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8))


def trained_folder(
    folder: Path,
    tokenizer_folder: Path,
    steps: int = 400,
    pictures: Callable[[int, Label], Image.Image] = lambda index, _: picture(index),
) -> Path:
    """Trains for some seconds on pictures with varied answers, and saves the model.

    By default the pictures are random, so that what the model says of others hangs on rounding, and so on the machine.
    """
    tokenizer = load_tokenizer(tokenizer_folder)
    model = small_model(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, bos_token_id=1, eos_token_id=2
    )
    model.set_tokenizer(tokenizer)
    choice = random.Random(0)
    samples = []
    for index in range(24):
        label = choice.choice(words.LABELS)
        name = choice.choice(words.ATTRIBUTES[label])
        reasoning = words.write_reasoning(label, {name: "it is so."})
        answer = words.write_answer(label, caption=choice.choice(CAPTIONS), reasoning=reasoning)
        answer = answer.replace(words.SUMMARY, "I look.")
        turns = [{"from": "human", "value": f"<image>\n{words.QUESTION}"}, {"from": "gpt", "value": answer}]
        tokenized = tokenize_conversation(fill_template(turns, conv_templates["llava_v1"]), tokenizer)
        pixels = process_images([pictures(index, label)], model.image_processor, model.config)[0]
        samples.append(
            Sample(
                torch.tensor(tokenized.input_ids),
                torch.tensor(tokenized.labels),
                pixels,
                words.LABELS.index(label),
            )
        )
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    for step in range(steps):
        batch = collate([samples[(step * 6 + offset) % len(samples)] for offset in range(6)], 0, 2048)
        optimizer.zero_grad()
        model(**batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    model.save_pretrained(folder)
    return folder


def change_config(folder: Path, **fields: object) -> None:
    """Writes fields into a saved model's config."""
    file = folder / "config.json"
    config = json.loads(file.read_text())
    file.unlink()
    file.write_text(json.dumps({**config, **fields}))
