"""What the paper takes as given, trained from nothing for the model `tiny`: one module a part, one loop for all."""

from typing import Any

from uniworld.train.parts.config import PartConfig


def make_part(config: PartConfig) -> Any:
    """The part that `config.part` names, with fresh weights; a `loop.Part`."""
    from uniworld.train.parts.align import Alignment
    from uniworld.train.parts.base import TextToImage
    from uniworld.train.parts.redux import PictureToImage
    from uniworld.train.parts.semantic_encoder import Contrastive
    from uniworld.train.parts.task_head import Routing
    from uniworld.train.parts.vae import Autoencoder
    from uniworld.train.parts.vlm import VisionLanguage

    parts = {
        "vae": Autoencoder,
        "vlm": VisionLanguage,
        "semantic_encoder": Contrastive,
        "base": TextToImage,
        "redux": PictureToImage,
        "align": Alignment,
        "task_head": Routing,
    }
    return parts[config.part](config)
