"""BentoML: one service of WORKERS processes, an image as the body; its batching takes a second service, and costs."""

import os
from typing import Any

import bentoml
from student import Student


@bentoml.service(workers=int(os.environ["WORKERS"]), traffic={"timeout": 30}, logging={"access": {"enabled": False}})
class Classifier:
    """Decode, forward, a dict for an answer."""

    def __init__(self) -> None:
        self.student = Student.from_environment()

    @bentoml.api
    def predict(self, body: bytes, /) -> dict[str, Any]:
        """An image or raw pixels."""
        [answer] = self.student.answers([self.student.decode(body)])
        return answer
