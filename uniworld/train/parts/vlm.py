"""The vision-language model of `tiny`: questions about scenes, captions, and what an instruction is to lead to.

First it learns to see (`dense`) and to point at what is described (`grounding`): a language model that finds nothing in
a picture learns to guess. Then answers are learned by next-token prediction; questions, instructions and pictures only
condition. So that the states of an instruction say what is to be drawn, its "answer" here is the caption of the wanted
picture; and the states of the tokens of its picture, which stands behind the words, must say what is to be at each
place of the wanted one. In the same way the states of a question's picture must say which things it speaks of. What
it learns from is in `vlm_batches`.

Letters: B conversations, L tokens of the longest, V vocabulary, n tokens of answers.
"""

from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from uniworld.checkpoint.build import read_config
from uniworld.checkpoint.locate import weight_files
from uniworld.checkpoint.names import TOWER_PREFIX, VLM, authors_names
from uniworld.checkpoint.save import copy_side_files, save_module, write_json
from uniworld.checkpoint.tiny import STORED_DTYPE
from uniworld.checkpoint.weights import Plan, fill, module_targets, read_headers
from uniworld.data.scenes.tasks import make_item
from uniworld.models.prompts import PromptProcessor, VLMInputs, sees_own_turn
from uniworld.models.tokenizers import load_tokenizer
from uniworld.models.vision_processor import VisionProcessor
from uniworld.models.vlm import VisionLanguageModel, rope_index
from uniworld.train.parts.attention import keep_scores, kept_scores, use_fast_attention
from uniworld.train.parts.config import PartConfig
from uniworld.train.parts.conversations import IGNORED, answer_starts, answer_weights, talk_of
from uniworld.train.parts.dense import UNNAMED, DenseHead, PlaceHead
from uniworld.train.parts.grounding import GroundingHead
from uniworld.train.parts.known import KnownHead
from uniworld.train.parts.phrases import PhraseHead, looking_loss
from uniworld.train.parts.sizes import PREPROCESSOR, qwen_config
from uniworld.train.parts.vlm_batches import NUM_TOKENS, POINTS_PER_SIDE, Batches
from uniworld.train.parts.words import open_tokenizers, read_ids

DENSE_WEIGHT = 0.2  # once answers are learned
GROUNDING_WEIGHT, POINTING_WEIGHT = 0.3, 1.0  # beside answers, and before
PLACE_WEIGHT, KNOWN_WEIGHT = 0.5, 0.3
PHRASE_WEIGHT, LOOKING_WEIGHT = 0.3, 0.3
# Layers of the language model, counted from 0, after which is read what phrases say, which things are spoken of, and
# what is known of them; and the heads, by their layers, that are told where to look.
PHRASE_LAYERS, GROUNDED_LAYERS, KNOWN_LAYERS = (0, 1), (1, 2), (2, 3)
LOOKING_HEADS = {0: 3, 1: 1}
SCORED_AT_ONCE = 32


class VisionLanguage:
    """The part `vlm`: Qwen2.5-VL in the sizes of `sizes.qwen_config`."""

    not_for_making = ("module", "vlm")

    def __init__(self, config: PartConfig):
        torch.manual_seed(config.seed)
        self.config = config
        words = open_tokenizers(config.words)
        tokenizer = load_tokenizer(words, "Qwen2Tokenizer")
        self.processor = PromptProcessor(tokenizer, VisionProcessor(PREPROCESSOR), own_turn=True)
        self.batches = Batches(config, self.processor)
        if config.start is None:
            self.vlm = VisionLanguageModel.from_config(qwen_config(read_ids(words, "qwen")))
        else:
            self.vlm = load_vlm(Path(config.start))
        use_fast_attention(self.vlm.model)
        heads: dict[str, nn.Module] = {n: DenseHead(self.vlm.hidden_size, POINTS_PER_SIDE) for n in ("dense", "wanted")}
        heads |= {f"phrases{i}": PhraseHead(self.vlm.hidden_size) for i in PHRASE_LAYERS}
        heads |= {f"grounding{i}": GroundingHead(self.vlm.hidden_size, POINTS_PER_SIDE) for i in GROUNDED_LAYERS}
        heads |= {f"known{i}": KnownHead(self.vlm.hidden_size) for i in KNOWN_LAYERS}
        heads["place"] = PlaceHead(self.vlm.hidden_size, NUM_TOKENS)
        self._at_layer: dict[int, Tensor] = {}
        for index in {*PHRASE_LAYERS, *GROUNDED_LAYERS, *KNOWN_LAYERS}:
            self._layers[index].register_forward_hook(self._keep_layer(index))
        keep_scores(self.vlm.model, self._layers, LOOKING_HEADS)
        self.module: nn.Module = nn.ModuleDict({"vlm": self.vlm.model.requires_grad_(True), **heads})
        self.vlm.model.model.visual.register_forward_hook(self._keep_seen)

    def make(self, seeds: range) -> dict[str, Any]:
        return self.batches.make(seeds)

    def loss(self, batch: dict[str, Any], generator: torch.Generator) -> tuple[Tensor, dict[str, float | Tensor]]:
        if "labels" not in batch or "row" in batch:
            return self._look(batch)
        states = self._states(batch)
        loss, more = self._answer(states, batch)
        if "seen" not in batch:
            return loss, more
        dense, seen = self._read("dense", self._seen, batch["seen"])
        of_pictures = batch["input_ids"].to(states.device) == self.processor.tokens.image_pad
        plan, planned = self._read_plan(states[of_pictures], batch["wanted"])
        grounding, told = self._read_asked(of_pictures, batch["asked"].to(states.device))
        loss = loss + DENSE_WEIGHT * (dense + plan) + GROUNDING_WEIGHT * grounding
        return loss, more | seen | planned | told

    def _answer(self, states: Tensor, batch: dict[str, Any]) -> tuple[Tensor, dict[str, float | Tensor]]:
        logits, labels, weights = self._predict(states, batch)
        position, token = batch["unseen"].to(logits.device).unbind(-1)
        logits = logits.index_put((position, token), logits.new_tensor(-torch.inf))
        right = (logits.detach().argmax(-1) == labels).float().mean()
        answers = (weights * F.cross_entropy(logits.float(), labels, reduction="none")).sum()
        return answers, {"answers": answers.detach(), "tokens_right": right}

    def _look(self, batch: dict[str, Any]) -> tuple[Tensor, dict[str, float | Tensor]]:
        """The tower sees each picture once; the language model reads every turn about it."""
        device = self.vlm.device
        seeing, more = self._see(batch)
        if "row" not in batch:
            return seeing, more
        of_pictures = batch["input_ids"].to(device) == self.processor.tokens.image_pad
        states = self._states_of_turns(batch, of_pictures)
        pointing, told = self._read_asked(of_pictures, batch["asked"].to(device))
        if "labels" in batch:
            answers, right = self._answer(states, batch)
            knowing, known = self._read_known(batch)
            reading, phrases = self._read_phrases(batch, of_pictures)
            # In other colours pictures are shown to learn to see.
            weight = 1.0 if (batch["seen"]["points"] == UNNAMED).any() else DENSE_WEIGHT
            loss = answers + weight * seeing + GROUNDING_WEIGHT * pointing + KNOWN_WEIGHT * knowing + reading
            return loss, more | told | right | known | phrases
        loss = seeing + POINTING_WEIGHT * pointing
        if "wanted" in batch:
            plan, planned = self._read_plan(states[of_pictures], batch["wanted"])
            loss, told = loss + plan, told | planned
        return loss, more | told

    def _see(self, batch: dict[str, Any]) -> tuple[Tensor, dict[str, float | Tensor]]:
        """What the tower reads of the pictures, whose states are then `_seen`; and of the same in greys, if any."""
        if "grey_values" not in batch:
            return self._see_pixels(batch["pixel_values"], batch, batch["seen"])
        any_shape = {"unseen_shapes": torch.zeros_like(batch["seen"]["unseen_shapes"])}
        seeing_greys, _ = self._see_pixels(batch["grey_values"], batch, batch["seen"] | any_shape)
        greys = self._seen
        seeing, more = self._see_pixels(batch["pixel_values"], batch, batch["seen"])
        coloured, greys = (states.unflatten(0, (len(batch["image_grid_thw"]), -1)) for states in (self._seen, greys))
        agreeing = self.module["dense"].agreement(coloured, greys, batch["seen"]["points"].to(self.vlm.device))
        return seeing + seeing_greys + agreeing, more | {"agreement": agreeing.detach()}

    def _see_pixels(
        self, pixels: Tensor, batch: dict[str, Any], labels: dict[str, Tensor]
    ) -> tuple[Tensor, dict[str, float | Tensor]]:
        device = self.vlm.device
        self.vlm.model.model.visual(pixels.to(device), grid_thw=batch["image_grid_thw"].to(device))
        return self._read("dense", self._seen, labels)

    def _states_of_turns(self, batch: dict[str, Any], of_pictures: Tensor) -> Tensor:
        """[N, L, D], from what the tower has just seen."""
        device, language = self.vlm.device, self.vlm.model.model.language_model
        ids, mask, row = batch["input_ids"], batch["attention_mask"], batch["row"]
        grids = batch["image_grid_thw"][row]
        positions, _ = rope_index(of_pictures.long().cpu(), mask, grids, self.vlm.merge_size)
        seen = self._seen.unflatten(0, (len(batch["image_grid_thw"]), -1))[row.to(device)]
        embeddings = language.embed_tokens(ids.to(device))
        embeddings = embeddings.masked_scatter(of_pictures[..., None], seen.to(embeddings.dtype))
        sees = sees_own_turn(ids, mask.bool(), self.processor.tokens)
        sees = self._sees = None if sees is None else sees[:, None].to(device)
        output = language(
            inputs_embeds=embeddings, attention_mask=sees, position_ids=positions.to(device), use_cache=False
        )
        return output.last_hidden_state

    @property
    def _layers(self) -> nn.ModuleList:
        return self.vlm.model.model.language_model.layers

    def _keep_seen(self, visual: nn.Module, inputs: Any, output: Any) -> None:
        """The states of the pictures' tokens [all, D], which transformers 4 returns bare."""
        self._seen = getattr(output, "pooler_output", output)

    def _keep_layer(self, index: int) -> Callable[..., None]:
        def keep(layer: nn.Module, inputs: Any, output: Any) -> None:
            self._at_layer[index] = output if isinstance(output, Tensor) else output[0]

        return keep

    def _read_asked(self, of_pictures: Tensor, labels: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """After all GROUNDED_LAYERS the loss of which things are meant and of where a token is; and what is told after
        the last."""
        losses, told = [], {}
        for index in GROUNDED_LAYERS:
            states = self._at_layer[index][of_pictures].unflatten(0, (len(labels), -1))
            loss, told = self.module[f"grounding{index}"](states, labels)
            place, right = self.module["place"](states)
            losses += [loss, PLACE_WEIGHT * place]
        return torch.stack(losses).sum(), told | {"place_right": right}

    def _read_known(self, batch: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """What is known of the things that each question speaks of, at the last token before its answer; and what to
        log of it in the middle of the language model."""
        row, begin = answer_starts(batch["labels"]).nonzero(as_tuple=True)
        read = [self.module[f"known{i}"](self._at_layer[i][row, begin - 1], batch["known"]) for i in KNOWN_LAYERS]
        return torch.stack([loss for loss, _ in read]).sum(), read[0][1]

    def _read_phrases(self, batch: dict[str, Any], of_pictures: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """What the words of each question say, and where `LOOKING_HEADS` look; both weighted."""
        read = [self.module[f"phrases{i}"](self._at_layer[i], batch["phrases"]) for i in PHRASE_LAYERS]
        L = of_pictures.shape[1]
        sees = torch.ones(1, L, L, dtype=torch.bool, device=of_pictures.device).tril()
        sees = (sees if self._sees is None else self._sees[:, 0]).expand(len(of_pictures), L, L)
        scores = [kept_scores(self._layers[i]) for i in LOOKING_HEADS]
        looking = looking_loss(scores, sees, of_pictures, batch["phrases"])
        reading = torch.stack([loss for loss, _ in read]).sum()
        return PHRASE_WEIGHT * reading + LOOKING_WEIGHT * looking, read[-1][1] | {"looking": looking.detach()}

    def _read_plan(self, states: Tensor, wanted: dict[str, Tensor]) -> tuple[Tensor, dict[str, float | Tensor]]:
        """What is to be at each place, from the last states of the pictures' tokens [all, D]; and which place it is, as
        the DiT gives them no position."""
        plan, right = self._read("wanted", states, wanted)
        place, place_right = self.module["place"](states.unflatten(0, (-1, NUM_TOKENS)))
        named = {f"wanted_{name}": value for name, value in right.items()}
        return plan + PLACE_WEIGHT * place, named | {"final_place_right": place_right}

    def _read(self, head: str, states: Tensor, labels: dict[str, Tensor]) -> tuple[Tensor, dict[str, float | Tensor]]:
        """What a head reads from the states of the pictures' tokens [all, D]."""
        labels = {name: label.to(self.vlm.device) for name, label in labels.items()}
        return self.module[head](states.unflatten(0, (len(labels["points"]), -1)), labels)

    @torch.no_grad()
    def score(self) -> dict[str, float]:
        """Share of held-out questions answered exactly, behind the earlier ones of their conversations, of all and by
        kind; captions, which may be put otherwise, not.

        Every token of an answer is predicted after the right ones before it: all of them are right if and only if
        greedy decoding gives the answer.
        """
        size_px = self.config.size_px
        seeds = range(self.config.num_checked)
        asked = []
        for item in (make_item("understanding", seed, "held-out", size_px=size_px) for seed in seeds):
            for i, question in enumerate(item.facts):
                if not question.kind.startswith("caption"):
                    asked.append((question.kind, item, talk_of(item.facts[: i + 1])))
        found: dict[str, list[bool]] = {}
        for start in range(0, len(asked), SCORED_AT_ONCE):
            kinds, items, conversations = zip(*asked[start : start + SCORED_AT_ONCE])
            for kind, right in zip(kinds, self._right(self.batches.conversations(items, conversations))):
                found.setdefault(kind, []).append(right)
        by_kind = {f"accuracy_{kind}": float(np.mean(right)) for kind, right in sorted(found.items())}
        return {"accuracy": float(np.mean([r for right in found.values() for r in right])), **by_kind}

    def export(self, folder: Path) -> None:
        """A Qwen2.5-VL folder, whose tensors have the same names in the authors' layout; tokenizer, processor."""
        named = ((authors_names(VLM, name)[0], tensor) for name, tensor in self.vlm.model.named_parameters())
        words = open_tokenizers(self.config.words)
        save_module(folder, named, qwen_config(read_ids(words, "qwen")), dtype=STORED_DTYPE)
        copy_side_files(words, folder)
        write_json(folder / "preprocessor_config.json", PREPROCESSOR)

    def _states(self, batch: dict[str, Any]) -> Tensor:
        """[B, L, D]"""
        inputs = VLMInputs(**{field.name: batch[field.name] for field in fields(VLMInputs)})
        return self.vlm.states(inputs).hidden_states

    def _predict(self, states: Tensor, batch: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
        """Logits [n, V], labels [n] and weights [n] of the answers' tokens."""
        labels = batch["labels"].to(self.vlm.device)
        weights = answer_weights(labels)[:, 1:]
        labels = labels[:, 1:]
        learned = labels != IGNORED
        return self.vlm.model.lm_head(states[:, :-1][learned]), labels[learned], weights[learned]

    def _right(self, batch: dict[str, Any]) -> list[bool]:
        """Of each conversation, whether all tokens of its last answer are right."""
        logits, labels, _ = self._predict(self._states(batch), batch)
        rows = (batch["labels"][:, 1:] != IGNORED).nonzero()[:, 0]
        wrong = rows[(logits.argmax(-1) != labels).cpu()]
        return [row not in wrong.tolist() for row in range(len(batch["labels"]))]


def load_vlm(folder: Path) -> VisionLanguageModel:
    """The trained VLM, fp32 and frozen, of a folder that holds it alone or with a DiT.

    Raises: FileNotFoundError where it is not there.
    """
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder}: holds no VLM; train one first (configs/tiny/vlm.yaml)")
    vlm = VisionLanguageModel.from_config(read_config(folder))
    targets = module_targets(vlm.model, lambda name: authors_names(VLM, name))
    headers = read_headers(weight_files(folder))
    own = {name: header for name, header in headers.items() if not name.startswith(TOWER_PREFIX)}
    plan = Plan(folder, own, targets, torch.device("cpu"), torch.float32)
    plan.check()
    fill([plan])
    return vlm
