"""mosec over our own core: what is left of serving when the server is exchanged."""

import os
from typing import Any

import core
from mosec import Server, Worker


class Inference(Worker):
    """Bodies in, bodies out; decoding, batching of the model, cache and JSON are the core's."""

    def __init__(self) -> None:
        self.service = core.load()

    def deserialize(self, data: bytes) -> bytes:
        """As it came."""
        return data

    def forward(self, data: Any) -> Any:
        """One call of the core a batch."""
        return core.answers(self.service, data)

    def serialize(self, data: Any) -> bytes:
        """As the core wrote it."""
        return bytes(data)


if __name__ == "__main__":
    server = Server()
    server.append_worker(Inference, num=int(os.environ["WORKERS"]), max_batch_size=core.BATCH, max_wait_time=1)
    server.run()
