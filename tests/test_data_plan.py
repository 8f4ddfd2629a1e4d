"""What an epoch draws, and that the ranks' batches cost the same at every step."""

import numpy as np
import pytest

from uniworld.data.plan import MAX_COST_RATIO, Mixture, Planner, forward_flops

NONE = np.empty((0, 2), np.int64)


def planner(costs, buckets=None, *, batch_size=1, world_size=8, seed=0, groups=None):
    costs = np.asarray(costs, float)
    buckets = np.zeros(len(costs), np.int64) if buckets is None else np.asarray(buckets)
    mixture = Mixture(groups or [(np.arange(len(costs)), 1.0)], seed)
    return Planner(mixture, buckets, costs, batch_size=batch_size, world_size=world_size)


def epochs(made, num_epochs):
    carried = NONE
    for epoch in range(num_epochs):
        plan = made.plan(epoch, carried)
        yield plan
        carried = plan.carried


def test_cost_of_a_forward():
    """Text to image at 1024x1024 with 300 VLM tokens: 89 ms at 790 TFLOP/s."""
    assert forward_flops(4396) / 790e12 == pytest.approx(0.089, rel=0.01)


def mixed_costs(rng, n):
    """Text to image, one and two references, three target sizes, captions of 5 to 300 tokens."""
    target = rng.choice([960, 1024, 1120], n)
    references = rng.choice([0, 1, 2], n, p=[0.3, 0.6, 0.1])
    return forward_flops(target + references * 1280 + rng.integers(5, 300, n)), target


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("world_size", [1, 2, 8])
def test_every_item_is_planned_once(batch_size, world_size):
    rng = np.random.default_rng(0)
    costs, buckets = mixed_costs(rng, 1003)
    made = planner(costs, buckets, batch_size=batch_size, world_size=world_size)
    seen = []
    for epoch, plan in enumerate(epochs(made, 4)):
        assert plan.items.shape[1:] == (world_size, batch_size, 2)
        seen += map(tuple, plan.items.reshape(-1, 2).tolist())
        waiting = set(map(tuple, plan.carried.tolist()))
        assert len(set(seen)) == len(seen)
        assert set(seen) | waiting == {(n, r) for n in range(1003) for r in range(epoch + 1)}
        assert not set(seen) & waiting
        # the tail rule: fewer than a step's samples for each cluster of costs, fewer than a batch for each bucket
        assert len(waiting) <= 3 * (batch_size - 1) + 9 * (world_size - 1) * batch_size
        assert (buckets[plan.items[..., 0]] == buckets[plan.items[..., :1, 0]]).all()


def test_costs_of_a_step_are_near():
    rng = np.random.default_rng(1)
    costs, buckets = mixed_costs(rng, 8000)
    plan = next(epochs(planner(costs, buckets), 1))
    assert np.allclose(plan.costs, costs[plan.items[..., 0]].sum(-1))
    assert (plan.costs.max(1) <= MAX_COST_RATIO * plan.costs.min(1)).all()
    assert (plan.costs.max(1) / plan.costs.mean(1)).max() < 1.05
    shuffled = rng.permutation(costs)[:7992].reshape(-1, 8)
    assert (shuffled.max(1) / shuffled.mean(1)).mean() > 1.5  # what dealing them out at random would give


def test_few_of_a_kind_wait_until_they_fill_a_step():
    """Five expensive samples for eight ranks: none in the first epoch, eight in the second."""
    costs = [1.0] * 80 + [10.0] * 5
    counts = [(plan.items[..., 0] >= 80).sum() for plan in epochs(planner(costs), 8)]
    assert counts[0] == 0 and sum(counts) == 40


def test_nobody_waits_forever():
    """Costs spread so thin that only neighbours meet."""
    costs = np.exp(np.linspace(0, 3, 301))
    seen = np.zeros(301)
    for plan in epochs(planner(costs), 12):
        np.add.at(seen, plan.items[..., 0].reshape(-1), 1)
    assert seen.min() >= 10


def test_fewer_samples_than_ranks():
    plans = list(epochs(planner([1.0, 1.0, 1.0]), 8))
    assert [len(plan) for plan in plans] == [0, 0, 1, 0, 0, 1, 0, 1]


def test_order_follows_from_the_seed():
    costs, buckets = mixed_costs(np.random.default_rng(2), 500)
    first, again = (next(epochs(planner(costs, buckets, seed=5), 1)) for _ in range(2))
    other = next(epochs(planner(costs, buckets, seed=6), 1))
    assert np.array_equal(first.items, again.items)
    assert not np.array_equal(first.items, other.items)
    one, two = epochs(planner(costs, buckets, seed=5), 2)
    n = min(len(one), len(two))
    assert not np.array_equal(one.items[:n, :, :, 0], two.items[:n, :, :, 0])


def test_steps_are_shuffled():
    costs = np.linspace(1, 2, 4000)
    plan = next(epochs(planner(costs), 1))
    order = plan.costs.mean(1)
    assert abs(np.corrcoef(order, np.arange(len(order)))[0, 1]) < 0.2
    ranks = plan.costs.argmax(1)
    assert np.bincount(ranks, minlength=8).min() > 20  # no rank always gets the largest


def test_sources_are_mixed_by_weight():
    """Group 1 has a tenth of the samples and half of the weight: five passes through it an epoch."""
    groups = [(np.arange(0, 900), 1.0), (np.arange(900, 1000), 1.0)]
    mixture = Mixture(groups, seed=0)
    drawn = [mixture.draw(epoch) for epoch in range(9)]
    assert all(len(items) == 1000 and (items[:, 0] >= 900).sum() == 500 for items in drawn)
    everything = np.concatenate(drawn)
    assert len(np.unique(everything, axis=0)) == len(everything)
    assert np.bincount(everything[:, 0]).tolist() == [5] * 900 + [45] * 100
    one_pass = everything[(everything[:, 0] >= 900) & (everything[:, 1] == 7)]
    assert sorted(one_pass[:, 0]) == list(range(900, 1000))
    assert not np.array_equal(one_pass[:, 0], np.sort(one_pass[:, 0]))


def test_every_source_is_drawn_from():
    mixture = Mixture([(np.arange(10), 1e6), (np.arange(10, 20), 1.0)], seed=0)
    assert (mixture.draw(0)[:, 0] >= 10).sum() == 1
