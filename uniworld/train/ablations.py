"""The paper's questions as trainings of a small model on drawn scenes, and what they are compared on.

All variants take as many optimizer steps and samples: half of them in stage 1 and half in stage 2, which starts from
the averaged weights of stage 1. Variants that train the same thing share the run.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from uniworld.config import TrainConfig, from_dict, overridden

SIZE_PX = 128
NUM_QUERIES = 64
OPTIM = {"stage1": {"lr": 1e-3}, "stage2": {"lr": 1e-4}}
WARMUP_SHARE = 0.05  # of the steps of stage 2
# What makes a run the one that it is called; overrides leave it alone.
OWN_SETTINGS = ("run_dir", "num_steps", "seed", "model.", "stage.", "data.sources", "data.precomputed", "data.region_")


@dataclass(frozen=True, kw_only=True)
class Run:
    """One training. after: the run that it starts from, None for the start. whole: it takes all steps, as there is no
    other stage. overrides: of the config, what makes it differ."""

    stage: str
    after: str | None = None
    whole: bool = False
    overrides: tuple[str, ...] = ()


REGION_WEIGHTS = ("none", "linear", "exp", "sqrt")  # besides the default, log
QUERIES = (f"model.num_queries={NUM_QUERIES}",)
RUNS = {
    "stage1": Run(stage="stage1"),
    "stage1-alone": Run(stage="stage1", whole=True),
    "stage1-queries": Run(stage="stage1", overrides=QUERIES),
    "stage2": Run(stage="stage2", after="stage1"),
    "stage2-queries": Run(stage="stage2", after="stage1-queries", overrides=QUERIES),
    "stage2-no-siglip": Run(stage="stage2", after="stage1", overrides=("stage.use_siglip=false",)),
    "stage2-vae": Run(stage="stage2", after="stage1", overrides=("model.references=vae",)),
    **{
        f"stage2-{kind}": Run(stage="stage2", after="stage1", overrides=(f"data.region_weight={kind}",))
        for kind in REGION_WEIGHTS
    },
}


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One line of a table: the model that `run` ends with, by its averaged weights or the last ones."""

    title: str
    run: str
    ema: bool = True

    @property
    def name(self) -> str:
        """Of its folders."""
        return self.run if self.ema else f"{self.run}-raw"


@dataclass(frozen=True, kw_only=True)
class Ablation:
    """A question of the paper. The first variant is the model as published; all have one budget."""

    question: str
    variants: tuple[Variant, ...]
    by_region: bool = False
    """Whether success is told by the size of the edited region."""


FULL = Variant(title="stage 1, then stage 2", run="stage2")
ABLATIONS = {
    "stage1": Ablation(
        question="Is the VLM connector alone enough?",
        variants=(FULL, Variant(title="stage 1 alone", run="stage1-alone")),
    ),
    "no-siglip": Ablation(
        question="What does the semantic encoder add to the VLM's states?",
        variants=(FULL, Variant(title="no semantic encoder", run="stage2-no-siglip")),
    ),
    "vae": Ablation(
        question="Are semantic states of the reference better than VAE latents?",
        variants=(FULL, Variant(title="VAE latents in its place", run="stage2-vae")),
    ),
    "queries": Ablation(
        question="Are the VLM's own states better than those of learned queries?",
        variants=(FULL, Variant(title=f"{NUM_QUERIES} learned queries", run="stage2-queries")),
    ),
    "region": Ablation(
        question="Does weighting the edited region help, and small regions most?",
        variants=(
            Variant(title="logarithmic", run="stage2"),
            Variant(title="uniform", run="stage2-none"),
            Variant(title="linear", run="stage2-linear"),
            Variant(title="exponential root", run="stage2-exp"),
            Variant(title="quadratic root", run="stage2-sqrt"),
        ),
        by_region=True,
    ),
    "ema": Ablation(
        question="Are averaged weights better than the last ones?",
        variants=(
            Variant(title="averaged weights", run="stage2"),
            Variant(title="last weights", run="stage2", ema=False),
        ),
    ),
}


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What all runs have in common. steps: of a variant in all. data: one source of training samples. overrides: of
    every run's config."""

    start: str
    data: str
    steps: int
    seed: int = 0
    dtype: str = "fp32"
    overrides: tuple[str, ...] = ()

    def __post_init__(self):
        if self.steps < 2:
            raise ValueError(f"steps={self.steps}: must be at least 2, one a stage")
        for override in self.overrides:
            if override.startswith(OWN_SETTINGS):
                raise ValueError(f"override {override!r}: is what the ablation itself sets")


def chain(name: str) -> list[str]:
    """The runs that lead to a run, in order, itself the last."""
    before = RUNS[name].after
    return [*(chain(before) if before is not None else ()), name]


def num_steps(name: str, budget: Budget) -> int:
    """Optimizer steps of a run; those of a chain add up to the budget's."""
    first = budget.steps // 2
    if RUNS[name].whole:
        return budget.steps
    return first if RUNS[name].stage == "stage1" else budget.steps - first


def config_of(name: str, budget: Budget, run_dir: str, model: str) -> TrainConfig:
    """The training config of a run that starts from `model`.

    Raises: ValueError naming the override that does not fit.
    """
    run, steps = RUNS[name], num_steps(name, budget)
    warmup = round(WARMUP_SHARE * steps) if run.stage == "stage2" else 0
    tree = {
        "run_dir": run_dir,
        "num_steps": steps,
        "seed": budget.seed,
        "log_every_steps": 10,
        "model": {"path": model},
        "data": {
            "sources": [{"path": budget.data}],
            "anchor_px": SIZE_PX * SIZE_PX,
            "num_ratios": 1,
            "batch_size": 16,
            "num_workers": 1,
        },
        "stage": {"preset": run.stage},
        "optim": {**OPTIM[run.stage], "warmup_steps": warmup},
        "sharding": {"zero_stage": 1, "dtype": budget.dtype},
        "checkpoint": {"every_steps": 100, "keep": 1},
    }
    return from_dict(TrainConfig, overridden(tree, (*run.overrides, *budget.overrides)))


def runs_of(variants: Sequence[Variant]) -> list[str]:
    """The runs that variants need, each once, in an order that respects `after`."""
    return list(dict.fromkeys(run for variant in variants for run in chain(variant.run)))
