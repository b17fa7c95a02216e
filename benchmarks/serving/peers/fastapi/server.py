"""FastAPI and uvicorn: the body read as it is, the model called in place, orjson for the answer; no batching."""

import orjson
from fastapi import FastAPI, Request, Response
from student import Student

student = Student.from_environment()
app = FastAPI()


@app.post("/predict")
async def predict(request: Request) -> Response:
    """An image or raw pixels."""
    [answer] = student.answers([student.decode(await request.body())])
    return Response(orjson.dumps(answer), media_type="application/json")
