"""What every sample costs before it is read: its target's bucket, and its tokens in the DiT.

Letters: N samples.
"""

import numpy as np

from uniworld.config import TrainConfig
from uniworld.data.buckets import bucket_of
from uniworld.data.dataset import Dataset, SampleIndex
from uniworld.models.prompts import PromptProcessor, training_pieces

NUM_TEXTS = 256  # of a source, tokenized to learn how many tokens a byte makes


def sort_into_buckets(index: SampleIndex, config: TrainConfig) -> tuple[np.ndarray, list[tuple[int, int]]]:
    """The bucket number of each sample, int64 [N] (-1 where unusable), and each bucket's (height, width)."""
    sizes, inverse = np.unique(index.rows[:, :2], axis=0, return_inverse=True)
    buckets_of_sizes = [bucket_of(h, w, config.data) if h > 0 else (0, 0) for h, w in sizes.tolist()]
    numbers = {size: number for number, size in enumerate(sorted(set(buckets_of_sizes) - {(0, 0)}))}
    of_sizes = np.array([numbers.get(size, -1) for size in buckets_of_sizes], np.int64)
    return of_sizes[inverse.reshape(-1)], list(numbers)


def estimate_tokens(
    dataset: Dataset,
    index: SampleIndex,
    processor: PromptProcessor,
    buckets: np.ndarray,
    sizes: list[tuple[int, int]],
    siglip_tokens: int,
) -> np.ndarray:
    """Tokens of each sample in the DiT, [N]: target, references and prompt, the prompt by its bytes."""
    target_tokens = np.array([height * width // 256 for height, width in sizes])[buckets]
    vision = processor.vision
    vlm_tokens = vision.max_pixels // (vision.patch_size * vision.merge_size) ** 2
    text_tokens = np.zeros(len(dataset))
    for part, start in zip(dataset.parts, dataset.starts.tolist()):
        rows = index.rows[start : start + len(part)]
        usable = np.flatnonzero(rows[:, 0] > 0)
        chosen = usable[:: max(1, len(usable) // NUM_TEXTS)]
        counted = [
            len(processor.tokenize(training_pieces(part[number].conversations))) for number in chosen.tolist()
        ]
        text_tokens[start : start + len(part)] = _fit(rows[chosen, 3], np.array(counted), rows[:, 3])
    num_references = index.rows[:, 2]
    return target_tokens + text_tokens + num_references * (vlm_tokens + siglip_tokens)


def _fit(num_bytes: np.ndarray, num_tokens: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Tokens of texts of `wanted` bytes, by a straight line through the counted ones."""
    if not len(num_bytes):
        return np.zeros(len(wanted))
    x, y = num_bytes - num_bytes.mean(), num_tokens - num_tokens.mean()
    slope = max(0.0, float((x * y).sum() / max(1.0, (x * x).sum())))
    return np.maximum(1.0, num_tokens.mean() + slope * (wanted - num_bytes.mean()))
