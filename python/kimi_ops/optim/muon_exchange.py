# SPDX-License-Identifier: MIT
"""What several ranks have travels to its owner and back, bucket by bucket.

    rows (DTensor)                                      copies (ZeRO-1, DDP)
    rank 0   u[0:2] --.                 .-- o[0:2]                       .--> p   rank 0
    rank 1   u[2:4] ----> owner: NS(u) ---> o[2:4]      owner: g, u, p -----> p   rank 1
    rank 2   u[4:5] --'                 '-- o[4:5]                       '--> p   rank 2

One mechanism for both: owners are chosen by the cost of their work, what travels does so in
buckets, and while a bucket is worked the next one is on its way there and the last one on its way
back:

    messages   there 0   there 1   back 0   there 2   back 1 ...
    arithmetic momenta 0   1     NS 0   2     NS 1    apply 0

Of rows each has one destination: an all-to-all there and one back, a rank sends and receives 4
bytes of fp32 twice for each element of its rows and of the matrices that it owns. A copy is for all
ranks: its owner broadcasts it, in the parameter's dtype, which passes from host to host once, where
an all-to-all would bring it once for each rank there. To its owner it need not travel, who has the
gradient; where gradients are to be averaged they are reduced to the owners, in buckets too, but all
of them first, since norms are known before anything moves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from kimi_ops.optim.muon_routes import Route, buckets


class Exchange:
    """One bucket there and back; `routes` ascend by owner, and so does what this rank holds of
    them, one after the other. `name` says what they are where it fails."""

    def __init__(self, routes: Sequence[Route], name: str) -> None:
        self.circle = routes[0].circle
        self.name = f"{name}, from turn {min(route.turn for route in routes)} on"
        self.owned = [route for route in routes if route.owner == self.circle.rank]
        self.held = [route.numel(self.circle.rank) for route in routes]
        self.to_owners = [0] * self.circle.world
        for route, size in zip(routes, self.held, strict=True):
            self.to_owners[route.owner] += size
        self.messages: list[dist.Work] = []
        self.incoming: Tensor

    def arrived(self) -> Tensor:
        for message in self.messages:
            with self.circle.told(self.name):
                message.wait()
        return self.incoming

    def rows(self) -> Sequence[Tensor]:
        """What this rank holds of the bucket, flat, once it is back."""
        return self.arrived().split(self.held)


class Rows(Exchange):
    """Of matrices of which every rank holds rows."""

    def __init__(self, routes: Sequence[Route], name: str) -> None:
        super().__init__(routes, name)
        ranks = range(self.circle.world)
        self.to_ranks = [sum(route.numel(r) for route in self.owned) for r in ranks]

    def there(self, rows: Iterable[Tensor]) -> None:
        """Start sending this rank's rows to the owners."""
        self._send(torch.cat([x.flatten() for x in rows]), self.to_owners, self.to_ranks)

    def wholes(self) -> list[Tensor]:
        """The matrices that this rank owns, once their rows are here."""
        sources = [
            source.split([route.numel(r) for route in self.owned])
            for r, source in enumerate(self.arrived().split(self.to_ranks))
        ]
        return [
            torch.cat([source[i] for source in sources]).view(route.shape)
            for i, route in enumerate(self.owned)
        ]

    def back(self, wholes: Sequence[Tensor]) -> None:
        """Start sending the rows of the owned matrices to the ranks that hold them."""
        pieces = [
            route.rows(r, whole).flatten()
            for r in range(self.circle.world)
            for route, whole in zip(self.owned, wholes, strict=True)
        ]
        outgoing = torch.cat(pieces) if pieces else self.incoming.new_empty(0)
        self._send(outgoing, self.to_ranks, self.to_owners)

    def _send(self, outgoing: Tensor, sent: list[int], received: list[int]) -> None:
        self.outgoing = outgoing  # lives until it is sent
        self.incoming = outgoing.new_empty(sum(received))
        with self.circle.told(self.name):
            message = dist.all_to_all_single(
                self.incoming, outgoing, received, sent, group=self.circle.group, async_op=True
            )
        self.messages = [message]


class Copies(Exchange):
    """Of what every rank holds whole."""

    def there(self, copies: Iterable[Tensor]) -> None:
        """Start adding the copies of all ranks up at the owners."""
        self._send(copies, lambda part, owner, **how: dist.reduce(part, group_dst=owner, **how))

    def wholes(self) -> list[Tensor]:
        """The sums that this rank owns, once they are here."""
        mine = self.arrived().split(self.to_owners)[self.circle.rank]
        parts = mine.split([route.numel(route.owner) for route in self.owned])
        return [part.view(route.shape) for part, route in zip(parts, self.owned, strict=True)]

    def back(self, copies: Iterable[Tensor]) -> None:
        """Start bringing the owners' copies to all; those of others count for nothing."""
        self._send(copies, lambda part, owner, **how: dist.broadcast(part, group_src=owner, **how))

    def _send(self, copies: Iterable[Tensor], send: Callable[..., dist.Work]) -> None:
        self.incoming = torch.cat([x.flatten() for x in copies])
        self.messages = []
        for owner, part in enumerate(self.incoming.split(self.to_owners)):
            if part.numel():
                with self.circle.told(self.name):
                    self.messages.append(send(part, owner, group=self.circle.group, async_op=True))


def overlapped(trips: Iterable[Iterator[None]]) -> None:
    """Run generators that pause while messages fly, each a stage behind the one after it."""
    under_way: list[Iterator[None]] = []
    for trip in trips:
        under_way = _advance([trip, *under_way])
    while under_way:
        under_way = _advance(under_way)


def _advance(trips: list[Iterator[None]]) -> list[Iterator[None]]:
    """The youngest first: its messages leave before the older ones' arithmetic begins."""
    return [trip for trip in trips if next(trip, StopIteration) is not StopIteration]


def averages(
    routes: Sequence[Route], keys: Sequence[Any], gradient: Callable[[int], Tensor]
) -> dict[int, Tensor]:
    """The mean over the ranks of each gradient that this rank owns, by its number among the routes.
    16-bit ones are added up in fp32."""
    found: dict[int, Tensor] = {}

    def trip(bucket: list[int]) -> Iterator[None]:
        exchange = Copies([routes[i] for i in bucket], "gradients")
        exchange.there(_wide(gradient(i)) for i in bucket)
        yield
        mine = [i for i in bucket if routes[i].owner == exchange.circle.rank]
        for i, total in zip(mine, exchange.wholes(), strict=True):
            found[i] = total / exchange.circle.world

    overlapped(map(trip, buckets(routes, keys)))
    return found


def _wide(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor
