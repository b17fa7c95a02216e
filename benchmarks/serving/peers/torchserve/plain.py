"""TorchServe's stock way: a handler on BaseHandler that overrides what its documentation says to override."""

from typing import Any

import torch
from student import Pixels, Student
from ts.torch_handler.base_handler import BaseHandler


class PlainHandler(BaseHandler):
    """Decode each row, one forward a batch, a dict for each; the rest is upstream's."""

    def initialize(self, context: Any) -> None:
        """The student, once in each worker."""
        super().__init__()
        self.student = Student.from_environment()
        self.device, self.initialized = torch.device("cpu"), True

    def preprocess(self, data: Any) -> list[Pixels]:
        """An image or raw pixels in each row."""
        return [self.student.decode(bytes(row.get("data") or row["body"])) for row in data]

    def inference(self, data: Any, *args: Any, **kwargs: Any) -> Any:
        """One forward."""
        return self.student.answers(data)

    def postprocess(self, data: Any) -> Any:
        """Upstream writes the JSON."""
        return data
