"""One training step as the authors' trainer does it, on the parts of diffusers, transformers and torch: the peer of
`Trainer`'s step.

Live encoders, plain connectors, diffusers' transformer in eager mode, loss and weights in torch, fp32 master weights
under torch's AdamW, and an EMA in fp32 of every parameter of VLM, connectors and DiT, one tensor after the other.
Frozen weights are shared with ours; what is trained is a copy.

Letters: B batch, C latent channels, h, w latent height and width.
"""

import copy
import math
from collections.abc import Iterator

import torch
from original import insert_semantic, plain, vlm_states
from peers import run_diffusers
from torch import Tensor, nn

from uniworld.config import TrainConfig
from uniworld.data.batch import TrainBatch
from uniworld.models.flow import image_ids
from uniworld.models.unified import UniWorld

# The parts of a parameter's name that stage 2 trains, beside the connectors.
DOUBLE_BLOCKS = ("attn.norm_q.", "attn.norm_k.", "attn.to_q.", "attn.to_k.", "attn.to_v.", "attn.to_out.", "norm1.")
SINGLE_BLOCKS = ("attn.norm_q.", "attn.norm_k.", "attn.to_q.", "attn.to_k.", "attn.to_v.", ".norm.linear.")
NO_DECAY_BEFORE = 1  # updates that copy the parameters


class OriginalTraining:
    """Trains a copy of the stage's weights.

    Args:
        model: every part, frozen.
        transformer: diffusers' DiT on the weights of `model`.
        config: stage, optimizer, clipping and EMA. Stage 2 recomputes all blocks in the backward pass, as the authors
            do to fit their GPUs, whatever the config says.
        ema_of_frozen: keep averages of the frozen parameters too, as the authors do.
    """

    def __init__(self, model: UniWorld, transformer: nn.Module, config: TrainConfig, *, ema_of_frozen: bool = True):
        self.model, self.transformer, self.config = model, transformer, config
        self.stage2 = config.stage.preset == "stage2"
        self.denoise_projector = copy.deepcopy(model.denoise_projector)
        self.siglip_projector = copy.deepcopy(model.siglip_projector)
        self.trained = {name: p for name, p in self.named_parameters() if self._is_trained(name)}
        for p in self.trained.values():
            p.data = p.data.clone()
            p.requires_grad_(True)
        if self.stage2:
            transformer.enable_gradient_checkpointing()
        self.masters = {name: self._master(p) for name, p in self.trained.items()}
        optim = config.optim
        self.optimizer = torch.optim.AdamW(
            self.masters.values(), lr=optim.lr, betas=optim.betas, eps=optim.eps, weight_decay=optim.weight_decay
        )
        self.pooled = model.text_encoders.pooled([""])
        self.num_updates = 0
        averaged = dict(self.named_parameters()) if ema_of_frozen else self.trained
        self.ema = {name: p.detach().float().clone() for name, p in averaged.items()}

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Those of the authors' model: VLM, connectors and DiT; SigLIP, CLIP and VAE stand beside it."""
        parts = {
            "denoiser": self.transformer,
            "denoise_projector": self.denoise_projector,
            "siglip_projector": self.siglip_projector,
            "vlm": self.model.vlm.model,
        }
        for part, module in parts.items():
            for name, p in module.named_parameters():
                yield f"{part}.{name}", p

    def _is_trained(self, name: str) -> bool:
        if name.startswith("denoise_projector."):
            return True
        if not self.stage2 or name.startswith("vlm."):
            return False
        if name.startswith("denoiser.transformer_blocks."):
            return any(part in name for part in DOUBLE_BLOCKS)
        if name.startswith("denoiser.single_transformer_blocks."):
            return any(part in name for part in SINGLE_BLOCKS)
        return name.startswith("siglip_projector.")

    @staticmethod
    def _master(p: nn.Parameter) -> Tensor:
        return p if p.dtype == torch.float32 else p.detach().float()

    def step(self, batch: TrainBatch, lr: float, generator: torch.Generator, *, ema_of_frozen: bool = True) -> float:
        """One step from the samples; returns the loss. `ema_of_frozen=False` leaves out that part of the EMA."""
        loss = self.loss(batch, generator)
        loss.backward()
        self._update(lr)
        self._update_ema(ema_of_frozen)
        return loss.item()

    def loss(self, batch: TrainBatch, generator: torch.Generator) -> Tensor:
        """The loss of a batch, whose random numbers are drawn in the order in which ours are."""
        txt, latent_mean, latent_std = self._encode(batch)
        B, C, h, w = latent_mean.shape
        sigma = self._shifted(torch.sigmoid(torch.randn(B, generator=generator)), h * w // 4)
        sigma = sigma.to(txt.device)[:, None, None, None]
        noise, sample = (torch.randn(latent_mean.shape, generator=generator).to(txt.device) for _ in range(2))
        latents = latent_mean + latent_std * sample
        vae = self.model.vae.model.config
        latents = (latents - vae.shift_factor) * vae.scaling_factor
        noisy = (1.0 - sigma) * latents + sigma * noise
        predicted = run_diffusers(
            self.transformer,
            img=noisy.view(B, C, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(B, -1, 4 * C).to(txt.dtype),
            txt=txt,
            pooled=self.pooled.expand(B, -1),
            timestep=sigma.flatten().to(txt.dtype),
            guidance=torch.full((B,), self.config.flow.guidance_scale, device=txt.device),
            img_ids=image_ids(8 * h, 8 * w, txt.device),
        )
        predicted = predicted.view(B, h // 2, w // 2, C, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(B, C, h, w)
        weight = torch.ones_like(sigma)
        if batch.region_weight is not None:
            weight = weight * batch.region_weight.to(txt.device).float()
        return (weight * (predicted.float() - (noise - latents).float()) ** 2).mean()

    def _encode(self, batch: TrainBatch) -> tuple[Tensor, Tensor, Tensor]:
        """The text sequence [B, L, D] with its gradient, mean and standard deviation of the unscaled latents."""
        model = self.model
        with torch.no_grad():
            states = vlm_states(model, batch.inputs)
            posterior = model.vae.model.encode(batch.target.to(model.device, model.dtype)).latent_dist
            semantic_states = None
            if self.stage2 and batch.siglip_pixels is not None:
                pixels = batch.siglip_pixels.to(model.device, model.dtype)
                semantic_states = model.semantic_encoder.model(pixels).last_hidden_state
        txt = plain(self.denoise_projector, states)
        if semantic_states is not None:
            semantic = list(plain(self.siglip_projector, semantic_states))
            rows = []
            for row, ends in zip(txt, batch.inputs.image_end_positions):
                rows.append(insert_semantic(row, [semantic.pop(0) for _ in ends], ends))
            txt = torch.stack(rows)
        return txt, posterior.mean.float(), posterior.std.float()

    def _shifted(self, sigma: Tensor, num_tokens: int) -> Tensor:
        shift = self.model.time_shift
        slope = (shift.max_shift - shift.base_shift) / (shift.max_image_seq_len - shift.base_image_seq_len)
        factor = math.exp(shift.base_shift + slope * (num_tokens - shift.base_image_seq_len))
        return sigma * factor / (1 + (factor - 1) * sigma)

    def _update(self, lr: float) -> None:
        """Clip and update the master weights, and round them into the parameters."""
        for name, p in self.trained.items():
            if self.masters[name] is not p:
                self.masters[name].grad, p.grad = p.grad.float(), None
        self.grad_norm = nn.utils.clip_grad_norm_(self.masters.values(), self.config.optim.clip_norm)
        self.optimizer.param_groups[0]["lr"] = lr
        self.optimizer.step()
        self.optimizer.zero_grad()
        with torch.no_grad():
            for name, p in self.trained.items():
                if self.masters[name] is not p:
                    p.copy_(self.masters[name])

    @torch.no_grad()
    def _update_ema(self, of_frozen: bool) -> None:
        """Move the averages of what is trained towards it; copy what is frozen."""
        self.num_updates += 1
        s = max(0, self.num_updates - NO_DECAY_BEFORE)
        one_minus_decay = 1 - (min(self.config.ema.decay, (1 + s) / (10 + s)) if s else 0.0)
        for name, p in self.named_parameters():
            if p.requires_grad:
                average = self.ema[name]
                average.sub_(one_minus_decay * (average - p.to(average.dtype)))
            elif of_frozen:
                self.ema[name].copy_(p)
