"""Pictures to pixels, prompts to ids."""

import os

import numpy as np
import pytest
import torch
from PIL import Image

from llava.conversation import conv_templates
from llava.data.prompting import fill_template, tokenize_conversation
from llava.errors import ImageReadError
from llava.images import load_image, to_rgb
from llava.mm_utils import expand2square, get_model_name_from_path, process_images, tokenizer_image_token


def test_sixteen_bits_are_scaled_to_eight(tmp_path):
    values = np.array([[0, 255, 256, 65535]], dtype=np.uint16)
    Image.fromarray(values).save(tmp_path / "deep.png")
    assert np.asarray(load_image(tmp_path / "deep.png"))[0, :, 0].tolist() == [0, 0, 1, 255]


@pytest.mark.parametrize("mode", ["L", "LA", "P", "PA", "RGBA", "RGBa", "CMYK", "YCbCr", "1", "F", "HSV", "LAB"])
def test_every_mode_becomes_rgb(mode):
    assert to_rgb(Image.new(mode, (3, 2))).mode == "RGB"


def test_alpha_is_dropped():
    picture = Image.new("RGBA", (2, 2), (10, 20, 30, 0))
    assert to_rgb(picture).getpixel((0, 0)) == (10, 20, 30)


def test_orientation_is_applied_unless_the_protocol_ignores_it(tmp_path):
    picture = Image.new("RGB", (4, 2))
    exif = picture.getexif()
    exif[0x0112] = 6
    picture.save(tmp_path / "turned.jpg", exif=exif)
    assert load_image(tmp_path / "turned.jpg").size == (2, 4)
    assert load_image(tmp_path / "turned.jpg", apply_orientation=False).size == (4, 2)


def test_the_first_frame_of_an_animation_is_taken(tmp_path):
    frames = [Image.new("RGB", (2, 2), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
    assert load_image(tmp_path / "moving.gif").getpixel((0, 0))[0] > 200


def test_what_is_no_picture_raises(tmp_path):
    (tmp_path / "empty.png").write_bytes(b"")
    for name in ("empty.png", "absent.png"):
        with pytest.raises(OSError):
            load_image(tmp_path / name)
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(ImageReadError, match=r"pipe\.png: a pipe or a device"):
        load_image(tmp_path / "pipe.png")
    with pytest.raises(ImageReadError, match=r"^an image or its path is needed, not bytes$"):
        load_image(b"many bytes")


@pytest.mark.parametrize(("size", "corner"), [((5, 2), (0, 1)), ((2, 5), (1, 0)), ((3, 3), (0, 0)), ((1, 7), (3, 0))])
def test_a_picture_is_padded_in_the_middle(size, corner):
    square = expand2square(Image.new("RGB", size, "red"), (1, 2, 3))
    assert square.size == (max(size), max(size))
    red = np.argwhere(np.asarray(square)[:, :, 0] == 255)
    assert tuple(red.min(axis=0)[::-1]) == corner
    assert (red.max(axis=0) - red.min(axis=0) + 1).tolist() == [size[1], size[0]]


def test_pixels_without_padding_are_the_authors_too(bundled):
    _, model, processor, _ = bundled.base

    class Square:
        image_aspect_ratio = "square"

    pixels = process_images(bundled.images, processor, Square())
    assert torch.allclose(pixels, bundled.tensors["pixel_values_square"], atol=1e-6)
    with pytest.raises(ValueError, match="no images"):
        process_images([], processor, model.config)


def test_one_image_in_any_mode_gives_the_same_pixels(bundled):
    _, model, processor, _ = bundled.base
    picture = bundled.images[0].convert("L")
    modes = [picture, picture.convert("RGB"), picture.convert("LA"), picture.convert("RGBA")]
    pixels = process_images(modes, processor, model.config)
    assert all(torch.equal(pixels[0], other) for other in pixels)


def test_placeholders_and_return_types(bundled):
    tokenizer = bundled.base[0]
    ids = tokenizer_image_token("<image>", tokenizer, image_token_index=-7)
    assert ids == [tokenizer.bos_token_id, -7]
    assert tokenizer_image_token("<image>", tokenizer, return_tensors="pt").dtype == torch.long
    with pytest.raises(ValueError, match="unsupported return_tensors"):
        tokenizer_image_token("x", tokenizer, return_tensors="np")


@pytest.mark.parametrize(
    ("path", "name"), [("/a/b/model", "model"), ("b/run/checkpoint-50/", "run_checkpoint-50"), ("o/m", "m")]
)
def test_names_of_models(path, name):
    assert get_model_name_from_path(path) == name


def test_two_turns_are_both_supervised(bundled):
    tokenizer = bundled.base[0]
    turns = [
        {"from": "human", "value": "Look. <image>"},
        {"from": "gpt", "value": "It is real."},
        {"from": "human", "value": "Sure?"},
        {"from": "gpt", "value": "Yes."},
    ]
    conversation = fill_template(turns, conv_templates["v1"])
    assert conversation.messages[0] == ("USER", "<image>\nLook.")
    tokenized = tokenize_conversation(conversation, tokenizer)
    said = [i for i in tokenized.labels if i != -100]
    assert tokenizer.decode(said).replace(" ", "") == "Itisreal.</s>Yes.</s>"
    assert -200 not in tokenized.labels
    assert conv_templates["v1"].messages == []


@pytest.mark.parametrize(
    ("turns", "message"),
    [
        ([{"from": "gpt", "value": "x"}, {"from": "human", "value": "y"}], "speakers must alternate"),
        ([{"from": "human", "value": "x"}], "speakers must alternate"),
        ([{"from": "robot", "value": "x"}], "turn 0 is not"),
        ([{"from": "human"}], "turn 0 is not"),
    ],
)
def test_turns_that_are_no_dialogue_are_refused(bundled, turns, message):
    with pytest.raises(ValueError, match=message):
        tokenize_conversation(fill_template(turns, conv_templates["v1"]), bundled.base[0])


def test_the_mixed_batch_of_the_authors(bundled):
    """A text-only row beside one with an image."""
    _, model, _, _ = bundled.base
    given = bundled.tensors
    output = model(
        input_ids=given["mixed/input_ids"],
        attention_mask=given["mixed/attention_mask"],
        labels=given["mixed/labels"],
        images=given["mixed/images"],
    )
    assert abs(float(output.lm_loss) - bundled.fact("lm_loss_mixed")) < 1e-5
