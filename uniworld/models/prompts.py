"""Prompts: their text, their token ids, and the VLM's inputs.

Letters: B batch, L tokens of the longest prompt.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from PIL import Image
from torch import Tensor

from uniworld.models.vision_processor import VisionProcessor

TURN_START, TURN_END = "<|im_start|>", "<|im_end|>"
VISION_START, IMAGE_PAD, VISION_END = "<|vision_start|>", "<|image_pad|>", "<|vision_end|>"
IMAGE = VISION_START + IMAGE_PAD + VISION_END
RESERVED = (TURN_START, TURN_END, VISION_START, IMAGE_PAD, VISION_END, "<|video_pad|>", "<|endoftext|>")
ANSWER_START = f"{TURN_START}assistant\n"
DEFAULT_SYSTEM = "You are a helpful assistant."

# Marks in the text of training and validation data.
IMAGE_MARK, DRAWN_MARK = "<image>", "<gen_image>"
DATA_ROLES = {"human": "user", "gpt": "assistant"}

MAX_TOKENS = 8192
TEXT_TYPE, IMAGE_TYPE = 0, 1

# What is asked of the model for a perception task, in the manner of its training data. {target} is named by the user.
PERCEPTION_PROMPTS = {
    "canny": "Generate a Canny edge map for this image.",
    "depth": "Generate a depth map for this image.",
    "hed": "Generate a HED boundary map for this image.",
    "mlsd": "Generate an MLSD straight-line map for this image.",
    "normal": "Generate a surface normal map for this image.",
    "pose": "Generate an OpenPose human pose map for this image.",
    "sketch": "Transform this image into a hand-drawn sketch.",
    "segment": "Segment {target} from the background.",
    "detect": "Detect {target} in this image and draw its bounding box.",
}
DEFAULT_TARGET = "the main object"


def perception_prompt(task: str, target: str | None = None) -> str:
    """The instruction for a perception task; `target` names the object of "segment" and "detect"."""
    if task not in PERCEPTION_PROMPTS:
        raise ValueError(f"task={task!r}: must be one of {', '.join(PERCEPTION_PROMPTS)}")
    template = PERCEPTION_PROMPTS[task]
    if target is not None and "{target}" not in template:
        raise ValueError(f"target={target!r}: only the tasks segment and detect take a target")
    return template.replace("{target}", target or DEFAULT_TARGET)


class Turn(Protocol):
    """One message of a conversation: "user" or "assistant", its text, and the images that follow the text."""

    role: str
    text: str
    images: Sequence[Image.Image]


def check_text(field: str, text: str) -> str:
    """Raise a ValueError where `text` holds one of the tokens that structure a prompt."""
    for token in RESERVED:
        if token in text:
            raise ValueError(f"{field}: must not contain the reserved token {token}")
    return text


def chat_text(prompt: str, num_images: int = 0, history: Sequence[Turn] = (), system: str | None = None) -> str:
    """A conversation that the assistant is to answer, as at inference: text first, then the turn's images.

    There is no system turn unless `system` is given; the model was used without one.
    """
    parts = [] if system is None else [f"{TURN_START}system\n{check_text('system', system)}{TURN_END}\n"]
    for i, turn in enumerate(history):
        images = IMAGE * len(turn.images)
        parts.append(f"{TURN_START}{turn.role}\n{check_text(f'history[{i}]', turn.text)}{images}{TURN_END}\n")
    parts.append(f"{TURN_START}user\n{check_text('prompt', prompt)}{IMAGE * num_images}{TURN_END}\n")
    return "".join(parts) + ANSWER_START


def training_pieces(conversations: Sequence[Mapping[str, str]]) -> list[str]:
    """A training sample's prompt, in the pieces that are tokenized one by one.

    Args:
        conversations: {"from": "human" | "gpt", "value": text} in turn; `<image>` marks the places of the inputs and
            the last answer is `<gen_image>`, in whose place the sequence ends with one `<|vision_start|>`.
    """
    pieces = []
    for i, turn in enumerate(conversations):
        if turn["from"] not in DATA_ROLES:
            raise ValueError(f"conversations[{i}].from={turn['from']!r}: must be one of {', '.join(DATA_ROLES)}")
        role = DATA_ROLES[turn["from"]]
        text = check_text(f"conversations[{i}].value", turn["value"]).replace(IMAGE_MARK, IMAGE)
        if i:
            pieces.append("\n")
        if role == "user":
            pieces.append(f"{TURN_START}{role}\n{text}{TURN_END}")
            continue
        drawn = text.endswith(DRAWN_MARK)
        if drawn != (i == len(conversations) - 1) or text.count(DRAWN_MARK) != int(drawn):
            raise ValueError(f"conversations[{i}].value: {DRAWN_MARK} must stand once, at the end of the last turn")
        answer = text.removesuffix(DRAWN_MARK) + VISION_START if drawn else text + TURN_END
        pieces += [f"{TURN_START}{role}\n", answer]
    if not pieces or not pieces[-1].endswith(VISION_START):
        raise ValueError(f"conversations: the last turn must be gpt's and hold {DRAWN_MARK}")
    return pieces


def validation_text(prompt: str, system: str = DEFAULT_SYSTEM) -> str:
    """A validation prompt of the trainer: with a system turn, `<image>` marks the places of the inputs."""
    text = check_text("prompt", prompt).replace(IMAGE_MARK, IMAGE)
    return f"{TURN_START}system\n{system}{TURN_END}\n{TURN_START}user\n{text}{TURN_END}\n{ANSWER_START}"


def instruction(text: str) -> str:
    """The instruction alone, without the marks of its images: what T5 and CLIP are given."""
    return text.replace(IMAGE_MARK, "").strip()


@dataclass(frozen=True)
class TokenIds:
    """The ids of the tokens that structure a prompt, as the tokenizer has them."""

    turn_start: int
    turn_end: int
    vision_start: int
    image_pad: int
    vision_end: int
    assistant: int
    pad: int

    @classmethod
    def of(cls, tokenizer: Any) -> "TokenIds":
        tokens = {
            "turn_start": TURN_START,
            "turn_end": TURN_END,
            "vision_start": VISION_START,
            "image_pad": IMAGE_PAD,
            "vision_end": VISION_END,
            "assistant": "assistant",
        }
        ids = {}
        for name, token in tokens.items():
            found = tokenizer(token, add_special_tokens=False).input_ids
            if len(found) != 1:
                raise ValueError(f"tokenizer: {token} must be one token, got {len(found)}")
            ids[name] = found[0]
        pad = ids["turn_end"] if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        return cls(pad=pad, **ids)


@dataclass(frozen=True)
class VLMInputs:
    """What the VLM is given; all on the CPU, `VisionLanguageModel.encode` moves what it needs.

    input_ids, attention_mask, mm_token_type_ids (1 where an image token stands): [B, L] int64.
    pixel_values: [patches, C T p p] fp32 and image_grid_thw: [num_images, 3] int64, or None without images.
    sees: bool [B, L, L], whether a token sees another; None where each sees all before it, but padding.
    image_end_positions: for each sample, the column of each image's `<|vision_end|>`.
    assistant_positions: for each sample, the column of the last "assistant" token, -1 where there is none.
    """

    input_ids: Tensor
    attention_mask: Tensor
    mm_token_type_ids: Tensor
    image_end_positions: tuple[tuple[int, ...], ...]
    assistant_positions: tuple[int, ...]
    pixel_values: Tensor | None = None
    image_grid_thw: Tensor | None = None
    sees: Tensor | None = None

    @classmethod
    def from_ids(
        cls,
        input_ids: Tensor,
        attention_mask: Tensor,
        tokens: TokenIds,
        pixel_values: Tensor | None = None,
        image_grid_thw: Tensor | None = None,
        own_turn: bool = False,
    ) -> "VLMInputs":
        """Complete token ids [B, L] and images with what follows from them.

        own_turn: an image's tokens see no turn before their own.
        """
        real = attention_mask.bool()
        ends = (input_ids == tokens.vision_end) & real
        assistants = (input_ids == tokens.assistant) & real
        return cls(
            input_ids=input_ids,
            attention_mask=attention_mask.long(),
            mm_token_type_ids=torch.where((input_ids == tokens.image_pad) & real, IMAGE_TYPE, TEXT_TYPE),
            image_end_positions=tuple(tuple(row.nonzero().flatten().tolist()) for row in ends),
            assistant_positions=tuple(max(row.nonzero().flatten().tolist(), default=-1) for row in assistants),
            pixel_values=pixel_values,
            image_grid_thw=image_grid_thw,
            sees=sees_own_turn(input_ids, real, tokens) if own_turn else None,
        )


def sees_own_turn(input_ids: Tensor, real: Tensor, tokens: TokenIds) -> Tensor | None:
    """bool [B, L, L]: the tokens of images see what their own turn holds before them, others all before them.

    None where no image has a turn before its own, which is the same.

    input_ids, real: [B, L], the tokens and which of them are no padding.
    """
    turns = (input_ids == tokens.turn_start).cumsum(1)
    of_images = (input_ids == tokens.image_pad) & real
    if not (of_images & (turns > 1)).any():
        return None
    seen = torch.ones(len(input_ids), *turns.shape[1:] * 2, dtype=torch.bool).tril()
    seen &= real[:, None] & (~of_images[..., None] | (turns[..., None] == turns[:, None]))
    return seen | torch.eye(turns.shape[1], dtype=torch.bool)  # padding, too, sees something


class PromptProcessor:
    """Turns prompts and pictures into the VLM's inputs.

    Args:
        tokenizer: a Qwen2 tokenizer of transformers.
        vision: how pictures are resized and cut into patches.
        max_tokens: the longest prompt allowed, image tokens included.
        padding_side: of prompts shorter than the longest in a batch.
        own_turn: an image's tokens see no turn before their own.
    """

    def __init__(
        self,
        tokenizer: Any,
        vision: VisionProcessor,
        *,
        max_tokens: int = MAX_TOKENS,
        padding_side: str = "right",
        own_turn: bool = False,
    ):
        if padding_side not in ("left", "right"):
            raise ValueError(f"padding_side={padding_side!r}: must be left or right")
        self.tokenizer, self.vision = tokenizer, vision
        self.max_tokens, self.padding_side, self.own_turn = max_tokens, padding_side, own_turn
        self.tokens = TokenIds.of(tokenizer)

    def encode(
        self, prompts: Sequence[str | Sequence[str]], images: Sequence[Sequence[Image.Image]] | None = None
    ) -> VLMInputs:
        """Tokenize prompts, give every image as many pad tokens as the VLM makes of it, and pad to one length.

        Args:
            prompts: from `chat_text`, `validation_text` (text) or `training_pieces` (pieces).
            images: the pictures of each prompt, in the order of their places in it.

        Raises:
            ValueError: a prompt has not as many places as pictures, or is longer than `max_tokens`.
        """
        images = images or [()] * len(prompts)
        pictures = [image for of_prompt in images for image in of_prompt]
        pixel_values, grids = self.vision(pictures) if pictures else (None, None)
        num_tokens = [] if grids is None else (grids.prod(1) // self.vision.merge_size**2).tolist()
        rows, first = [], 0
        for prompt, of_prompt in zip(prompts, images, strict=True):
            counts = num_tokens[first : first + len(of_prompt)]
            rows.append(self._expand(self.tokenize(prompt), counts))
            first += len(of_prompt)
        return VLMInputs.from_ids(*self.pad(rows), self.tokens, pixel_values, grids, self.own_turn)

    def tokenize(self, prompt: str | Sequence[str]) -> list[int]:
        """The ids of a prompt, one pad token an image; pieces are tokenized one by one."""
        pieces = [prompt] if isinstance(prompt, str) else prompt
        return [token for piece in pieces for token in self.tokenizer(piece, add_special_tokens=False).input_ids]

    def decode(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True)

    def pad(self, rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        """input_ids and attention_mask, [B, L] int64, of prompts of unequal length."""
        length = max(map(len, rows))
        input_ids = torch.full((len(rows), length), self.tokens.pad)
        attention_mask = torch.zeros_like(input_ids)
        for i, row in enumerate(rows):
            columns = slice(0, len(row)) if self.padding_side == "right" else slice(length - len(row), length)
            input_ids[i, columns] = torch.tensor(row)
            attention_mask[i, columns] = 1
        return input_ids, attention_mask

    def _expand(self, ids: list[int], counts: list[int]) -> list[int]:
        num_places = ids.count(self.tokens.image_pad)
        if num_places != len(counts):
            raise ValueError(f"images: {len(counts)} given, the prompt has places for {num_places}")
        remaining, row = iter(counts), []
        for token in ids:
            row += [token] * next(remaining) if token == self.tokens.image_pad else [token]
        if len(row) > self.max_tokens:
            raise ValueError(f"prompt: {len(row)} tokens with its images, at most {self.max_tokens} are allowed")
        return row
