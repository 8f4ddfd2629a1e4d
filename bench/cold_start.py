"""From the start of a process to its first picture, weights in the page cache: an edit by the full-size model.

The first process finds no kernel of Triton's compiled, as after an installation; those after it find them all. Of these
some encode the prompt and its picture while the DiT's weights are read, as the command line does, and others after it.

A checkpoint of random weights is written to the disk first, 48 GiB of it, or 39 without T5 where there is less room; on
a CPU one of a small model. `bench/gpu.sh` has it among its last sections. `UNIWORLD_BENCH_SIZE=tiny` is a dry run.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import pytest
import torch
from deadline import Deadline
from full_cases import FULL, SMALL, TOY, Case, noise_pictures
from full_model import random_uniworld, write_tokenizers
from full_requests import PROMPT, parts
from peers import MISSING
from residents import free, own_bytes
from timing import Samples
from torch import nn

pytest.importorskip("diffusers", reason=f"{MISSING}; the VAE needs it")

from uniworld.checkpoint import tiny_configs
from uniworld.checkpoint.save import save_module, save_uniworld, with_prefix, write_json
from uniworld.models.unified import UniWorld

CUDA = torch.cuda.is_available()
SCALE = TOY if os.environ.get("UNIWORLD_BENCH_SIZE") == "tiny" else FULL if CUDA else SMALL
DEVICE, DTYPE = ("cuda" if CUDA else "cpu"), (torch.bfloat16 if CUDA else torch.float32)
CASE = SCALE.request_cases[0]
MAX_ROUNDS = 9  # of both ways; as many as the time allows, and one at least
SPARE_BYTES = 2 * 2**30
VAE_STEM = "diffusion_pytorch_model"
# What the new process runs: it prints seconds of its imports, of loading and of the request.
DRAW = """
import json, sys, time
start = time.perf_counter()
from uniworld.engine import Engine, Request
from uniworld.models.images import read_image
imported = time.perf_counter()
given = json.loads(sys.argv[1])
pictures = tuple(read_image(path) for path in given["pictures"])
first = Request(prompt=given["prompt"], images=pictures, **given["settings"]) if given["meanwhile"] else None
where = {"device": given["device"], "dtype": given["dtype"]}
engine = Engine.from_pretrained(given["model"], **where, progress=False, first_request=first)
loaded = time.perf_counter()
engine.edit(pictures, given["prompt"], **given["settings"]).images[0].save(given["out"])
print(json.dumps({"import": imported - start, "load": loaded - imported, "draw": time.perf_counter() - loaded}))
"""

FIRST, DURING, AFTER = SIDES = "ours, nothing compiled yet", "ours", "ours, encoding after loading"


@pytest.fixture(scope="module")
def measured() -> tuple[dict[str, "Draws"], dict] | str:
    """What each side took and what goes with all of them; or why there is nothing."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        model = random_uniworld(SCALE.size, DEVICE, DTYPE, use_t5=SCALE is not SMALL)  # which has no T5 that fits
        if own_bytes(*parts(model), model.denoiser) + SPARE_BYTES > shutil.disk_usage(folder).free:
            model.text_encoders.t5 = model.text_encoders.t5_tokenizer = None
        num_bytes, has_t5 = own_bytes(*parts(model), model.denoiser), model.text_encoders.has_t5
        if num_bytes + SPARE_BYTES > shutil.disk_usage(folder).free:
            return f"{folder} has no room for {num_bytes / 2**30:.0f} GiB of weights"
        write_checkpoint(model, folder / "model")
        del model
        free()
        drawn = first_pictures(folder)
    return drawn, {"weights_gib": num_bytes / 2**30, "t5": has_t5, "steps": SCALE.num_steps}


@pytest.mark.parametrize("side", SIDES)
def test_cold_start(side, measured, report, report_missing):
    name = f"cold start, {CASE}"
    if isinstance(measured, str):
        report_missing(SCALE.bench, name, side, DTYPE, measured)
        pytest.skip(measured)
    drawn, more = measured
    report(SCALE.bench, name, side, DTYPE, drawn[side].whole, parts_s=drawn[side].parts_s, **more)


def write_checkpoint(model: UniWorld, folder: Path) -> None:
    """The whole model in the authors' layout, with `flux/` and `siglip/` in its folder."""
    texts, vae, siglip = model.text_encoders, model.vae.model, model.semantic_encoder
    with tempfile.TemporaryDirectory() as temporary:
        made = Path(temporary)
        write_tokenizers(made)
        write_json(made / "qwen" / "preprocessor_config.json", tiny_configs.PREPROCESSOR)
        model.folder = made / "qwen"
        save_uniworld(model, folder)
        flux = folder / "flux"
        shutil.copytree(made / "clip", flux / "tokenizer")
        if texts.has_t5:
            shutil.copytree(made / "t5", flux / "tokenizer_2")
    write_json(flux / "model_index.json", tiny_configs.MODEL_INDEX)
    (flux / "scheduler").mkdir()
    write_json(flux / "scheduler" / "scheduler_config.json", tiny_configs.SCHEDULER)
    save_module(flux / "text_encoder", named(texts.clip, "text_model."), texts.clip.config.to_dict())
    if texts.has_t5:
        save_module(flux / "text_encoder_2", named(texts.t5), texts.t5.config.to_dict())
    save_module(flux / "vae", named(vae), dict(vae.config), stem=VAE_STEM)
    save_module(folder / "siglip", named(siglip.model, "vision_model."), siglip.model.config.to_dict())
    write_json(folder / "siglip" / "preprocessor_config.json", siglip.preprocessor)


def named(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    for name, parameter in module.named_parameters():
        yield with_prefix(name, prefix), parameter.detach()


@dataclass
class Draws:
    """Seconds from the start of a process until its picture is written and it has ended; and of its parts."""

    whole: Samples = field(default_factory=lambda: Samples("wall clock of a process"))
    parts: list[dict[str, float]] = field(default_factory=list)

    @property
    def parts_s(self) -> dict[str, float]:
        """Medians of importing, of loading and of the request."""
        return {name: median(parts[name] for parts in self.parts) for name in self.parts[0]}


def first_pictures(folder: Path, case: Case = CASE) -> dict[str, Draws]:
    """What each of `SIDES` takes: a process that finds nothing compiled, then pairs of both ways as time allows."""
    noise_pictures(1)[0].save(folder / "reference.png")
    given = {"model": str(folder / "model"), "device": DEVICE, "dtype": str(DTYPE).removeprefix("torch.")}
    given |= {"pictures": [str(folder / "reference.png")], "prompt": PROMPT, "out": str(folder / "picture.png")}
    size = {"height": case.size_px, "width": case.size_px}
    given["settings"] = {**size, "num_inference_steps": SCALE.num_steps, "seed": 7}
    env, deadline = os.environ | {"TRITON_CACHE_DIR": str(folder / "triton")}, Deadline()
    drawn = {side: Draws() for side in SIDES}

    def draw(side: str) -> None:
        command = [sys.executable, "-c", DRAW, json.dumps(given | {"meanwhile": side != AFTER})]
        start = time.perf_counter()
        done = subprocess.run(command, capture_output=True, text=True, env=env)
        seconds = time.perf_counter() - start
        if done.returncode:
            raise RuntimeError(done.stderr[-2000:])
        drawn[side].whole.seconds.append(seconds)
        drawn[side].parts.append(json.loads(done.stdout.splitlines()[-1]))

    draw(FIRST)
    for i in range(MAX_ROUNDS):
        if i and deadline.left_s < 1.5 * sum(max(drawn[side].whole.seconds) for side in (DURING, AFTER)):
            break
        for side in (DURING, AFTER) if i % 2 == 0 else (AFTER, DURING):
            draw(side)
    return drawn
