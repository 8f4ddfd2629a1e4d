"""From samples to a batch: pictures decoded and resized, prompts tokenized, region weights, padding on the left."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from uniworld.config import DataConfig
from uniworld.data.bad import SampleError
from uniworld.data.batch import TrainBatch
from uniworld.data.buckets import WHOLE, Box, bucket_of, centre_box, cropped, stretched, target_tensor
from uniworld.data.masks import LATENT_PX, focus_weight, region_mask, region_weight
from uniworld.data.samples import Picture, Sample
from uniworld.models.prompts import PromptProcessor, VLMInputs, training_pieces
from uniworld.models.vision_processor import TRAINING_FACTOR, VisionProcessor

SiglipPreprocess = Callable[[list[Image.Image]], Tensor]


@dataclass(frozen=True, kw_only=True)
class PreparedSample:
    """A sample of a batch to be.

    inputs: the VLM's view of it alone. siglip_pixels: [n, 3, S, S] fp32 or None. target: [3, H, W] fp32 in [-1, 1].
    region_weight: [1, H / 8, W / 8] fp32, or None for ones.
    """

    id: str
    inputs: VLMInputs
    siglip_pixels: Tensor | None
    instruction: str
    target: Tensor
    region_weight: Tensor | None


def training_processor(processor: PromptProcessor, config: DataConfig) -> PromptProcessor:
    """The prompt processor of training: padding on the left, pictures of area `vlm_max_px` in steps of 56 pixels."""
    vision = VisionProcessor(
        processor.vision.config,
        min_pixels=config.vlm_max_px,
        max_pixels=config.vlm_max_px,
        factor=TRAINING_FACTOR,
    )
    limits = {"max_tokens": processor.max_tokens, "own_turn": processor.own_turn}
    return PromptProcessor(processor.tokenizer, vision, padding_side="left", **limits)


class Collator:
    """Makes batches of samples.

    Args:
        processor: any prompt processor of the model; its tokenizer and picture settings are taken.
        siglip_preprocess: the semantic encoder's view of pictures, or None where it is not used.
    """

    def __init__(
        self, config: DataConfig, processor: PromptProcessor, siglip_preprocess: SiglipPreprocess | None = None
    ):
        self.config, self.siglip_preprocess = config, siglip_preprocess
        self.processor = training_processor(processor, config)

    def prepare(self, sample: Sample, bucket: tuple[int, int] | None = None) -> PreparedSample:
        """Decode and convert one sample.

        Args:
            bucket: the target size (height, width) that was planned; by default the target's own bucket.

        Raises: SampleError naming the path and the reason.
        """
        target = read_picture(sample.target)
        references = [read_picture(picture) for picture in sample.references]
        own = bucket_of(target.height, target.width, self.config)
        bucket = bucket or own
        if own != bucket:
            raise SampleError(
                sample.target.name,
                f"is {target.width}x{target.height} and belongs to the bucket {own[1]}x{own[0]}, "
                f"its header said {bucket[1]}x{bucket[0]}",
            )
        try:
            inputs = self.processor.encode([training_pieces(sample.conversations)], [references])
            box = fitted_box(target, bucket, self.config)
            target, *references_beside = fitted([target, *references], bucket, self.config)
            return PreparedSample(
                id=sample.id,
                inputs=inputs,
                siglip_pixels=self.siglip_preprocess(references) if references and self.siglip_preprocess else None,
                instruction=sample.instruction,
                target=target_tensor(target, bucket),
                region_weight=self._weight(sample, references_beside, target, bucket, box),
            )
        except Exception as error:  # whatever a picture or a text can do; over a share of them the run stops
            raise SampleError.of(sample.target.name, error) from error

    def _weight(
        self, sample: Sample, references: list[Image.Image], target: Image.Image, bucket: tuple[int, int], box: Box
    ) -> Tensor | None:
        """[1, h, w] at the target's latent size, or None where every latent weighs 1. box: the part of the target that
        is trained on, to which `focus` is moved."""
        left, upper, right, lower = box
        width, height = right - left, lower - upper
        focus = [
            ((x0 - left) / width, (y0 - upper) / height, (x1 - left) / width, (y1 - upper) / height)
            for x0, y0, x1, y1 in sample.focus
        ]
        weight = focus_weight(focus, (bucket[0] // LATENT_PX, bucket[1] // LATENT_PX), self.config.focus_weight)
        if self.config.region_weight != "none" and references and sample.need_weight:
            mask = latent_mask(references, target, bucket, self.config)
            weight = np.maximum(weight, region_weight(mask, self.config.region_weight))
        return None if (weight == 1).all() else torch.from_numpy(weight)[None]

    def collate(self, samples: Sequence[PreparedSample]) -> TrainBatch:
        """Join samples whose targets have one size."""
        inputs = [sample.inputs for sample in samples]
        rows = [one.input_ids[0].tolist() for one in inputs]
        with_pictures = [one for one in inputs if one.pixel_values is not None]
        siglip = [sample.siglip_pixels for sample in samples if sample.siglip_pixels is not None]
        weights = [sample.region_weight for sample in samples]
        if all(weight is None for weight in weights):
            region_weights = None
        else:
            H, W = samples[0].target.shape[1:]
            ones = torch.ones(1, H // 8, W // 8)
            region_weights = torch.stack([ones if weight is None else weight for weight in weights])
        return TrainBatch(
            inputs=VLMInputs.from_ids(
                *self.processor.pad(rows),
                self.processor.tokens,
                torch.cat([one.pixel_values for one in with_pictures]) if with_pictures else None,
                torch.cat([one.image_grid_thw for one in with_pictures]) if with_pictures else None,
                self.processor.own_turn,
            ),
            siglip_pixels=torch.cat(siglip) if siglip else None,
            instructions=tuple(sample.instruction for sample in samples),
            target=torch.stack([sample.target for sample in samples]),
            region_weight=region_weights,
            sample_ids=tuple(sample.id for sample in samples),
        )


def fitted(images: Sequence[Image.Image], bucket: tuple[int, int], config: DataConfig) -> list[Image.Image]:
    """The part of the target, which comes first, that is trained on, and the same part of its references."""
    box = fitted_box(images[0], bucket, config)
    return [cropped(image, box) for image in images]


def fitted_box(target: Image.Image, bucket: tuple[int, int], config: DataConfig) -> Box:
    """Which part of the target is trained on."""
    return centre_box(target.height, target.width, bucket) if config.target_fit == "crop" else WHOLE


def latent_mask(
    references: Sequence[Image.Image], target: Image.Image, bucket: tuple[int, int], config: DataConfig
) -> np.ndarray:
    """The edited latent pixels of `fitted` pictures at the bucket's size, uint8 [H / 8, W / 8] of 0 and 255."""
    return region_mask(
        [stretched(image, bucket) for image in references],
        stretched(target, bucket),
        keep_scattered=config.keep_scattered,
    )


def read_picture(picture: Picture) -> Image.Image:
    try:
        return picture.read()
    except Exception as error:
        raise SampleError.of(picture.name, error) from error
