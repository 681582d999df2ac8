"""The supported forms of a data set row, all converted to one: [`Conversation`]."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pvm.data.media import media_file
from pvm.errors import UserError


MEDIA = {"image": "images", "video": "videos"}  # type of a part: its column, which may also have the singular name
LLAVA_ROLES = {"human": "user", "gpt": "assistant", "system": "system"}
PLACEHOLDERS = re.compile(r"\n?<(image|video)>\n?")  # as in LLaVA, including the line breaks around them
URL_PARTS = {f"{kind}_url": kind for kind in MEDIA}  # as in OpenAI's API
FILE_KEYS = ("image", "video", "url", "path", *URL_PARTS)  # where formats name the file of a part
# What chat templates would render and a `Conversation` cannot hold, by message and by row.
NOT_RENDERED = ("tool_calls", "reasoning_content", "tools")
QUESTIONS = ("prompt", "question", "problem")  # columns; the first that a row has counts
FORMS = (
    "`messages`; `prompt` and `completion`; `conversations` (LLaVA); or `prompt`, `question` or `problem` with "
    "`answer` or `reward_model`; each with optional `images` or `videos`"
)


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
    known = set(columns)
    if not (
        known & {"messages", "conversations"}
        or known >= {"prompt", "completion"}
        or (known & set(QUESTIONS) and known & {"answer", "reward_model"})
    ):
        raise UserError(
            f"{name} has the columns {', '.join(columns)}, which match no supported form. It needs {FORMS}. Rename "
            "the columns, or see docs/data.md."
        )


def to_conversation(row: dict[str, Any], root: Path | None = None, allow_urls: bool = False) -> Conversation:
    """
    Convert a row of any form. If it has the columns of several, the order is `messages`, `prompt` and `completion`,
    `conversations`, a question and its answer.

    A content is a string or a list of parts. In a user's string, `<image>` and `<video>` are placeholders. Without
    any placeholder, images and videos go before the first user message, as in trl. Images may also be named in the
    parts, as in OpenAI's API: `{"type": "image_url", "image_url": {"url": path or URI}}`.

    Args:
        row (`dict`): see [`media_file`] for what its images may be.
        root (`Path`, *optional*): the folder or zip file that relative paths start from.
        allow_urls (`bool`): accept http(s) URLs of images.

    Raises:
        UserError: if roles, contents or media are invalid or do not match.
    """
    _refuse_not_rendered(row, "the row")
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
        turns = _question_and_answer(row)
        prompt_messages = len(turns) - 1

    named: dict[str, list] = {"image": [], "video": []}  # files that parts name
    messages = [_message(index, turn, named) for index, turn in enumerate(turns)]
    if not messages or messages[-1]["role"] != "assistant":
        raise UserError("the last message must be the answer to train on or to compare with, from the assistant.")
    images = [media_file(value, "image", root, allow_urls) for value in _media(row, "image", named)]
    videos = [_video(value, root, allow_urls) for value in _media(row, "video", named)]
    _match_placeholders(messages, {"image": len(images), "video": len(videos)})
    for index, message in enumerate(messages):
        if not message["content"]:
            raise UserError(f"message {index} ({message['role']}) is empty.")
    return Conversation(messages, images, videos, prompt_messages)


def to_prompt(conversation: Conversation) -> tuple[Conversation, str]:
    """
    Split a conversation into a prompt and its reference answer, as reinforcement learning needs it. Rows with `prompt`
    (a text or a list of messages), `images`, and `answer` or `reward_model.ground_truth` are read like all others:

        rows = load_conversations(name, split, config_name, image_root, allow_image_urls)
        for index in range(len(rows)):
            prompt, reference = to_prompt(rows[index])
            images = [read_image(image) for image in prompt.images]

    The reference is as written in the row: `\\boxed{A}` stays that. Left to the caller: `refuse_special_tokens`
    before the chat template is trusted; and naming the row (`rows.where(index)`) of a `UserError`, or counting and
    listing it as skipped.

    Returns:
        The conversation without its last message, and the text of that message.
    """
    return replace(conversation, messages=conversation.messages[:-1]), message_text(conversation.messages[-1])


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


def _question_and_answer(row: dict[str, Any]) -> list[dict[str, Any]]:
    """The messages of a row whose columns are a question and its answer, as sets for reinforcement learning have."""
    questions = [column for column in QUESTIONS if column in row]
    if not questions or not {"answer", "reward_model"} & row.keys():
        raise UserError(f"the row has no conversation. It needs {FORMS}.")
    question = next((column for column in questions if row[column] is not None), questions[0])
    column, answer = "answer", row.get("answer")
    if answer is None and isinstance(row.get("reward_model"), dict):
        column, answer = "reward_model.ground_truth", row["reward_model"].get("ground_truth")
    if isinstance(answer, int | float) and not isinstance(answer, bool):
        answer = None if answer != answer else str(answer)  # NaN is a missing value
    for name, value in ((question, row[question]), (column, answer)):
        if value is None or (isinstance(value, str) and not value.strip()):
            raise UserError(f"its `{name}` is empty. Fill it in, or remove the row.")
    if not isinstance(answer, str):
        raise UserError(f"its `{column}` is neither a text nor a number: {str(answer)[:60]}.")
    prompt = _as_turns(row[question], "user")
    if not prompt or prompt[-1].get("role") != "user":
        raise UserError(f"its `{question}` does not end with a message from the user, which `{column}` would answer.")
    return [*prompt, {"role": "assistant", "content": answer}]


def _message(index: int, turn: dict[str, Any], named: dict[str, list]) -> dict[str, Any]:
    """The message with a list of parts as its content, without empty texts. Files that parts name go into `named`."""
    role, content = turn.get("role"), turn.get("content")
    _refuse_not_rendered(turn, f"message {index}")
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
        if kind not in ("text", *MEDIA, *URL_PARTS):
            raise UserError(f"message {index} has a part of type {kind!r}; use text, image, video or image_url.")
        files = {key: _url(part[key]) for key in FILE_KEYS if part.get(key) is not None}
        if kind in URL_PARTS:
            file, kind = files.pop(kind, None), URL_PARTS[kind]
            if not isinstance(file, str) or not file:
                raise UserError(f"message {index} has a part of type {part['type']!r} without a URL or path.")
            named[kind].append(file)
        if any(value is not None for value in files.values()):
            raise UserError(
                f"message {index} names a file in a part of type {part['type']!r}. Name it in the column `images` or "
                '`videos`, or in a part of its own: {"type": "image_url", "image_url": {"url": ...}}.'
            )
        if not isinstance(text, str):
            raise UserError(f"message {index} has a text that is not a string: {text!r}.")
        if kind == "text" and part.get("text") is None:
            raise UserError(f"message {index} has a part of type 'text' without `text`.")
        if kind in MEDIA and text:
            raise UserError(f"message {index} has a text in a part of type {kind!r}; give it a part of its own.")
        if kind in MEDIA and role != "user":
            raise UserError(f"message {index} ({role}) has a part of type {kind!r}, which only users can send.")
        if kind in MEDIA or text:
            parts.append({"type": kind} if kind in MEDIA else {"type": "text", "text": text})
    if role == "assistant" and not any(part["text"].strip() for part in parts):
        raise UserError(f"message {index} (assistant) has no text.")
    return {"role": role, "content": parts}


def _refuse_not_rendered(value: dict[str, Any], name: str) -> None:
    if key := next((key for key in NOT_RENDERED if value.get(key)), None):
        raise UserError(f"{name} has `{key}`, which would be dropped. Write what is to be learned into the content.")


def _url(value: Any) -> Any:
    return value.get("url") if isinstance(value, dict) else value


def _split_at_placeholders(text: str) -> list[dict[str, Any]]:
    pieces = PLACEHOLDERS.split(text)  # text, type, text, type, ..., text
    return [{"type": piece} if index % 2 else {"type": "text", "text": piece} for index, piece in enumerate(pieces)]


def _media(row: dict[str, Any], kind: str, named: dict[str, list]) -> list:
    """The files of a row, from its columns or its parts."""
    columns = [row[column] for column in (MEDIA[kind], kind) if row.get(column) not in (None, [])]
    if len(columns) > 1:
        raise UserError(f"the row has both `{MEDIA[kind]}` and `{kind}`. Remove one.")
    if columns and named[kind]:
        raise UserError(f"the row names {MEDIA[kind]} in a column and in parts of type '{kind}_url'. Use one of them.")
    if named[kind]:
        return named[kind]
    if columns and not isinstance(columns[0], list):
        return columns
    return columns[0] if columns else []


def _video(value: Any, root: Path | None, allow_urls: bool) -> dict[str, Any]:
    if isinstance(value, list):
        if not value:
            raise UserError("one of its videos has no frames.")
        return {
            "path": None,
            "bytes": None,
            "frames": [media_file(frame, "image", root, allow_urls) for frame in value],
        }
    return {**media_file(value, "video", root), "frames": None}


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
