"""The supported forms of a data set row, all converted to one: [`Conversation`]."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pvm.errors import UserError


MEDIA = {"image": "images", "video": "videos"}  # type of a part: its column, which may also have the singular name
LLAVA_ROLES = {"human": "user", "gpt": "assistant", "system": "system"}
PLACEHOLDERS = re.compile(r"\n?<(image|video)>\n?")  # as in LLaVA, including the line breaks around them
# Tokens of the chat format. Inside a text they would be parsed as turns or images.
RESERVED = re.compile(r"<\|(?:im_start|im_end|vision_start|vision_end|image_pad|video_pad)\|>")
FORMS = "`messages`, `prompt` and `completion`, or `conversations` (LLaVA), each with optional `images` or `videos`"


@dataclass
class Conversation:
    """
    A row of any data set in the internal form.

    messages (`list[dict]`): `{"role": "system" | "user" | "assistant", "content": parts}`, as chat templates expect
        them. A part is `{"type": "image"}`, `{"type": "video"}` or `{"type": "text", "text": str}`. The last message
        is from the assistant. Image and video parts match `images` and `videos` in number and order.
    images (`list[dict]`): undecoded files, `{"path": str | None, "bytes": bytes | None}`.
    videos (`list[dict]`): the same for video files; a video given as a list of images has them in `frames`.
    prompt_messages (`int`): number of leading messages that form the prompt; their answers are not trained on.
    """

    messages: list[dict[str, Any]]
    images: list[dict[str, Any]] = field(default_factory=list)
    videos: list[dict[str, Any]] = field(default_factory=list)
    prompt_messages: int = 0


def check_columns(name: str, columns: Sequence[str]) -> None:
    """
    Raises:
        UserError: if the columns of the data set `name` match none of the supported forms.
    """
    if not ({"messages", "conversations"} & set(columns) or {"prompt", "completion"} <= set(columns)):
        raise UserError(
            f"{name} has the columns {', '.join(columns)}, which match no supported form. It needs {FORMS}. Rename "
            "the columns, or see docs/data.md."
        )


def to_conversation(row: dict[str, Any], folder: Path | None = None) -> Conversation:
    """
    Convert a row of any form. If it has the columns of several, the order is `messages`, `prompt` and `completion`,
    `conversations`.

    A content is a string or a list of parts. In a user's string, `<image>` and `<video>` are placeholders. Without
    any placeholder, images and videos go before the first user message, as in trl.

    Args:
        row (`dict`): its images are paths or undecoded images of `datasets`.
        folder (`Path`, *optional*): what relative paths are relative to.

    Raises:
        UserError: if roles, contents or media are invalid or do not match.
    """
    prompt_messages = 0
    if row.get("messages") is not None:
        turns = _as_turns(row["messages"])
    elif row.get("completion") is not None and row.get("prompt") is not None:
        prompt, completion = _as_turns(row["prompt"], "user"), _as_turns(row["completion"], "assistant")
        turns, prompt_messages = prompt + completion, len(prompt)
    elif row.get("conversations") is not None:
        turns = [
            {"role": LLAVA_ROLES.get(str(turn.get("from")), turn.get("from")), "content": turn.get("value")}
            for turn in _as_turns(row["conversations"])
        ]
    else:
        raise UserError(f"the row has no conversation. It needs {FORMS}.")

    messages = [_message(index, turn) for index, turn in enumerate(turns)]
    if not messages or messages[-1]["role"] != "assistant":
        raise UserError("the last message must be the answer to train on or to compare with, from the assistant.")
    images = [_file(value, "image", folder) for value in _media(row, "image")]
    videos = [_video(value, folder) for value in _media(row, "video")]
    _match_placeholders(messages, {"image": len(images), "video": len(videos)})
    for index, message in enumerate(messages):
        if not message["content"]:
            raise UserError(f"message {index} ({message['role']}) is empty.")
    return Conversation(messages, images, videos, prompt_messages)


def message_text(message: dict[str, Any]) -> str:
    """The text of a message of a [`Conversation`], without its images and videos."""
    return "".join(part["text"] for part in message["content"] if part["type"] == "text")


def _as_turns(value: Any, role: str | None = None) -> list[dict[str, Any]]:
    """A list of messages; with a `role`, a string is one message."""
    if isinstance(value, str) and role is not None:
        return [{"role": role, "content": value}]
    if not isinstance(value, list) or not all(isinstance(turn, dict) for turn in value):
        raise UserError(f"expected a list of messages, found {str(value)[:60]!r}.")
    return value


def _message(index: int, turn: dict[str, Any]) -> dict[str, Any]:
    """The message with a list of parts as its content, without empty texts."""
    role, content = turn.get("role"), turn.get("content")
    if role not in LLAVA_ROLES.values():
        roles = "system, user or assistant (in LLaVA's form system, human or gpt)"
        raise UserError(f"message {index} has the role {role!r}; use {roles}.")
    if role == "system" and index > 0:
        raise UserError(f"message {index} has the role system, but chat templates ignore it except in message 0.")
    if isinstance(content, str):
        content = _split_at_placeholders(content) if role == "user" else [{"type": "text", "text": content}]
    if content is None:
        raise UserError(f"message {index} ({role}) has no content.")
    if not isinstance(content, list) or not all(isinstance(part, dict) for part in content):
        raise UserError(
            f"the content of message {index} ({role}) is neither a string nor a list of parts: {str(content)[:60]}."
        )
    parts = []
    for part in content:
        kind, text = part.get("type"), "" if part.get("text") is None else part["text"]
        if not isinstance(text, str):
            raise UserError(f"message {index} has a text that is not a string: {text!r}.")
        if kind not in ("text", *MEDIA):
            raise UserError(f"message {index} has a part of type {kind!r}; use text, image or video.")
        if kind == "text" and part.get("text") is None:
            raise UserError(f"message {index} has a part of type 'text' without `text`.")
        if kind in MEDIA and text:
            raise UserError(f"message {index} has a text in a part of type {kind!r}; give it a part of its own.")
        if kind in MEDIA and role != "user":
            raise UserError(f"message {index} ({role}) has a part of type {kind!r}, which only users can send.")
        if reserved := RESERVED.search(text):
            raise UserError(f"the text of message {index} contains {reserved[0]}, which the chat format reserves.")
        if kind in MEDIA or text:
            parts.append({"type": kind} if kind in MEDIA else {"type": "text", "text": text})
    if role == "assistant" and not any(part["text"].strip() for part in parts):
        raise UserError(f"message {index} (assistant) has no text.")
    return {"role": role, "content": parts}


def _split_at_placeholders(text: str) -> list[dict[str, Any]]:
    pieces = PLACEHOLDERS.split(text)  # text, type, text, type, ..., text
    return [{"type": piece} if index % 2 else {"type": "text", "text": piece} for index, piece in enumerate(pieces)]


def _media(row: dict[str, Any], kind: str) -> list:
    columns = [row[column] for column in (MEDIA[kind], kind) if row.get(column) not in (None, [])]
    if len(columns) > 1:
        raise UserError(f"the row has both `{MEDIA[kind]}` and `{kind}`. Remove one.")
    if columns and not isinstance(columns[0], list):
        return columns
    return columns[0] if columns else []


def _file(value: Any, kind: str, folder: Path | None) -> dict[str, Any]:
    """`{"path", "bytes"}` of an image or video. A local path is absolute."""
    # `datasets` represents undecoded images and videos as dictionaries.
    path, content = (value.get("path"), value.get("bytes")) if isinstance(value, dict) else (value, None)
    if not isinstance(path, str | None) or not isinstance(content, bytes | None):
        raise UserError(f"one of the {MEDIA[kind]} is neither a path nor a file: {str(value)[:60]}.")
    if not path and not content:
        raise UserError(f"one of the {MEDIA[kind]} is empty.")
    if content is None and "://" not in path and not Path(path).is_absolute():
        if folder is None:
            raise UserError(f"the {kind} {path} is a relative path, which only local data sets can use.")
        path = str(folder / path)
    return {"path": path, "bytes": content}


def _video(value: Any, folder: Path | None) -> dict[str, Any]:
    if isinstance(value, list):
        if not value:
            raise UserError("one of its videos has no frames.")
        return {"path": None, "bytes": None, "frames": [_file(frame, "image", folder) for frame in value]}
    return {**_file(value, "video", folder), "frames": None}


def _match_placeholders(messages: list[dict[str, Any]], counts: dict[str, int]) -> None:
    """Check that there is a part for every image and video. If there is none at all, insert them."""
    inserted = []
    for kind, count in counts.items():
        placeholders = sum(part["type"] == kind for message in messages for part in message["content"])
        if placeholders == 0:
            inserted += [{"type": kind} for _ in range(count)]
        elif placeholders != count:
            raise UserError(f"{MEDIA[kind]}: {count}, but {kind} placeholders in the messages: {placeholders}.")
    if not inserted:
        return
    user = next((message for message in messages if message["role"] == "user"), None)
    if user is None:
        raise UserError("the row has images or videos, but no user message to contain them.")
    user["content"] = inserted + user["content"]
