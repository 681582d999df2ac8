"""The forms that conversations come in, each turned into the one form that everything else works on."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pvm.errors import UserError


MEDIA = {"image": "images", "video": "videos"}  # type of a part: its column; the singular is a column's name, too
LLAVA_ROLES = {"human": "user", "gpt": "assistant", "system": "system"}
MARKS = re.compile(r"\n?<(image|video)>\n?")  # LLaVA's; the line break beside a mark belongs to it
# What the chat format is made of: in a text they would forge turns and images.
RESERVED = re.compile(r"<\|(?:im_start|im_end|vision_start|vision_end|image_pad|video_pad)\|>")
FORMS = (
    "`messages`; `prompt` and `completion`; or `conversations` (LLaVA), each with `images` or `videos` if it has any"
)


@dataclass
class Conversation:
    """
    A row of any data set in the one internal form.

    messages (`list[dict]`): `{"role": "system" | "user" | "assistant", "content": parts}`, as chat templates take
        them; a part is `{"type": "image"}`, `{"type": "video"}` or `{"type": "text", "text": str}`. The last message
        is the assistant's. There are as many image and video parts as images and videos, in their order.
    images (`list[dict]`): files not yet decoded, `{"path": str | None, "bytes": bytes | None}`.
    videos (`list[dict]`): the same for video files; a video given as images has them in `frames` (`list[dict]`).
    given (`int`): how many messages at the start are a prompt, whose answers are not to be learned.
    """

    messages: list[dict[str, Any]]
    images: list[dict[str, Any]] = field(default_factory=list)
    videos: list[dict[str, Any]] = field(default_factory=list)
    given: int = 0


def check_columns(columns: Sequence[str]) -> None:
    """
    Raises:
        UserError: if rows with these columns hold no conversation in any of the known forms.
    """
    if not ({"messages", "conversations"} & set(columns) or {"prompt", "completion"} <= set(columns)):
        raise UserError(
            f"no known form has its columns, {', '.join(columns)}. It needs {FORMS}. Rename the columns, or see "
            "docs/data.md."
        )


def to_conversation(row: dict[str, Any], folder: Path | None = None) -> Conversation:
    """
    The one function that reads a row, whatever its form: `messages`; or `prompt` and `completion`; or LLaVA's
    `conversations`; the first of these that the row has.

    A content is a string or a list of parts. In a user's string, `<image>` and `<video>` stand for images and videos;
    those that nothing stands for go before the first user message (trl's convention).

    Args:
        row (`dict`): its images are paths or `datasets`' undecoded images.
        folder (`Path`, *optional*): where relative paths start.

    Raises:
        UserError: for roles, contents or media that do not fit together.
    """
    given = 0
    if row.get("messages") is not None:
        turns = _as_turns(row["messages"])
    elif row.get("completion") is not None and row.get("prompt") is not None:
        prompt, completion = _as_turns(row["prompt"], "user"), _as_turns(row["completion"], "assistant")
        turns, given = prompt + completion, len(prompt)
    elif row.get("conversations") is not None:
        turns = [
            {"role": LLAVA_ROLES.get(str(turn.get("from")), turn.get("from")), "content": turn.get("value")}
            for turn in _as_turns(row["conversations"])
        ]
    else:
        raise UserError(f"there is no conversation in it. A row needs {FORMS}.")

    messages = [_message(index, turn) for index, turn in enumerate(turns)]
    if not messages or messages[-1]["role"] != "assistant":
        raise UserError("the last message must be the assistant's: it is the answer to learn, or to compare with.")
    images = [_file(value, "image", folder) for value in _media(row, "image")]
    videos = [_video(value, folder) for value in _media(row, "video")]
    _place(messages, {"image": len(images), "video": len(videos)})
    for index, message in enumerate(messages):
        if not message["content"]:
            raise UserError(f"message {index} ({message['role']}) is empty.")
    return Conversation(messages, images, videos, given)


def message_text(message: dict[str, Any]) -> str:
    """The text of a message of a [`Conversation`], without its images and videos."""
    return "".join(part["text"] for part in message["content"] if part["type"] == "text")


def _as_turns(value: Any, role: str | None = None) -> list[dict[str, Any]]:
    if isinstance(value, str) and role is not None:
        return [{"role": role, "content": value}]
    if not isinstance(value, list) or not all(isinstance(turn, dict) for turn in value):
        raise UserError(f"its messages are no list of messages, but {str(value)[:60]!r}.")
    return value


def _message(index: int, turn: dict[str, Any]) -> dict[str, Any]:
    """A message whose content is a list of parts, none of them an empty text."""
    role, content = turn.get("role"), turn.get("content")
    if role not in LLAVA_ROLES.values():
        roles = "system, user or assistant (in LLaVA's form system, human or gpt)"
        raise UserError(f"message {index} has the role {role!r}; use {roles}.")
    if role == "system" and index > 0:
        raise UserError(f"message {index} is the system's, which can only be the first: chat templates leave it out.")
    if not isinstance(content, (str, list, type(None))):
        raise UserError(
            f"message {index} ({role}) has the content {content!r}, which is neither a string nor a list of parts."
        )
    if isinstance(content, str):
        content = _split_at_marks(content) if role == "user" else [{"type": "text", "text": content}]
    if not all(isinstance(part, dict) for part in content or []):
        raise UserError(f"message {index} has a content that is neither a string nor a list of parts.")
    parts = []
    for part in content or []:
        kind, text = part.get("type"), "" if part.get("text") is None else part["text"]
        if not isinstance(text, str):
            raise UserError(f"message {index} has a text that is no string, but {text!r}.")
        if kind not in ("text", *MEDIA):
            raise UserError(f"message {index} has a part of type {kind!r}; use text, image or video.")
        if kind in MEDIA and role != "user":
            raise UserError(f"message {index} ({role}) has a part of type {kind!r}; only the user can show one.")
        if forged := RESERVED.search(text):
            raise UserError(f"message {index} has {forged[0]} in its text, which is reserved for the chat format.")
        if kind in MEDIA or text:
            parts.append({"type": kind} if kind in MEDIA else {"type": "text", "text": text})
    if role == "assistant" and not any(part["text"].strip() for part in parts):
        raise UserError(f"message {index}, the assistant's, has no text.")
    return {"role": role, "content": parts}


def _split_at_marks(text: str) -> list[dict[str, Any]]:
    pieces = MARKS.split(text)  # text, kind, text, kind, ..., text
    return [{"type": piece} if index % 2 else {"type": "text", "text": piece} for index, piece in enumerate(pieces)]


def _media(row: dict[str, Any], kind: str) -> list:
    given = [row[column] for column in (MEDIA[kind], kind) if row.get(column) not in (None, [])]
    if len(given) > 1:
        raise UserError(f"it has both `{MEDIA[kind]}` and `{kind}`, and only one can be meant. Remove one.")
    if given and not isinstance(given[0], list):
        return given
    return given[0] if given else []


def _file(value: Any, kind: str, folder: Path | None) -> dict[str, Any]:
    """`{"path", "bytes"}` of an image or video, with a path that can be opened from anywhere."""
    if isinstance(value, dict):  # an image or video of `datasets`, not decoded
        path, content = value.get("path"), value.get("bytes")
    elif isinstance(value, str):
        path, content = value, None
    else:
        raise UserError(f"one of its {MEDIA[kind]} is neither a path nor a file, but {value!r}.")
    if not isinstance(path, (str, type(None))) or not isinstance(content, (bytes, type(None))):
        raise UserError(f"one of its {MEDIA[kind]} is neither a path nor a file, but {str(value)[:60]}.")
    if not path and not content:
        raise UserError(f"one of its {MEDIA[kind]} is empty.")
    if content is None and "://" not in path and not Path(path).is_absolute():
        if folder is None:
            raise UserError(
                f"the {kind} {path} is a relative path, and only a local data set can have files beside it."
            )
        path = str(folder / path)
    return {"path": path, "bytes": content}


def _video(value: Any, folder: Path | None) -> dict[str, Any]:
    if isinstance(value, list):
        return {"path": None, "bytes": None, "frames": [_file(frame, "image", folder) for frame in value]}
    return {**_file(value, "video", folder), "frames": None}


def _place(messages: list[dict[str, Any]], counts: dict[str, int]) -> None:
    """Give every image and video its part: those that no part stands for go before the first user message."""
    front = []
    for kind, count in counts.items():
        parts = sum(part["type"] == kind for message in messages for part in message["content"])
        if parts == 0:
            front += [{"type": kind} for _ in range(count)]
        elif parts != count:
            raise UserError(f"{MEDIA[kind]}: {count}, but places for them in the messages: {parts}.")
    if not front:
        return
    user = next((message for message in messages if message["role"] == "user"), None)
    if user is None:
        raise UserError("there are images or videos, but no user message to show them in.")
    user["content"] = front + user["content"]
