"""Whether parts that come from different folders have the widths that they hand to each other."""

from collections.abc import Mapping
from pathlib import Path

from torch import nn

from uniworld.checkpoint.weights import listed
from uniworld.models.task_head import TaskHead


def check_widths(title: str | Path, parts: Mapping[str, nn.Module], task_head: TaskHead | None) -> None:
    """Raise one ValueError that lists every pair of parts that do not fit, a SigLIP of another size say.

    Args:
        title: the checkpoint's folder, for the error.
        parts: the modules of a `UniWorld` by the name of its field; their weights may be missing still.
    """
    vlm = parts["vlm"].model.config.get_text_config().hidden_size
    dit, text = parts["denoiser"].config, parts["text_encoders"]
    latents = 4 * parts["vae"].model.config.latent_channels  # packed 2x2
    semantic = parts["semantic_encoder"].hidden_size
    pairs = [
        ("denoise_projector", parts["denoise_projector"][0].in_features, "the VLM", vlm),
        ("denoise_projector's output", parts["denoise_projector"][2].out_features, "the DiT", dit.joint_attention_dim),
        ("siglip_projector", parts["siglip_projector"][0].in_features, "SigLIP", semantic),
        ("siglip_projector's output", parts["siglip_projector"][2].out_features, "the DiT", dit.joint_attention_dim),
        ("CLIP", text.clip.config.hidden_size, "the DiT's pooled input", dit.pooled_projection_dim),
        ("packed latents of the VAE", latents, "the DiT's image input", dit.in_channels),
    ]
    if text.has_t5:
        pairs.append(("T5", text.t5.config.d_model, "the DiT's text input", dit.joint_attention_dim))
    if "queries" in parts:
        pairs.append(("queries", parts["queries"].weight.shape[1], "the VLM", vlm))
    if task_head is not None:
        pairs.append(("task head", task_head[0].in_features, "the VLM", vlm))
    problems = [f"{one} is {a} wide, {other} {b}" for one, a, other, b in pairs if a != b]
    if problems:
        raise ValueError(f"{title}: its parts do not fit each other: {listed(problems)}")
