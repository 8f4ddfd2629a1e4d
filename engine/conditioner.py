"""From words and pictures to the DiT's conditioning: one VLM pass a request, shared by routing and drawing."""

import hashlib
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace

import torch
from PIL import Image
from torch import Tensor

from uniworld.engine.cache import ConditioningCache
from uniworld.engine.offload import Parts
from uniworld.engine.request import Job, Request
from uniworld.models.conditioning import Conditioning, assemble, layout_text
from uniworld.models.prompts import VLMInputs, chat_text, instruction
from uniworld.models.unified import UniWorld
from uniworld.models.vlm import VLMStates


@dataclass(frozen=True)
class Reading:
    """A request after the VLM's one pass over it."""

    inputs: VLMInputs
    states: VLMStates


class Conditioner:
    def __init__(self, model: UniWorld, cache: ConditioningCache | None = None, parts: Parts | None = None):
        """`parts` brings encoders to the device where they are offloaded."""
        self.model = model
        self.cache = ConditioningCache() if cache is None else cache
        self._parts = parts

    def tokenize(self, request: Request) -> VLMInputs:
        """The VLM's inputs of a request. Raises ValueError where the prompt is too long or asks for absent parts."""
        if request.use_t5 and not self.model.text_encoders.has_t5:
            raise ValueError("use_t5=True: no T5 is loaded (the FLUX folder has none, or it was loaded without)")
        text = chat_text(request.prompt, len(request.images), request.history, request.system)
        return self.model.processor.encode([text], [all_images(request)])

    @torch.inference_mode()
    def warn_of_strangers(self, request: Request) -> None:
        """Say which of the request's own pictures are not of the world that a small model knows."""
        model = self.model
        if model.known_world is not None and request.images:
            self._bring("semantic_encoder")
            states = model.semantic_encoder(model.semantic_encoder.preprocess(request.images))
            model.known_world.warn_of_strangers(states, model.name)

    def tokenize_negative(self, request: Request) -> VLMInputs | None:
        """The same of the negative prompt; None without true CFG."""
        if request.true_cfg_scale == 1:
            return None
        try:
            return self.tokenize(negative_request(request))
        except ValueError as error:  # it speaks of `prompt`
            raise ValueError(f"negative_{error}") from None

    @torch.inference_mode()
    def read(self, inputs: VLMInputs, keep_cache: bool = False) -> Reading:
        """Run the VLM. `keep_cache` keeps keys and values, so that `answer` can go on from here, as queries do."""
        keep_cache = keep_cache or self.model.queries is not None
        self._bring("vlm")
        return Reading(inputs, self.model.vlm.encode(inputs, use_cache=keep_cache))

    @torch.inference_mode()
    def fill(self, batch: Sequence[Job]) -> None:
        """Fill `conditioning` of every job, and `negative` where true CFG is on."""
        for job in batch:
            job.conditioning = self._cached(job.request, job.inputs, job.reading)
            if job.negative_inputs is not None:
                job.negative = self._cached(negative_request(job.request), job.negative_inputs, None)

    def check(self, request: Request) -> None:
        """Raise the ValueError of a request that cannot be encoded; needs no weights."""
        self.tokenize(request)
        self.tokenize_negative(request)

    @torch.inference_mode()
    def prepare(self, request: Request) -> None:
        """Keep a request's conditioning, and that of its negative prompt, for when it comes."""
        self._cached(request, self.tokenize(request), None)
        if (negative_inputs := self.tokenize_negative(request)) is not None:
            self._cached(negative_request(request), negative_inputs, None)

    def draw_probability(self, reading: Reading) -> float:
        """What the task head says of the state of the last "assistant" token: the probability of drawing."""
        if self.model.task_head is None:
            raise ValueError("mode='auto': the checkpoint has no task_head_final.pt; use mode='image' or 'text'")
        state = reading.states.hidden_states[0, reading.inputs.assistant_positions[0]]
        return float(self.model.task_head.draw_probability(state))

    def answer(self, reading: Reading, *, on_text: Callable[[str], None] | None = None, **sampling) -> str:
        """Write the text answer; `on_text` gets each piece as soon as its characters are complete."""
        self._bring("vlm")
        processor = self.model.processor
        tokens, shown = [], ""
        stop_ids = (processor.tokens.turn_end, processor.tokens.pad)
        for token in self.model.vlm.stream_text(reading.states, stop_ids=stop_ids, **sampling):
            tokens.append(token)
            text = processor.decode(tokens)
            if on_text is not None and not text.endswith("\ufffd"):  # a character may span several tokens
                on_text(text[len(shown) :])
                shown = text
        text = processor.decode(tokens)
        if on_text is not None and len(text) > len(shown):
            on_text(text[len(shown) :])
        return text

    def encode(
        self,
        inputs: VLMInputs,
        *,
        pooled: Tensor,
        siglip_states: Tensor | None = None,
        t5_states: Tensor | None = None,
        states: VLMStates | None = None,
    ) -> Conditioning:
        """Batch of VLM inputs and encoder states -> conditioning; differentiable in the connectors.

        Args:
            inputs: a batch of B prompts, padded on either side.
            pooled: [B, P].
            siglip_states: [num_images, T, D] of the model's `reference_encoder`, in the order of the prompts' images;
                None inserts none.
            t5_states: [B, T, D_joint] or None.
            states: the VLM's states, where its pass has been made already; with learned queries, with its cache.
        """
        model = self.model
        if states is None or model.queries is not None:
            self._bring("vlm")
        states = model.vlm.encode(inputs, use_cache=model.queries is not None) if states is None else states
        vlm_states, mask, image_ends = states.hidden_states, inputs.attention_mask, inputs.image_end_positions
        if model.queries is not None:
            vlm_states = model.queries(model.vlm.states_after, states)
            mask, image_ends = model.queries.layout(image_ends)
        layout = layout_text(
            mask,
            image_ends if siglip_states is not None else [()] * len(image_ends),
            num_siglip_tokens=0 if siglip_states is None else siglip_states.shape[1],
            num_t5_tokens=0 if t5_states is None else t5_states.shape[1],
        )
        self._bring("connectors")
        return assemble(
            layout,
            vlm_states=vlm_states,
            denoise_projector=model.denoise_projector,
            siglip_states=siglip_states,
            siglip_projector=model.reference_projector,
            t5_states=t5_states,
            pooled=pooled,
        )

    def _bring(self, group: str) -> None:
        if self._parts is not None:
            self._parts.bring(group)

    def _cached(self, request: Request, inputs: VLMInputs, reading: Reading | None) -> Conditioning:
        if self.model.images_last and request.history:  # it has learned to draw from single messages
            request = replace(request, history=())
            inputs, reading = self.tokenize(request), None
        key = conditioning_key(request)
        found = self.cache.get(key)
        if found is None:
            found = self._condition(request, self.read(inputs) if reading is None else reading)
            self.cache.put(key, found)
        return found

    def _condition(self, request: Request, reading: Reading) -> Conditioning:
        model, dtype = self.model, self.model.dtype
        images = all_images(request)
        siglip_states = None
        encoder = model.reference_encoder
        if images and encoder is not None:
            self._bring("decode" if model.references == "vae" else "semantic_encoder")
            siglip_states = encoder(encoder.preprocess(images)).to(dtype)
        use_t5 = model.text_encoders.has_t5 if request.use_t5 is None else request.use_t5
        words = instruction(request.prompt)
        self._bring("text_encoders")
        t5_states = model.text_encoders.t5_states([words]).to(dtype) if use_t5 else None
        pooled_prompt = request.pooled_prompt
        if pooled_prompt is None:
            pooled_prompt = words if use_t5 else ""
        pooled = model.text_encoders.pooled([pooled_prompt]).to(dtype)
        return self.encode(
            reading.inputs, pooled=pooled, siglip_states=siglip_states, t5_states=t5_states, states=reading.states
        )


def all_images(request: Request) -> list[Image.Image]:
    """The pictures of a request in the order of their places in the prompt: those of the history first."""
    return [image for turn in request.history for image in turn.images] + list(request.images)


def negative_request(request: Request) -> Request:
    """What true CFG steers away from: the negative prompt with the same pictures, and no pooled prompt of its own."""
    return Request(
        prompt=request.negative_prompt or "",
        images=request.images,
        history=request.history,
        system=request.system,
        use_t5=request.use_t5,
    )


def conditioning_key(request: Request) -> Hashable:
    """Equal for requests with equal words, pictures and encoder settings."""
    history = tuple((turn.role, turn.text, len(turn.images)) for turn in request.history)
    pictures = tuple(image_digest(image) for image in all_images(request))
    return request.prompt, request.system, history, pictures, request.use_t5, request.pooled_prompt


def image_digest(image: Image.Image) -> tuple[int, int, bytes]:
    return image.width, image.height, hashlib.blake2b(image.tobytes(), digest_size=16).digest()
