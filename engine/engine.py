"""The engine: sequences the rooms (scheduler, conditioner, denoiser, decoder) and nothing else."""

import os
import time
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from typing import Any, Unpack

import torch
from PIL import Image
from torch.distributed import ProcessGroup

from uniworld.checkpoint.precision import default_device
from uniworld.engine.cache import ConditioningCache
from uniworld.engine.chat import ChatReply, parse_messages
from uniworld.engine.compiled import compile_blocks, warm_up
from uniworld.engine.conditioner import Conditioner
from uniworld.engine.decoder import Decoder
from uniworld.engine.denoiser import Denoiser
from uniworld.engine.graphs import GraphSetting, graphs_for_engine
from uniworld.engine.loading import load_for_engine
from uniworld.engine.lora import LoraMethods
from uniworld.engine.offload import place, streamed_modules, turns_of
from uniworld.engine.offload_choice import OffloadChoice
from uniworld.engine.parallel import ParallelFlux
from uniworld.engine.request import DrawingSettings, Job, Request, Result, draw_seed, with_images_last
from uniworld.engine.scheduler import Scheduler
from uniworld.engine.step_errors import StepErrors
from uniworld.kernels.attention_backends import choose_backend
from uniworld.models.image_size import output_size
from uniworld.models.images import read_image
from uniworld.models.prompts import perception_prompt
from uniworld.models.unified import UniWorld

ImageLike = Image.Image | str | bytes | os.PathLike
CHAT_MODES = ("auto", "image", "text")


class Engine(LoraMethods):
    """Understands, generates, edits and perceives images with one UniWorld-V1 model.

    `edit`, `generate`, `perceive` and `chat` answer one request; `submit` and `step` serve many in batches.
    Not thread-safe: one thread owns an engine.
    """

    def __init__(
        self,
        model: UniWorld,
        *,
        attention: str = "auto",
        max_batch_size: int = 4,
        cuda_graphs: GraphSetting = "auto",
        compile: bool = False,
        sequence_parallel: ProcessGroup | None = None,
        offload: str | OffloadChoice | None = None,
        errors: StepErrors | None = None,
        conditionings: ConditioningCache | None = None,
        progress: bool = False,
    ):
        """Make an engine of a loaded model.

        Args:
            attention: a backend's name, or "auto" for the fastest exact one that this machine has.
            cuda_graphs: "auto" replays steps as CUDA graphs where that can be done, and `Result.graphs` says where not;
                True raises where there is no CUDA device or recording fails, False never records.
            compile, sequence_parallel: as for `from_pretrained`. progress: say on stderr how long compiling took.
            offload: a level as for `from_pretrained`; the model is then the engine's alone.
            errors: the measure of the steps' errors, which gives `Result.step_errors`.
            conditionings: what has been encoded already.
        """
        self.model = model
        self.offload = offload if isinstance(offload, OffloadChoice) else OffloadChoice(offload)
        level = self.offload.level
        self.decoder = Decoder(model.vae, model.device)
        self._parts = place(model, level)
        self._streamed = streamed_modules(turns_of(model.denoiser, level))
        head_dim = model.denoiser.config.attention_head_dim
        self.attention = choose_backend(attention, device=model.device, dtype=model.dtype, head_dim=head_dim)
        for denoiser in (model.denoiser, *([] if errors is None else [errors.exact])):
            denoiser.attention_backend = self.attention
        self.scheduler = Scheduler(max_batch_size)
        self._unclaimed: dict[int, Result] = {}  # of submitted requests, finished in the batches of a `run`
        self.conditioner = Conditioner(model, conditionings, self._parts)
        self.parallel = None if sequence_parallel is None else ParallelFlux(model.denoiser, sequence_parallel)
        graphs = graphs_for_engine(
            cuda_graphs,
            model.device,
            parallel=self.parallel is not None,
            offload=level,
            report_error=errors is not None and errors.every_step,
        )
        dit = self.parallel or model.denoiser
        if errors is not None and not errors.every_step:
            errors = StepErrors(dit)  # the DiT that draws, by the processes that do
        self.denoiser = Denoiser(dit, asdict(model.time_shift), graphs, errors)
        if compile:
            compile_blocks(model.denoiser)
            warm_up(self.denoiser.model, told=progress)

    @classmethod
    def from_pretrained(
        cls,
        model: str = "tiny",
        flux: str | None = None,
        siglip: str | None = None,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        attention: str = "auto",
        *,
        progress: bool = True,
        check_finite: bool = False,
        use_t5: bool | None = None,
        max_batch_size: int = 4,
        cuda_graphs: GraphSetting = "auto",
        compile: bool = False,
        sequence_parallel: ProcessGroup | None = None,
        quantize: str | None = None,
        quantize_exclude: Sequence[str] = (),
        report_error: bool = False,
        offload: str | None = None,
        first_request: Request | None = None,
    ) -> "Engine":
        """Load a model and make an engine of it.

        Args:
            model: "tiny", or a hub id or local folder in the authors' layout.
            flux: FLUX.1-dev folder or hub id (VAE, text encoders); siglip: SigLIP2 folder or hub id.
            device: "cuda" where there is one, else "cpu". dtype: bf16 where it is fast, else fp32.
            attention: see `uniworld env` for the names this machine has.
            progress: draw a progress bar on stderr while loading. check_finite: refuse NaN and Inf in weights.
            use_t5: False never loads T5, which saves 9.5 GB at full scale.
            cuda_graphs: as in `Engine`.
            compile: run the DiT's blocks through `torch.compile`; takes a while before the first request.
            sequence_parallel: processes that draw every request together, each with a model on a GPU of its own and
                each making the same calls with the same arguments; all get the same result.
            quantize: "fp8" (e4m3, sm_89 and newer, or a CPU) or "nf4" (bitsandbytes) for the linears of the DiT's
                blocks, apart from modulation.
            quantize_exclude: globs over the names of weights that stay as they are, `transformer_blocks.0.*` for one.
            report_error: give `Result.step_errors`, against all unquantized blocks on the same inputs: of every step
                with `quantize`, which keeps those blocks too, without it of the steps of requests with a step cache.
            offload: "modulation", "parts" or "cpu": what waits in host memory, see `uniworld.engine.offload`; "auto":
                the least of them that fits the memory that is free, and `Result.offload` says which and why.
            first_request: what will be asked first, encoded while the DiT's weights are read; those that it shares
                words and pictures with find it encoded. Without effect where encoders wait in host memory.
        """
        on = default_device() if device is None else torch.device(device)
        graphs_for_engine(  # raises before anything is loaded
            cuda_graphs,
            on,
            parallel=sequence_parallel is not None,
            offload=offload,
            report_error=report_error and quantize is not None,
        )
        loaded = load_for_engine(
            model,
            flux=flux,
            siglip=siglip,
            device=device,
            dtype=dtype,
            progress=progress,
            check_finite=check_finite,
            use_t5=use_t5,
            quantize=quantize,
            quantize_exclude=quantize_exclude,
            report_error=report_error,
            offload=offload,
            first_request=first_request,
        )
        return cls(
            loaded.model,
            attention=attention,
            max_batch_size=max_batch_size,
            cuda_graphs=cuda_graphs,
            compile=compile,
            sequence_parallel=sequence_parallel,
            offload=loaded.offload,
            errors=loaded.errors,
            conditionings=loaded.conditionings,
            progress=progress,
        )

    def edit(self, images: ImageLike | Sequence[ImageLike], prompt: str, **settings: Unpack[DrawingSettings]) -> Result:
        """Redraw reference images as `prompt` asks.

        Args:
            images: one or several, each a PIL image, a path or encoded bytes.
            prompt: the instruction.
            settings: fields of `Request`: height, width, num_inference_steps, guidance_scale, seed, latents, use_t5,
                pooled_prompt, true_cfg_scale, negative_prompt, vae_tiling, cache, cache_threshold, cache_interval,
                cache_order, on_step.

        Raises: ValueError naming the field, its value and what is allowed.
        """
        references = [images] if isinstance(images, ImageLike) else images
        if not references:
            raise ValueError("images: edit needs at least one reference image; use generate() for none")
        request = Request(prompt=prompt, images=tuple(read_image(image) for image in references), **settings)
        return self.run([request])[0]

    def generate(self, prompt: str, **settings: Unpack[DrawingSettings]) -> Result:
        """Draw a picture from text alone; `settings` as for `edit`."""
        return self.run([Request(prompt=prompt, **settings)])[0]

    def perceive(
        self, image: ImageLike, task: str, target: str | None = None, **settings: Unpack[DrawingSettings]
    ) -> Result:
        """Draw what `task` sees in `image`: canny, depth, hed, mlsd, normal, pose, sketch, segment or detect.

        `target` names the object of segment and detect; `settings` as for `edit`.
        """
        return self.edit(image, perception_prompt(task, target), **settings)

    def chat(
        self,
        messages: Sequence[dict[str, Any]],
        *,
        mode: str = "auto",
        max_new_tokens: int = 512,
        temperature: float = 0.0,
        top_p: float = 1.0,
        on_text: Callable[[str], None] | None = None,
        **settings: Unpack[DrawingSettings],
    ) -> ChatReply:
        """Answer a conversation in text or with a picture.

        Args:
            messages: OpenAI-style, see `chat.parse_messages`; the last one is the user's.
            mode: "auto" lets the task head decide, "image" draws, "text" answers.
            max_new_tokens, temperature, top_p: of a text answer; temperature 0 is greedy.
            on_text: called with each piece of a text answer as it comes.
            settings: of a picture, as for `edit`.
        """
        if mode not in CHAT_MODES:
            raise ValueError(f"mode={mode!r}: must be one of {', '.join(CHAT_MODES)}")
        talk = parse_messages(messages)
        request = Request(prompt=talk.prompt, images=talk.images, history=talk.history, system=talk.system, **settings)
        job = self._job(request)
        with self._timed([job], "condition"):
            job.reading = self.conditioner.read(job.inputs, keep_cache=mode != "image")
        probability = self._same(self.conditioner.draw_probability(job.reading)) if mode == "auto" else None
        if mode == "image" or (probability is not None and probability >= 0.5):
            result = self._finish([job])[job.id]
            return ChatReply(
                text="", images=result.images, result=result, draw_probability=probability, timings=result.timings
            )
        sampling = {"max_new_tokens": max_new_tokens, "temperature": temperature, "top_p": top_p, "seed": job.seed}
        with self._timed([job], "answer"):
            text = self.conditioner.answer(job.reading, on_text=on_text, **sampling)
        job.timings["total"] = sum(job.timings.values())
        return ChatReply(text=text, images=[], draw_probability=probability, timings=job.timings)

    def run(self, requests: Sequence[Request]) -> list[Result]:
        """Answer several requests, batching those of equal shape; results in the order of the requests."""
        jobs = [self._job(request) for request in requests]
        results: dict[int, Result] = {}
        try:
            for job in jobs:
                self.scheduler.add(job)
            while not all(job.id in results for job in jobs):
                results |= self.step()
        finally:
            own = {job.id for job in jobs}
            for job_id in own - results.keys():  # nothing of a failed call may run in the next one
                self.scheduler.cancel(job_id)
            self._unclaimed = {id: result for id, result in results.items() if id not in own}
        return [results[job.id] for job in jobs]

    def submit(self, request: Request) -> int:
        """Queue a request; its id is the key of its result in a later `step`. Raises ValueError or QueueFull."""
        job = self._job(request)
        self.scheduler.add(job)
        return job.id

    def step(self) -> dict[int, Result]:
        """Schedule one batch and finish it; {} when nothing waits.

        Also gives what a `run` in between finished of the requests that were submitted.
        """
        batch = self.scheduler.next_batch()
        finished = self._finish(batch) if batch else {}
        finished, self._unclaimed = self._unclaimed | finished, {}
        return finished

    def _finish(self, batch: list[Job]) -> dict[int, Result]:
        with self._timed(batch, "condition"):
            self.conditioner.fill(batch)
        with self._timed(batch, "denoise"):
            self.denoiser.run(batch)
        with self._timed(batch, "decode"):
            self.decoder.run([job for job in batch if not job.cancelled])
        return {job.id: self._result(job) for job in batch}

    def _job(self, request: Request) -> Job:
        request = self._with_defaults(request)
        height, width = request.height, request.width
        if height is None:
            first = request.images[0] if request.images else None
            in_height, in_width = (first.height, first.width) if first else (1, 1)
            height, width = output_size(in_height, in_width, self.model.anchor_px)
        self.denoiser.check(request, height, width)
        self.conditioner.warn_of_strangers(request)
        return Job(
            request=request,
            height=height,
            width=width,
            seed=self._same(draw_seed(request.seed)),
            inputs=self.conditioner.tokenize(request),
            negative_inputs=self.conditioner.tokenize_negative(request),
        )

    def _with_defaults(self, request: Request) -> Request:
        """The request with the model's own steps and guidance where it names none, and its place of pictures."""
        request = with_images_last(request) if self.model.images_last else request
        own = {"num_inference_steps": self.model.num_inference_steps, "guidance_scale": self.model.guidance_scale}
        if request.images and self.model.edit_inference_steps is not None:
            own["num_inference_steps"] = self.model.edit_inference_steps
        missing = {name: value for name, value in own.items() if getattr(request, name) is None}
        return replace(request, **missing) if missing else request

    def _same(self, value: Any) -> Any:
        """What is random or decided, the same on all processes that draw together."""
        return value if self.parallel is None else self.parallel.same(value)

    def _result(self, job: Job) -> Result:
        job.timings["total"] = sum(job.timings.values())
        return Result(
            images=[] if job.image is None else [job.image],
            latents=job.latents,
            timings=job.timings,
            seed=job.seed,
            height=job.height,
            width=job.width,
            num_inference_steps=job.request.num_inference_steps,
            cancelled=job.cancelled,
            graphs=job.graphs,
            step_cache=job.step_cache,
            offload=str(self.offload),
            step_errors=[float(error) for error in job.step_errors],
        )

    @contextmanager
    def _timed(self, batch: list[Job], room: str):
        """Wall time of a room, shared by its batch; waits for the device so that rooms do not pay for each other."""
        start = time.perf_counter()
        if self._parts is not None and room in ("denoise", "decode"):  # the conditioner brings its own
            self._parts.bring(room)
        yield
        if self.model.device.type == "cuda":
            torch.cuda.synchronize(self.model.device)
        for job in batch:
            job.timings[room] = job.timings.get(room, 0.0) + time.perf_counter() - start
