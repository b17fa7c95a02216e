"""LitServe: `{"image": base64}` as in its examples, batches of up to BATCH, one process of WORKERS each."""

import base64
import os
from typing import Any

import litserve
from student import Pixels, Student


class API(litserve.LitAPI):
    """Decode, one forward a batch. No annotations on requests and answers: they would be read as schemas."""

    def setup(self, device: str) -> None:
        """Once in each worker."""
        self.student = Student.from_environment()

    def decode_request(self, request) -> Pixels:
        """An image or raw pixels."""
        return self.student.decode(base64.b64decode(request["image"]))

    def batch(self, inputs: list[Pixels]) -> list[Pixels]:
        """The student stacks them itself."""
        return inputs

    def predict(self, x: Any) -> Any:
        """A list of images where it batches, one image where it does not."""
        return self.student.answers(x) if BATCH > 1 else self.student.answers([x])[0]

    def unbatch(self, output: Any) -> Any:
        """One answer an image."""
        return output

    def encode_response(self, output):
        """It writes JSON of it."""
        return output


BATCH = int(os.environ["BATCH"])

if __name__ == "__main__":
    api = API(max_batch_size=BATCH, batch_timeout=0.001 if BATCH > 1 else 0.0)
    server = litserve.LitServer(api, accelerator="cpu", workers_per_device=int(os.environ["WORKERS"]), fast_queue=True)
    server.run(host="127.0.0.1", port=int(os.environ["PORT"]), generate_client_file=False, log_level="warning")
