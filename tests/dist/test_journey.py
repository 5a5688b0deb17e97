# SPDX-License-Identifier: MIT
"""The two steps of an exchange and of its gradient; the stream that they have on a GPU."""

import gc
import weakref
from contextlib import contextmanager

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from kimi_ops.parallel.journey import Journey
from kimi_ops.parallel.side_stream import beside


class Doubled:
    """x -> 2 x in two steps, which are noted; `under_way` messages are now."""

    def __init__(self, name: str, log: list[str]) -> None:
        self.name, self.log, self.under_way = name, log, 0

    def start(self, x: torch.Tensor):
        self.log.append(f"begin {self.name}")
        self.under_way += 1

        def wait() -> torch.Tensor:
            self.log.append(f"wait {self.name}")
            self.under_way -= 1
            return 2 * x

        return wait

    def leave(self, x: torch.Tensor):
        journey = Journey(self.name, lambda: self.start(x), torch.empty(0), x)

        def back(kept, gradients):
            assert torch.equal(kept[0], x)
            wait = self.start(gradients[0])
            return lambda: [wait()]

        return lambda: journey.arrive(lambda wanted: ([journey.wait()], [x.detach()]), back)[1]


def test_the_backward_mirrors_the_forward():
    log: list[str] = []
    a, b = (torch.tensor([float(n)], requires_grad=True) for n in (1, 2))
    first, second = Doubled("a", log).leave(a), Doubled("b", log).leave(b)
    x = first()
    x.register_hook(lambda gradient: log.append("after a"))
    y = second().exp()  # made last: before "arrive a" in the backward
    (x.sum() + y.sum()).backward()
    assert log[:4] == ["begin a", "begin b", "wait a", "wait b"]
    assert log[4:] == ["begin b", "after a", "begin a", "wait b", "wait a"]
    assert a.grad.item() == 2 and b.grad.item() == pytest.approx(2 * torch.tensor(4.0).exp())


def test_twice_backward_and_no_second_derivative():
    log: list[str] = []
    a = torch.ones(2, requires_grad=True)
    y = Doubled("a", log).leave(a)()
    for _ in range(2):
        y.sum().backward(retain_graph=True)
    assert a.grad.tolist() == [4.0, 4.0] and log.count("begin a") == 3
    (gradient,) = torch.autograd.grad(y.sum(), a, create_graph=True)
    with pytest.raises(RuntimeError, match="^a: expected to be differentiated once at most"):
        gradient.sum().backward()


@pytest.mark.parametrize("constant", [True, False])
def test_no_part_of_a_second_derivative_is_lost_in_silence(constant):
    """Its other part alone would come out, or None: whether the gradient that came is constant."""
    a, b = (torch.ones(2, requires_grad=True) for _ in range(2))
    y = Doubled("a", []).leave(a)()
    dy = torch.ones(2) if constant else b * 3
    (gradient,) = torch.autograd.grad(y, a, dy, create_graph=True)
    for of in (a,) if constant else (a, b):
        with pytest.raises(RuntimeError, match="^a: expected to be differentiated once at most"):
            torch.autograd.grad((gradient * a).sum(), of, retain_graph=True, allow_unused=True)


def test_a_forward_that_is_repeated_does_not_end_between_the_steps():
    """It ends with the last tensor that is saved."""
    doubled = Doubled("a", [])
    a = torch.ones(2, requires_grad=True)
    checkpoint(lambda x: doubled.leave(x)(), a, use_reentrant=False).sum().backward()
    assert doubled.under_way == 0 and a.grad.tolist() == [2.0, 2.0]
    assert doubled.log == ["begin a", "wait a"] * 3


def test_one_that_nobody_awaits_is_gone():
    a = torch.ones(2, requires_grad=True)
    leaving = Doubled("a", []).leave(a)
    gone = weakref.ref(leaving)
    del leaving
    gc.collect()
    assert gone() is None


def test_a_stream_of_its_own(monkeypatch: pytest.MonkeyPatch):
    """Its kernels behind what the caller has launched; what comes behind them, behind the wait."""
    log: list[str] = []

    class Stream:
        device = "a GPU"

        def __init__(self, name: str) -> None:
            self.name = name

        def wait_stream(self, other: "Stream") -> None:
            log.append(f"{self.name} waits for {other.name}")

        def record_event(self) -> str:
            return f"what {self.name} has by then"

        def wait_event(self, event: str) -> None:
            log.append(f"{self.name} waits for {event}")

    @contextmanager
    def current(stream: Stream):
        log.append(f"on {stream.name}")
        yield
        log.append(f"off {stream.name}")

    callers, side = Stream("the caller"), Stream("the side")
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: callers)
    monkeypatch.setattr(torch.cuda, "stream", current)
    x = torch.ones(1)
    read = weakref.ref(x)

    def begin(x: torch.Tensor = x):
        log.append("kernels")
        return lambda: "rows"

    arrived = beside(side, begin)
    del x, begin
    assert read() is not None  # until it is not read any more
    assert arrived() == "rows"
    del arrived
    assert read() is None
    assert log == [
        "the side waits for the caller", "on the side", "kernels", "off the side",
        "the caller waits for what the side has by then",
    ]  # fmt: skip
