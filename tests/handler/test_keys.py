"""What a request is and the key of its answer, found for a whole batch."""

import gc
import weakref

import pytest

from handler.errors import BadInput, Unsupported
from handler.keys import REMEMBERED, SHORT_BYTES, Keyed, Keys
from handler.messages import Request
from handler.options import Options
from tests.handler.payloads import JSON, RAW, dumps
from tests.handler.test_service import CONTRACT, raw, rows


class Recorder:
    """Makes keys that can be read, and remembers of what kinds."""

    def __init__(self) -> None:
        self.kinds: list[str] = []

    def key(self, kind: str, payload: bytes) -> bytes:
        self.kinds.append(kind)
        return kind.encode() + b" of " + payload


@pytest.fixture
def recorder() -> Recorder:
    return Recorder()


@pytest.fixture
def keys(recorder: Recorder) -> Keys:
    return Keys(CONTRACT, recorder.key)


def test_what_a_short_request_means_is_remembered(keys: Keys, recorder: Recorder) -> None:
    """By type and options, too; a long one is hashed again, for to remember it would take its size."""
    short = [raw(1, 2, 3), raw(3, 2, 1, options=Options(top_k=1)), rows([1, 2, 3])]
    long = [Request(dumps([[3, 2, 1]]) + b" " * SHORT_BYTES, JSON), Request(b"[1]", JSON + " " * SHORT_BYTES)]
    (first, asked), again = keys.of(short + long[:1]), keys.of(short + long[:1])
    assert recorder.kinds == ["raw", f"raw {Options(top_k=1)}", "json", "json", "json"]
    assert again == (first, asked)
    other = raw(1, 2, 3, options=Options(top_k=1)), Request(bytes([1, 2, 3]), "image/png")
    assert keys.of(other)[1] == [f"raw {Options(top_k=1)} of ".encode() + bytes([1, 2, 3]), b""]
    assert [keyed.kind for keyed in first] == ["raw", "raw", "json", "json"]
    assert asked == [keyed.key for keyed in first] and len(set(asked)) == 4
    assert isinstance(keys.of(long[1:])[0][0].error, Unsupported)


def test_each_request_has_a_place_whatever_became_of_it(keys: Keys) -> None:
    refused = BadInput("bad_option", "told so")
    asked = [Request(error=refused), Request(describe=True), Request(b"xx", RAW), raw(1, 2, 3, look_up=False)]
    found, keys_asked = keys.of([*asked, raw(1, 2, 3)])
    assert found[:2] == [Keyed(error=refused), Keyed()]
    assert isinstance(found[2].error, BadInput) and not found[2].key
    assert found[3] == found[4] == Keyed(RAW, None, "raw", b"raw of \1\2\3")
    assert keys_asked == [b"", b"", b"", b"", b"raw of \1\2\3"]


def test_what_is_remembered_is_bounded(keys: Keys, recorder: Recorder) -> None:
    bodies = [raw(*number.to_bytes(3)) for number in range(REMEMBERED + 1)]
    for body in bodies:
        keys.of([body])
        assert len(keys.known) <= REMEMBERED
    keys.of(bodies[-1:])
    assert len(recorder.kinds) == len(bodies)


def test_what_makes_the_keys_is_let_go_at_once() -> None:
    """It holds a connection: in a circle it would stay open until garbage is collected."""
    gc.disable()
    try:
        recorder = Recorder()
        keys, alive = Keys(CONTRACT, recorder.key), weakref.ref(recorder)
        keys.of([raw(1, 2, 3)])
        del keys, recorder
        assert alive() is None
    finally:
        gc.enable()
