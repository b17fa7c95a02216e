"""mosec: raw bodies, dynamic batches of up to BATCH, one process of WORKERS each; the JSON is its own."""

import os
from typing import Any

from mosec import Server, Worker
from student import Pixels, Student


class Inference(Worker):
    """Decode, one forward a batch."""

    def __init__(self) -> None:
        self.student = Student.from_environment()

    def deserialize(self, data: bytes) -> Pixels:
        """An image or raw pixels."""
        return self.student.decode(data)

    def forward(self, data: Any) -> Any:
        """A list of images where it batches, one image where it does not."""
        return self.student.answers(data) if BATCH > 1 else self.student.answers([data])[0]


BATCH = int(os.environ["BATCH"])

if __name__ == "__main__":
    server = Server()
    wait_ms = 1  # the least that it takes; more is slower at every number of clients
    server.append_worker(Inference, num=int(os.environ["WORKERS"]), max_batch_size=BATCH, max_wait_time=wait_ms)
    server.run()
