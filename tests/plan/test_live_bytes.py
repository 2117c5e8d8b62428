"""LiveBytes counts tensor storages exactly."""

import torch
from torch import Tensor

from ondevice_trgl.plan.live_bytes import LiveBytes, seed

KIB = 1024


def block() -> Tensor:
    """1 KiB that was there before."""
    return torch.ones(256)


def test_what_an_operator_allocates_counts_until_it_is_freed() -> None:
    x = block()
    with LiveBytes() as live:
        y = x + 1
        assert live.current == KIB
        z = y * 2
        assert live.current == 2 * KIB
        del y
        assert live.current == KIB
        assert live.peak == 2 * KIB
        del z
        assert live.current == 0


def test_views_results_in_place_and_what_was_there_before_are_free() -> None:
    x = block()
    with LiveBytes() as live:
        x.add_(1)
        x.view(16, 16).t()[2:4].unsqueeze(0)
        parts = x.split(64)
        x.detach()
        assert live.current == live.peak == 0
        y = x.clone()
        views = [y[:10], y.view(-1, 2), *y.chunk(4)]
        y.mul_(3)
        assert live.current == live.peak == KIB
        del y
        assert live.current == KIB
        views.clear()
        assert live.current == 0
    del parts


def test_temporaries_make_the_peak() -> None:
    x = block()
    with LiveBytes() as live:
        y = (x + 1) * (x + 2)
        assert live.peak == 3 * KIB
        assert live.current == KIB
    del y


def test_all_results_of_an_operator_count() -> None:
    x = torch.randn(8, 4, 5)
    with LiveBytes() as live:
        values, indices = x.max(2)
        assert live.current == 8 * 4 * (4 + 8)
    del values, indices


def test_factories_and_joins_count() -> None:
    x = block()
    with LiveBytes() as live:
        held = [torch.zeros(256), torch.cat([x, x]), torch.stack([x, x, x])]
        assert live.current == 6 * KIB
        held.clear()
        assert live.current == 0


def test_a_graph_keeps_what_backward_needs_and_backward_frees_it() -> None:
    w = torch.ones(256, requires_grad=True)
    with LiveBytes() as live:
        loss = (w * 2).exp().sum()  # exp keeps its result alone
        assert live.current == KIB + 4
        loss.backward()
        del loss
        assert live.current == KIB  # the gradient
        assert live.peak >= 2 * KIB
        w.grad = None
        assert live.current == 0


def test_restarting_forgets_the_peak_but_not_what_is_alive() -> None:
    x = block()
    with LiveBytes() as live:
        y = x + 1
        z = y + 1
        del z
        live.restart()
        assert (live.current, live.peak, live.timeline) == (KIB, KIB, [KIB])
        y = y + 1
        assert live.timeline == [KIB, 2 * KIB]
        assert live.current == KIB
    del y


def test_counting_ends_with_the_block() -> None:
    with LiveBytes() as live:
        y = block() + 1
    held = [block() for _ in range(4)]
    assert live.peak == 2 * KIB
    del y, held


def test_seed_passes_ones_back_and_does_not_keep_its_input() -> None:
    x = block().requires_grad_()
    with LiveBytes() as live:
        loss = seed(x * 2)
        assert live.current == 4
        loss.backward()
    assert x.grad is not None
    assert torch.equal(x.grad, torch.full((256,), 2.0))
