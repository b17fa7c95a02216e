"""JSON → pixels, against numpy, and against everything that JSON can say."""

import json
import math
import re
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from handler.codecs import features, image
from handler.contract import Contract
from handler.errors import BadInput, ServeError, TooLarge, Unsupported
from handler.settings import LimitSettings
from tests.handler.payloads import b64, huge_png, png

SMALL = Contract(network="separable", channels=1, height=2, width=3, labels=("a", "b"))
COLOUR = Contract(network="separable", channels=3, height=2, width=2, labels=("a", "b"))
LIMITS = LimitSettings(pixels=100, rows=4)
ROW = [0, 1, 2, 253, 254, 255]


def decode(value: Any, contract: Contract = SMALL) -> tuple[Any, str]:
    images, form = features.decode(features.parse(json.dumps(value).encode()), contract, LIMITS)
    assert {len(pixels) for pixels in images} == {contract.size}
    return image.raw(b"".join(images), contract), form


@pytest.mark.parametrize(
    ("value", "count", "form"),
    [
        (ROW, 1, "prediction"),
        ([ROW, ROW], 2, "prediction"),
        ({"features": ROW}, 1, "prediction"),
        ({"features": [ROW] * 4}, 4, "prediction"),
        ({"features": [float(n) for n in ROW], "id": 7}, 1, "prediction"),
        ({"instances": [ROW, [ROW[:3], ROW[3:]], [[[n] for n in ROW[:3]], [[n] for n in ROW[3:]]]]}, 3, "predictions"),
        ({"instances": [b64(bytes(ROW))]}, 1, "predictions"),
    ],
)
def test_each_form(value: Any, count: int, form: str) -> None:
    pixels, found = decode(value)
    np.testing.assert_array_equal(pixels, np.array(ROW, np.uint8).reshape(1, 1, 2, 3).repeat(count, 0))
    assert found == form


def test_colours_are_innermost() -> None:
    image = np.arange(12).reshape(2, 2, 3)
    for value in (image.ravel().tolist(), {"instances": [image.tolist()]}, {"instances": [image.ravel().tolist()]}):
        np.testing.assert_array_equal(decode(value, COLOUR)[0][0], image.transpose(2, 0, 1))


@given(st.lists(st.floats(0, 255) | st.integers(0, 255), min_size=6, max_size=6))
def test_fractions_go_to_the_nearest_intensity(row: list[float]) -> None:
    found = decode(row)[0].ravel().astype(float)
    assert all(abs(n - m) <= 0.5 for n, m in zip(found, row, strict=True))


INSTANCES_BAD: list[tuple[Any, str, str]] = [
    ({"instances": 5}, "bad_type", "instances: expected a list, got a number"),
    ({"instances": []}, "bad_shape", "instances: expected at least one, got none"),
    ({"instances": [ROW] * 5}, "too_many_rows", "instances: expected at most 4 rows a request, got 5"),
    ({"instances": [ROW, ROW[1:]]}, "bad_shape", "instances[1]: expected 6 numbers (2×3×1), got 5"),
    ({"instances": ROW[:3]}, "bad_shape", "instances[0]: expected 6 numbers (2×3×1), got a number"),
    ({"instances": ["x"]}, "bad_type", "instances[0]: expected 6 numbers (2×3×1), got a string"),
    ({"instances": [[ROW]]}, "bad_shape", "instances[0]: expected 6 numbers (2×3×1), got 1×6"),
    ({"instances": [[[0, 1], [2, 3], [4, 5]]]}, "bad_shape", "instances[0]: expected 6 numbers (2×3×1), got 3×2"),
    ({"instances": [{}]}, "bad_type", 'instances[0]: expected {"b64": "base64 text"} or lists of numbers'),
    ({"instances": [{"b64": 5}]}, "bad_type", 'instances[0]: expected {"b64": "base64 text"} or lists of numbers'),
    ({"instances": [{"b64": "?"}]}, "bad_base64", "instances[0].b64: expected base64 text"),
    ({"instances": [{"b64": "ü"}]}, "bad_base64", "instances[0].b64: expected base64 text"),
    ({"instances": [b64(b"x")]}, "bad_shape", "instances[0]: expected 6 bytes (2×3×1) or a PNG or JPEG"),
    ({"instances": [b64(png(np.zeros((2, 3), np.uint8))[:-30])]}, "bad_image", "instances[0]: the image cannot"),
    ({"instances": [ROW, b64(huge_png(11, 10))]}, "too_many_pixels", "instances[1]: the image has 11×10 pixels"),
]
FEATURES_BAD: list[tuple[Any, str, str]] = [
    (5, "bad_json", "expected {"),
    (None, "bad_json", "expected {"),
    ("features", "bad_json", "expected {"),
    ({}, "bad_json", "expected {"),
    ({"features": ROW, "instances": [ROW]}, "bad_json", "expected {"),
    ([], "bad_shape", "body: expected 6 numbers (2×3×1), got 0"),
    ([[]], "bad_shape", "body[0]: expected 6 numbers (2×3×1), got 0"),
    ([[[]]], "bad_shape", "body[0]: expected 6 numbers (2×3×1), got 1×0"),
    (ROW[1:], "bad_shape", "body: expected 6 numbers (2×3×1), got 5"),
    ([ROW, ROW[1:]], "bad_shape", "body[1]: expected 6 numbers (2×3×1), got 5"),
    ([ROW, 5], "bad_shape", "body[1]: expected 6 numbers (2×3×1), got a number"),
    ([ROW, None], "bad_type", "body[1]: expected 6 numbers (2×3×1), got null"),
    ([ROW[:3], ROW[3:]], "bad_shape", "body[0]: expected 6 numbers (2×3×1), got 3"),
    ([*ROW[1:], [0]], "bad_shape", "body: expected 6 numbers (2×3×1), got numbers and lists mixed"),
    ([[[0], [1, 2]]], "bad_shape", "body[0]: expected 6 numbers (2×3×1), got lists of different lengths"),
    ([ROW] * 5, "too_many_rows", "body: expected at most 4 rows a request, got 5"),
    ({"features": "x"}, "bad_type", "features: expected a list of numbers, got a string"),
    ({"features": {}}, "bad_type", "features: expected a list of numbers, got an object"),
    ({"features": None}, "bad_type", "features: expected a list of numbers, got null"),
    ([*ROW[1:], "7"], "bad_type", "body: expected 6 numbers (2×3×1), got a string among them"),
    ([*ROW[1:], True], "bad_type", "body: expected 6 numbers (2×3×1), got true or false among them"),
    ([*ROW[1:], None], "bad_type", "body: expected 6 numbers (2×3×1), got null among them"),
    ([*ROW[1:], {}], "bad_type", "body: expected 6 numbers (2×3×1), got an object among them"),
    ([*ROW[1:], -1], "out_of_range", "body: expected intensities 0–255, got -1"),
    ([*ROW[1:], 256], "out_of_range", "body: expected intensities 0–255, got 256"),
    ([*ROW[1:], 255.1], "out_of_range", "body: expected intensities 0–255, got 255.1"),
    ([*ROW[1:], -0.1], "out_of_range", "body: expected intensities 0–255, got -0.1"),
    ([*ROW[1:], 10**30], "out_of_range", "body: expected intensities 0–255, got 1e+30"),
    ([*ROW[1:], 10**400], "out_of_range", "body: expected intensities 0–255, got a number that is far outside"),
    ([0.5, *ROW[2:], 10**400], "out_of_range", "body: expected intensities 0–255, got a number that is far outside"),
]


@pytest.mark.parametrize(("value", "code", "text"), INSTANCES_BAD + FEATURES_BAD, ids=lambda v: str(v)[:30])
def test_what_is_wrong_is_named(value: Any, code: str, text: str) -> None:
    with pytest.raises(ServeError, match="^" + re.escape(text)) as caught:
        decode(value)
    assert caught.value.code == code


def test_the_pixel_limit_is_for_the_whole_request() -> None:
    fits = {"instances": [b64(huge_png(7, 7)), b64(huge_png(7, 7)), ROW]}
    assert len(decode(fits)[0]) == 3
    with pytest.raises(TooLarge, match=r"^instances\[2\]: the image has 2×2 pixels; expected at most 2 "):
        decode({"instances": [b64(huge_png(7, 7)), b64(huge_png(7, 7)), b64(huge_png(2, 2))]})


def test_an_error_in_an_item_keeps_its_kind() -> None:
    two = Contract(network="separable", channels=2, height=2, width=3, labels=("a", "b"))
    with pytest.raises(Unsupported, match=r"^instances\[0\]: this model takes no images"):
        decode({"instances": [b64(png(np.zeros((2, 3), np.uint8)))]}, two)


@pytest.mark.parametrize("text", ["NaN", "-Infinity", "[Infinity]", '{"features": [NaN]}'])
def test_numbers_that_json_does_not_have_are_refused(text: str) -> None:
    with pytest.raises(BadInput) as caught:
        features.parse(text.encode())
    assert caught.value.code == "not_finite"


@pytest.mark.parametrize("number", ["1e400", "-1e999"])
def test_numbers_too_large_for_a_float_are_refused(number: str) -> None:
    with pytest.raises(BadInput) as caught:
        features.decode(features.parse(f"[0, 1, 2, 3, 4, {number}]".encode()), SMALL, LIMITS)
    assert caught.value.code == "not_finite"


def test_integers_of_thousands_of_digits_are_out_of_range() -> None:
    with pytest.raises(BadInput) as caught:
        features.parse(b"[" + b"9" * 10_000 + b"]")
    assert caught.value.code == "out_of_range"


@pytest.mark.parametrize(
    "text", [b"", b"{", b"[1,]", b"\xff", b"'a'", b"[" * 200_000, b'{"a":' * 200_000, b"\xef\xbb\xbf[]"]
)
def test_what_is_not_json_is_refused(text: bytes) -> None:
    with pytest.raises(BadInput) as caught:
        features.parse(text)
    assert caught.value.code == "bad_json" and len(str(caught.value)) < 200


VALUES = st.recursive(
    st.none() | st.booleans() | st.text(max_size=3) | st.integers(-2, 300)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.just(ROW) | st.just([float(n) for n in ROW]) | st.just([ROW[:3], ROW[3:]]) | st.just(b64(bytes(ROW))),
    lambda inner: st.lists(inner, max_size=7)
    | st.dictionaries(st.sampled_from(["features", "instances", "b64"]), inner, max_size=2),
    max_leaves=12,
)  # fmt: skip


def simple(value: Any) -> bool:
    """The reference: whether the value is one of the documented forms, by the plainest possible reading."""

    def row(v: Any, shapes: list[tuple[int, ...]]) -> bool:
        array = np.array(v, object) if isinstance(v, list) else np.empty(0)
        return array.shape in shapes and all(
            type(n) in (int, float) and math.isfinite(n) and 0 <= n <= 255 for n in array.ravel()
        )

    def rows(v: Any) -> bool:
        flat = row(v, [(6,)])
        return flat or (isinstance(v, list) and 0 < len(v) <= 4 and all(row(r, [(6,)]) for r in v))

    def instance(v: Any) -> bool:
        return v == b64(bytes(ROW)) or row(v, [(6,), (2, 3), (2, 3, 1)])

    try:
        if not isinstance(value, dict):
            return rows(value)
        if len(value.keys() & {"features", "instances"}) != 1:
            return False
        if "features" in value:
            return rows(value["features"])
        items = value["instances"]
        return isinstance(items, list) and 0 < len(items) <= 4 and all(map(instance, items))
    except ValueError:  # numpy refuses ragged lists
        return False


@settings(max_examples=200)
@given(VALUES | st.fixed_dictionaries({"instances": VALUES}) | st.fixed_dictionaries({"features": VALUES}))
def test_any_value_is_decoded_or_refused_as_the_plain_reading_says(value: Any) -> None:
    try:
        decode(value)
    except ServeError:
        assert not simple(value)
    else:
        assert simple(value)


@given(VALUES)
def test_canonical_text_says_the_same(value: Any) -> None:
    assert features.parse(features.canonical(value)) == value


@pytest.mark.parametrize("value", [{1, 2}, object(), b"x"])
def test_what_json_has_no_text_for_is_refused(value: Any) -> None:
    with pytest.raises(BadInput) as caught:
        features.canonical(value)
    assert caught.value.code == "bad_json"


def test_values_nested_too_deeply_have_no_canonical_text() -> None:
    value: list[Any] = []
    for _ in range(100_000):
        value = [value]
    with pytest.raises(BadInput):
        features.canonical(value)
    while value:  # freed step by step, as recursion would overflow here too
        value = value[0]
