"""What travels through the engine, and which room fills which field.

    Request   made by the caller, never changed afterwards
    Job       made by `Engine.submit`; the conditioner, denoiser and decoder each fill their fields
    Result    made by `Engine.step` from a finished job
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import count
from numbers import Integral
from typing import Any, TypedDict

from PIL import Image
from torch import Tensor

from uniworld.models.conditioning import Conditioning
from uniworld.models.flow import TOKEN_PX
from uniworld.models.prompts import VLMInputs, check_text
from uniworld.models.unified import MAX_GUIDANCE, MAX_STEPS
from uniworld.models.vision_processor import MAX_ASPECT_RATIO

MAX_SIDE_PX = 4096
MAX_IMAGES = 8
CACHES = ("first_block", "taylor")
MAX_CACHE_ORDER = 3
_ids = count()


@dataclass(frozen=True)
class Turn:
    """One earlier message of a conversation: what was said, and the images shown or drawn in it."""

    role: str
    text: str
    images: tuple[Image.Image, ...] = ()


@dataclass(frozen=True)
class StepInfo:
    """Handed to `on_step` after each step; returning False from the callback cancels the request."""

    step: int
    num_inference_steps: int
    sigma: float
    latents: Tensor  # packed [1, L, C] fp32, this request's only


class DrawingSettings(TypedDict, total=False):
    """The optional fields of a `Request`, as `Engine.edit`, `generate`, `perceive` and `chat` take them."""

    height: int | None
    width: int | None
    num_inference_steps: int
    guidance_scale: float
    true_cfg_scale: float
    negative_prompt: str | None
    seed: int | None
    latents: Tensor | None
    use_t5: bool | None
    pooled_prompt: str | None
    vae_tiling: bool
    cache: str | None
    cache_threshold: float
    cache_interval: int
    cache_order: int
    on_step: Callable[["StepInfo"], bool | None] | None


@dataclass(frozen=True)
class StepCacheReport:
    """What step caching left out of one request, and how far off it may be.

    computed: of each step that ran, whether all blocks ran.
    changes: of each step a relative change, sum of |difference| over sum of |value|, the larger of two passes; None
        where there is nothing to compare. "first_block": of the first block's update since the last computed step, the
        number that the threshold is held against. "taylor": of what all blocks add, extrapolated against computed, so
        only at computed steps: an estimate of the error of the steps between them.
    """

    computed: tuple[bool, ...]
    changes: tuple[float | None, ...]

    @property
    def num_computed(self) -> int:
        return sum(self.computed)

    @property
    def num_saved(self) -> int:
        return len(self.computed) - self.num_computed


@dataclass(frozen=True, kw_only=True)
class Request:
    """One picture to draw. None means the default that the specification gives.

    num_inference_steps, guidance_scale: None takes the model's own, 28 and 3.5 where it names none.
    height, width: pixels, multiples of 16; None takes the nearest of 11 aspect ratios of the first reference image
    (square without one) at the model's area. true_cfg_scale above 1 runs a second pass with `negative_prompt`.
    use_t5: None uses T5 where it is loaded. pooled_prompt: text for CLIP; None is the prompt when T5 is used, else "".
    latents: packed initial noise [1, L, C] instead of the seed's. system: a system turn, none by default.
    cache: leave out blocks of some steps, faster and lossy: "first_block" where the first block's update has changed by
    less than cache_threshold (0: never) since the last computed step, "taylor" all but every cache_interval-th step,
    extrapolated by a polynomial of degree cache_order.
    """

    prompt: str
    images: Sequence[Image.Image] = ()
    history: Sequence[Turn] = ()
    system: str | None = None
    height: int | None = None
    width: int | None = None
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    true_cfg_scale: float = 1.0
    negative_prompt: str | None = None
    seed: int | None = None
    latents: Tensor | None = None
    use_t5: bool | None = None
    pooled_prompt: str | None = None
    vae_tiling: bool = False
    cache: str | None = None
    cache_threshold: float = 0.08
    cache_interval: int = 3
    cache_order: int = 1
    on_step: Callable[[StepInfo], bool | None] | None = None

    def __post_init__(self):
        if not isinstance(self.prompt, str):
            raise ValueError(f"prompt={self.prompt!r}: must be text")
        check_text("prompt", self.prompt)
        check_text("negative_prompt", self.negative_prompt or "")
        for name in ("num_inference_steps", "height", "width", "seed"):
            value = getattr(self, name)
            if not isinstance(value, Integral) and value is not None:
                raise ValueError(f"{name}={value!r}: must be a whole number")
        if self.num_inference_steps is not None and not 1 <= self.num_inference_steps <= MAX_STEPS:
            raise ValueError(f"num_inference_steps={self.num_inference_steps}: must be from 1 to {MAX_STEPS}")
        for name in ("height", "width"):
            check_side(name, getattr(self, name))
        if (self.height is None) != (self.width is None):
            raise ValueError(f"height={self.height}, width={self.width}: give both, or neither")
        if len(self.images) > MAX_IMAGES:
            raise ValueError(f"images: {len(self.images)} given, at most {MAX_IMAGES} are allowed")
        for i, image in enumerate(self.images):
            check_image(f"images[{i}]", image)
        if self.guidance_scale is not None and not 0 <= self.guidance_scale <= MAX_GUIDANCE:
            raise ValueError(f"guidance_scale={self.guidance_scale}: must be from 0 to {MAX_GUIDANCE}")
        if not 1 <= self.true_cfg_scale <= 100:
            raise ValueError(f"true_cfg_scale={self.true_cfg_scale}: must be from 1 (off) to 100")
        if self.negative_prompt is not None and self.true_cfg_scale == 1:
            raise ValueError("negative_prompt: only has an effect with true_cfg_scale above 1")
        if self.seed is not None and not 0 <= self.seed < 2**63:
            raise ValueError(f"seed={self.seed}: must be from 0 to 2**63 - 1")
        check_cache(self)

    @property
    def cache_settings(self) -> tuple | None:
        """The settings of step caching that count; None without it."""
        if self.cache == "taylor":
            return self.cache, self.cache_interval, self.cache_order
        return self.cache and (self.cache, self.cache_threshold)


def with_images_last(request: Request) -> Request:
    """The request with the pictures of the last turn that shows some behind its prompt, unless it has some there."""
    shown = [i for i, turn in enumerate(request.history) if turn.images]
    if request.images or not shown:
        return request
    history = list(request.history)
    last = history[shown[-1]]
    history[shown[-1]] = replace(last, images=())
    return replace(request, images=last.images, history=tuple(history))


def check_cache(request: Request) -> None:
    """Raise unless the settings of step caching are ones."""
    if request.cache not in (None, *CACHES):
        raise ValueError(f"cache={request.cache!r}: must be {' or '.join(CACHES)}, or None for no caching")
    if not 0 <= request.cache_threshold <= 1:
        raise ValueError(f"cache_threshold={request.cache_threshold}: must be from 0 (computes every step) to 1")
    for name, lowest, highest in (("cache_interval", 1, MAX_STEPS), ("cache_order", 0, MAX_CACHE_ORDER)):
        value = getattr(request, name)
        if not isinstance(value, Integral) or not lowest <= value <= highest:
            raise ValueError(f"{name}={value!r}: must be a whole number from {lowest} to {highest}")


def check_side(name: str, value: int | None) -> None:
    """Raise unless `value` is None or a side length the DiT can draw."""
    if value is None:
        return
    if value % TOKEN_PX or not TOKEN_PX <= value <= MAX_SIDE_PX:
        raise ValueError(f"{name}={value}: must be a multiple of {TOKEN_PX} from {TOKEN_PX} to {MAX_SIDE_PX}")


def check_image(name: str, image: Image.Image) -> None:
    """Raise unless `image` is a picture, and not too long and thin for the VLM."""
    if not isinstance(image, Image.Image):
        raise ValueError(f"{name}: must be a PIL image, got {type(image).__name__}; `read_image` opens files")
    if max(image.size) > MAX_ASPECT_RATIO * min(image.size):
        raise ValueError(
            f"{name}: {image.width}x{image.height} px, sides may differ at most by a factor of {MAX_ASPECT_RATIO}"
        )


@dataclass(kw_only=True)
class Job:
    """A request on its way. `height`, `width`, `seed` are the resolved ones."""

    request: Request
    height: int
    width: int
    seed: int
    inputs: VLMInputs  # conditioner, before queueing: a prompt that is too long is refused there
    negative_inputs: VLMInputs | None = None  # the same of the negative prompt, with true CFG only
    reading: Any = None  # conditioner, where the VLM's pass was made already (chat): its `Reading`
    id: int = field(default_factory=lambda: next(_ids))
    conditioning: Conditioning | None = None  # conditioner
    negative: Conditioning | None = None  # conditioner, with true CFG only
    latents: Tensor | None = None  # denoiser, packed [1, L, C] fp32
    graphs: str = ""  # denoiser
    step_cache: StepCacheReport | None = None  # denoiser, with step caching only
    image: Image.Image | None = None  # decoder
    cancelled: bool = False
    step_errors: list[Tensor] = field(default_factory=list)  # denoiser, where it measures them
    timings: dict[str, float] = field(default_factory=dict)  # seconds by room

    @property
    def batch_key(self) -> tuple:
        """Jobs with equal keys may share a batch."""
        request = self.request
        steps = request.num_inference_steps, request.true_cfg_scale, request.cache_settings
        return self.height, self.width, steps, request.vae_tiling


@dataclass(frozen=True, kw_only=True)
class Result:
    """A finished request. `images` is empty where it was cancelled. `timings` are seconds by room.

    graphs: whether steps were replayed as a CUDA graph: "graph", "graph, recorded for this shape" or "eager: " and why.
    step_cache: what step caching left out, where it was asked for.
    offload: what waits in host memory, "none" or a level, and why where it was chosen.
    step_errors: with `report_error`, ||v - v_exact|| / ||v_exact|| of each step: the velocity against that of all
        blocks of the unquantized DiT on the same latents. Else empty, or where neither quantization nor a cache is.
    """

    images: list[Image.Image]
    latents: Tensor | None
    timings: dict[str, float]
    seed: int
    height: int
    width: int
    num_inference_steps: int
    cancelled: bool = False
    graphs: str = ""
    step_cache: StepCacheReport | None = None
    offload: str = ""
    step_errors: list[float] = field(default_factory=list)


def draw_seed(seed: int | None) -> int:
    """The seed given, or a fresh one that the result reports."""
    return random.getrandbits(32) if seed is None else seed
