"""What each request of a batch is, and the key of its answer: for a hit that is nearly all there is to do."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from handler import codecs
from handler.contract import Contract
from handler.errors import ServeError, told
from handler.messages import Request
from handler.options import Options

SHORT_BYTES, REMEMBERED = 4096, 4096
"""Up to which size requests are remembered, which is faster than to hash them again, and how many of them."""


@dataclass(frozen=True, slots=True)
class Keyed:
    """What a body is, by its Content-Type and options, and the key of its answer: empty if there is to be none."""

    content_type: str = ""
    options: Options | None = None
    kind: codecs.Kind = "raw"
    key: bytes = b""
    error: ServeError | None = None


class Keys:
    """Keys of answers, by the contract; `key` makes one of a kind and a body."""

    def __init__(self, contract: Contract, key: Callable[[str, bytes], bytes]) -> None:
        self.contract, self.key = contract, key
        self.known: dict[bytes, Keyed] = {}  # by the body; of an equal one with other options the last

    def of(self, requests: Sequence[Request]) -> tuple[list[Keyed], list[bytes]]:
        """What each is, and the keys that the cache is asked, empty for what is not to be found there."""
        found, asked = [], []
        for request in requests:
            keyed = self.known.get(request.payload) if len(request.payload) <= SHORT_BYTES else None
            if keyed is None or keyed.content_type != request.content_type or keyed.options != request.options:
                keyed = self._keyed(request)
            found.append(keyed)
            asked.append(keyed.key if request.look_up else b"")
        return found, asked

    def _keyed(self, request: Request) -> Keyed:
        if request.error or request.describe:
            return Keyed(error=request.error)
        payload, content_type, options = request.payload, request.content_type, request.options
        try:
            kind = codecs.kind_of(payload, content_type, self.contract)
            keyed = Keyed(content_type, options, kind, self.key(f"{kind} {options}" if options else kind, payload))
        except Exception as error:
            return Keyed(error=told(error, request.request_id))
        if len(payload) + len(content_type) <= SHORT_BYTES:
            if len(self.known) >= REMEMBERED:
                self.known.clear()  # all at once: to know which was used last would cost every hit
            self.known[payload] = keyed
        return keyed
