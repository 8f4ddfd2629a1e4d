"""More copying heads: on an attention in which one head looks at its own place by construction."""

import pytest
import torch

from uniworld.models.blocks import AttentionPlan, JointAttention
from uniworld.models.flow import image_ids
from uniworld.models.flux import FluxConfig, FluxTransformer
from uniworld.train.parts.copying import Seen, add_copying_heads, share_at_own_place

DIM, HEADS, WIDTH, SIDE, B, WANTED = 64, 4, 16, 4, 12, 24
COPYING, WEAK, WEAKER = 1, 3, 2
SIZES = {"in_channels": 16, "num_layers": 1, "num_single_layers": 1, "joint_attention_dim": 8}


@pytest.fixture
def seen():
    config = FluxConfig(attention_head_dim=WIDTH, num_attention_heads=HEADS, axes_dims_rope=(4, 6, 6), **SIZES)
    rope = FluxTransformer(config).rope(image_ids(16 * SIDE, 16 * SIDE, "cpu"))
    generator = torch.Generator().manual_seed(0)
    img, txt = torch.randn(2, B, SIDE**2, DIM, generator=generator)
    txt[..., :WIDTH] = 0
    txt[..., 0:WIDTH:2], txt[..., 1:WIDTH:2] = rope.cos, rope.sin  # (1, 0) of every pair, turned to the token's place
    return Seen(img, txt, AttentionPlan(rope, None, "auto"))


@pytest.fixture
def attn():
    torch.manual_seed(0)
    attn = JointAttention(DIM, HEADS).requires_grad_(False)
    rows = slice(COPYING * WIDTH, (COPYING + 1) * WIDTH)
    attn.to_qkv.weight[:DIM][rows] = 0
    attn.to_qkv.bias[:DIM][rows] = torch.tensor([1.0, 0.0]).repeat(WIDTH // 2)
    attn.add_qkv_proj.weight[DIM : 2 * DIM][rows] = torch.eye(WIDTH, DIM)
    attn.add_qkv_proj.bias[DIM : 2 * DIM][rows] = 0
    attn.norm_q.weight.fill_(16.0)
    for head, share in ((WEAK, 0.1), (WEAKER, 0.01)):
        for linear in (attn.to_out[0], attn.to_add_out):
            linear.weight[:, head * WIDTH : (head + 1) * WIDTH] *= share
    return attn


@pytest.fixture
def wanted(seen):
    mix = torch.randn(DIM - WIDTH, WANTED, generator=torch.Generator().manual_seed(1))
    return seen.txt[..., WIDTH:] @ mix


def loss_of(attn, seen):
    before = [update.clone() for update in attn(*seen)]
    return lambda: sum((now - old).square().mean() for now, old in zip(attn(*seen), before))


def values(attn, seen, heads):
    v = attn.add_qkv_proj(seen.txt)[..., 2 * DIM :].unflatten(-1, (HEADS, WIDTH))
    return v[:, :, heads].flatten(2).flatten(0, 1).double()


def unexplained(values, wanted):
    """The share of the variance that no linear map of the values gives."""
    inputs = torch.cat([values, torch.ones(len(values), 1).double()], 1)
    targets = wanted.flatten(0, 1).double()
    left = targets - inputs @ torch.linalg.lstsq(inputs, targets, driver="gelsd").solution
    return float(left.square().sum() / (targets - targets.mean(0)).square().sum())


def test_finds_the_head_that_copies(attn, seen):
    shares = share_at_own_place(attn, seen)
    assert shares.argmax() == COPYING and shares[COPYING] > 0.8 and shares.sum() - shares[COPYING] < 0.3


def test_heads_that_matter_least_copy_what_was_lacking(attn, seen, wanted):
    assert unexplained(values(attn, seen, [COPYING]), wanted) > 0.3
    heads = add_copying_heads(attn, loss_of(attn, seen), wanted, 2)
    assert heads == [COPYING, WEAKER, WEAK]
    assert unexplained(values(attn, seen, heads), wanted) < 1e-6
    shares = share_at_own_place(attn, seen)
    torch.testing.assert_close(shares[heads], shares[COPYING].expand(3))


def test_a_head_brings_the_most_that_it_can(attn, seen, wanted):
    lacking = unexplained(values(attn, seen, [COPYING]), wanted)
    heads = add_copying_heads(attn, loss_of(attn, seen), wanted, 1)
    assert heads == [COPYING, WEAKER]
    assert unexplained(values(attn, seen, heads), wanted) < 0.25 * lacking


def test_nothing_else_changes(attn, seen, wanted):
    before = {name: tensor.clone() for name, tensor in attn.state_dict().items()}
    updates = [update.clone() for update in attn(*seen)]
    add_copying_heads(attn, loss_of(attn, seen), wanted, 1)
    others = [head for head in range(HEADS) if head != WEAKER]
    for name, tensor in attn.state_dict().items():
        if "qkv" in name:  # rows of q, k and v
            now, old = (x.unflatten(0, (3, HEADS, WIDTH)) for x in (tensor, before[name]))
            assert torch.equal(now[:, others], old[:, others])
        elif "out" in name and "weight" in name:  # columns
            now, old = (x.unflatten(1, (HEADS, WIDTH)) for x in (tensor, before[name]))
            assert torch.equal(now[:, others], old[:, others]) and not now[:, WEAKER].any()
        else:
            assert torch.equal(tensor, before[name])
    for now, old in zip(attn(*seen), updates):  # the head that is gone had a hundredth of the others' weight
        assert (now - old).norm() < 0.03 * old.norm()


def test_more_heads_than_there_are(attn, seen, wanted):
    with pytest.raises(ValueError, match="copying_heads=4: must be from 1 to 3"):
        add_copying_heads(attn, loss_of(attn, seen), wanted, 4)
