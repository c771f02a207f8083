"""Native crops: where they lie, how they travel, and that a model without them is untouched."""

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from llava.errors import CheckpointError
from llava.mm_utils import grid_over_image, process_images
from llava.native_crops import NativeCrops
from tests.small_models import small_config

CROPS = {"size": 16, "per_side": 3}
PROCESSOR = {
    "size": {"height": 40, "width": 40},
    "do_center_crop": False,
    "image_mean": [0.5, 0.4, 0.3],
    "image_std": [0.25, 0.2, 0.3],
}


def image(width: int, height: int, seed: int = 0) -> Image.Image:
    values = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)


def config(**fields):
    return small_config(mm_image_processor=PROCESSOR, image_aspect_ratio="stretch", **fields)


@pytest.mark.parametrize("size", [(100, 40), (41, 300), (16, 16), (17, 90)])
def test_crops_are_the_pixels_of_the_image_as_they_are(size):
    picture, crops = image(*size), NativeCrops(**CROPS)
    levels = np.asarray(picture)
    found = crops.cut(picture)
    assert found.shape == (9, 16, 16, 3)
    down, across = crops.origins(size[1]), crops.origins(size[0])
    for index, crop in enumerate(found):
        top, left = down[index // 3], across[index % 3]
        assert np.array_equal(crop, levels[top : top + 16, left : left + 16])


def test_crops_lie_in_the_middle_of_their_cells_and_within_the_image():
    crops = NativeCrops(size=16, per_side=3)
    assert crops.origins(300) == [42, 142, 242]
    assert crops.origins(24) == [0, 4, 8]
    assert crops.origins(16) == [0, 0, 0]


@pytest.mark.parametrize("size", [(5, 9), (1, 1), (15, 40), (40, 7)])
def test_an_image_smaller_than_a_crop_is_continued_by_its_mirror_image(size):
    picture = image(*size)
    crop = NativeCrops(size=16, per_side=1).cut(picture)[0]
    assert crop.shape == (16, 16, 3)
    assert {tuple(pixel) for pixel in crop.reshape(-1, 3)} <= {tuple(p) for p in np.asarray(picture).reshape(-1, 3)}


@pytest.mark.parametrize("crops", [CROPS, {"size": 13, "per_side": 2}, {"size": 64, "per_side": 1}])
def test_what_is_packed_comes_back_beside_the_whole_image(crops):
    processor = CLIPImageProcessorPil(**PROCESSOR)
    pictures = [image(90, 70), image(64, 200, seed=1)]
    packed = process_images(pictures, processor, config(mm_native_crops=crops))
    plain = process_images(pictures, processor, config())
    assert torch.equal(packed[:, :, :40], plain) and packed.shape[-1] == 40
    cut = NativeCrops(**crops)
    mean, std = (torch.tensor(PROCESSOR[name]).view(1, 3, 1, 1) for name in ("image_mean", "image_std"))
    for picture, found in zip(pictures, cut.unpack(packed), strict=True):
        wanted = torch.from_numpy(cut.cut(picture)).permute(0, 3, 1, 2)
        assert torch.equal(((found * std + mean) * 255).round(), wanted.float())


def test_crops_of_a_large_image_are_not_shrunk():
    picture = image(9000, 20)
    found = process_images([picture], CLIPImageProcessorPil(**PROCESSOR), config(mm_native_crops=CROPS))
    crop = NativeCrops(**CROPS).unpack(found)[0, 4]
    mean, std = (torch.tensor(PROCESSOR[name]).view(3, 1, 1) for name in ("image_mean", "image_std"))
    left = NativeCrops(**CROPS).origins(9000)[1]
    wanted = np.asarray(picture)[2:18, left : left + 16]
    assert np.array_equal(((crop * std + mean) * 255).round().permute(1, 2, 0).numpy(), wanted)


def test_a_stretched_image_is_seen_whole():
    values = np.arange(9, dtype=np.float32).reshape(3, 3)
    laid = grid_over_image(values, (300, 60), "stretch")
    assert laid.shape == (60, 300)
    assert (laid[0, 0], laid[0, -1], laid[-1, 0], laid[-1, -1]) == (0, 2, 6, 8)


@pytest.mark.parametrize(
    "wrong", [{}, {"size": 64}, {"size": 0, "per_side": 3}, {"size": "64", "per_side": 3}, [64, 3]]
)
def test_a_field_that_makes_no_sense_is_explained(wrong):
    with pytest.raises(CheckpointError, match="mm_native_crops must be like"):
        NativeCrops.from_config(wrong)
    assert NativeCrops.from_config(None) is None
