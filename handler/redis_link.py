"""RedisLink: commands to a Redis that may be slow, full, paused, gone or none at all, none of which costs an answer."""

import logging
import time
from collections.abc import Callable, Sequence
from typing import Any

from handler.errors import SettingsError

log = logging.getLogger(__name__)

FIRST_PAUSE_S, LONGEST_PAUSE_S = 1.0, 5.0
Command = tuple[bytes | str | int, ...]


class RedisLink:
    """One connection, made when it is needed, made anew when it was lost; each wait is at most `timeout_s` long.

    What fails is counted in `errors`, and said once until it works again. After a failure Redis is left alone for
    a while, twice as long after each further one, so that a paused one costs a timeout every few seconds and not one
    a batch. `clock` gives seconds and never runs backwards. Not for several threads.
    """

    def __init__(self, url: str, *, timeout_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self.errors = 0
        self._connection, self._refusal = _connection(url, timeout_s)
        self._pause_s, self._away_until = 0.0, -float("inf")
        self._refused: set[str] = set()

    def ask(self, what: str, *commands: Command) -> list[Any] | None:
        """The reply to each command of one round trip, an exception for one that Redis refuses; None without Redis.

        `what` these commands are, is for the log: a full Redis refuses writes and goes on reading.
        """
        if self.clock() < self._away_until:
            return None
        try:
            replies = self._exchange(commands)
        except Exception as error:  # of any kind: what answers there need not be a Redis
            self._failed(error)
            return None
        if self._pause_s:
            log.warning("Redis is back")
            self._pause_s = 0.0
        self._note(what, [reply for reply in replies if isinstance(reply, Exception)])
        return replies

    def _exchange(self, commands: Sequence[Command]) -> list[Any]:
        if self._connection.is_connected and _ended(self._connection):
            self._connection.disconnect()
        self._connection.send_packed_command(self._connection.pack_commands(commands))
        return [self._reply() for _ in commands]

    def _reply(self) -> Any:
        try:
            return self._connection.read_response()
        except self._refusal as error:
            return error

    def _failed(self, error: Exception) -> None:
        self.errors += 1
        if not self._pause_s:
            log.warning("Redis is away, answers go on without it: %s: %s", type(error).__name__, error)
        self._pause_s = min(2 * self._pause_s, LONGEST_PAUSE_S) or FIRST_PAUSE_S
        self._away_until = self.clock() + self._pause_s

    def _note(self, what: str, refusals: Sequence[Exception]) -> None:
        self.errors += bool(refusals)
        if refusals and what not in self._refused:
            log.warning("Redis refuses our %s: %s: %s", what, type(refusals[0]).__name__, refusals[0])
            self._refused.add(what)
        elif not refusals and what in self._refused:
            log.warning("Redis takes our %s again", what)
            self._refused.remove(what)


def _connection(url: str, timeout_s: float) -> tuple[Any, type[Exception]]:
    """A connection that is not made yet, and the class of Redis' refusals; errors do not show what may be a password.

    It is used bare, and so tries nothing twice: redis-py's client around it takes 1.5 to 2 times as long for a batch.
    """
    try:
        from redis import ConnectionPool, ResponseError
    except ImportError:
        raise SettingsError("cache.redis_url is set, and the package redis is not there: pip install redis") from None
    bounds = {"socket_timeout": timeout_s, "socket_connect_timeout": timeout_s}
    try:  # protocol 2 and silence about the driver: no round trip stands before the first command
        pool = ConnectionPool.from_url(url, **bounds, protocol=2, driver_info=None)
        return pool.make_connection(), ResponseError
    except (ValueError, TypeError):
        expected = "redis://[[user]:password@]host[:port][/db], rediss://… or unix:///path"
        raise SettingsError(f"cache.redis_url: expected {expected}; what is set cannot be read as one") from None


def _ended(connection: Any) -> bool:
    """Whether something lies unread where nothing was asked: the connection's end, after a restart of Redis."""
    try:
        return bool(connection.can_read())
    except Exception:
        return True
