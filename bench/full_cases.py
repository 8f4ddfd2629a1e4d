"""What the full-scale bench runs: cases, sides, and the inputs of one step."""

from dataclasses import dataclass, field

import torch
from full_model import FULL_SIZE, SMALL_SIZE, TINY_SIZE, Size
from PIL import Image
from torch import Tensor

from uniworld.models import flow
from uniworld.models.flux import FluxConfig

NUM_WORDS, NUM_REFERENCE = 316, 1260  # tokens of T5 and of the VLM's words; of a reference picture, 1,024 of SigLIP
TASKS = {0: "text to image", 1: "edit", 2: "edit of two pictures"}


@dataclass(frozen=True)
class Case:
    """A picture size drawn from text alone or as an edit of references, some of them at a time."""

    num_references: int
    size_px: int
    batch: int = 1
    shrink: int = 1  # divides the text lengths, for a dry run
    unequal: bool = False  # the texts of a batch have lengths from half of it up

    @property
    def num_img(self) -> int:
        return (self.size_px // flow.TOKEN_PX) ** 2

    @property
    def num_txt(self) -> int:
        return (NUM_WORDS + NUM_REFERENCE * self.num_references) // self.shrink

    @property
    def num_tokens(self) -> int:
        """Tokens a sample that the DiT attends to."""
        return self.num_img + self.num_txt

    @property
    def txt_lengths(self) -> tuple[int, ...]:
        """Text tokens of every sample of the batch."""
        if not self.unequal:
            return (self.num_txt,) * self.batch
        return tuple(self.num_txt * (self.batch + 1 + i) // (2 * self.batch) for i in range(self.batch))

    @property
    def flops(self) -> float:
        """Of one forward of FLUX.1-dev, linear and attention terms of all blocks; none of padding."""
        lengths = [self.num_img + length for length in self.txt_lengths]
        return sum(1.291e10 * length + 7.004e5 * length**2 for length in lengths)

    def __str__(self) -> str:
        batch = f", batch {self.batch}" if self.batch > 1 else ""
        return f"{TASKS[self.num_references]}, {self.size_px} px{batch}{' of unequal lengths' if self.unequal else ''}"


@dataclass(frozen=True)
class Scale:
    """Everything that differs between the bench and its dry run."""

    bench: str
    size: Size
    sides_px: tuple[int, ...]
    batches: tuple[int, ...]
    num_steps: int
    overhead_steps: int
    shrink: int = 1
    gemm: int = 8192
    request_cases: tuple[Case, ...] = field(init=False)
    step_cases: tuple[Case, ...] = field(init=False)
    served_cases: tuple[Case, ...] = field(init=False)

    def __post_init__(self):
        """The most wanted cases first: a run that is cut off leaves those."""
        one, many = [], []
        for px in self.sides_px:
            one += [Case(refs, px, 1, self.shrink) for refs in (1, 0)]
        two = [Case(2, px, 1, self.shrink) for px in self.sides_px]
        for px in reversed(self.sides_px):
            many += [Case(refs, px, batch, self.shrink) for refs in (1, 0) for batch in self.batches]
        unequal = [Case(1, px, self.batches[0], self.shrink, unequal=True) for px in self.sides_px if self.batches]
        many += unequal
        object.__setattr__(self, "request_cases", (*one, two[0]))
        object.__setattr__(self, "step_cases", (*one, *two, *many))
        object.__setattr__(self, "served_cases", tuple(unequal[-1:]))


FULL = Scale("full_scale", FULL_SIZE, sides_px=(1024, 512), batches=(4, 8), num_steps=28, overhead_steps=8)
SMALL = Scale("cold_start", SMALL_SIZE, sides_px=(256,), batches=(), num_steps=4, overhead_steps=2)
TOY = Scale("full_scale_dry_run", TINY_SIZE, (128,), batches=(2,), num_steps=4, overhead_steps=2, shrink=16, gemm=256)


def step_inputs(case: Case, config: FluxConfig, dtype: torch.dtype, device: str) -> dict[str, Tensor]:
    """Inputs of one prediction. diffusers rounds 1000 times timestep and guidance to bf16; these are exact in it."""
    generator = torch.Generator().manual_seed(case.num_tokens)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).bfloat16().to(device, dtype)

    return {
        "img": normal(case.batch, case.num_img, config.in_channels),
        "txt": normal(case.batch, case.num_txt, config.joint_attention_dim),
        "pooled": normal(case.batch, config.pooled_projection_dim),
        "timestep": torch.full((case.batch,), 0.5, device=device, dtype=dtype),
        "guidance": torch.full((case.batch,), 4.0, device=device, dtype=dtype),
        "img_ids": flow.image_ids(case.size_px, case.size_px, device),
    }


def noise_pictures(num: int) -> list[Image.Image]:
    """Reference pictures of 512 px."""
    generator = torch.Generator().manual_seed(0)
    return [
        Image.fromarray(torch.randint(0, 256, (512, 512, 3), dtype=torch.uint8, generator=generator).numpy())
        for _ in range(num)
    ]
