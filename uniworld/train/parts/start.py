"""The checkpoint that stage 1 starts from, put together from the trained parts."""

import shutil
from pathlib import Path

from uniworld.checkpoint.convert import convert
from uniworld.checkpoint.locate import read_json
from uniworld.checkpoint.save import TASK_HEAD_FILE, atomic_folder, write_json
from uniworld.train.parts.sizes import SIZE_PX

# What a request that names none takes: two steps are learned as they are drawn, what is new takes some; no guidance was
# learned.
DRAWING = {"num_inference_steps": 4, "edit_inference_steps": 2, "guidance_scale": 1.0}
PARTS = ("vlm", "redux", "semantic_encoder", "align", "task_head")


def write_start(parts: Path, out: Path) -> Path:
    """A UniWorld checkpoint with FLUX and SigLIP folders and task head in it; replaces `out`.

    The semantic encoder's connector is Redux's, and the VLM's is aligned with it.

    Args:
        parts: folder of the parts' runs, each with its weights in `PART/model`.

    Raises: FileNotFoundError naming the part that is not trained yet.
    """
    vlm, flux, siglip, connectors, head = folders = [parts / name / "model" for name in PARTS]
    for folder in folders:
        if not folder.is_dir():
            raise FileNotFoundError(f"parts: {folder} is not there; train it first")
    with atomic_folder(out, overwrite=True) as temporary:
        made = convert(vlm, flux, temporary / "converted", siglip=siglip, connectors=connectors)
        for path in made.iterdir():
            path.rename(temporary / path.name)
        made.rmdir()
        config = read_json(temporary / "config.json")
        own = {"anchor_px": SIZE_PX**2, "random_weights": False, "use_t5": False, **DRAWING}  # as its stages learn
        own["images_last"] = True  # as its VLM learns
        write_json(temporary / "config.json", config | {"uniworld": own})
        shutil.copytree(flux, temporary / "flux", ignore=shutil.ignore_patterns("transformer", "*_projector.*"))
        shutil.copytree(siglip, temporary / "siglip")
        shutil.copyfile(head / TASK_HEAD_FILE, temporary / TASK_HEAD_FILE)
    return out
