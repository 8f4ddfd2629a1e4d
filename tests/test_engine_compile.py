"""Compiled blocks: equal to eager ones, one graph a kind for all sizes, and right where LoRA stands beside some."""

import pytest
import torch
from parallel_worker import PASSES, prepared, small_flux
from safetensors.torch import save_file
from test_parallel import Threads
from test_quantize import needs_bitsandbytes
from torch._dynamo.testing import CompileCounterWithBackend

from uniworld.engine import Engine, parallel
from uniworld.engine.compiled import compile_blocks, warm_up
from uniworld.engine.lora import Loras
from uniworld.engine.offload import Stream, turns_of
from uniworld.engine.quantize import quantized_copy


def num_graphs(counter):
    """Those that compute something; choosing the attention backend counts as an empty one."""
    return sum(any(node.op == "call_function" for node in graph.graph.nodes) for graph in counter.graphs)


SIZES = {"first": ((4, 4), 6, None), "second": ((3, 5), 7, None), "third": ((5, 8), 11, None)}


@pytest.fixture
def counted(monkeypatch):
    """Makes `torch.compile` trace as it does for Inductor, run what it traced, and count the graphs."""
    counter, compiled = CompileCounterWithBackend("aot_eager"), torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, **how: compiled(function, backend=counter, **how))
    for name, size in SIZES.items():
        monkeypatch.setitem(PASSES, name, size)
    torch._dynamo.reset()
    return counter


def assert_equal_to_eager(compiled, eager, name):
    arguments = prepared(eager, name)
    torch.testing.assert_close(compiled.denoise(*arguments), eager.denoise(*arguments), rtol=1e-5, atol=1e-5)


@torch.inference_mode()
def test_one_graph_a_kind_serves_all_sizes(counted):
    compiled, eager = small_flux(), small_flux()
    compile_blocks(compiled)
    warm_up(compiled, told=False)
    assert num_graphs(counted) == 2  # a double block and a single one
    ops = {str(node.target) for graph in counted.graphs for node in graph.graph.nodes if node.op == "call_function"}
    assert {"uniworld.qk_norm_rope.default", "uniworld.gate_residual_adaln.default"} <= ops
    for name in SIZES:
        assert_equal_to_eager(compiled, eager, name)
    assert num_graphs(counted) == 2


@pytest.mark.parametrize("name", ["fp8", pytest.param("nf4", marks=needs_bitsandbytes), "offloaded"])
@torch.inference_mode()
def test_quantized_and_offloaded_blocks_are_compiled_once(counted, name):
    compiled, eager = small_flux(), small_flux()
    if name != "offloaded":
        compiled, eager = (quantized_copy(model, name) for model in (compiled, eager))
    else:
        for turns in turns_of(compiled, "cpu"):
            Stream(turns, torch.device("cpu"))
    compile_blocks(compiled)
    warm_up(compiled, told=False)
    assert num_graphs(counted) == 2
    for size in SIZES:
        assert_equal_to_eager(compiled, eager, size)
    assert num_graphs(counted) == 2


@pytest.mark.slow
@torch.inference_mode()
def test_a_padded_batch_leaves_the_graph_for_its_attention_alone(counted):
    compiled, eager = small_flux(), small_flux()
    compile_blocks(compiled)
    counts = []
    for num_txt, lengths in ((11, (11, 4)), (9, (3, 9)), (13, (13, 12)), (10, (1, 10))):
        PASSES["first"] = ((3, 5), num_txt, lengths)
        assert_equal_to_eager(compiled, eager, "first")
        counts.append(num_graphs(counted))
    assert len(set(counts[1:])) == 1 and counts[1] <= 6  # before and behind the attention of each kind, and few anew


@torch.inference_mode()
def test_factors_beside_some_blocks_are_seen(counted, tmp_path):
    """All blocks of a kind share their code: what stands in one must not be taken for what stands in another."""
    compiled, eager = small_flux(), small_flux()
    compile_blocks(compiled)
    warm_up(compiled, told=False)
    dim, generator = compiled.config.dim, torch.Generator().manual_seed(0)
    tensors = {}
    for linear, num_out in (("transformer_blocks.1.attn.to_k", dim), ("single_transformer_blocks.0.proj_mlp", 4 * dim)):
        tensors[f"{linear}.lora_A.weight"] = torch.randn(2, dim, generator=generator)
        tensors[f"{linear}.lora_B.weight"] = torch.randn(num_out, 2, generator=generator)
    save_file(tensors, tmp_path / "some.safetensors")
    before = eager.denoise(*prepared(eager, "first"))
    known = [Loras(model, torch.device("cpu"), torch.float32) for model in (compiled, eager)]
    for loras in known:
        loras.load(tmp_path / "some.safetensors", "it", 1.0)
    assert not torch.allclose(eager.denoise(*prepared(eager, "first")), before, atol=1e-2)
    for change in (lambda loras: None, lambda loras: loras.set_scale("it", 0.5), lambda loras: loras.fuse([])):
        for loras in known:
            change(loras)
        for name in SIZES:
            assert_equal_to_eager(compiled, eager, name)
    for loras in known:
        loras.unload([])
    torch.testing.assert_close(compiled.denoise(*prepared(eager, "first")), before, rtol=1e-5, atol=1e-5)
    assert num_graphs(counted) <= 4  # those with factors in the blocks, beside the two without


@pytest.mark.slow
def test_sequence_parallel_blocks_leave_the_graph_for_their_attention_alone(counted, monkeypatch):
    group = Threads(1)
    monkeypatch.setattr(parallel, "dist", group)
    compiled, eager = small_flux(), small_flux()
    compile_blocks(compiled)

    def run():
        counts = []
        for name in SIZES:
            assert_equal_to_eager(parallel.ParallelFlux(compiled, None), eager, name)
            counts.append(num_graphs(counted))
        return counts

    ((_, second, third),) = group.run(run)
    assert second == third <= 8


@pytest.mark.slow
def test_inductor_draws_the_same(capfd):
    torch._dynamo.reset()
    settings = {"num_inference_steps": 2, "seed": 1}
    compiled = Engine.from_pretrained("tiny", device="cpu", dtype="float32", compile=True)
    assert capfd.readouterr().err.count("compiling the DiT's blocks, once for all sizes ... ") == 1
    eager = Engine.from_pretrained("tiny", device="cpu", dtype="float32", progress=False)
    for height, width in ((64, 64), (48, 80)):
        found, expected = (
            engine.generate("a cat", height=height, width=width, **settings).latents for engine in (compiled, eager)
        )
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
