from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import scipy.ndimage
import torch
from PIL import Image

from fedkd.core.errors import UsageError
from fedkd.data import corruptions
from fedkd.data.corruptions import KINDS, STRENGTHS, corrupt, transformed


@pytest.fixture
def pixels(generator) -> torch.Tensor:
    """Smooth images with a little grain, as pictures are."""
    coarse = torch.rand(20, 3, 6, 6, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, 32, mode="bilinear").permute(0, 2, 3, 1) * 255
    grain = torch.randint(-15, 16, smooth.shape, generator=generator)
    return (smooth + grain).clamp(0, 255).to(torch.uint8)


@pytest.mark.parametrize("kind", KINDS)
def test_strength_takes_images_further_from_themselves(kind, pixels):
    before = pixels.clone()
    distances = []
    for strength in STRENGTHS:
        changed = corrupt(pixels, kind, strength, 0)
        assert changed.shape == pixels.shape
        assert changed.dtype == torch.uint8
        assert torch.equal(changed, corrupt(pixels, kind, strength, 0))
        distances.append((changed.double() - pixels.double()).square().mean().item())
    assert torch.equal(pixels, before)
    assert distances[0] > 0
    assert all(less < more for less, more in pairwise(distances)), distances


def test_only_noise_is_drawn(pixels):
    for kind in KINDS:
        assert torch.equal(corrupt(pixels, kind, 3, 0), corrupt(pixels, kind, 3, 1)) == (kind != "noise"), kind


@pytest.mark.parametrize("kind", KINDS)
def test_chunks_are_seamless(kind, pixels, monkeypatch):
    whole = corrupt(pixels, kind, 4, 0)
    monkeypatch.setattr(corruptions, "CHUNK", 8)  # 20 images: the last chunk is a short one
    apart = (corrupt(pixels, kind, 4, 0).int() - whole.int()).abs()
    assert apart.max() <= 1, "a sum in another order may round the other way"
    assert apart.float().mean() < 1e-3


def test_chunks_of_moved_images_are_seamless(pixels, monkeypatch):
    whole = transformed(pixels, 0)
    monkeypatch.setattr(corruptions, "CHUNK", 8)
    assert (transformed(pixels, 0).int() - whole.int()).abs().max() <= 1


@pytest.mark.parametrize("byte", [0, 255])
def test_noise_is_cut_off_where_bytes_end(byte):
    images = torch.full((4, 32, 32, 3), byte, dtype=torch.uint8)
    changed = corrupt(images, "noise", 5, 0).int()
    assert (changed - byte).abs().max() < 160  # six deviations; a byte that wraps around is further off
    assert (changed == byte).float().mean().item() == pytest.approx(0.5, abs=0.03)


def test_noise_has_the_deviation_that_is_stated():
    gray = torch.full((50, 32, 32, 3), 128, dtype=torch.uint8)
    for strength, std in zip(STRENGTHS, (0.04, 0.06, 0.08, 0.09, 0.10), strict=True):
        noise = corrupt(gray, "noise", strength, 0).double() - 128
        assert noise.std().item() == pytest.approx(255 * std, rel=0.02)  # 150,000 draws: a hundredth is five sigma
        assert abs(noise.mean().item()) < 0.3


@pytest.mark.parametrize(("strength", "sigma"), enumerate((0.4, 0.6, 0.7, 0.8, 1.0), 1))
def test_blur_against_scipy(strength, sigma, pixels):
    wanted = scipy.ndimage.gaussian_filter(pixels.double().numpy(), (0, sigma, sigma, 0), mode="nearest")
    assert np.abs(corrupt(pixels, "blur", strength, 0).numpy() - wanted).max() < 0.51


@pytest.mark.parametrize(("strength", "share"), enumerate((0.75, 0.5, 0.4, 0.3, 0.15), 1))
def test_contrast_against_numpy(strength, share, pixels):
    images = pixels.numpy().astype(np.float64)
    mean = images.mean((1, 2), keepdims=True)
    wanted = mean + share * (images - mean)
    assert np.abs(corrupt(pixels, "contrast", strength, 0).numpy() - wanted).max() < 0.51


@pytest.mark.parametrize(("strength", "side"), enumerate((30, 28, 27, 24, 20), 1))
def test_pixelate_against_pillow(strength, side, pixels):
    for image, changed in zip(pixels, corrupt(pixels, "pixelate", strength, 0), strict=True):
        small = Image.fromarray(image.numpy()).resize((side, side), Image.Resampling.BOX)
        wanted = np.asarray(small.resize((32, 32), Image.Resampling.BOX), dtype=int)
        assert np.abs(changed.numpy() - wanted).max() <= 1, "Pillow rounds once along each axis"


@pytest.mark.parametrize(("kind", "strength"), [("fog", 1), ("noise", 0), ("noise", 6)])
def test_what_is_not_known_is_refused(kind, strength, pixels):
    with pytest.raises(UsageError):
        corrupt(pixels, kind, strength, 0)


def test_images_that_do_not_move_are_left_alone(pixels):
    assert torch.equal(transformed(pixels, 0, rotation=0, shift=0), pixels)


def test_a_rotation_by_90_degrees_and_whole_pixels_are_exact(pixels):
    images = pixels.float()
    right, still = torch.full((20,), math.pi / 2), torch.zeros(20, 2)
    assert torch.allclose(corruptions._resample(images, right, still), images.rot90(1, (1, 2)), atol=1e-2)
    seen = corruptions._resample(images, torch.zeros(20), torch.tensor([2.0, 1.0]).expand(20, 2))
    assert torch.allclose(seen[:, 1:, 2:], images[:, :-1, :-2], atol=1e-2)


def test_moving_against_scipy():
    """One affine map for each channel, on images that are not square; mirrored beyond the rim."""
    images = torch.randint(256, (6, 24, 32, 3), generator=torch.Generator().manual_seed(2)).float()
    angles = torch.linspace(-0.26, 0.26, 6)
    shifts = torch.stack([torch.linspace(-2, 2, 6), torch.linspace(1.5, -1, 6)], 1)
    seen = corruptions._resample(images, angles, shifts)
    middle = np.array([11.5, 15.5])
    for image, angle, (right, down), mine in zip(images, angles.tolist(), shifts.tolist(), seen, strict=True):
        # In rows and columns, where rows count downward: counterclockwise as one sees it.
        turn = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
        back = np.linalg.inv(turn)
        offset = middle - back @ (middle + np.array([down, right]))
        for channel in range(3):
            plane = image[..., channel].numpy().astype(float)
            wanted = scipy.ndimage.affine_transform(plane, back, offset, order=1, mode="reflect")
            assert np.abs(mine[..., channel].numpy() - wanted).max() < 0.05


def test_moves_follow_the_seed(pixels):
    before = pixels.clone()
    assert torch.equal(transformed(pixels, 0), transformed(pixels, 0))
    assert not torch.equal(transformed(pixels, 0), transformed(pixels, 1))
    assert torch.equal(pixels, before)


def test_moves_stay_within_what_is_stated():
    places = torch.arange(33, dtype=torch.double) - 16
    # The middle of a bright spot tells how far an image was shifted.
    spot = torch.zeros(300, 33, 33, 3, dtype=torch.uint8)
    spot[:, 14:19, 14:19] = 200
    light = transformed(spot, 0, rotation=0)[..., 0].double()
    for axis in (1, 2):
        offsets = (light.sum(3 - axis) @ places) / light.sum((1, 2))
        assert offsets.abs().max() < 2.02
        assert offsets.min() < -1.8
        assert offsets.max() > 1.8
    # The long axis of a bright bar tells how far it was turned.
    bar = torch.zeros(300, 33, 33, 3, dtype=torch.uint8)
    bar[:, 15:18, 6:27] = 200
    light = transformed(bar, 0, shift=0)[..., 0].double()
    xx, yy, xy = (torch.einsum("nhw,hw->n", light, m) for m in (
        places.square().expand(33, 33), places.square()[:, None].expand(33, 33), places[:, None] * places
    ))  # fmt: skip
    angles = torch.rad2deg(0.5 * torch.atan2(2 * xy, xx - yy))
    assert angles.abs().max() < 15.2
    assert angles.min() < -14
    assert angles.max() > 14
