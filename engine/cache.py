"""A least-recently-used store of conditionings, bounded by the bytes they hold."""

from collections import OrderedDict
from collections.abc import Hashable

from uniworld.models.conditioning import Conditioning


class ConditioningCache:
    """Maps a request's words and pictures to its conditioning, so that a second seed costs no encoder pass."""

    def __init__(self, max_bytes: int = 512 * 2**20):
        self.max_bytes = max_bytes
        self.num_bytes = 0
        self._entries: OrderedDict[Hashable, Conditioning] = OrderedDict()

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, key: Hashable) -> Conditioning | None:
        if key not in self._entries:
            return None
        self._entries.move_to_end(key)
        return self._entries[key]

    def put(self, key: Hashable, value: Conditioning) -> None:
        size = _num_bytes(value)
        if size > self.max_bytes:
            return
        if key in self._entries:
            self.num_bytes -= _num_bytes(self._entries.pop(key))
        self._entries[key] = value
        self.num_bytes += size
        while self.num_bytes > self.max_bytes:
            _, dropped = self._entries.popitem(last=False)
            self.num_bytes -= _num_bytes(dropped)


def _num_bytes(value: Conditioning) -> int:
    return value.txt.nbytes + value.pooled.nbytes
