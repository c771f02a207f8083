"""The residual tower: what it measures, and that it is a tower like the others."""

import numpy as np
import pytest
import torch
from PIL import Image

from llava.demo import residual_features
from llava.demo.residual_encoder import ResidualVisionTower
from llava.demo.residual_features import Residuals, log_power, measure, residual_moments
from llava.errors import CheckpointError
from llava.model.multimodal_encoder.base import PixelFormat
from llava.model.multimodal_encoder.builder import build_vision_tower, read_vision_tower
from llava.native_crops import NativeCrops
from tests.small_models import CLIP_CONFIG, small_config, small_model

CROPS = NativeCrops(size=48, per_side=2)
SHARED = PixelFormat(64, (0.48, 0.46, 0.41), (0.27, 0.26, 0.28), CROPS)
RESIDUAL_CONFIG = {
    "type": "residual",
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "mlp_ratio": 2,
    "tile_size": 24,
}
SUMMARY = {"hidden_size": 20, "dropout": 0.4}


def levels(count: int = 3, size: int = 64, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, (count, 3, size, size), generator=torch.Generator().manual_seed(seed)).float()


def shared(values: torch.Tensor, pixel_format: PixelFormat = SHARED) -> torch.Tensor:
    """Shared pixels of images: the whole image in grey, since this tower must not look at it, and its crops."""
    mean, std = (torch.tensor(part) for part in (pixel_format.mean, pixel_format.std))
    whole = torch.zeros(3, pixel_format.size, pixel_format.size)
    images = [Image.fromarray(value.permute(1, 2, 0).numpy().astype(np.uint8)) for value in values]
    crops = pixel_format.crops
    return torch.stack([crops.pack(whole, crops.cut(image), mean, std) for image in images])


def tower(seed: int = 0, **changes) -> ResidualVisionTower:
    torch.manual_seed(seed)
    built = build_vision_tower({**RESIDUAL_CONFIG, **changes}, SHARED)
    built.calibrate(shared(levels(16, seed=9)))
    return built.eval()


def numpy_planes(image: np.ndarray) -> list[np.ndarray]:
    red, green, blue = image
    return [0.299 * red + 0.587 * green + 0.114 * blue, red - green, blue - green]


def numpy_residual(plane: np.ndarray) -> np.ndarray:
    out = np.empty_like(plane)
    rows, columns = plane.shape
    for y in range(rows):
        for x in range(columns):
            up, down = plane[max(y - 1, 0), x], plane[min(y + 1, rows - 1), x]
            left, right = plane[y, max(x - 1, 0)], plane[y, min(x + 1, columns - 1)]
            out[y, x] = plane[y, x] - (up + down + left + right) / 4
    return out


def test_residuals_and_their_moments_are_those_of_a_plain_loop():
    image = levels(1, 32)
    residuals = Residuals.of(image)
    plain = [numpy_residual(plane) for plane in numpy_planes(image[0].double().numpy())]
    assert np.allclose(residuals.both[0, :3], plain, atol=1e-3)
    moments = residual_moments(image, residuals, 16)[0].numpy()
    cell = plain[0][16:, :16]
    assert np.allclose(moments[6, 1, 0], np.abs(cell).mean(), atol=1e-3)
    assert np.allclose(moments[9, 1, 0], (cell**2).mean(), rtol=1e-4)
    assert np.allclose(moments[15, 1, 0], (cell**4).mean(), rtol=1e-4)
    red, green = (numpy_residual(channel) for channel in image[0, :2].double().numpy())
    assert np.allclose(moments[18, 1, 0], (red * green)[16:, :16].mean(), rtol=1e-3)
    assert np.allclose(moments[24:, 1, 0].reshape(7, 3)[3, 0], (np.abs(cell) < 4).mean(), atol=1e-6)


def test_the_spectrum_of_a_tile_is_that_of_its_pixels():
    image = levels(2, 72)
    spectra = residual_features.tile_spectra(residual_features.planes(image), 24)
    assert spectra.shape == (2, 9, 3 * 24 * 13)
    window = np.hanning(24)[:, None] * np.hanning(24)
    for row, column in ((1, 2), (0, 1)):
        plane = numpy_planes(image[1].double().numpy())[1]
        tile = plane[row * 24 : row * 24 + 24, column * 24 : column * 24 + 24]
        power = np.abs(np.fft.rfft2((tile - tile.mean()) * window)) ** 2 / (window**2).sum()
        found = spectra[1, row * 3 + column].reshape(3, 24, 13)[1]
        assert np.allclose(found, np.log(power + 1 / 12), atol=1e-3)


def test_a_wave_stands_in_its_place_of_the_spectrum():
    rows = torch.arange(64).view(-1, 1)
    wave = torch.cos(2 * torch.pi * rows * 16 / 64).expand(64, 64) * 20
    spectrum = log_power(wave)
    assert spectrum.argmax() in (16 * 33, 48 * 33)


@pytest.mark.parametrize("turn", [(20, 5), (4, 20), (-14, 14)])
def test_a_wave_of_any_direction_raises_its_ring(turn):
    rows, columns = torch.meshgrid(torch.arange(64), torch.arange(64), indexing="ij")
    noise = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 3
    wave = 4 * torch.cos(2 * torch.pi * (rows * turn[0] + columns * turn[1]) / 64)
    highest = []
    for plane in (noise, noise + wave):
        spectra = log_power(plane)
        peaks = spectra - spectra.mean((-2, -1), keepdim=True)
        highest.append(residual_features._ring_statistics(spectra, peaks)[0].view(-1, 3, 3)[:, 2, 0])
    ring = int((turn[0] ** 2 + turn[1] ** 2) ** 0.5 / 64 / 0.05)
    assert (highest[1] - highest[0]).argmax() == ring - 1 and (highest[1] - highest[0]).max() > 2


def test_a_grid_and_missing_levels_change_what_is_measured_of_the_image():
    image = levels(1)
    strength = Residuals.of(image).strength
    gridded = strength * (1 + (torch.arange(64) % 4 == 0).float())
    assert residual_features._phase_spread(gridded, 4).min() > 2 * residual_features._phase_spread(strength, 4).max()
    few = (image / 32).round() * 32
    whole, gaps = (residual_features._histogram_statistics(part)[0, :3] for part in (image, few))
    assert (whole > 1.5).all() and (gaps < -1.5).all()


def test_the_lags_are_circular_correlations():
    residual = torch.randn(1, 1, 16, 16, generator=torch.Generator().manual_seed(0)) * 5
    found = residual_features._lags(residual)[0]
    for value, (dy, dx) in zip(found, residual_features._LAGS, strict=True):
        moved = (residual * residual.roll((-dy, -dx), (2, 3))).mean() / (residual.square().mean() + 1 / 12)
        assert torch.allclose(value, moved, atol=1e-4)


@pytest.mark.parametrize(("size", "crop", "per_side", "tile"), [(64, 48, 2, 24), (112, 64, 3, 32), (30, 32, 1, 16)])
def test_shapes_at_several_sizes(size, crop, per_side, tile):
    format_ = PixelFormat(40, SHARED.mean, SHARED.std, NativeCrops(crop, per_side))
    built = build_vision_tower({**RESIDUAL_CONFIG, "tile_size": tile}, format_).eval()
    pixels = shared(levels(2, size), format_)
    assert pixels.shape[1:] == format_.shape
    seen = built(pixels, with_attention=True)
    side, prefix = per_side * crop // tile, 1 + per_side**2
    tokens = side * side + prefix
    assert built.grid == (side, side) and (built.num_patches, built.num_prefix_tokens) == (side * side, prefix)
    assert seen.features.shape == (2, side * side, 24) and seen.attention.shape == (2, 3, tokens, tokens)
    assert torch.allclose(seen.attention.sum(-1), torch.ones(2, 3, tokens), atol=1e-5)
    assert torch.equal(built(pixels).features, seen.features)
    assert built(pixels).attention is None


@pytest.mark.parametrize("summary", [None, SUMMARY])
def test_an_image_is_seen_alike_in_any_batch(summary):
    built, pixels = tower(summary=summary), shared(levels(4))
    together = built(pixels, with_attention=True)
    for index in range(4):
        alone = built(pixels[index : index + 1], with_attention=True)
        assert torch.allclose(alone.features[0], together.features[index], atol=1e-5)
        assert torch.allclose(alone.attention[0], together.attention[index], atol=1e-5)
    assert not torch.allclose(together.features[0], together.features[1], atol=1e-2)


def test_features_stay_with_their_place():
    built = tower(num_hidden_layers=1)
    with torch.no_grad():
        built.blocks[0].attention.out.weight.zero_()
        changed = levels(1, 96)
        changed[..., 72:, 24:48] = 128
        difference = (built(shared(levels(1, 96))).features - built(shared(changed)).features)[0].abs().amax(-1)
    grid = difference.view(4, 4)
    # A residual at a tile's edge looks at its neighbours, but never beyond the crop.
    assert grid[3, 1] == grid.max() > 1e-2 and max(grid[:2].max(), grid[2:, 2:].max()) < 1e-5


def test_the_tower_looks_at_the_crops_alone():
    built, pixels = tower(), shared(levels(2))
    other = pixels.clone()
    other[:, :, : SHARED.size] += 1
    assert torch.equal(built(pixels).features, built(other).features)


def test_calibration_brings_every_measure_to_one_scale():
    built, pixels = tower(), shared(levels(16, seed=9))
    measured = built._measure(built.own_pixels(pixels))
    for name, values in zip(("tile", "crop"), measured, strict=True):
        standard = (values.flatten(0, 1) - getattr(built, f"{name}_mean")) / getattr(built, f"{name}_spread")
        assert standard.mean(0).abs().max() < 1e-3 and standard.std(0, correction=0).max() < 1.0001
    once = {name: value.clone() for name, value in built.state_dict().items() if "mean" in name or "spread" in name}
    built.calibrate(pixels)
    assert all(torch.equal(built.state_dict()[name], value) for name, value in once.items())


def test_half_precision_sees_the_same_pixels_and_nothing_overflows():
    built = tower()
    pixels = shared(levels(2))
    exact = built._measure(built.own_pixels(pixels))
    for part, half in zip(exact, built._measure(built.own_pixels(pixels.half())), strict=True):
        assert torch.equal(part, half)
    seen = built.half()(pixels.half(), with_attention=True)
    assert seen.features.dtype == torch.float16 and seen.features.isfinite().all()
    for extreme in (torch.zeros(1, 3, 64, 64), torch.full((1, 3, 20, 5), 255.0)):
        assert tower()(shared(extreme)).features.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_tower_built_in_half_precision_measures_the_same(dtype):
    pixels = shared(levels(2))
    pixels = CROPS.unpack(pixels)
    wanted = tower()._measure(pixels)
    torch.set_default_dtype(dtype)
    try:
        built = build_vision_tower(RESIDUAL_CONFIG, SHARED)
        found = built._measure(pixels)
    finally:
        torch.set_default_dtype(torch.float32)
    assert built.position_embeddings.dtype == dtype
    for mine, theirs in zip(found, wanted, strict=True):
        assert mine.dtype == torch.float32 and torch.equal(mine, theirs)


def test_its_operations_can_be_counted_without_pixels():
    built = tower().to("meta")
    seen = built(torch.zeros(2, *SHARED.shape, device="meta"), with_attention=True)
    assert seen.features.shape == (2, 16, 24) and seen.attention.shape == (2, 3, 21, 21)


@pytest.mark.parametrize("summary", [None, SUMMARY])
def test_gradients_reach_every_parameter(summary):
    built = tower(summary=summary).train()
    if summary:  # the gate is closed at first, and only it learns from what the blocks find
        torch.nn.init.ones_(built.gate)
    (built(shared(levels(2))).features * torch.randn(16, 24)).sum().backward()
    without = [name for name, parameter in built.named_parameters() if not parameter.grad.abs().sum() > 0]
    assert without == []


def test_a_summary_sees_mean_and_spread_and_tells_every_tile():
    built = tower(num_hidden_layers=1, summary=SUMMARY)
    measures = built.measure(shared(levels(2)))
    mean, spread = measures.crops.mean(1), measures.crops.std(1, correction=0)
    layer = built.whole_layer
    plain = torch.nn.functional.gelu(torch.cat((mean, spread), 1) @ layer.inner.weight.T + layer.inner.bias)
    plain = plain @ layer.outer.weight.T + layer.outer.bias
    assert torch.allclose(layer(layer.moments(measures.crops)), plain, atol=1e-5)
    before = built.encode_measures(measures).features
    assert torch.equal(before[:, 0], before[:, -1])  # the gate is closed
    turned = measures._replace(crops=2 * mean[:, None] - measures.crops)
    assert torch.allclose(built.encode_measures(turned).features, before, atol=1e-5)
    wider = measures._replace(crops=mean[:, None] + 1.5 * (measures.crops - mean[:, None]))
    assert (built.encode_measures(wider).features - before).abs().amax(-1).min() > 1e-3


def test_a_summary_leaves_measures_out_in_training_alone():
    built, measures = tower(summary=SUMMARY), tower().measure(shared(levels(2)))
    seen = [built.encode_measures(measures).features for _ in range(2)]
    built.train()
    trained = [built.encode_measures(measures).features for _ in range(2)]
    assert torch.equal(*seen) and not torch.allclose(*trained, atol=1e-3)


@pytest.mark.parametrize("changes", [{}, {"summary": SUMMARY}])
def test_a_saved_tower_opens_through_the_registry(tmp_path, changes):
    built = tower(**changes)
    built.save_pretrained(tmp_path)
    source = read_vision_tower(str(tmp_path))
    assert source.config == {**RESIDUAL_CONFIG, **changes}
    again = build_vision_tower(source.config, SHARED).eval()
    again.load_state_dict({name: tensor[...] for name, tensor in source.tensors.items()})
    pixels = shared(levels(2))
    assert torch.equal(again(pixels).features, built(pixels).features)


def test_the_forgery_aware_fusion_takes_its_attention(tmp_path):
    processor = small_config().mm_image_processor
    processor = {**processor, "size": {"shortest_edge": 64}, "crop_size": {"height": 64, "width": 64}}
    model = small_model(
        vision_tower_config={**CLIP_CONFIG, "image_size": 64, "patch_size": 16},
        dino_tower_config=RESIDUAL_CONFIG,
        mm_image_processor=processor,
        mm_native_crops={"size": 48, "per_side": 2},
    )
    output = model.encode_images(shared(levels(2)), return_attention=True)
    assert output.tokens.shape == (2, 16, 32) and output.attention.shape == (2, 4, 16, 16)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    assert torch.equal(again.encode_images(shared(levels(2)), return_attention=True).tokens, output.tokens)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_attention_heads": 5}, "no multiple of 5 heads"),
        ({"tile_size": 20}, "crops of 48 pixels cannot be cut into tiles of 20"),
        ({"tile_size": 96}, "cannot be cut into tiles of 96"),
        ({"summary": {"hidden_size": 20}}, "needs dropout and hidden_size: {'hidden_size': 20}"),
        ({"summary": 20}, "needs dropout and hidden_size: 20"),
    ],
)
def test_sizes_that_do_not_fit_are_explained(changes, message):
    with pytest.raises(ValueError, match=message):
        build_vision_tower({**RESIDUAL_CONFIG, **changes}, SHARED)


def test_a_tower_without_crops_is_explained():
    with pytest.raises(ValueError, match="has no mm_native_crops"):
        build_vision_tower(RESIDUAL_CONFIG, PixelFormat(64, SHARED.mean, SHARED.std))


def test_a_config_without_its_sizes_is_explained():
    with pytest.raises(ValueError, match="lacks hidden_size, num_hidden_layers"):
        build_vision_tower({"type": "residual"}, SHARED)


def test_another_model_is_no_residual_tower(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "vit"}')
    assert not ResidualVisionTower.opens(str(tmp_path))
    with pytest.raises(CheckpointError, match="no residual tower"):
        ResidualVisionTower.read(str(tmp_path))


def test_measures_are_the_same_each_time():
    image = levels(2)
    for one, other in zip(measure(image, 32), measure(image.clone(), 32), strict=True):
        assert torch.equal(one, other)


def test_it_describes_an_image_by_its_measures():
    """By what no training changes, so that images of another world are not taken for known ones."""
    built = tower()
    pixels = shared(levels(3))
    before = built(pixels).description
    assert torch.equal(before, built.measure(pixels).crops.mean(1))
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.add_(0.1)
    assert torch.equal(built(pixels).description, before)
