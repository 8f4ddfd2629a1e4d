"""Which parameters learn, as glob patterns over the names in `TrainModel`.

Source: UniWorld-V1, section on training; the authors' `only_img_branch` list.
"""

from fnmatch import fnmatchcase

from torch import nn

from uniworld.config import StageConfig, TrainConfig

IMAGE_BRANCH = (
    "denoiser.transformer_blocks.*.attn.norm_q.*",
    "denoiser.transformer_blocks.*.attn.norm_k.*",
    "denoiser.transformer_blocks.*.attn.to_qkv.*",
    "denoiser.transformer_blocks.*.attn.to_out.*",
    "denoiser.transformer_blocks.*.norm1.linear.*",
    "denoiser.single_transformer_blocks.*.attn.*",
    "denoiser.single_transformer_blocks.*.norm.linear.*",
)
LORA_FACTORS = ("denoiser.*.lora_A.*", "denoiser.*.lora_B.*")
PRESETS: dict[str, tuple[str, ...]] = {
    "stage1": ("denoise_projector.*",),
    "stage2": ("denoise_projector.*", "siglip_projector.*", *IMAGE_BRANCH),
    "siglip_mlp": ("siglip_projector.*",),
    "lora": LORA_FACTORS,
}


def trained_patterns(stage: StageConfig) -> tuple[str, ...]:
    return stage.patterns if stage.preset == "custom" else PRESETS[stage.preset]


def patterns_of(config: TrainConfig) -> tuple[str, ...]:
    """What a run trains: its stage's patterns, with the variant's modules for those of the published model; with LoRA,
    of the DiT the factors alone."""
    patterns = trained_patterns(config.stage)
    if config.stage.preset != "custom":
        patterns = _of_variant(config, patterns)
    if config.model.lora_rank is None or config.stage.preset == "lora":
        return patterns
    return (*(pattern for pattern in patterns if not pattern.startswith("denoiser.")), *LORA_FACTORS)


def _of_variant(config: TrainConfig, patterns: tuple[str, ...]) -> tuple[str, ...]:
    if config.model.references == "vae":
        patterns = tuple(pattern.replace("siglip_projector.", "vae_projector.") for pattern in patterns)
    learns_queries = config.model.num_queries > 0 and "denoise_projector.*" in patterns
    return (*patterns, "queries.*") if learns_queries else patterns


def references_of(config: TrainConfig) -> str:
    """What stands for reference pictures in a run: one of `uniworld.models.references.REFERENCES`."""
    return config.model.references if inserts_siglip(config.stage) else "none"


def inserts_siglip(stage: StageConfig) -> bool:
    """Whether semantic tokens are inserted: not in stage 1, unless the config says so."""
    return stage.preset != "stage1" if stage.use_siglip is None else stage.use_siglip


def freeze_except(model: nn.Module, patterns: tuple[str, ...]) -> list[str]:
    """Let only the parameters that match learn; returns their names in model order.

    Raises: ValueError for a pattern that matches nothing, which is always a mistake.
    """
    names = [name for name, _ in model.named_parameters()]
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ValueError(f"stage.patterns: {pattern!r} matches no parameter")
    trained = []
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(any(fnmatchcase(name, pattern) for pattern in patterns))
        if parameter.requires_grad:
            trained.append(name)
    return trained


def num_trained(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)
