"""multipart/form-data, as browsers and `curl -F` send it, where the front end leaves that to us.

TorchServe's own decoder answers many a broken form with 500 and keeps its memory; `serving start` has it pass all of
them on.
"""

import re

from handler.errors import BadInput

Parts = list[tuple[str, str, bytes]]
"""Name, Content-Type ("" if none) and value of each part of a body; one that is no form has one, named "body"."""
PARTS, HEAD_BYTES = 64, 4096
"""How many parts, and how much before the value of one: more than any form needs, and soon read."""
_NAME = re.compile(rb'^content-disposition:[^\r\n]*?;[ \t]*name="?([^";\r\n]*)', re.IGNORECASE | re.MULTILINE)
_TYPE = re.compile(rb"^content-type:[ \t]*([^\r\n]*)", re.IGNORECASE | re.MULTILINE)


def parts(body: bytes, boundary: str) -> Parts:
    """The parts of a form (RFC 2046, 5.1.1, and RFC 7578); BadInput `bad_form`."""
    found = Parts()
    _, *pieces = (b"\r\n" + body).split(b"\r\n--" + boundary.encode(), PARTS + 1)
    for piece in pieces if boundary else ():
        if piece.startswith(b"--"):
            return found
        head, blank, value = piece.partition(b"\r\n\r\n")
        name, kind = _NAME.search(head), _TYPE.search(head)
        if not (blank and name) or len(head) > HEAD_BYTES:
            break
        found.append((_text(name), _text(kind) if kind else "", value))
    expected = f"up to {PARTS} parts between lines of the boundary in Content-Type, each with a name, and the last line"
    raise BadInput("bad_form", f"the form cannot be taken apart: expected {expected}")


def _text(found: re.Match[bytes]) -> str:
    return found[1].decode(errors="replace")
