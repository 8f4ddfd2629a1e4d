"""Looks at every sample as training would: annotations, pictures, sizes, masks. `uniworld check-data` runs it."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from PIL import Image
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from uniworld.config import DataConfig
from uniworld.data.bad import BadSample, SampleError
from uniworld.data.buckets import bucket_of, stretched
from uniworld.data.collate import fitted, latent_mask, read_picture
from uniworld.data.dataset import Dataset
from uniworld.data.masks import region_mask_reference, region_weight
from uniworld.data.reader import prepare_to_fork
from uniworld.data.samples import Sample
from uniworld.models.vision_processor import TRAINING_FACTOR, smart_resize

NUM_ERRORS_KEPT = 1000  # a source, for reports; all are counted


@dataclass(frozen=True, kw_only=True)
class CheckedSample:
    """What is known of a sample, or why it cannot be used.

    edited_share: of the latent pixels, None where nothing is weighted. weight: of those in the loss.
    """

    number: int
    bad: BadSample | None = None
    bucket: tuple[int, int] = (0, 0)
    num_references: int = 0
    edited_share: float | None = None
    weight: float = 1.0


@dataclass
class SourceReport:
    """Counts of one source (a line of a `data.txt`, a set of shards, a table)."""

    name: str
    num_samples: int
    num_checked: int = 0
    num_errors: int = 0
    references: Counter[int] = field(default_factory=Counter)
    buckets: Counter[tuple[int, int]] = field(default_factory=Counter)
    edited_shares: list[float] = field(default_factory=list)
    num_unchanged: int = 0
    """Pairs without an edited region, such as equal pictures or many small edits: every latent weighs 1."""
    errors: list[BadSample] = field(default_factory=list)

    def add(self, checked: CheckedSample) -> None:
        self.num_checked += 1
        if checked.bad is not None:
            self.num_errors += 1
            if len(self.errors) < NUM_ERRORS_KEPT:
                self.errors.append(checked.bad)
            return
        self.references[checked.num_references] += 1
        self.buckets[checked.bucket] += 1
        if checked.edited_share is not None:
            self.edited_shares.append(checked.edited_share)
            self.num_unchanged += checked.edited_share == 0

    @property
    def median_edited_share(self) -> float | None:
        return float(np.median(self.edited_shares)) if self.edited_shares else None


@dataclass(frozen=True)
class View:
    """A sample as training sees it: pictures at the target's size, and its mask.

    mask: uint8 [H / 8, W / 8] of 0 and 255, None where nothing is weighted. unchanged: the mask is full because no
    edited region was found.
    """

    references: list[Image.Image]
    target: Image.Image
    bucket: tuple[int, int]
    mask: np.ndarray | None
    weight: float
    unchanged: bool


def view(sample: Sample, config: DataConfig) -> View:
    """Decode a sample and compare its pictures. Raises SampleError."""
    target = read_picture(sample.target)
    references = [read_picture(picture) for picture in sample.references]
    bucket = bucket_of(target.height, target.width, config)
    for picture, image in zip(sample.references, references):
        try:
            smart_resize(image.height, image.width, TRAINING_FACTOR, config.vlm_max_px, config.vlm_max_px)
        except ValueError as error:
            raise SampleError.of(picture.name, error) from error
    mask, weight, unchanged = None, 1.0, False
    if references and sample.need_weight and config.region_weight != "none":
        try:
            target_part, *reference_parts = fitted([target, *references], bucket, config)
            mask = latent_mask(reference_parts, target_part, bucket, config)
        except Exception as error:  # whatever a picture can do
            raise SampleError.of(sample.target.name, error) from error
        weight = float(region_weight(mask, config.region_weight).max())
        unchanged = bool(mask.all()) and _num_edited(reference_parts, target_part, bucket, config) == 0
    return View(references, target, bucket, mask, weight, unchanged)


def _num_edited(
    references: Sequence[Image.Image], target: Image.Image, bucket: tuple[int, int], config: DataConfig
) -> int:
    """Pixels that a full mask comes from: 0 means that no region was found."""
    at_size = [stretched(image, bucket) for image in references]
    return region_mask_reference(at_size, stretched(target, bucket), config.keep_scattered)[1]


class _Checker(TorchDataset):
    def __init__(self, dataset: Dataset, config: DataConfig):
        self.dataset, self.config = dataset, config

    def __getitem__(self, number: int) -> CheckedSample:
        try:
            seen = view(self.dataset[number], self.config)
        except SampleError as error:
            return CheckedSample(number=number, bad=self.dataset.bad_sample(number, error))
        share = None
        if seen.mask is not None:
            share = 0.0 if seen.unchanged else float((seen.mask != 0).mean())
        return CheckedSample(
            number=number,
            bucket=seen.bucket,
            num_references=len(seen.references),
            edited_share=share,
            weight=seen.weight,
        )


def check(
    dataset: Dataset,
    config: DataConfig,
    *,
    limit: int | None = None,
    num_workers: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> list[SourceReport]:
    """One report a source.

    Args:
        limit: look at this many samples of each source, evenly spaced; None looks at all.
        progress: called with (samples looked at, samples to look at).
    """
    numbers = [number for part in range(len(dataset.parts)) for number in spaced(dataset, part, limit)]
    reports = [SourceReport(source.name, len(source)) for source in dataset.parts]
    for done, checked in enumerate(_results(_Checker(dataset, config), numbers, num_workers), 1):
        reports[int(np.searchsorted(dataset.starts, checked.number, side="right")) - 1].add(checked)
        if progress is not None:
            progress(done, len(numbers))
    return reports


def spaced(dataset: Dataset, part: int, limit: int | None) -> list[int]:
    """Numbers of samples of a part, at most `limit`, from its first on at even distances."""
    first, end = dataset.starts[part : part + 2].tolist()
    num_samples = end - first
    if limit is None or limit >= num_samples:
        return list(range(first, end))
    return [first + i * num_samples // limit for i in range(limit)]


def _results(checker: _Checker, numbers: list[int], num_workers: int) -> Iterator[CheckedSample]:
    if num_workers:
        prepare_to_fork()
    yield from DataLoader(
        checker,
        batch_size=None,
        sampler=numbers,
        num_workers=num_workers,
        collate_fn=_unchanged,
        multiprocessing_context="fork" if num_workers else None,
    )


def _unchanged(checked: CheckedSample) -> CheckedSample:
    return checked
