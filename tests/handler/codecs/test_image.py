"""Bytes → pixels, against arithmetic done by hand and against torch's resampling."""

import contextlib
import re
import struct
import zlib
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from handler.codecs import image
from handler.contract import Contract
from handler.errors import BadInput, ServeError, TooLarge, Unsupported
from tests.handler.payloads import Pixels, chunk, encoded, huge_png, jpeg, png

RANDOM = np.random.default_rng(0)
GREY = RANDOM.integers(0, 256, (28, 28), dtype=np.uint8)
COLOUR = RANDOM.integers(0, 256, (28, 28, 3), dtype=np.uint8)
LIMIT = 1_000_000
ONE = Contract(network="separable", channels=1, height=28, width=28, labels=("a", "b"))
THREE = replace(ONE, channels=3)


def decode(payload: bytes, contract: Contract = ONE) -> Pixels:
    pixels: Pixels = image.raw(image.decode(payload, contract, LIMIT)[0], contract)[0]
    assert pixels.shape == contract.shape and pixels.dtype == np.uint8
    return pixels


def grey(colour: Any) -> Pixels:
    """ITU-R 601 luma of `[..., 3]`."""
    return np.asarray(np.floor(colour @ np.array([0.299, 0.587, 0.114]) + 0.5)).astype(np.uint8)


def test_grey_and_colour_pixels_arrive_unchanged_and_in_order() -> None:
    np.testing.assert_array_equal(decode(png(GREY)), GREY[None])
    np.testing.assert_array_equal(decode(png(COLOUR), THREE), COLOUR.transpose(2, 0, 1))


def test_colour_becomes_grey_by_luma_and_grey_becomes_three_equal_channels() -> None:
    np.testing.assert_allclose(decode(png(COLOUR))[0], grey(COLOUR), atol=1)
    np.testing.assert_array_equal(decode(png(GREY), THREE), np.stack([GREY] * 3))


def test_raw_pixels_are_in_the_order_height_width_channel() -> None:
    contract = replace(THREE, height=4, width=5)
    raw = RANDOM.integers(0, 256, (4, 5, 3), dtype=np.uint8)
    np.testing.assert_array_equal(image.raw(raw.tobytes() * 2, contract), np.stack([raw.transpose(2, 0, 1)] * 2))


@pytest.mark.parametrize("contract", [ONE, THREE], ids=["grey", "colour"])
@pytest.mark.parametrize("mode", ["1", "P", "RGB", "L"])
def test_depth_and_palette_do_not_matter(mode: str, contract: Contract) -> None:
    black_and_white = Image.fromarray(np.where(GREY > 127, 255, 0).astype(np.uint8))
    expected = decode(png(black_and_white), contract)
    np.testing.assert_array_equal(decode(png(black_and_white.convert(mode)), contract), expected)


def test_sixteen_bits_are_scaled_not_cut_off() -> None:
    deep = RANDOM.integers(0, 65536, (28, 28)).astype(np.uint16)
    np.testing.assert_array_equal(decode(png(deep))[0], deep >> 8)
    np.testing.assert_array_equal(decode(png(deep), THREE)[1], deep >> 8)


def test_sixteen_bits_a_colour_are_scaled_too() -> None:
    deep = RANDOM.integers(0, 65536, (28, 28, 3)).astype(">u2")
    rows = b"".join(b"\0" + row.tobytes() for row in deep)
    header = struct.pack(">IIBBBBB", 28, 28, 16, 2, 0, 0, 0)
    payload = image.PNG + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    np.testing.assert_array_equal(decode(payload, THREE), (deep >> 8).transpose(2, 0, 1))


def test_what_is_transparent_lies_on_black() -> None:
    alpha = RANDOM.integers(0, 256, (28, 28, 1), dtype=np.uint8)
    on_black = COLOUR * (alpha / 255)
    np.testing.assert_allclose(decode(png(np.dstack([COLOUR, alpha])), THREE), on_black.transpose(2, 0, 1), atol=1)
    np.testing.assert_allclose(decode(png(np.dstack([COLOUR, alpha])))[0], grey(on_black), atol=2)
    np.testing.assert_allclose(
        decode(png(np.dstack([GREY[..., None], alpha])))[0], GREY * (alpha[..., 0] / 255), atol=1
    )


@pytest.mark.parametrize("mode", ["P", "L", "RGB", "1"])
def test_a_transparent_colour_becomes_black(mode: str) -> None:
    white = Image.new("RGB", (28, 28), "white").convert(mode)
    corner = white.getpixel((0, 0))
    assert decode(png(white)).min() == 255
    assert decode(png(white, transparency=corner)).max() == 0


@pytest.mark.parametrize("mode", ["L", "RGB", "CMYK"])
def test_jpeg_of_each_mode(mode: str) -> None:
    smooth = Image.linear_gradient("L").resize((28, 28))
    found = decode(jpeg(smooth.convert(mode), quality=100))
    np.testing.assert_allclose(found[0], np.asarray(smooth), atol=4)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_images_are_turned_upright(orientation: int, kind: str) -> None:
    turns: dict[int, Callable[[Any], Any]] = {
        1: lambda a: a, 2: np.fliplr, 3: lambda a: np.rot90(a, 2), 4: np.flipud,
        5: lambda a: a.T, 6: lambda a: np.rot90(a, -1), 7: lambda a: np.rot90(a, 2).T, 8: np.rot90,
    }  # fmt: skip
    halves = np.zeros((28, 28), np.uint8)
    halves[:14, :] = 90
    halves[:14, :14] = 240
    exif = Image.Exif()
    exif[0x0112] = orientation
    found = decode(encoded(halves, kind, exif=exif))
    np.testing.assert_allclose(found[0], turns[orientation](halves), atol=20 if kind == "JPEG" else 0)


@pytest.mark.parametrize("size", [(100, 61), (28, 200), (9, 5), (1, 1), (29, 28)])
@pytest.mark.parametrize("contract", [ONE, replace(THREE, height=17)], ids=["grey", "colour"])
def test_other_sizes_are_resampled_as_torch_does(size: tuple[int, int], contract: Contract) -> None:
    """Antialiased bilinear, without keeping the aspect; torch's uint8 kernel may differ by one level."""
    pixels = RANDOM.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    whole = np.asarray(Image.fromarray(pixels).convert(image.MODES[contract.channels])).reshape(*size[::-1], -1)
    tensor = torch.from_numpy(whole.copy()).permute(2, 0, 1)[None].float()
    target = (contract.height, contract.width)
    expected = torch.nn.functional.interpolate(tensor, target, mode="bilinear", antialias=True)[0]
    np.testing.assert_allclose(decode(png(pixels), contract), expected.numpy(), atol=1.01)


def test_an_image_of_the_right_size_is_not_resampled() -> None:
    assert decode(png(GREY))[0, 0, 0] == GREY[0, 0]


@pytest.mark.parametrize("payload", [b"GIF89a" + bytes(99), b"BM" + bytes(99), b"hello", b"", bytes(784)])
def test_other_formats_are_unsupported(payload: bytes) -> None:
    with pytest.raises(Unsupported, match="neither PNG nor JPEG"):
        decode(payload)


def test_a_model_of_two_channels_takes_no_images() -> None:
    with pytest.raises(Unsupported, match=re.escape("1568 bytes (28×28×2)")):
        image.decode(png(GREY), replace(ONE, channels=2), LIMIT)


@pytest.mark.parametrize("payload", [png(GREY), jpeg(GREY), png(COLOUR), jpeg(COLOUR)], ids=["pg", "jg", "pc", "jc"])
@pytest.mark.parametrize("share", [0.05, 0.3, 0.6, 0.9])
def test_a_truncated_image_is_bad(payload: bytes, share: float) -> None:
    with pytest.raises(BadInput) as caught:
        decode(payload[: int(len(payload) * share)])
    assert caught.value.code == "bad_image"


def test_colours_without_a_palette_are_bad() -> None:
    """Pillow's own assertion fails there."""
    whole = png(Image.fromarray(GREY).convert("P"))
    start = whole.index(b"PLTE") - 4
    (length,) = struct.unpack_from(">I", whole, start)
    with pytest.raises(BadInput) as caught:
        decode(whole[:start] + whole[start + 12 + length :])
    assert caught.value.code == "bad_image"


def test_the_pixel_limit_is_exact_and_checked_before_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    assert decode(huge_png(1000, 1000)).max() == 0
    monkeypatch.setattr(ImageOps, "exif_transpose", lambda *_, **__: pytest.fail("decoded"))
    with pytest.raises(TooLarge, match="1000×1001 pixels; expected at most 1000000") as caught:
        decode(huge_png(1000, 1001))
    assert (caught.value.status, caught.value.code) == (413, "too_many_pixels")


@pytest.mark.parametrize("side", [10_000, 20_000], ids=["Pillow would warn", "Pillow would refuse"])
def test_bombs_are_too_large(side: int) -> None:
    with pytest.raises(TooLarge):
        decode(huge_png(side, side))


def test_no_image_is_larger_than_the_budget_that_is_left() -> None:
    assert image.decode(png(GREY), ONE, 784)[1] == 784
    with pytest.raises(TooLarge):
        image.decode(png(GREY), ONE, 783)


def test_bytes_of_no_type_are_pixels_if_their_number_is_right() -> None:
    """Even if they begin as an image does: the length is looked at first."""
    disguised = png(GREY)[:8] + bytes(776)
    assert image.blob_kind(disguised, ONE) == "raw"
    assert image.blob_kind(png(COLOUR), ONE) == "image"
    with pytest.raises(BadInput, match=r"expected 784 bytes \(28×28×1\) or a PNG or JPEG image, got 785 bytes"):
        image.blob_kind(bytes(785), ONE)


SEEDS = [png(GREY), jpeg(COLOUR), png(np.dstack([COLOUR, GREY])), jpeg(Image.fromarray(COLOUR).convert("CMYK"))]


@settings(max_examples=200)
@given(
    st.sampled_from(SEEDS),
    st.lists(st.tuples(st.integers(0, 5000), st.integers(0, 255)), min_size=1, max_size=6),
    st.integers(0, 5000),
)
def test_damage_is_refused_or_survived_never_a_fault(seed: bytes, damage: list[tuple[int, int]], cut: int) -> None:
    payload = bytearray(seed)
    for place, value in damage:
        payload[place % len(payload)] = value
    with contextlib.suppress(ServeError):
        decode(bytes(payload[: len(payload) - cut % 50]))


@settings(max_examples=100)
@given(st.sampled_from([image.PNG, image.JPEG]), st.binary(max_size=200))
def test_garbage_behind_a_magic_is_refused(magic: bytes, rest: bytes) -> None:
    with pytest.raises(ServeError):
        decode(magic + rest)


def test_a_reason_is_one_line_without_our_buffers() -> None:
    assert image._reason(OSError("cannot identify image file <_io.BytesIO object at 0x7f>")) == "it is corrupt"
    assert image._reason(OSError("")) == "it is corrupt"
    assert image._reason(OSError("one\ntwo" + "x" * 200)) == "one two" + "x" * 113
