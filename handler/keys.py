"""What each request of a batch is, and the key of its answer: for a hit that is nearly all there is to do."""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

from handler import codecs
from handler.contract import Contract
from handler.errors import ServeError, told
from handler.messages import Request
from handler.options import Options

SHORT_BYTES, REMEMBERED = 4096, 4096
"""Up to which size a request's kind and key are remembered, which is faster than to hash it again, and of how many."""


class Keyed(NamedTuple):
    """What a body is, and the key of its answer; or why there is none, and then the key is empty."""

    kind: codecs.Kind = "raw"
    key: bytes = b""
    error: ServeError | None = None


class Keys:
    """Keys of answers, by the contract; `key` makes one of a kind and a body."""

    def __init__(self, contract: Contract, key: Callable[[str, bytes], bytes]) -> None:
        def keyed(payload: bytes, content_type: str, options: Options | None) -> Keyed:
            kind = codecs.kind_of(payload, content_type, contract)
            return Keyed(kind, key(f"{kind} {options}" if options else kind, payload))

        self._keyed, self._known = keyed, functools.lru_cache(REMEMBERED)(keyed)

    def of(self, requests: Sequence[Request]) -> tuple[list[Keyed], list[bytes]]:
        """What each is, and the keys that the cache is asked, empty for what is not to be found there."""
        found, asked = [], []
        for request in requests:
            try:
                if request.error or request.describe:
                    keyed = Keyed(error=request.error)
                elif len(request.payload) + len(request.content_type) <= SHORT_BYTES:
                    keyed = self._known(request.payload, request.content_type, request.options)
                else:
                    keyed = self._keyed(request.payload, request.content_type, request.options)
            except Exception as error:
                keyed = Keyed(error=told(error, request.request_id))
            found.append(keyed)
            asked.append(keyed.key if request.look_up else b"")
        return found, asked
