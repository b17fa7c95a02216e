"""RedisStore: entries that all workers share, and claims, by which one of them computes what several lack.

An entry lies under PREFIX + key: VERSION, check, deadline, value. The check tells our entries from whatever else may
lie there; it keeps no forger out, so whoever can write to that Redis is trusted. The deadline is by the wall clock,
for Redis counts a life from when it executes the command, which a paused one does late.
"""

import os
import struct
import time
from collections.abc import Callable, Mapping, Sequence
from hashlib import blake2b
from math import ceil, inf
from typing import Any, NamedTuple

from handler.redis_link import Command, RedisLink

PREFIX = b"distillery:"
VERSION = b"\1"
CHECK_BYTES = 8
HEAD_BYTES = len(VERSION) + CHECK_BYTES
DEADLINE = struct.Struct(">d")
RELEASE = "for _, name in ipairs(KEYS) do if redis.call('GET', name) == ARGV[1] then redis.call('DEL', name) end end"


class Kept(NamedTuple):
    """A value, and for how many seconds it may still be given."""

    value: bytes
    left_s: float


class RedisStore:
    """In Redis, each entry for `ttl_s` seconds; keys have 1 to 64 bytes. One round trip a call, and none fails.

    Without Redis nothing is there and nothing is claimed. `wall` gives the same seconds to all who share the entries.
    """

    expired = evicted = 0  # Redis counts them, for all that lies in it

    def __init__(self, link: RedisLink, *, ttl_s: float, lease_s: float, wall: Callable[[], float] = time.time) -> None:
        self.link, self.ttl_s, self.lease_ms, self.wall = link, ttl_s, ceil(1000 * lease_s), wall
        self._token = os.urandom(16)

    def get_many(self, keys: Sequence[bytes]) -> list[bytes | None]:
        """The value of each key, None where there is none (any more)."""
        found = self.fetch(keys)
        return [found[key].value if key in found else None for key in keys]

    def fetch(self, keys: Sequence[bytes]) -> dict[bytes, Kept]:
        """What is there of the keys, and for how long."""
        return self._opened(keys, self._many([_entry(key) for key in keys]))

    def put_many(self, entries: Mapping[bytes, bytes], life_s: float = inf) -> None:
        """Keep the entries, in place of older ones with the same key, and end the claims on them, whosever they are.

        If another's, it stood for a value that is there now.
        """
        if not entries:
            return
        life_s = min(life_s, self.ttl_s)
        deadline, life_ms = self.wall() + life_s, max(1, ceil(1000 * life_s))  # Redis refuses a life of 0
        commands: list[Command] = [
            ("SET", _entry(key), _sealed(key, deadline, value), "PX", life_ms) for key, value in entries.items()
        ]
        self.link.ask("writes", *commands, ("DEL", *map(_claim, entries)))

    def claim(self, keys: Sequence[bytes]) -> list[bool]:
        """Whether each key is this worker's to compute: no other's claim on it is younger than a lease.

        Nor is it to be computed if its value has come since it was looked for. When in doubt it is: everyone for
        himself is better than nobody.
        """
        if not keys:
            return []
        claims: list[Command] = [("SET", _claim(key), self._token, "NX", "PX", self.lease_ms) for key in keys]
        replies = self.link.ask("claims", *claims, ("MGET", *map(_entry, keys)))
        if replies is None:
            return [True] * len(keys)
        there = self._opened(keys, replies.pop())
        return [reply is not None and key not in there for key, reply in zip(keys, replies, strict=True)]

    def poll(self, keys: Sequence[bytes]) -> tuple[dict[bytes, Kept], list[bytes]]:
        """What is there of the keys by now, and which of the others are still claimed."""
        found = self._many([*map(_entry, keys), *map(_claim, keys)])
        there = self._opened(keys, found[: len(keys)])
        claims = zip(keys, found[len(keys) :], strict=True)
        return there, [key for key, claim in claims if claim is not None and key not in there]

    def release(self, keys: Sequence[bytes]) -> None:
        """End this worker's claims on the keys; one that has run out may be another's by now and stays his."""
        if keys:
            self.link.ask("releases", ("EVAL", RELEASE, len(keys), *map(_claim, keys), self._token))

    def _many(self, names: Sequence[bytes]) -> list[Any]:
        replies = self.link.ask("reads", ("MGET", *names)) if names else None
        return _list(replies[0] if replies else None, len(names))

    def _opened(self, keys: Sequence[bytes], entries: Any) -> dict[bytes, Kept]:
        """The values of those entries that are ours and not over."""
        found = {key: self._open(key, entry) for key, entry in zip(keys, _list(entries, len(keys)), strict=True)}
        return {key: kept for key, kept in found.items() if kept}

    def _open(self, key: bytes, entry: Any) -> Kept | None:
        if not isinstance(entry, bytes) or len(entry) < HEAD_BYTES + DEADLINE.size:
            return None
        body = entry[HEAD_BYTES:]
        if entry[:HEAD_BYTES] != _head(key, body):
            return None
        left_s = min(DEADLINE.unpack_from(body)[0] - self.wall(), self.ttl_s)
        return Kept(body[DEADLINE.size :], left_s) if left_s > 0 else None


def _list(reply: Any, length: int) -> list[Any]:
    """The reply to MGET; no Redis, a refusal, or one that is no list at all mean that nothing is there."""
    return reply if isinstance(reply, list) and len(reply) == length else [None] * length


def _entry(key: bytes) -> bytes:
    return PREFIX + key


def _claim(key: bytes) -> bytes:
    return PREFIX + key + b":claim"


def _head(key: bytes, body: bytes) -> bytes:
    """What an entry begins with; it depends on the key, so that an entry is none under another one."""
    return VERSION + blake2b(body, digest_size=CHECK_BYTES, key=key).digest()


def _sealed(key: bytes, deadline: float, value: bytes) -> bytes:
    body = DEADLINE.pack(deadline) + value
    return _head(key, body) + body
