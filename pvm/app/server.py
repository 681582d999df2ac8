"""
The page's server. It keeps nothing of its visitors: a request has the whole question, and its answer is written while
the connection lasts.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from threading import Lock
from typing import Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

from pvm.app.answers import LARGEST_GATE_SCALE, Question, data_uri, read_upload, write_answer
from pvm.app.examples import examples
from pvm.checkpoints.loading import Checkpoint
from pvm.checkpoints.names import public_name
from pvm.errors import UserError
from pvm.style import CSS
from pvm.terminal import printable
from variants_qwen3vl_pvm import BLOCKS


LARGEST_UPLOAD = 20 * 2**20  # bytes
TOO_LARGE = f"This is larger than {LARGEST_UPLOAD // 2**20} MB. Choose a smaller image."


def create_app(checkpoints: list[Checkpoint]) -> Starlette:
    """
    The page for some models, whose attention becomes eager: the other kinds return no weights.

    `GET /setup`: what the page shows before a question. `POST /image?name=NAME`: an uploaded file, of which the image
    comes back as the model will see it. `POST /answer`: a [`Question`] as JSON; lines of JSON, see [`write_answer`],
    come back. Errors are `{"error": sentence}`, instead or as the last line.
    """
    locks = [Lock() for _ in checkpoints]
    for checkpoint in checkpoints:
        checkpoint.plain_model.set_attn_implementation("eager")
    setup = {
        "models": [describe(checkpoint) for checkpoint in checkpoints],
        "examples": examples(checkpoints),
        "largest_upload": LARGEST_UPLOAD,
        "too_large": TOO_LARGE,
        "largest_gate_scale": LARGEST_GATE_SCALE,
    }

    async def get_setup(request: Request) -> JSONResponse:
        return JSONResponse(setup)

    async def get_shared_css(request: Request) -> Response:
        return Response(CSS, media_type="text/css")

    async def post_image(request: Request) -> JSONResponse:
        name = request.query_params.get("name", "")[:100]
        image = await run_in_threadpool(read_upload, await _body(request), name)
        return JSONResponse({"image": data_uri(image)})

    async def post_answer(request: Request) -> StreamingResponse:
        question = Question.parse(await _body(request))
        if not 0 <= question.model < len(checkpoints):
            raise UserError(f"There is no model {question.model}.")
        events = write_answer(checkpoints[question.model], question, locks[question.model])
        return StreamingResponse(_lines(events), media_type="application/x-ndjson")

    return Starlette(
        routes=[
            Route("/setup", get_setup),
            Route("/shared.css", get_shared_css),
            Route("/image", post_image, methods=["POST"]),
            Route("/answer", post_answer, methods=["POST"]),
            Mount("/", StaticFiles(directory=Path(__file__).with_name("static"), html=True)),
        ],
        exception_handlers={UserError: lambda request, error: JSONResponse({"error": printable(str(error))}, 422)},
    )


def describe(checkpoint: Checkpoint) -> dict[str, Any]:
    """A model for the page: `name`, `has_branches`, `reads_image`, and what to know about it, `about`."""
    description = checkpoint.description
    name, layers = public_name(description.path)["name"], ", ".join(description.gates)
    training = checkpoint.plain_model.config.text_config.to_dict().get("pvm_training") or {}
    reads_image = description.block is not None and BLOCKS[description.block].reads_image
    if description.block is None:
        about = (
            f"{name} has no PVM branches, so there is nothing to switch off. `pvm demo` or `pvm train` makes a "
            "checkpoint with branches."
        )
    elif not description.gates_on:
        about = f"Branches in layers {layers}. Their gates are all 0, so they change nothing: they are not trained."
    elif not reads_image:
        about = f"Branches in layers {layers} that do not read the image, as a control."
    elif not training.get("image_dropout"):
        about = (
            f"Branches in layers {layers}, trained without image dropout as far as the checkpoint says: without the "
            "image in the KV cache, answers may get worse."
        )
    else:
        about = f"Branches in layers {layers}, trained with image dropout {training['image_dropout']}."
    return {
        "name": name,
        "has_branches": description.block is not None,
        "reads_image": reads_image,
        "about": about,
    }


def _lines(events: Iterator[dict[str, Any]]) -> Iterator[str]:
    try:
        for event in events:
            yield json.dumps(event) + "\n"
    except UserError as error:
        yield json.dumps({"error": str(error)}) + "\n"


async def _body(request: Request) -> bytes:
    """
    Raises:
        UserError: if it has more than `LARGEST_UPLOAD` bytes.
    """
    content = bytearray()
    async for part in request.stream():
        content += part
        if len(content) > LARGEST_UPLOAD:
            raise UserError(TOO_LARGE)
    return bytes(content)
