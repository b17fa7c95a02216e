"""The inference client: bytes in, a Prediction out. It waits and tries again where that can help.

    with Client("http://127.0.0.1:8080", key_file=Path("key_file.json")) as client:
        client.predict(Path("shoe.png").read_bytes()).label

Errors are those of handler.errors: the server's refusals with its own words, everything else as one line.
"""

import json
import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import requests

from handler.errors import BadInput, DistilleryError, ServeError, TooLarge, Unsupported

ERRORS: Mapping[int, type[ServeError]] = {kind.status: kind for kind in (BadInput, TooLarge, Unsupported)}
# 503: the queue is full. 500: the worker died with the batch in hand. A prediction may be asked for twice.
RETRIED = (500, 503)


@dataclass(frozen=True)
class Prediction:
    """One answer; `scores` are probabilities in the order of the contract's labels."""

    label: str
    class_id: int
    scores: tuple[float, ...]
    source: str
    name: str
    version: str
    digest: str

    @property
    def probability(self) -> float:
        """That of the label."""
        return self.scores[self.class_id]


class Client:
    """A client of one model; the connection is kept, the token is read from TorchServe's key file.

    `attempts` and `wait_s` (per attempt) bound every call. Pauses double from `pause_s`, each with jitter.
    """

    def __init__(
        self,
        url: str,
        *,
        model: str = "student",
        key_file: Path | None = None,
        attempts: int = 5,
        wait_s: float = 10.0,
        pause_s: float = 0.1,
        sleep: Callable[[float], None] = time.sleep,
        jitter: Callable[[], float] = random.random,
    ) -> None:
        self.url = f"{url}/predictions/{model}"
        self.key_file, self.attempts, self.wait_s, self.pause_s = key_file, attempts, wait_s, pause_s
        self._sleep, self._jitter = sleep, jitter
        self._session = requests.Session()
        self._session.trust_env = False  # a proxy has no part in a loopback call
        self._read_token()

    def predict(self, payload: bytes, content_type: str | None = None, *, cache: bool = True) -> Prediction:
        """The prediction for one image: PNG or JPEG bytes, raw pixels, or JSON by `content_type`.

        Raises BadInput, TooLarge or Unsupported with the server's own words when the payload is refused, and
        DistilleryError when no answer came.
        """
        headers = {} if content_type is None else {"Content-Type": content_type}
        if not cache:
            headers["Cache-Control"] = "no-cache"
        answer = self._post(payload, headers)
        if token_refused(answer) and self._read_token():  # a server that was started anew has new tokens
            answer = self._post(payload, headers)
        if not answer.ok:
            raise refusal(answer)
        return prediction(answer)

    def _post(self, payload: bytes, headers: Mapping[str, str]) -> requests.Response:
        """The answer of the first attempt that got one worth having, or the last attempt's failure."""
        for attempt in range(1, self.attempts + 1):
            try:
                answer = self._session.post(self.url, payload, headers=headers, timeout=self.wait_s)
                if answer.status_code not in RETRIED or attempt == self.attempts:
                    return answer
            except requests.Timeout:
                raise DistilleryError(f"{self.url}: no answer within {self.wait_s:g} s") from None
            except requests.ConnectionError:
                if attempt == self.attempts:
                    raise DistilleryError(f"{self.url}: no TorchServe is listening there") from None
            self._sleep(self.pause_s * 2 ** (attempt - 1) * (0.5 + self._jitter()))
        raise AssertionError("an attempt returns or raises")

    def _read_token(self) -> bool:
        """Take the token of the key file; True when that is another one than before."""
        before = self._session.headers.get("Authorization")
        key = token(self.key_file, "inference")
        if key:
            self._session.headers["Authorization"] = f"Bearer {key}"
        return self._session.headers.get("Authorization") != before

    def close(self) -> None:
        """Give the connection back."""
        self._session.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


def token(key_file: Path | None, kind: str) -> str | None:
    """The `inference` or `management` token in TorchServe's key file; None when there is no such file."""
    if key_file is None or not key_file.is_file():
        return None
    try:
        return str(json.loads(key_file.read_text())[kind]["key"])
    except (OSError, ValueError, KeyError, TypeError):
        raise DistilleryError(f"{key_file}: not a key file of TorchServe") from None


def token_refused(answer: requests.Response) -> bool:
    """Whether TorchServe itself refused, for want of a token."""
    return answer.status_code == 400 and body(answer).get("type") == "InvalidKeyException"


def refusal(answer: requests.Response) -> DistilleryError:
    """The error that an answer without a prediction stands for, in the server's words."""
    found, status = body(answer), answer.status_code
    if token_refused(answer):
        return DistilleryError(f"{answer.url}: the token was refused: start from the folder that holds key_file.json")
    if status in ERRORS and "error" in found:
        return ERRORS[status](str(found.get("code", status)), str(found["error"]))
    if status == 413:  # of TorchServe's own, which has no body
        return TooLarge("body_too_large", "the body is larger than the server's max_request_size")
    return DistilleryError(f"{answer.url}: {status}: {found.get('message', answer.reason)}")


def body(answer: requests.Response) -> dict[str, Any]:
    """The JSON object of an answer; empty when it is anything else."""
    try:
        found = answer.json()
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def prediction(answer: requests.Response) -> Prediction:
    """The first prediction of an answer; DistilleryError when a stranger's server answered."""
    try:
        found = answer.json()
        return Prediction(
            label=found["label"][0],
            class_id=found["class_id"][0],
            scores=tuple(found["prediction"][0]),
            source=found["source"],
            **found["model"],
        )
    except (ValueError, KeyError, IndexError, TypeError):
        raise DistilleryError(f"{answer.url}: answered 200 without a prediction of ours") from None
