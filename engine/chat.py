"""OpenAI-style messages in, turns of a conversation out."""

import base64
import binascii
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from PIL import Image

from uniworld.engine.request import Result, Turn
from uniworld.models.images import read_image

ROLES = ("system", "user", "assistant")
MAX_DATA_URL_BYTES = 64 * 2**20


@dataclass(frozen=True)
class Conversation:
    """A parsed conversation: everything before the last user message, and that message."""

    system: str | None
    history: tuple[Turn, ...]
    prompt: str
    images: tuple[Image.Image, ...]


@dataclass(frozen=True, kw_only=True)
class ChatReply:
    """The answer to a conversation: text, or a picture with its `result`.

    draw_probability: what the task head says of this conversation; None where `mode` decided.
    timings: seconds by room; of a picture those of its result.
    """

    text: str
    images: list[Image.Image]
    result: Result | None = None
    draw_probability: float | None = None
    timings: dict[str, float] = field(default_factory=dict)


def parse_messages(messages: Sequence[dict[str, Any]]) -> Conversation:
    """Check and split OpenAI-style messages; the last one must be the user's.

    `content` is text, or a list of parts: {"type": "text", "text": ...},
    {"type": "image_url", "image_url": {"url": "data:image/...;base64,..."}} or {"type": "image", "image": PIL or path}.
    Pictures of assistant messages are part of the history and condition what is drawn next.
    """
    if not messages:
        raise ValueError("messages: at least one message is needed")
    turns = [_parse_message(i, message) for i, message in enumerate(messages)]
    system = None
    if turns[0].role == "system":
        system, turns = turns[0].text, turns[1:]
    if any(turn.role == "system" for turn in turns):
        raise ValueError("messages: only the first message may have role 'system'")
    if not turns or turns[-1].role != "user":
        raise ValueError("messages: the last message must have role 'user'")
    return Conversation(system, tuple(turns[:-1]), turns[-1].text, turns[-1].images)


def _parse_message(index: int, message: dict[str, Any]) -> Turn:
    if not isinstance(message, dict):
        raise ValueError(f"messages[{index}]: must have role and content, got {type(message).__name__}")
    role, content = message.get("role"), message.get("content")
    if role not in ROLES:
        raise ValueError(f"messages[{index}].role={role!r}: must be one of {', '.join(ROLES)}")
    if isinstance(content, str):
        return Turn(role, content)
    if not isinstance(content, Sequence):
        raise ValueError(f"messages[{index}].content: must be text or a list of parts, got {type(content).__name__}")
    texts, images = [], []
    for part_index, part in enumerate(content):
        where = f"messages[{index}].content[{part_index}]"
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text":
            texts.append(_text(f"{where}.text", part.get("text")))
        elif kind == "image_url":
            url = part.get("image_url")
            url = url.get("url") if isinstance(url, dict) else None
            images.append(_read_data_url(where, _text(f"{where}.image_url.url", url)))
        elif kind == "image":
            if part.get("image") is None:
                raise ValueError(f"{where}.image: must be a picture or the path of one")
            images.append(read_image(part["image"]))
        else:
            raise ValueError(f"{where}.type={kind!r}: must be one of text, image_url, image")
    return Turn(role, "\n".join(texts), tuple(images))


def _text(where: str, value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{where}={value!r}: must be text")
    return value


def _read_data_url(where: str, url: str) -> Image.Image:
    """Decode a data URL. Nothing is ever fetched: who wants a remote picture downloads it first."""
    header, comma, payload = url.partition(",")
    if not (header.startswith("data:image/") and header.endswith(";base64") and comma):
        raise ValueError(f"{where}.image_url.url: must be a data:image/...;base64,... URL, got {url[:40]!r}")
    if len(payload) * 3 // 4 > MAX_DATA_URL_BYTES:
        raise ValueError(f"{where}.image_url.url: over {MAX_DATA_URL_BYTES // 2**20} MiB")
    try:
        return read_image(base64.b64decode(payload, validate=True))
    except binascii.Error as error:
        raise ValueError(f"{where}.image_url.url: not base64 ({error})") from None
