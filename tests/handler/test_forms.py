"""Forms taken apart: what goes in comes out, what is broken is refused in few words, and neither takes long."""

import re

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from requests import Request
from urllib3.filepost import encode_multipart_formdata

from handler import forms
from handler.errors import BadInput
from handler.options import wishes

NAMES = st.from_regex(re.compile(r"[a-zA-Z0-9_. -]{1,20}"), fullmatch=True)
KINDS = st.sampled_from(["", "image/png", "application/json; charset=utf-8"])
HEAD = b'--x\r\nContent-Disposition: form-data; name="data"\r\n'


@given(st.lists(st.tuples(NAMES, KINDS, st.binary(max_size=300)), min_size=1, max_size=5))
def test_what_a_client_puts_in_comes_out(sent: forms.Parts) -> None:
    """urllib3 is what `requests` sends with."""
    assume(not any(b"\r\n--x" in b"\r\n" + value for _, _, value in sent))
    body, _ = encode_multipart_formdata([(name, ("a; name=b.png", value, kind)) for name, kind, value in sent], "x")
    found = forms.parts(body, "x")
    assert found == sent


def test_what_requests_and_curl_send_is_read() -> None:
    files = {"data": ("name=a.png", b"\r\n--y\r\n", "image/png")}
    made = Request("POST", "http://x", files=files, data={"k": "v"}).prepare()
    asked = wishes(made.headers, "multipart/form-data")
    assert isinstance(made.body, bytes) and asked.boundary
    assert forms.parts(made.body, asked.boundary) == [("k", "", b"v"), ("data", "image/png", b"\r\n--y\r\n")]
    curl = HEAD.replace(b'"data"', b'"data"; filename="a"') + b"Content-Type: image/png\r\n\r\n1\r\n--x--\r\n"
    assert forms.parts(curl, "x") == [("data", "image/png", b"1")]
    odd = b"before\r\n--x \t\r\ncontent-type:a/b\r\nCONTENT-DISPOSITION:form-data;name=n\r\n\r\n\r\n--x--after"
    assert forms.parts(odd, "x") == [("n", "a/b", b"")]
    assert forms.parts(odd.replace(b"=n", b"=\xff"), "x")[0][0] == "\ufffd"


@pytest.mark.parametrize(
    ("kind", "boundary"),
    [
        ("multipart/form-data; boundary=a-b", "a-b"),
        ('Multipart/Form-Data; charset=utf-8;BOUNDARY="a b"', "a b"),
        ("multipart/form-data", ""),
    ],
)
def test_the_boundary_is_that_of_the_header(kind: str, boundary: str) -> None:
    assert wishes({"content-type": kind}, "multipart/form-data").boundary == boundary
    assert wishes({"content-type": kind}, "image/png").boundary is None


@pytest.mark.parametrize(
    ("body", "boundary"),
    [
        (b"", "x"),
        (HEAD + b"\r\n1\r\n--x--", ""),
        (HEAD.replace(b"x", b"") + b"\r\n1\r\n----", ""),
        (HEAD + b"\r\n1\r\n--x--", "y"),
        (HEAD + b"\r\n1", "x"),
        (HEAD + b"\r\n1\r\n--x", "x"),
        (HEAD + b"--x--", "x"),
        (b"--x\r\n\r\n1\r\n--x--", "x"),
        (b'--x\r\nContent-Disposition: form-data; filename="name=a"\r\n\r\n1\r\n--x--', "x"),
        (HEAD + b"a" * 4096 + b"\r\n\r\n1\r\n--x--", "x"),
        ((HEAD + b"\r\n1\r\n") * 65 + b"--x--", "x"),
    ],
)
def test_what_is_broken_is_refused(body: bytes, boundary: str) -> None:
    with pytest.raises(BadInput, match=r"^the form cannot be taken apart: expected up to 64 parts") as error:
        forms.parts(body, boundary)
    assert (error.value.status, error.value.code) == (400, "bad_form")


@given(st.lists(st.sampled_from([HEAD, b"--x", b"--", b"\r\n", b"; name=", b"content-disposition:", b'"', b"\xff"])))
def test_no_form_raises_anything_else(pieces: list[bytes]) -> None:
    try:
        forms.parts(b"".join(pieces), "x")
    except BadInput as error:
        assert error.code == "bad_form"


@pytest.mark.timeout(60)  # of 6 MB; what is not linear in that would take hours
@pytest.mark.parametrize("piece", [b"\r\n--x", b"\n", b";", b"; ", b"content-disposition:", b'; name="', b"\r\n\r\n"])
def test_no_form_takes_longer_than_its_length_asks(piece: bytes) -> None:
    for head in (b"", HEAD, b"--x\r\ncontent-disposition:"):
        with pytest.raises(BadInput):
            forms.parts(head + piece * (6_000_000 // len(piece)), "x")
