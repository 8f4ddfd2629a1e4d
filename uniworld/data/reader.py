"""What worker processes do: planned batches of samples become tensors, bad samples are told."""

import os
import signal
import threading
from collections import Counter
from dataclasses import dataclass

import cv2
import numpy as np
from torch.utils.data import Dataset as TorchDataset

from uniworld.config import TrainConfig
from uniworld.data.bad import BadSample, SampleError
from uniworld.data.batch import TrainBatch
from uniworld.data.collate import Collator
from uniworld.data.dataset import Dataset

DROP_PROMPT = 2  # kind of random draw; plan.py has 0 and 1


@dataclass(frozen=True)
class Loaded:
    """What became of a planned batch; `batch` is None where every sample was bad."""

    batch: TrainBatch | None
    num_read: dict[str, int]
    bad: list[BadSample]


class Reader(TorchDataset):
    """Makes `Loaded` of the items of a planned batch; runs in the worker processes."""

    def __init__(self, config: TrainConfig):
        self.seed, self.drop_prompt_rate = config.seed, config.data.drop_prompt_rate

    def drops_prompt(self, number: int, round: int) -> bool:
        """Whether a sample is seen without its words in this pass."""
        return np.random.default_rng((self.seed, DROP_PROMPT, number, round)).random() < self.drop_prompt_rate


class BatchReader(Reader):
    """Reads and converts the samples.

    Args:
        bucket_sizes: (height, width) of each bucket number; buckets: [N], bucket number of each sample.
    """

    def __init__(
        self,
        dataset: Dataset,
        collator: Collator,
        buckets: np.ndarray,
        bucket_sizes: list[tuple[int, int]],
        config: TrainConfig,
    ):
        super().__init__(config)
        self.dataset, self.collator = dataset, collator
        self.buckets, self.bucket_sizes = buckets, bucket_sizes

    def __getitem__(self, items: tuple[tuple[int, int], ...]) -> Loaded:
        prepared, bad, num_read = [], [], Counter()
        for number, round in items:
            num_read[self.dataset.locate(number)[0].name] += 1
            try:
                sample = self.dataset[number]
                if self.drops_prompt(number, round):
                    sample = sample.without_prompt()
                prepared.append(self.collator.prepare(sample, self.bucket_sizes[self.buckets[number]]))
            except SampleError as error:
                bad.append(self.dataset.bad_sample(number, error))
        return Loaded(self.collator.collate(prepared) if prepared else None, dict(num_read), bad)


def prepare_to_fork() -> None:
    """Call before worker processes are forked: they hang in thread pools that the fork has left without threads."""
    cv2.setNumThreads(1)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def init_worker(_: int) -> None:
    """Let only the trainer stop its workers: when a whole job gets a signal, it may want some batches yet."""
    for number in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
    threading.Thread(target=_stop_when_told_by_parent, daemon=True).start()


def _stop_when_told_by_parent() -> None:
    while signal.sigwaitinfo([signal.SIGTERM]).si_pid != os.getppid():
        pass
    os._exit(0)
