"""The queue in front of the engine: first come, first served, in batches of equal shape and steps."""

from collections import deque

from uniworld.engine.request import Job


class QueueFull(RuntimeError):
    """More requests wait than the engine admits; try again later."""


class Scheduler:
    def __init__(self, max_batch_size: int = 4, max_waiting: int = 256):
        if max_batch_size < 1:
            raise ValueError(f"max_batch_size={max_batch_size}: must be at least 1")
        self.max_batch_size = max_batch_size
        self.max_waiting = max_waiting
        self._waiting: deque[Job] = deque()

    def __len__(self) -> int:
        return len(self._waiting)

    def add(self, job: Job) -> None:
        if len(self._waiting) >= self.max_waiting:
            raise QueueFull(f"{self.max_waiting} requests are waiting already")
        self._waiting.append(job)

    def cancel(self, job_id: int) -> bool:
        """Drop a waiting job; False where none waits under this id (a running one is cancelled by its `on_step`)."""
        for job in self._waiting:
            if job.id == job_id:
                self._waiting.remove(job)
                return True
        return False

    def next_batch(self) -> list[Job]:
        """The oldest job and the following ones of equal `batch_key`, at most `max_batch_size`; empty when idle."""
        if not self._waiting:
            return []
        key = self._waiting[0].batch_key
        batch = [job for job in self._waiting if job.batch_key == key][: self.max_batch_size]
        taken = {job.id for job in batch}
        self._waiting = deque(job for job in self._waiting if job.id not in taken)
        return batch
