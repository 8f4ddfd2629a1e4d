"""Training configuration: frozen dataclasses, read from YAML with dotted overrides, and written back resolved.

`load_config("configs/stage1_512.yaml", ["optim.lr=1e-4"])` refuses unknown keys and names the nearest known one.
"""

import dataclasses
import difflib
import functools
import math
import types
import typing
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal

import yaml


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Where the weights come from."""

    path: str = "tiny"
    """"tiny", a Hub id or a folder in the authors' layout (`uniworld convert` makes a starting one)."""
    flux: str | None = None
    """FLUX.1-dev folder or Hub id; by default `flux/` inside the model's folder."""
    siglip: str | None = None
    """SigLIP2 folder or Hub id; by default `siglip/` inside the model's folder."""
    connectors: str | None = None
    """Folder with `denoise_projector.bin` or `siglip_projector.bin` of an earlier stage, to start from."""
    use_t5: bool = False
    """Condition on T5 states too. The released model never trained with T5."""
    attention: str = "auto"
    """Attention backend of the DiT; see `uniworld env`."""
    references: Literal["siglip", "vae"] = "siglip"
    """What stands for a reference picture where the stage inserts it: the semantic encoder's states, or the picture's
    packed VAE latents, whose connector `vae_projector` then learns where `siglip_projector` would."""
    num_queries: int = 0
    """Tokens after the VLM's input, learned with its connector; their states replace the prompt's. 0: none."""
    lora_rank: int | None = None
    """Train LoRA factors of this rank on the DiT's attention (needs peft) in place of the weights that the stage names
    there; its connectors learn as without."""

    @property
    def needs_live_encoding(self) -> bool:
        """Whether precomputed states lack what the model is conditioned on."""
        return self.references != "siglip" or self.num_queries > 0


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """One source of training samples."""

    path: str
    """`data.txt` of the authors' layout, WebDataset shards ("shard-{000..031}.tar") or a parquet/datasets folder."""
    kind: Literal["auto", "authors", "webdataset", "parquet"] = "auto"
    """How to read `path`; "auto" goes by its suffix."""
    weight: float = 1.0
    """Share of this source among the samples drawn, relative to the other sources' weights."""
    columns: tuple[str, ...] = ()
    """Of a table, "prompt=edit_instruction": its own names of the columns."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What is trained on, and in which shape."""

    sources: tuple[SourceConfig, ...] = ()
    """At least one, unless `precomputed` is given."""
    precomputed: tuple[str, ...] | None = None
    """Folders written by `uniworld precompute`, one or a list; they replace `sources` and the encoders."""
    anchor_px: int = 512 * 512
    """Area of the target pictures in pixels."""
    num_ratios: Literal[1, 5, 7, 9, 11] = 11
    """Aspect ratios the targets are sorted into."""
    target_fit: Literal["stretch", "crop"] = "stretch"
    """How a target meets its bucket's ratio: stretched as in the authors' training, or cut at the centre."""
    vlm_max_px: int = 448 * 448
    """Area of a reference picture as the VLM sees it, in pixels."""
    batch_size: int = 1
    """Samples a step and rank; all of one bucket."""
    drop_prompt_rate: float = 0.0
    """Share of samples whose instruction is dropped (for classifier-free guidance); pictures stay."""
    drop_t5_rate: float = 0.0
    """Share of micro-batches that go without T5 states where `model.use_t5` gives them."""
    drop_siglip_rate: float = 0.0
    """Share of micro-batches that go without semantic tokens, so that all is drawn from the VLM's states."""
    region_weight: Literal["none", "linear", "exp", "log", "sqrt"] = "log"
    """How the loss weight of edited latents grows with total area / edited area."""
    focus_weight: float = 1.0
    """The least loss weight of latents in the `focus` boxes of a sample, of what matters most in its target."""
    keep_scattered: bool = False
    """Keep many small scattered edits in the region mask, which the authors' rule drops."""
    max_bad_share: float = 0.01
    """Stop the run with a table when more than this share of the samples read could not be used."""
    num_workers: int = 2
    """Loader processes a rank; 0 loads in the training process."""


@dataclass(frozen=True, kw_only=True)
class StageConfig:
    """Which parameters learn."""

    preset: Literal["stage1", "stage2", "siglip_mlp", "lora", "custom"] = "stage1"
    """stage1: the VLM connector. stage2: both connectors and the DiT's image branch. siglip_mlp: that MLP alone.
    lora: factors of `model.lora_rank` on the DiT alone."""
    patterns: tuple[str, ...] = ()
    """Glob patterns over parameter names, for preset "custom"."""
    use_siglip: bool | None = None
    """Insert semantic tokens (or what `model.references` names); by default off in stage 1, on else."""


@dataclass(frozen=True, kw_only=True)
class FlowConfig:
    """How noise levels are drawn."""

    density: Literal["logit_normal", "mode", "uniform"] = "logit_normal"
    """Density of sigma before the shift."""
    logit_mean: float = 0.0
    logit_std: float = 1.0
    mode_scale: float = 1.29
    weighting: Literal["none", "sigma_sqrt", "cosmap"] = "none"
    """Loss weight as a function of sigma."""
    guidance_scale: float = 1.0
    """Guidance embedding during training."""
    rollout_share: float = 0.0
    """Of the micro-batches, learned from what the model itself has drawn: the second of two sampling steps."""


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """Optimizer and schedule."""

    name: Literal["adamw", "prodigy", "adamw8bit", "muon"] = "adamw"
    """muon, of `train-part` alone: Muon for the weights of linear layers, AdamW for all else."""
    lr: float = 1e-3
    """Peak learning rate; 1.0 for Prodigy."""
    muon_lr: float = 0.02
    """Of `muon`: peak learning rate of the matrices, whose update has a spectral norm of about 1."""
    betas: tuple[float, float] = (0.9, 0.99)
    eps: float = 1e-8
    weight_decay: float = 0.0
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """After the warm-up: hold, fall linearly or along a cosine to 0 at `num_steps`."""
    warmup_steps: int = 0
    clip_norm: float = 1.0
    """Largest norm of the gradient over all trained parameters; 0 never clips."""

    def __post_init__(self):
        if self.muon_lr <= 0:
            raise ValueError(f"optim.muon_lr={self.muon_lr}: must be above 0")


@dataclass(frozen=True, kw_only=True)
class ShardingConfig:
    """DeepSpeed."""

    zero_stage: Literal[1, 2, 3] = 2
    """Split over the ranks: 1 the optimizer, 2 gradients too, 3 parameters too."""
    dtype: Literal["bf16", "fp32"] = "bf16"
    """Compute dtype; ZeRO keeps an fp32 master copy of what is trained in bf16."""
    accumulation_steps: int = 1
    """Micro-batches whose gradients are summed before an update."""
    checkpoint_blocks: tuple[Literal["double", "single"], ...] = ()
    """Kinds of DiT block whose activations are recomputed in the backward pass."""
    compile_blocks: bool = False
    """Run the DiT's blocks through `torch.compile`; with ZeRO 1 and 2 only."""
    offload_optimizer: bool = False
    """Keep fp32 master weights, optimizer state and their average in host memory, and let the CPU update them: less GPU
    memory, longer steps. With ZeRO 1 and 2 and optim.name adamw."""


@dataclass(frozen=True, kw_only=True)
class EMAConfig:
    """Exponential moving average of the trained parameters, sharded over the ranks."""

    enabled: bool = True
    decay: float = 0.999
    min_decay: float = 0.0
    update_after_step: int = 0
    warmup: bool = False
    """1 - (1 + s / inv_gamma)^-power instead of (1 + s) / (10 + s)."""
    inv_gamma: float = 1.0
    power: float = 2 / 3
    source: Literal["master", "params"] = "master"
    """Average the optimizer's fp32 master weights, or the compute parameters as the original does."""


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When and how to save."""

    every_steps: int = 500
    keep: int = 3
    """Checkpoints kept; older ones are deleted once a newer one is complete."""
    asynchronous: bool = False
    """Write in the background while training goes on."""
    resume: str = "auto"
    """From the run's newest checkpoint ("auto"), anew ("never"), or, while there is none, from a run or checkpoint."""


@dataclass(frozen=True, kw_only=True)
class ValidationConfig:
    """Pictures drawn during training with the EMA weights."""

    every_steps: int = 0
    """0 draws none."""
    prompts: tuple[str, ...] = ()
    images: tuple[str, ...] = ()
    """One reference picture a prompt, or none at all."""
    num_inference_steps: int = 28
    guidance_scale: float = 3.5
    seed: int = 0


BOUNDS = (
    (
        "num_steps max_bad_steps log_every_steps data.batch_size data.anchor_px sharding.accumulation_steps "
        "checkpoint.every_steps checkpoint.keep validation.num_inference_steps",
        *(1, math.inf, "at least 1"),
    ),
    ("seed model.num_queries data.num_workers optim.warmup_steps optim.clip_norm", 0, math.inf, "at least 0"),
    ("ema.update_after_step validation.every_steps", 0, math.inf, "at least 0"),
    ("data.focus_weight", 1, 1000, "from 1 to 1000"),
    ("data.drop_prompt_rate data.drop_t5_rate data.drop_siglip_rate data.max_bad_share", 0, 1, "from 0 to 1"),
    ("flow.rollout_share ema.decay ema.min_decay", 0, 1, "from 0 to 1"),
)


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """A training run."""

    run_dir: str = "runs/stage1"
    """Checkpoints, metrics and the resolved config go here."""
    num_steps: int = 1000
    """Optimizer steps in all; one that was skipped counts."""
    seed: int = 0
    max_bad_steps: int = 10
    """Stop after this many steps in a row with a loss or gradient that is not finite."""
    log_every_steps: int = 1
    tensorboard: bool = False
    wandb_project: str | None = None
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    stage: StageConfig = field(default_factory=StageConfig)
    flow: FlowConfig = field(default_factory=FlowConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    sharding: ShardingConfig = field(default_factory=ShardingConfig)
    ema: EMAConfig = field(default_factory=EMAConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)

    def __post_init__(self):
        for names, low, high, allowed in BOUNDS:
            for name in names.split():
                value = functools.reduce(getattr, name.split("."), self)
                if not low <= value <= high:
                    raise ValueError(f"{name}={value}: must be {allowed}")
        if self.optim.lr <= 0:
            raise ValueError(f"optim.lr={self.optim.lr}: must be above 0")
        if self.optim.name == "muon":
            raise ValueError("optim.name=muon: is of train-part alone; stages have adamw, prodigy or adamw8bit")
        for name in ("compile_blocks", "offload_optimizer"):
            if getattr(self.sharding, name) and self.sharding.zero_stage == 3:
                raise ValueError(f"sharding.{name}=True: needs sharding.zero_stage 1 or 2, not 3")
        if self.sharding.offload_optimizer and self.optim.name != "adamw":
            raise ValueError(f"sharding.offload_optimizer=True: needs optim.name adamw, not {self.optim.name}")
        for i, source in enumerate(self.data.sources):
            if not 0 < source.weight < math.inf:
                raise ValueError(f"data.sources[{i}].weight={source.weight}: must be above 0")
        if (self.stage.preset == "custom") != bool(self.stage.patterns):
            raise ValueError(f"stage.patterns={list(self.stage.patterns)}: go with preset custom, and only with it")
        if self.stage.preset == "lora" and self.model.lora_rank is None:
            raise ValueError("stage.preset=lora: needs model.lora_rank")
        if self.data.precomputed and self.model.needs_live_encoding:
            raise ValueError("data.precomputed: model.references=vae and model.num_queries need live encoding")
        if self.validation.images and len(self.validation.images) != len(self.validation.prompts):
            raise ValueError("validation.images: give one a prompt, or none")


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> TrainConfig:
    """Read a YAML file, apply `a.b=value` overrides (values are YAML), and check everything.

    Raises: ValueError naming the key, the value and what is allowed; FileNotFoundError.
    """
    return from_dict(TrainConfig, read_yaml(path, overrides))


def read_yaml(path: str | Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The nested dicts of a YAML file with `a.b=value` overrides applied."""
    if not (path := Path(path)).is_file():
        raise FileNotFoundError(f"{path}: no such config file")
    try:
        tree = yaml.safe_load(path.read_text()) or {}
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: not YAML ({' '.join(str(error).split())})") from None
    if not isinstance(tree, dict):
        raise ValueError(f"{path}: must be a mapping, got {tree!r:.80}")
    return overridden(tree, overrides)


def overridden(tree: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Nested dicts with `a.b=value` overrides applied, in place."""
    for override in overrides:
        _override(tree, override)
    return tree


def _override(tree: dict[str, Any], override: str) -> None:
    dotted, equals, text = override.partition("=")
    if not equals:
        raise ValueError(f"override {override!r}: must be key=value, such as optim.lr=1e-4")
    *parents, last = dotted.split(".")
    for parent in parents:
        tree = tree.setdefault(parent, {})
        if not isinstance(tree, dict):
            raise ValueError(f"override {override!r}: {parent} is no section")
    try:
        tree[last] = yaml.safe_load(text)
    except yaml.YAMLError as error:
        problem = getattr(error, "problem", None) or "a mistake"
        raise ValueError(f"override {override!r}: the value is not YAML ({problem}); quote it for the shell") from None


def from_dict(cls: type, tree: Any, where: str = "") -> Any:
    """Build a config dataclass from nested dicts, refusing unknown keys and wrong types."""
    if not isinstance(tree, dict):
        raise ValueError(f"{where or 'config'}: must be a mapping, got {tree!r}")
    known = {f.name for f in fields(cls)}
    for key in tree:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(sorted(known))}"
            raise ValueError(f"{_join(where, key)}: unknown key; {hint}")
    hints = typing.get_type_hints(cls)
    return cls(**{key: _convert(hints[key], value, _join(where, key)) for key, value in tree.items()})


def to_dict(config: Any) -> dict[str, Any]:
    """Nested plain dicts and lists, as YAML and JSON take them."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: plain(v) for k, v in value.items()}
        return [plain(v) for v in value] if isinstance(value, (list, tuple)) else value

    return plain(dataclasses.asdict(config))


def to_yaml(config: Any) -> str:
    """The resolved config, every default written out."""
    return yaml.safe_dump(to_dict(config), sort_keys=False)


def _join(where: str, key: Any) -> str:
    return f"{where}.{key}" if where else str(key)


def _convert(hint: Any, value: Any, where: str) -> Any:
    """Check `value` against a field's type; ints pass as floats, and YAML's "1e-4" strings as the floats they are."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if is_dataclass(hint):
        return from_dict(hint, value, where)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        return _convert(next(a for a in args if a is not type(None)), value, where)
    if origin is Literal:
        if value not in args or isinstance(value, bool):
            raise ValueError(f"{where}={value!r}: must be one of {', '.join(map(str, args))}")
        return value
    if origin is tuple:
        return _convert_tuple(args, value, where)
    if hint is float:
        value = _as_float(value)
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        raise ValueError(f"{where}={value!r}: must be {hint.__name__}")
    return value


def _convert_tuple(args: tuple, value: Any, where: str) -> tuple:
    value = (value,) if isinstance(value, str) and args == (str, ...) else value  # one text for a list of it
    if not isinstance(value, (list, tuple)):
        raise ValueError(f"{where}={value!r}: must be a list")
    if args[-1] is Ellipsis:
        return tuple(_convert(args[0], v, f"{where}[{i}]") for i, v in enumerate(value))
    if len(value) != len(args):
        raise ValueError(f"{where}={value!r}: must have {len(args)} entries")
    return tuple(_convert(arg, v, f"{where}[{i}]") for i, (arg, v) in enumerate(zip(args, value)))


def _as_float(value: Any) -> Any:
    if isinstance(value, (int, str)) and not isinstance(value, bool):  # YAML 1.1 reads 1e-4 without a dot as text
        try:
            return float(value)
        except ValueError:
            return value
    return value
