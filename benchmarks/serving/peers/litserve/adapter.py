"""LitServe over our own core: what is left of serving when the server is exchanged."""

import base64
import json
import os

import core
import litserve


class API(litserve.LitAPI):
    """Bodies in, answers out; decoding, batching of the model, cache and JSON are the core's."""

    def setup(self, device: str) -> None:
        """Once in each worker."""
        self.service = core.load()

    def decode_request(self, request) -> bytes:
        """As it was before base64."""
        return base64.b64decode(request["image"])

    def batch(self, inputs: list[bytes]) -> list[bytes]:
        """The core takes a list."""
        return inputs

    def predict(self, x: list[bytes]) -> list[bytes]:
        """One call of the core a batch."""
        return core.answers(self.service, x)

    def unbatch(self, output: list[bytes]) -> list[bytes]:
        """One answer a body."""
        return output

    def encode_response(self, output):
        """It insists on writing the JSON itself."""
        return json.loads(output)


if __name__ == "__main__":
    api = API(max_batch_size=core.BATCH, batch_timeout=0.001)
    server = litserve.LitServer(api, accelerator="cpu", workers_per_device=int(os.environ["WORKERS"]), fast_queue=True)
    server.run(host="127.0.0.1", port=int(os.environ["PORT"]), generate_client_file=False, log_level="warning")
