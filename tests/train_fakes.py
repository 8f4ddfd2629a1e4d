"""What tests of the trainer run on: a small random model with encoder states, and a source of random pictures.

    python train_fakes.py train CONFIG...    is `uniworld train CONFIG...` on random pictures

Letters: B batch, L tokens.
"""

import json
import os
import signal
from dataclasses import dataclass

import torch
from PIL import Image

from uniworld.config import TrainConfig, from_dict
from uniworld.data.batch import TrainBatch
from uniworld.models.connectors import Connector
from uniworld.models.flux import FluxConfig, FluxTransformer
from uniworld.models.prompts import training_pieces
from uniworld.train.blocks import prepare_blocks
from uniworld.train.build import Batches
from uniworld.train.encode import Encoders
from uniworld.train.model import EncodedBatch, TrainModel
from uniworld.train.stages import freeze_except, inserts_siglip, trained_patterns

VLM, SIGLIP, JOINT, POOLED, CHANNELS, HEIGHT, WIDTH = 20, 12, 24, 8, 4, 4, 6
FLUX = FluxConfig(
    in_channels=4 * CHANNELS,
    num_layers=2,
    num_single_layers=2,
    attention_head_dim=16,
    num_attention_heads=2,
    joint_attention_dim=JOINT,
    pooled_projection_dim=POOLED,
    axes_dims_rope=(4, 6, 6),
)


def small_config(stage: str = "stage1", **sections: dict) -> TrainConfig:
    sections.setdefault("sharding", {"dtype": "fp32"})
    return from_dict(TrainConfig, {"stage": {"preset": stage}, **sections})


def small_model(config: TrainConfig) -> TrainModel:
    """The same random weights every time, fp32."""
    torch.manual_seed(0)
    model = TrainModel(FluxTransformer(FLUX), Connector(VLM, 36, JOINT), Connector(SIGLIP, 36, JOINT))
    freeze_except(model, trained_patterns(config.stage))
    prepare_blocks(model.denoiser, config.sharding)
    return model


def small_batch(
    config: TrainConfig, number: int, dtype: torch.dtype = torch.float32, *, size: int = 1, length: int = 9
) -> EncodedBatch:
    """Batch `number` of encoder states; the last sample is padded by a token where there are several."""
    generator = torch.Generator().manual_seed(number)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    mask = torch.ones(size, length, dtype=torch.int64)
    mask[1:, -1] = 0
    latents = (size, CHANNELS, HEIGHT, WIDTH)
    return EncodedBatch(
        vlm_states=random(size, length, VLM),
        attention_mask=mask,
        image_ends=((4,),) * size,
        siglip_states=random(size, 5, SIGLIP) if inserts_siglip(config.stage) else None,
        t5_states=None,
        pooled=random(size, POOLED),
        latent_mean=random(*latents),
        latent_std=random(*latents).abs(),
        region_weight=random(size, 1, HEIGHT, WIDTH).abs(),
    ).to(torch.device("cpu"), dtype)


@dataclass
class Report:
    count: int = 0


class RandomPictures:
    """An endless source of edits of random pictures, every rank its own; `next_number` is all its state.

    The environment variable TRAIN_FAKE says what happens at which batch, such as {"nan": [3, 4], "fail": [5],
    "signal": [6]}: pictures that are not finite, an error and a SIGTERM on the last rank.
    """

    def __init__(self, config, parts, rank, world_size):
        self.events = json.loads(os.environ.get("TRAIN_FAKE", "{}")) if rank == world_size - 1 else {}
        self.config, self.parts, self.rank, self.world_size, self.next_number = config, parts, rank, world_size, 0
        self.bad = Report()

    def __iter__(self):
        return self

    def __next__(self) -> TrainBatch:
        number, self.next_number = self.next_number, self.next_number + 1
        size, side = self.config.data.batch_size, int(self.config.data.anchor_px**0.5)
        if number in self.events.get("fail", ()):
            raise ValueError(f"batch {number} cannot be read")
        if number in self.events.get("signal", ()):
            os.kill(os.getpid(), signal.SIGTERM)
        scale = torch.nan if number in self.events.get("nan", ()) else 2.0
        generator = torch.Generator().manual_seed(number * self.world_size + self.rank)
        pixels = torch.randint(256, (size, 8, 8, 3), dtype=torch.uint8, generator=generator)
        pictures = [Image.fromarray(p.numpy()).resize((56, 56)) for p in pixels]
        words = [f"make it {number} times {'very ' * i}brighter" for i in range(size)]
        prompts = [
            training_pieces([{"from": "human", "value": f"<image>{w}"}, {"from": "gpt", "value": "<gen_image>"}])
            for w in words
        ]
        siglip = self.parts.semantic_encoder.preprocess(pictures) if inserts_siglip(self.config.stage) else None
        return TrainBatch(
            inputs=self.parts.processor.encode(prompts, [[p] for p in pictures]),
            siglip_pixels=siglip,
            instructions=tuple(words),
            target=torch.rand(size, 3, side, side, generator=generator) * scale - 1,
            region_weight=None,
            sample_ids=tuple(f"random:{number}:{i}" for i in range(size)),
        )

    def state_dict(self) -> dict:
        return {"next_number": self.next_number}

    def load_state_dict(self, state: dict) -> None:
        self.next_number = state["next_number"]


def open_random_pictures(config, parts, world, shown=False) -> Batches:
    """In place of `build.open_batches`."""
    source = RandomPictures(config, parts, world.rank, world.size)
    encoders = Encoders(parts, use_siglip=inserts_siglip(config.stage), use_t5=config.model.use_t5)
    return Batches(source, encoders.encode, lambda: source.bad.count)


if __name__ == "__main__":
    torch.set_num_threads(1)
    from uniworld import cli
    from uniworld.train import build

    build.check = lambda config: None
    build.open_batches = open_random_pictures
    cli.main()
