"""One training sample before anything is decoded: its conversation and where its pictures lie.

Source: UniWorld-V1's data format. `<image>` marks the inputs; `<gen_image>` stands once, at the end of the last gpt
turn; the last picture is the target.
"""

import io
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

from PIL import Image

from uniworld.data.buckets import Box
from uniworld.models.images import image_size, read_image
from uniworld.models.prompts import DRAWN_MARK, IMAGE_MARK, instruction, training_pieces

Conversation = tuple[dict[str, str], ...]
MAX_BOXES = 256  # of one sample


@dataclass(frozen=True)
class Picture:
    """A picture that is read when asked for.

    name: its path, or where it lies in a shard or table. content: a path, encoded bytes, or (path, offset, num_bytes)
    of a part of a file.
    """

    name: str
    content: str | bytes | tuple[str, int, int]

    def read(self) -> Image.Image:
        """8-bit RGB. Raises ValueError or OSError with the picture's name and the reason."""
        content = self.content
        if isinstance(content, tuple):
            path, offset, num_bytes = content
            with open(path, "rb") as file:
                file.seek(offset)
                content = file.read(num_bytes)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of animations and broken EXIF data, sample after sample
            return read_image(content, self.name)

    def size(self) -> tuple[int, int]:
        """(height, width) by the header; only the first bytes are read."""
        if not isinstance(self.content, tuple):
            return image_size(self.content, self.name)
        path, offset, num_bytes = self.content
        with open(path, "rb") as file:
            return image_size(io.BufferedReader(_FilePart(file, offset, num_bytes)), self.name)


class _FilePart(io.RawIOBase):
    """A part of an open file as a file of its own."""

    def __init__(self, file: BinaryIO, offset: int, num_bytes: int):
        self.file, self.offset, self.num_bytes, self.position = file, offset, num_bytes, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self.position, io.SEEK_END: self.num_bytes}[whence]
        self.position = max(0, start + offset)
        return self.position

    def readinto(self, buffer) -> int:
        wanted = max(0, min(len(buffer), self.num_bytes - self.position))
        self.file.seek(self.offset + self.position)
        data = self.file.read(wanted)
        buffer[: len(data)] = data
        self.position += len(data)
        return len(data)


@dataclass(frozen=True, kw_only=True)
class Sample:
    """A training sample.

    id: where it comes from, such as "edits.json:17". references: the inputs, in the order of their marks.
    need_weight: whether the loss weighs the edited region; False gives every latent weight 1.
    focus: boxes of what matters most in the target.
    """

    id: str
    conversations: Conversation
    references: tuple[Picture, ...]
    target: Picture
    need_weight: bool = True
    focus: tuple[Box, ...] = ()

    @property
    def instruction(self) -> str:
        """The words of the last human turn, for the text encoders."""
        return instruction(_last_human(self.conversations))

    @property
    def num_text_bytes(self) -> int:
        return sum(len(turn["value"].encode()) for turn in self.conversations)

    def without_prompt(self) -> "Sample":
        """The sample with its pictures and no words, for classifier-free guidance."""
        turns = []
        for i, turn in enumerate(self.conversations):
            marks = IMAGE_MARK * turn["value"].count(IMAGE_MARK)
            last = i == len(self.conversations) - 1
            turns.append({"from": turn["from"], "value": marks + (DRAWN_MARK if last else "")})
        return replace(self, conversations=tuple(turns))


def make_sample(
    id: str, conversations: Any, pictures: Sequence[Picture], *, need_weight: Any = True, focus: Any = None
) -> Sample:
    """Check what an annotation says, and make a sample of it; the last picture is the target.

    Raises: ValueError naming the field.
    """
    if not isinstance(conversations, Sequence) or isinstance(conversations, str) or not conversations:
        raise ValueError(f"conversations={conversations!r:.80}: must be a list of turns")
    turns = []
    for i, turn in enumerate(conversations):
        if not isinstance(turn, Mapping) or not all(isinstance(turn.get(key), str) for key in ("from", "value")):
            raise ValueError(f"conversations[{i}]: must have the texts from and value")
        turns.append({"from": turn["from"], "value": turn["value"]})
    training_pieces(turns)  # checks roles, <gen_image> and reserved tokens
    if not any(turn["from"] == "human" for turn in turns):
        raise ValueError("conversations: must have a human turn")
    if not pictures:
        raise ValueError("image: must name at least the target")
    num_marks = sum(turn["value"].count(IMAGE_MARK) for turn in turns)
    if num_marks != len(pictures) - 1:
        raise ValueError(
            f"conversations: {num_marks} {IMAGE_MARK} for {len(pictures) - 1} inputs "
            f"({len(pictures)} pictures, the last is the target)"
        )
    return Sample(
        id=id,
        conversations=tuple(turns),
        references=tuple(pictures[:-1]),
        target=pictures[-1],
        need_weight=as_bool("need_weight", need_weight),
        focus=_boxes(focus),
    )


def conversation_of(prompt: Any, num_references: int) -> list[dict[str, str]]:
    """The conversation of an instruction alone: the inputs first, as in the authors' data."""
    if not isinstance(prompt, str):
        raise ValueError(f"prompt={prompt!r:.80}: must be text")
    marks = IMAGE_MARK * num_references + "\n" if num_references else ""
    return [{"from": "human", "value": marks + prompt}, {"from": "gpt", "value": DRAWN_MARK}]


def as_bool(field: str, value: Any) -> bool:
    """True and False, also as the words of a text file."""
    if isinstance(value, bool):
        return value
    if isinstance(value, str) and value.strip().lower() in ("true", "false"):
        return value.strip().lower() == "true"
    raise ValueError(f"{field}={value!r:.80}: must be true or false")


def _boxes(value: Any) -> tuple[Box, ...]:
    """The field `focus`, None for no boxes."""
    boxes = [] if value is None else value
    if not isinstance(boxes, Sequence) or isinstance(boxes, str) or len(boxes) > MAX_BOXES:
        raise ValueError(f"focus={value!r:.80}: must be a list of at most {MAX_BOXES} boxes")
    for i, box in enumerate(boxes):
        numbers = isinstance(box, Sequence) and len(box) == 4 and all(type(n) in (int, float) for n in box)
        if not numbers or not (0 <= box[0] < box[2] <= 1 and 0 <= box[1] < box[3] <= 1):
            raise ValueError(f"focus[{i}]={box!r:.80}: must be left, upper, right, lower, in that order from 0 to 1")
    return tuple(tuple(map(float, box)) for box in boxes)


def resolve_path(folder: Path, name: str) -> str:
    """`name` below `folder`, or as it stands where it is absolute."""
    return str(folder / name)


def _last_human(conversations: Conversation) -> str:
    return next(turn["value"] for turn in reversed(conversations) if turn["from"] == "human")
