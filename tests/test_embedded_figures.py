"""The embedded model's card, checked from the repository alone: render the small sample, evaluate, compare.

And what it must not speak of: images of another world.
"""

import json

import numpy as np
import pytest

from forgery_eval.demo.card import card_metrics, read_rows
from forgery_eval.eval import run
from llava import ForgeryDetector
from llava.assets import DEMO_MODEL
from mmfr_generation.synthetic.writer import Run, write_dataset
from tests.other_worlds import WORLDS, draw_world

SAMPLE = Run(train=0, eval=2, size=112, seed=4242)
ONE_IMAGE_DIFFERENT = 0.3
"""Most that a set's metric may differ, where another processor's rounding turns one of its few images."""


@pytest.mark.slow
def test_the_embedded_model_reaches_what_its_card_says(tmp_path):
    stated = json.loads((DEMO_MODEL / "card.json").read_text("utf-8"))["sample"]
    write_dataset(SAMPLE, tmp_path / "data", 1)
    assert run(["--dataset_path", str(tmp_path / "data"), "--result_folder", str(tmp_path / "results")]) == 0
    found = card_metrics(read_rows(tmp_path / "data", tmp_path / "results"))
    assert found["images"] == stated["images"] == 88
    for reading in ("text", "score"):
        assert found[reading]["all"] == pytest.approx(stated[reading]["all"], abs=0.025)
        assert found[reading]["reals"] == pytest.approx(stated[reading]["reals"], abs=0.05)
        for name, value in stated[reading]["generator"].items():
            assert found[reading]["generator"][name] == pytest.approx(value, abs=ONE_IMAGE_DIFFERENT)
    assert found["without_verdict"] == pytest.approx(stated["without_verdict"], abs=0.02)
    assert found["score"]["role"]["seen"] > 0.85


@pytest.mark.slow
def test_images_of_another_world_get_no_verdict():
    images = [image for world in WORLDS for image in draw_world(world, 12, seed=23)]
    reports = ForgeryDetector.from_pretrained(device="cpu").analyze_many(images, batch_size=8, score_only=True)
    assert np.mean([report.abstained for report in reports]) >= 0.8
