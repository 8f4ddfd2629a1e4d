"""The parts of a training step: draws, schedules, optimizers, blocks, FLOPs and metrics."""

import builtins
import json
import math
import re
import sys
import types
from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from train_fakes import CHANNELS, FLUX, HEIGHT, WIDTH, small_batch, small_config, small_model

from uniworld.config import TrainConfig, from_dict
from uniworld.kernels import registry
from uniworld.models.connectors import Connector
from uniworld.models.flow import image_ids, pack, sigmas
from uniworld.models.flux import FluxConfig, FluxTransformer
from uniworld.train.flops import StepFlops, sample_tokens
from uniworld.train.metrics import METRICS_FILE, Metrics, described, read_metrics
from uniworld.train.model import TrainModel
from uniworld.train.optim import learning_rate, make_optimizer
from uniworld.train.stages import PRESETS, freeze_except
from uniworld.train.step import draw, drop_states, rank_generator, rolls_out, training_loss


def loss_and_gradients(config, batch):
    model = small_model(config)
    loss = training_loss(model, batch, config.flow, torch.Generator().manual_seed(5))
    loss.backward()
    return loss.item(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


# --- draws


def test_a_draw_depends_on_its_generator_alone():
    config, batch = small_config(), small_batch(small_config(), 0, size=2)
    first = draw(batch, config.flow, torch.Generator().manual_seed(3))
    torch.manual_seed(99)
    again = draw(batch, config.flow, torch.Generator().manual_seed(3))
    for name in ("sigma", "noise", "latents"):
        assert torch.equal(getattr(first, name), getattr(again, name))
    assert first.sigma.shape == (2,) and first.noise.shape == first.latents.shape == batch.latent_mean.shape
    assert not torch.equal(first.noise, draw(batch, config.flow, torch.Generator().manual_seed(4)).noise)


def test_latents_are_samples_of_the_posterior():
    batch = small_batch(small_config(), 0)
    drawn = [draw(batch, small_config().flow, rank_generator(0, r)).latents for r in range(400)]
    stacked = torch.stack(drawn)
    assert (stacked.mean(0) - batch.latent_mean).abs().max() < 5 * batch.latent_std.max() / 20
    assert stacked.std(0) / batch.latent_std == pytest.approx(torch.ones_like(batch.latent_std), rel=0.2)


def test_ranks_and_seeds_draw_differently_and_repeatably():
    states = {(s, r): rank_generator(s, r).get_state() for s in (0, 1) for r in range(8)}
    assert len({bytes(state.numpy()) for state in states.values()}) == 16
    assert torch.equal(states[1, 5], rank_generator(1, 5).get_state())


def test_level_weighting_reaches_the_loss():
    batch = small_batch(small_config(), 0)
    plain, weighted = small_config(), small_config(flow={"weighting": "cosmap"})
    losses = [training_loss(small_model(c), batch, c.flow, torch.Generator().manual_seed(5)) for c in (plain, weighted)]
    sigma = draw(batch, plain.flow, torch.Generator().manual_seed(5)).sigma.item()
    factor = 2 / (math.pi * (1 - 2 * sigma + 2 * sigma**2))
    assert losses[1].item() == pytest.approx(factor * losses[0].item(), rel=1e-5)


def test_t5_states_are_dropped_on_all_ranks_at_once():
    batch = replace(small_batch(small_config(), 0), t5_states=torch.ones(1, 3, 24))
    config = small_config(data={"drop_t5_rate": 0.3})
    dropped = [drop_states(batch, config, step, number).t5_states is None for step in range(300) for number in (0, 1)]
    assert sum(dropped) / len(dropped) == pytest.approx(0.3, abs=0.06)
    assert dropped == [drop_states(batch, config, s, n).t5_states is None for s in range(300) for n in (0, 1)]
    assert drop_states(batch, small_config(), 0, 0) is batch
    other = small_config(seed=1, data={"drop_t5_rate": 0.3})
    assert dropped != [drop_states(batch, other, s, n).t5_states is None for s in range(300) for n in (0, 1)]


def test_semantic_states_are_dropped_by_a_rate_of_their_own():
    config = small_config("stage2", data={"drop_siglip_rate": 0.4, "drop_t5_rate": 0.4})
    batch = replace(small_batch(config, 0), t5_states=torch.ones(1, 3, 24))
    left = [drop_states(batch, config, step, 0) for step in range(400)]
    gone = {(b.t5_states is None, b.siglip_states is None) for b in left}
    assert batch.siglip_states is not None and len(gone) == 4  # each without the other, too
    assert sum(b.siglip_states is None for b in left) / 400 == pytest.approx(0.4, abs=0.06)
    model, without = small_model(config), next(b for b in left if b.siglip_states is None and b.t5_states is None)
    bare = replace(batch, siglip_states=None, t5_states=None)
    losses = [training_loss(model, b, config.flow, torch.Generator().manual_seed(5)) for b in (without, bare, batch)]
    assert losses[0] == losses[1] != losses[2]


def test_a_rollout_learns_the_last_of_two_sampling_steps():
    config, batch = small_config(), small_batch(small_config(), 0, size=2)
    model = small_model(config)
    drawn = draw(batch, config.flow, torch.Generator().manual_seed(5))
    levels = sigmas(2, batch.num_image_tokens)

    def velocity(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        text, ids = model.condition(batch), image_ids(8 * HEIGHT, 8 * WIDTH)
        level, guidance = sigma.expand(2), torch.full((2,), config.flow.guidance_scale)
        return model.denoiser(x, text.txt, text.pooled, level, guidance, ids, text.lengths_if_padded)

    x = pack(drawn.noise)
    for sigma, following in zip(levels, levels[1:]):
        x = x + (following - sigma) * velocity(x, sigma)
    weight = pack(batch.region_weight.expand(2, CHANNELS, HEIGHT, WIDTH).contiguous())
    wanted = (weight * (x - pack(drawn.latents)) ** 2).mean()
    loss = training_loss(model, batch, config.flow, torch.Generator().manual_seed(5), rollout=True)
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-4)
    loss.backward()
    assert any(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters())


def test_rollouts_are_a_share_of_the_batches_on_all_ranks_at_once():
    config = small_config(flow={"rollout_share": 0.4})
    rolled = [rolls_out(config, step, number) for step in range(300) for number in (0, 1)]
    assert sum(rolled) / len(rolled) == pytest.approx(0.4, abs=0.06)
    assert not any(rolls_out(small_config(), step, 0) for step in range(100))


# --- optimizers and schedules


def run_config(**optim):
    return from_dict(TrainConfig, {"num_steps": 100, "optim": optim})


def test_warm_up_rises_linearly_to_the_peak():
    config = run_config(lr=2.0, warmup_steps=4)
    assert [learning_rate(config, step) for step in (1, 2, 3, 4, 5, 100)] == [0.5, 1.0, 1.5, 2.0, 2.0, 2.0]


def test_linear_and_cosine_schedules_fall_to_zero():
    for name, middle in (("linear", 1.0), ("cosine", 1.0)):
        config = run_config(lr=2.0, warmup_steps=20, schedule=name)
        rates = [learning_rate(config, step) for step in range(1, 101)]
        assert rates[19] == rates[20] == 2.0
        assert rates[60] == pytest.approx(middle)  # step 61 is half way from 21 to 101
        assert all(a > b for a, b in zip(rates[20:], rates[21:]))
        assert 0 < rates[-1] < 0.03
    cosine = run_config(lr=2.0, schedule="cosine")
    assert learning_rate(cosine, 26) == pytest.approx(1 + math.cos(math.pi / 4))


def test_without_warm_up_the_first_step_has_the_peak():
    assert learning_rate(run_config(lr=0.5, schedule="cosine"), 1) == 0.5


def test_adamw_is_fused_and_takes_the_config():
    parameter = torch.nn.Parameter(torch.ones(3))
    optimizer = make_optimizer(run_config(lr=0.1, betas=[0.5, 0.6], weight_decay=0.7, eps=0.01).optim, [parameter])
    taken = {name: optimizer.defaults[name] for name in ("fused", "lr", "betas", "weight_decay", "eps")}
    assert taken == {"fused": True, "lr": 0.1, "betas": (0.5, 0.6), "weight_decay": 0.7, "eps": 0.01}


@pytest.mark.parametrize("name, package", [("adamw8bit", "bitsandbytes"), ("prodigy", "prodigyopt")])
def test_a_missing_optimizer_package_is_named(monkeypatch, name, package):
    imported = builtins.__import__

    def without(module, *args, **kwargs):
        if module.split(".")[0] == package:
            raise ModuleNotFoundError(f"No module named '{package}'", name=package)
        return imported(module, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ValueError, match=f"optim.name={name}: {package} is missing; pip install {package}"):
        make_optimizer(run_config(name=name).optim, [torch.nn.Parameter(torch.ones(1))])


@pytest.mark.parametrize("weight_decay", [0.0, 0.01])
def test_prodigy_on_one_rank_is_prodigyopts(weight_decay):
    prodigyopt = pytest.importorskip("prodigyopt")
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(5, 7, generator=generator)
    mine, theirs = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.clone())
    settings = {"lr": 1.0, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": weight_decay}
    ours = make_optimizer(run_config(name="prodigy", **settings).optim, [mine])
    reference = prodigyopt.Prodigy([theirs], use_bias_correction=True, safeguard_warmup=True, **settings)
    for _ in range(100):
        for parameter in (mine, theirs):
            parameter.grad = 2 * (parameter.detach() - 3)
        ours.step()
        reference.step()
    assert (mine - start).abs().max() > 0.1  # the estimate grew from d0 = 1e-6
    assert (mine - theirs).abs().max() < 1e-4
    assert ours.param_groups[0]["d"] == pytest.approx(float(reference.param_groups[0]["d"]), rel=1e-4)


# --- blocks


@pytest.mark.parametrize("kinds", [["double"], ["single"], ["double", "single"]])
def test_recomputing_blocks_changes_no_gradient(kinds):
    plain = small_config("stage2")
    batch = small_batch(plain, 1, size=2)
    loss, gradients = loss_and_gradients(plain, batch)
    recomputed = small_config("stage2", sharding={"dtype": "fp32", "checkpoint_blocks": kinds})
    loss_again, again = loss_and_gradients(recomputed, batch)
    assert loss_again == loss and again.keys() == gradients.keys()
    assert all(torch.equal(again[name], gradients[name]) for name in gradients)


def test_recomputing_keeps_fewer_tensors():
    def saved_bytes(kinds):
        config = small_config("stage2", sharding={"dtype": "fp32", "checkpoint_blocks": kinds})
        kept: dict[int, int] = {}
        model = small_model(config)
        parameters = {p.data_ptr() for p in model.parameters()}

        def pack(tensor):
            if tensor.data_ptr() not in parameters:
                kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            training_loss(model, small_batch(config, 1), config.flow, torch.Generator().manual_seed(5))
        return sum(kept.values())

    all_kept, no_single, none = saved_bytes([]), saved_bytes(["single"]), saved_bytes(["single", "double"])
    assert none < no_single < all_kept
    assert none < 0.6 * all_kept


@pytest.mark.parametrize("kinds", [[], ["double", "single"]])
def test_compiled_blocks_have_our_ops_inside_the_graph(monkeypatch, kinds):
    """Every block is one graph, forward and backward, also where it is recomputed. (Padded batches leave it once.)"""
    ops, compiled = set(), torch.compile

    def note(graph, _):
        ops.update(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph

    monkeypatch.setattr(torch, "compile", lambda function: compiled(function, fullgraph=True, backend=note))
    config = small_config("stage2", sharding={"compile_blocks": True, "checkpoint_blocks": kinds, "dtype": "fp32"})
    torch._dynamo.reset()
    loss_and_gradients(config, small_batch(config, 1))
    ours = ("qk_norm_rope", "gate_residual_adaln")
    assert {f"uniworld.{name}.default" for name in ours} <= ops


@pytest.mark.slow
def test_compiled_blocks_give_the_same_gradients():
    """Also where the batch is padded, and its length changes from batch to batch."""
    plain = small_config("stage2")
    settings = {"compile_blocks": True, "checkpoint_blocks": ["single"], "dtype": "fp32"}
    compiled = small_config("stage2", sharding=settings)
    torch._dynamo.reset()
    for size, length in ((1, 9), (1, 10), (1, 13), (2, 9), (2, 12)):
        batch = small_batch(plain, 1, size=size, length=length)
        loss, gradients = loss_and_gradients(plain, batch)
        loss_again, again = loss_and_gradients(compiled, batch)
        assert loss_again == pytest.approx(loss, rel=1e-5)
        for name, gradient in gradients.items():
            assert (again[name] - gradient).norm() <= 1e-4 * gradient.norm() + 1e-8, name


@pytest.mark.slow
def test_changing_lengths_stop_compiling_anew():
    config = small_config("stage2", sharding={"compile_blocks": True, "dtype": "fp32"})
    model, generator = small_model(config), torch.Generator().manual_seed(5)
    torch._dynamo.reset()
    compiled = []
    for length in (9, 10, 11, 12, 14, 17, 21):
        for size in (1, 2):
            training_loss(model, small_batch(config, 1, size=size, length=length), config.flow, generator).backward()
        compiled.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert compiled[0] > 0 and compiled[3] == compiled[-1]


# --- FLOPs


def test_flops_of_the_full_model_are_three_times_the_forward_pass():
    with torch.device("meta"):
        flux = FluxTransformer(FluxConfig())
        model = TrainModel(flux, Connector(3584, 12288, 4096), Connector(1152, 12288, 4096))
    batch = small_batch(small_config(), 0, length=300)
    S = batch.num_image_tokens + 300
    forward = 1.291e10 * S + 7.004e5 * S**2
    projector = 300 * 2 * (3584 * 12288 + 12288 * 4096)
    count = StepFlops(model)(batch)
    assert count == pytest.approx(3 * (forward + projector), rel=0.01)
    freeze_except(model, PRESETS["stage1"])
    frozen = StepFlops(model)(batch)
    assert frozen == pytest.approx(2 * 1.291e10 * S + 3 * 7.004e5 * S**2 + 3 * projector, rel=0.01)


@pytest.mark.parametrize("stage", ["stage1", "stage2"])
def test_flops_are_those_of_the_matrix_products_that_run(stage):
    config = small_config(stage)
    model, batch = small_model(config), small_batch(config, 0, length=120)
    with registry.use_backend("torch"), FlopCounterMode(display=False) as counter:
        training_loss(model, batch, config.flow, torch.Generator().manual_seed(5)).backward()
    products = counter.get_flop_counts()["Global"]
    linear = sum(flops for op, flops in products.items() if str(op) in ("aten.mm", "aten.addmm"))
    S = sum(sample_tokens(batch)[0])
    attention = 3 * 4 * (FLUX.num_layers + FLUX.num_single_layers) * FLUX.dim * S * S
    # What is not counted: modulation and embeddings of vectors, once a sample, here 1 in 130 tokens.
    assert StepFlops(model)(batch) - attention == pytest.approx(linear, rel=0.1)


def test_tokens_leave_padding_out():
    batch = small_batch(small_config("stage2"), 0, size=2)
    assert sample_tokens(batch) == [(6, 9 + 5), (6, 8 + 5)]


# --- metrics

RECORD = {"loss": 0.5, "step_s": 2.0, "images_per_s": 4.0, "tokens_per_s": 5000.0, "memory_gib": 1.5, "mfu": 0.4}


def logged(tmp_path, steps, first_step=0, **settings):
    config = from_dict(TrainConfig, {"run_dir": str(tmp_path / "run"), "num_steps": 10, **settings})
    metrics = Metrics(config, rank=0, first_step=first_step)
    for step in steps:
        metrics.log(step, RECORD | {"loss": float(step)})
    metrics.close()
    return config.run_dir


def test_a_resumed_run_has_every_step_once(tmp_path):
    run = logged(tmp_path, range(1, 8))
    with open(f"{run}/{METRICS_FILE}", "a") as file:
        file.write('{"step": 8, "lo')  # cut off by a kill
    logged(tmp_path, range(5, 9), first_step=4)
    assert [r["step"] for r in read_metrics(run)] == list(range(1, 9))
    assert [r["loss"] for r in read_metrics(run)] == [float(s) for s in range(1, 9)]


def test_what_is_not_finite_is_still_json(tmp_path):
    config = from_dict(TrainConfig, {"run_dir": str(tmp_path)})
    metrics = Metrics(config, rank=0, quiet=True)
    metrics.log(1, RECORD | {"loss": math.nan, "grad_norm": math.inf})
    metrics.close()
    text = (tmp_path / METRICS_FILE).read_text()
    record = json.loads(text, parse_constant=lambda c: pytest.fail(f"{c} is no JSON"))
    assert record["loss"] is None and record["grad_norm"] is None and record["step"] == 1


def test_other_ranks_write_nothing(tmp_path):
    metrics = Metrics(from_dict(TrainConfig, {"run_dir": str(tmp_path / "run")}), rank=1)
    metrics.log(1, RECORD)
    metrics.close()
    assert not (tmp_path / "run").exists()


def test_a_line_says_what_matters(tmp_path, capsys):
    text = described(RECORD | {"skipped_steps": 2, "bad_samples": 3})
    assert text == (
        "loss 0.5000  2.00 s/step  4.00 img/s  5,000 tok/s  1.5 GiB  MFU 40%  2 skipped  3 bad samples"
    )
    logged(tmp_path, [1, 2, 10])
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("step 1/10  loss 1.0000") and lines[-1].startswith("step 10/10  loss 10.0000")
    assert len(lines) == 2  # a log that is no terminal gets a line every 10 s, and the last


def test_bar_and_figures_fit_a_narrow_terminal(tmp_path, monkeypatch, capsys):
    for name, value in {"FORCE_COLOR": "1", "TERM": "xterm", "COLUMNS": "80"}.items():
        monkeypatch.setenv(name, value)
    logged(tmp_path, [1, 2])
    lines = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", capsys.readouterr().err).replace("\r", "\n").splitlines()
    assert lines[-2].startswith("training") and " 2/10 " in lines[-2]
    assert lines[-1].strip() == described(RECORD | {"loss": 2.0})
    assert "MFU 40%" in lines[-1] and max(map(len, lines)) <= 80


def test_tensorboard_that_is_missing_is_named(tmp_path):
    try:
        import tensorboard  # noqa: F401
    except ModuleNotFoundError:
        with pytest.raises(ValueError, match="tensorboard=true: pip install tensorboard"):
            logged(tmp_path, [1], tensorboard=True)
    else:
        run = logged(tmp_path, [1, 2], tensorboard=True)
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        events = EventAccumulator(f"{run}/tensorboard")
        events.Reload()
        assert [e.value for e in events.Scalars("train/loss")] == [1.0, 2.0]


def test_wandb_gets_the_config_and_every_record(tmp_path, monkeypatch):
    """Against a stand-in for the package: a run of the folder's name, which a resume goes on with."""
    calls = []
    run = types.SimpleNamespace(log=lambda record, step: calls.append((step, record["loss"])), finish=calls.clear)
    started = {}
    fake = types.ModuleType("wandb")
    fake.init = lambda **arguments: started.update(arguments) or run
    monkeypatch.setitem(sys.modules, "wandb", fake)
    config = from_dict(TrainConfig, {"run_dir": str(tmp_path / "mine"), "wandb_project": "curves"})
    metrics = Metrics(config, rank=0, quiet=True)
    metrics.log(3, RECORD)
    assert calls == [(3, 0.5)]
    assert (started["project"], started["id"], started["resume"]) == ("curves", "mine", "allow")
    assert started["config"]["optim"]["lr"] == config.optim.lr
    metrics.close()
    assert calls == []
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match="wandb_project=curves: pip install wandb"):
        Metrics(config, rank=0, quiet=True)
