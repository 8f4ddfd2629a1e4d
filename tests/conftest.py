"""Shared fixtures. Triton kernels run through the interpreter here unless a GPU is present."""

import os

import pytest
import torch

# Before any kernel is decorated: the interpreter is chosen when `triton.jit` is applied.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

MAX_WORKERS = 8
if "PYTEST_XDIST_WORKER" in os.environ:  # processes share the cores: one thread in each, and in what it starts
    os.environ |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
    torch.set_num_threads(1)
else:
    torch.set_num_threads(min(2, os.cpu_count() or 1))

SLOW_TIMEOUT_S = 1200  # a fixture with many runs counts for the first test that uses it


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config):
    """What `-n auto` means: a process a core, hyperthreads too; none beside this one where there is a GPU to share."""
    return 0 if torch.cuda.is_available() else min(MAX_WORKERS, len(os.sched_getaffinity(0)))


def pytest_collection_modifyitems(items):
    for item in items:
        if item.get_closest_marker("slow"):
            item.add_marker(pytest.mark.timeout(SLOW_TIMEOUT_S))


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    """Tokenizers of `tiny`, for a test's own parts of it."""
    from parts_of_tiny import make_words

    return make_words(tmp_path_factory.mktemp("words") / "words")


@pytest.fixture(scope="module")
def language(words, tmp_path_factory):
    """A vision-language part that has hardly learned, its losses, and the batch that it learned from."""
    from parts_of_tiny import make_language

    return make_language(words, tmp_path_factory.mktemp("vlm"))


@pytest.fixture(scope="module")
def parts(language, tmp_path_factory):
    """A folder of parts of `tiny` that the later ones build on."""
    from parts_of_tiny import make_parts

    return make_parts(language, tmp_path_factory.mktemp("parts"))
