# SPDX-License-Identifier: MIT
"""MuonClip: Muon for matrices, AdamW for the rest, QK-Clip after the update, in one
``torch.optim.Optimizer``."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import chain
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from kimi_ops.choices import AnyMethod, BatchDims
from kimi_ops.optim import engine
from kimi_ops.optim.group_checks import Checked, check_clip, check_group, check_groups, gradients_of
from kimi_ops.optim.group_keys import check_keys, follow_cycle
from kimi_ops.optim.learning_rate import AdjustLr
from kimi_ops.optim.muon_blocks import names, state_dtype, summary
from kimi_ops.optim.muon_groups import muon_param_groups
from kimi_ops.optim.muon_masters import MASTER, followed, mastered, rows_of_masters, worked
from kimi_ops.optim.muon_mesh import check_sharded, local, whole_state
from kimi_ops.optim.muon_norms import Norms
from kimi_ops.optim.muon_routed import routed_update
from kimi_ops.optim.muon_shards import Shards
from kimi_ops.optim.muon_state import (
    FUNCTION,
    loaded_group,
    loaded_state,
    pack_function,
    unpack_function,
    wrap_state,
)
from kimi_ops.optim.muon_update import Work, adamw_update, measured, muon_update
from kimi_ops.optim.ns_schedule import Coefficients
from kimi_ops.optim.qk_clip_layers import QKClip

_MUON_STATE, _ADAMW_STATE = ("momentum_buffer",), ("exp_avg", "exp_avg_sq")

__all__ = ["MuonClip", "QKClip", "muon_param_groups"]


class MuonClip(torch.optim.Optimizer):
    r"""The optimizer that trained Kimi K2.

    A group with ``algorithm="muon"`` (the default) takes
    :math:`B \leftarrow \mu B + (1-\mu) g`, :math:`u = (1-\mu) g + \mu B`,
    :math:`W \leftarrow W (1 - \eta\lambda) - \mathrm{adjust}(\eta)\, \mathrm{NS}(u)`: keys, state
    and numbers are those of ``torch.optim.Muon``, whose checkpoints load here. A group with
    ``algorithm="adamw"`` is ``torch.optim.AdamW``. Then QK-Clip rescales the heads whose logits
    passed tau.

    Muon does not see the scale of a gradient, so clipping gradients acts on AdamW groups only
    (``max_grad_norm``); do not clip the update. A parameter whose gradient is not finite is left
    alone for the step, its state too; :meth:`nonfinite_parameters` names it.

    Parameters
    ----------
    params : iterable of Tensor, of (name, Tensor) or of groups
        A Muon parameter is a matrix [rows, in] or a stack [..., rows, in] whose matrices are taken
        one by one. Group keys: all arguments below up to `max_grad_norm`, ``algorithm``, and those
        that cut a parameter into matrices of their own: ``num_heads`` along the axis ``head_dim``
        (0: heads are rows, as in q and kv projections; 1: columns, as in output projections), and
        along that axis (in a head) ``split_sizes``, for a gate-up stack [E, 2F, H] ``(F, F)``, or
        ``interleave``, 2 where gate and up alternate. ``transposed`` says that the parameter is
        stored as [in, rows]. :func:`muon_param_groups` writes them for a model. Any other key
        raises, but for those of schedulers and of your own, which start with "_".
    lr, weight_decay : float
        Both algorithms; the decay is decoupled and multiplies the plain lr.
    momentum, nesterov, ns_coefficients, eps, ns_steps
        Muon; ``ns_coefficients`` is a triple, a list of triples or a name of
        :func:`kimi_ops.newton_schulz`. ``eps`` bounds the norm from below as torch does; 0 guards
        only exact zeros.
    adjust_lr_fn : None, "original", "match_rms_adamw" or callable(lr, (rows, in)) -> float
        ``match_rms_adamw`` is Moonlight's and Kimi K2's 0.2 sqrt(max(rows, in)). It sees the
        matrices that are orthogonalised, not the parameter.
    ns_method, ns_dtype, ns_restarts
        As `method`, `dtype`, `restarts` of :func:`kimi_ops.newton_schulz`. Dtypes also by name,
        "bfloat16".
    batch_dims : str
        More than two dimensions are ``"leading"`` batch dimensions, or ``"flatten"``: a matrix
        [first, all others], as convolutions are.
    cautious_weight_decay : bool
        Decay only entries that the step moves towards zero. Both algorithms.
    momentum_dtype : torch.dtype or str, optional
        Of the momentum; None is fp32 (fp64 for fp64 parameters), also for 16-bit parameters.
    master_weights : bool
        16-bit parameters have fp32 masters, in the state of the rank that owns the rows: they take
        decay, steps and QK-Clip, and each step rounds them to the parameters. Made of what a
        parameter is at its first step: load the state with the model, write parameters before.
        Let their gradients be fp32 (``param.grad_dtype``) where several are added up.
    maximize : bool
        Both algorithms.
    betas, adamw_eps
        AdamW. A group with ``algorithm="adamw"`` may write ``eps`` for ``adamw_eps``.
    max_grad_norm : float, optional
        Largest norm of all gradients of a group together; AdamW groups only, and refused in a Muon
        group and where there is no group of AdamW. The gradients themselves are not written.
    foreach : bool, optional
        Put many parameters through Newton-Schulz at once (None: yes) or one at a time.
    ns_max_batch : int, optional
        Matrices in one such batch; None: as many as hold 2^26 elements, on a CPU 2^23.
    capturable : bool
        ``lr`` and ``weight_decay`` may be tensors on the parameters' device, read there: a CUDA
        graph of ``step`` follows them.
    qk_clip : QKClip, optional
        Applied after each update.
    process_group : torch.distributed.ProcessGroup, optional
        Share work and state between its ranks (ZeRO-1): each rank holds all parameters, averages
        the gradients to the owner of each matrix, which updates it and sends it to all. The bits
        are those of one process with the averaged gradients. Every rank must call every method.
    reduce_gradients : bool
        False: the gradients are equal on all ranks already, as DDP leaves them.
    stages : torch.distributed.ProcessGroup, optional
        Ranks with other parameters, the stages of a pipeline in their order: `max_grad_norm` is
        over the gradients of all, with the bits of one process. Each has as many groups with it.

    Raises
    ------
    TypeError, ValueError
        For a parameter that Muon cannot take (fewer than two dimensions, complex) and for bad
        numbers, before anything changes. A sparse gradient raises TypeError in ``step``.

    Examples
    --------
    >>> import torch
    >>> layer = torch.nn.Linear(4, 4)
    >>> bias = {"params": [layer.bias], "algorithm": "adamw"}
    >>> optimizer = MuonClip([{"params": [layer.weight]}, bias], lr=0.01)
    >>> layer(torch.ones(1, 4)).sum().backward()
    >>> optimizer.step()

    Notes
    -----
    arXiv 2507.20534 (Kimi K2), arXiv 2502.16982 (Moonlight).
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_coefficients: Coefficients = (3.4445, -4.7750, 2.0315),
        eps: float = 1e-7,
        ns_steps: int = 5,
        adjust_lr_fn: AdjustLr = None,
        *,
        ns_method: AnyMethod = "auto",
        ns_dtype: torch.dtype | str | None = None,
        ns_restarts: Literal["auto"] | Sequence[int] = "auto",
        batch_dims: BatchDims = "leading",
        cautious_weight_decay: bool = False,
        momentum_dtype: torch.dtype | str | None = None,
        master_weights: bool = False,
        maximize: bool = False,
        betas: tuple[float, float] = (0.9, 0.95),
        adamw_eps: float = 1e-8,
        max_grad_norm: float | None = None,
        foreach: bool | None = None,
        ns_max_batch: int | None = None,
        capturable: bool = False,
        qk_clip: QKClip | None = None,
        process_group: dist.ProcessGroup | None = None,
        reduce_gradients: bool = True,
        stages: dist.ProcessGroup | None = None,
    ) -> None:
        defaults = {
            "lr": lr,
            "weight_decay": weight_decay,
            "momentum": momentum,
            "nesterov": nesterov,
            "ns_coefficients": ns_coefficients,
            "eps": eps,
            "ns_steps": ns_steps,
            "adjust_lr_fn": adjust_lr_fn,
            "ns_method": ns_method,
            "ns_dtype": ns_dtype,
            "ns_restarts": ns_restarts,
            "batch_dims": batch_dims,
            "cautious_weight_decay": cautious_weight_decay,
            "momentum_dtype": momentum_dtype,
            "master_weights": master_weights,
            "maximize": maximize,
            "betas": betas,
            "adamw_eps": adamw_eps,
            "max_grad_norm": max_grad_norm,
            "foreach": foreach,
            "ns_max_batch": ns_max_batch,
            "capturable": capturable,
            "algorithm": "muon",
            "num_heads": None,
            "head_dim": 0,
            "split_sizes": None,
            "interleave": None,
            "transposed": False,
        }
        if qk_clip is not None and not isinstance(qk_clip, QKClip):
            raise TypeError(
                f"MuonClip: qk_clip: expected a QKClip, got {type(qk_clip).__name__}; "
                "wrap the attention layers in one"
            )
        for name, given in (("process_group", process_group), ("stages", stages)):
            if given is not None and not isinstance(given, dist.ProcessGroup):
                raise TypeError(
                    f"MuonClip: {name}: expected a torch.distributed.ProcessGroup, got "
                    f"{type(given).__name__}; torch.distributed.group.WORLD is all ranks"
                )
        self.qk_clip = qk_clip
        self._shards, self._norms = Shards(process_group, reduce_gradients), Norms(stages)
        self._squares: Tensor | None = None  # norms of the last step's gradients
        self._warned = False
        self._checked: list[Checked] = []  # the groups of the last step
        self._written: dict[Tensor, int] = {}  # what torch counts of writes, of those with masters
        self._clipped: dict[Tensor, Tensor] = {}  # what QK-Clip left, rounded twice
        super().__init__(params, defaults)
        check_clip(max_grad_norm, self.param_groups)

    def __getstate__(self) -> dict[str, Any]:
        if self._shards.process_group is not None or self._norms.group is not None:
            raise TypeError(
                "MuonClip: copy: expected an optimizer of one process, got one with a process "
                "group; copy gather_state_dict()"
            )
        state = {**super().__getstate__(), "qk_clip": self.qk_clip}
        state["param_groups"] = [pack_function(group) for group in self.param_groups]
        state["defaults"] = pack_function(self.defaults)
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        current = self.__dict__.get("param_groups", [])
        if "_shards" not in self.__dict__:  # a copy or an unpickled one
            self.qk_clip = None
            self._shards, self._norms = Shards(None, True), Norms(None)
            self._squares, self._warned, self._checked = None, False, []
            self.defaults = unpack_function(state["defaults"])
            state = {**state, "defaults": self.defaults}
        olds = current or [self.defaults] * len(state["param_groups"])
        groups = [
            loaded_group(unpack_function(group), old, self.defaults)
            for group, old in zip(state["param_groups"], olds, strict=True)
        ]
        if any(group["algorithm"] == "adamw" for group in groups):
            # theirs alone; earlier states have it in every group
            groups = [
                {**group, "max_grad_norm": None} if group["algorithm"] == "muon" else group
                for group in groups
            ]
        for group in groups:
            check_group(group)
        self._shards.update(groups)
        loaded = loaded_state(state["state"], groups, self._shards)
        super().__setstate__({**state, "param_groups": groups, "state": loaded})
        # the masters are those of the model that is loaded with them
        self._written, self._clipped = {}, {}
        self.defaults.pop("differentiable", None)  # torch's addition, which no group has

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; it is checked as a whole first, and a refused group leaves the optimizer as
        it was."""
        if isinstance(param_group, dict):
            check_keys(param_group, self.defaults)
            if param_group.get("algorithm", "muon") == "muon":
                param_group = {"max_grad_norm": None, **param_group}  # the default is AdamW's
            if param_group.get("algorithm") == "adamw":
                # eps is torch.optim.AdamW's name; adamw_eps comes before it, both are saved
                eps = param_group.get("eps", self.defaults["adamw_eps"])
                eps = param_group.get("adamw_eps", eps)
                param_group = {**param_group, "adamw_eps": eps, "eps": eps}
        super().add_param_group(param_group)
        group = self.param_groups.pop()
        check_group(group)
        check_sharded(group, self._shards.process_group)
        self.param_groups.append(group)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient, then clip. Returns the closure's value, if
        one is given."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            follow_cycle(group)
        shards = self._shards
        checked = check_groups(self.param_groups, self._checked)
        grads = [gradients_of(known) for known in checked]
        clip = None if self.qk_clip is None else self.qk_clip.prepared()
        if checked == self._checked:
            shards.check_shapes()
        else:
            shards.update(self.param_groups)
            self._checked = checked
        alone = not shards.members
        present = [] if alone else shards.present()
        gradients = {} if alone else shards.gradients(present)
        work = [
            (list(self._work(group, own, known.sharded, gradients)), group)
            for group, own, known in zip(self.param_groups, grads, checked, strict=True)
        ]
        squares = measured(work, shards) if alone else shards.squares(gradients)
        for items, group in work:
            if group["algorithm"] == "muon":
                muon_update([item for item in items if item.route is None], group, squares)
            else:
                clipped = self._norms.clip_factor(group, squares, shards.numbers)
                adamw_update(items, group, squares, clipped, alone)
        if shards.routes:
            routed_update(work, shards.copies(present), squares)
        self._report(squares)
        self._clipped = {}
        if clip is not None:
            told = partial(shards.told, what="the largest logits")
            masters = rows_of_masters(self._params(), self.state, shards)
            scaled = clip(shards.process_group, masters, told)
            self._clipped = {p: p.detach().clone() for p in scaled if p in masters}
        mine = (p for group in self.param_groups for p in group["params"] if mastered(p, group))
        self._written = {p: local(p)._version for p in mine}
        return loss

    def _params(self) -> Iterator[Tensor]:
        return chain.from_iterable(group["params"] for group in self.param_groups)

    def _work(
        self,
        group: dict[str, Any],
        grads: list[Tensor | None],
        sharded: bool,
        gradients: dict[int, Tensor],
    ) -> Iterator[Work]:
        """What this rank updates in a group: whole parameters where it owns all of one."""
        shards = self._shards
        for param, grad in zip(group["params"], grads, strict=True):
            pieces = shards.numbers[param]
            if shards.process_group is None:
                if not sharded:
                    if grad is not None:
                        yield worked(param, grad, self._state_of(param, group), pieces)
                    continue
                # of a DTensor its rows here: zeros where only other ranks have a gradient
                here = gradients.get(pieces.start) if grad is None else local(grad)
                if here is not None:
                    state = {k: local(v) for k, v in self._state_of(param, group).items()}
                    route, heads = shards.routes.get(pieces.start), shards.heads.get(param)
                    yield worked(local(param), here, state, pieces, route, heads)
                continue
            numbers = [i for i in shards.mine(param) if i in gradients]
            state = self._state_of(param, group) if numbers else {}
            offset = 0
            for i in numbers:
                piece = shards.pieces[i]
                rows = slice(offset, offset + piece.stop - piece.start)
                mine = {k: v[rows] if v.ndim else v for k, v in state.items() if k != "step"}
                if "step" in state:  # the first piece counts for all
                    mine["step"] = state["step"].clone() if offset else state["step"]
                offset = rows.stop
                yield worked(piece.of(param), gradients[i], mine, pieces, shards.routes[i])

    def _state_of(self, param: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
        """The state of the rows that this rank owns, made where it is absent."""
        state = self.state[param]
        adamw = group["algorithm"] == "adamw"
        for key in _ADAMW_STATE if adamw else _MUON_STATE:
            if key not in state:
                empty = torch.zeros_like(param, dtype=state_dtype(param, group))
                state[key] = self._shards.local(param, empty)
        if not mastered(param, group):
            state.pop(MASTER, None)
        elif MASTER not in state:
            state[MASTER] = self._shards.local(param, param.detach().float())
        elif self._written.get(param, version := local(param)._version) != version:
            rows = partial(self._shards.local, param)
            followed(param, self._clipped.get(param), state[MASTER], rows)
        if adamw:
            # beside the parameter, as torch's fused kernel keeps it: what is left alone does not
            # count, and only the device knows
            step = state.get("step", 0.0)
            beside = isinstance(step, Tensor) and (
                (step.is_cpu and param.is_cpu) or step.device == param.device
            )
            if not beside or step.dtype is not torch.float32:
                state["step"] = torch.as_tensor(step, dtype=torch.float32, device=param.device)
        return state

    def _report(self, squares: Tensor) -> None:
        """Remember which parameters were left alone; the first time on a CPU, say so."""
        self._squares = squares
        if self._warned or not engine.on_host(squares) or math.isfinite(float(squares.sum())):
            return
        self._warned = True
        warnings.warn(
            f"MuonClip: gradient: not finite for {', '.join(self.nonfinite_parameters())}: these "
            "parameters and their state were left alone in this step; nonfinite_parameters() tells "
            "of later ones",
            stacklevel=4,
        )

    def nonfinite_parameters(self) -> list[str]:
        """Names (or numbers) of the parameters that the last step left alone because their
        gradients held NaN or infinity. Reads the answer from the device."""
        sums = [] if self._squares is None else self._squares.tolist()
        numbers = self._shards.numbers

        def alive(param: Tensor) -> bool:
            pieces = numbers.get(param, range(0))
            return all(map(math.isfinite, sums[pieces.start : pieces.stop]))

        every = chain.from_iterable(names(group) for group in self.param_groups)
        return [name for name, param in every if not alive(param)]

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over a state of MuonClip, ``torch.optim.Muon`` or ``torch.optim.AdamW``.

        Momenta and moments keep the dtype they are computed in (torch casts them to that of the
        parameter). With a process group, a state from :meth:`gather_state_dict` or of a single
        process, given to every rank; each keeps what it owns.
        """
        # torch would round the tensors to the dtype of their parameters: they travel wrapped, from
        # after the caller's hooks to __setstate__
        handle = self.register_load_state_dict_pre_hook(wrap_state)
        try:
            super().load_state_dict(state_dict)
        finally:
            handle.remove()

    def state_dict(self) -> dict[str, Any]:
        """As torch's. A function as ``adjust_lr_fn`` is not saved: the optimizer that loads the
        state must have one."""
        state = super().state_dict()
        for group in state.get("param_groups", ()):
            if callable(group.get("adjust_lr_fn")):
                group["adjust_lr_fn"] = FUNCTION
        return state

    def gather_state_dict(self, dst: int = 0) -> dict[str, Any] | None:
        """The whole state on rank `dst` of the process group, None on the others.

        Collective. It is an ordinary state dict: any number of ranks, and a single process, can
        load it. Without a process group the same as ``state_dict()``.
        """
        shards = self._shards
        own = self.state_dict()
        if shards.process_group is None:
            return whole_state(own, dst)
        parts: list[Any] | None = [None] * shards.world if shards.rank == dst else None
        root = dist.get_global_rank(shards.process_group, dst)
        with shards.told(shards.process_group, "the state"):
            dist.gather_object(own["state"], parts, root, group=shards.process_group)
        if parts is None:
            return None
        shards.update(self.param_groups)
        numbers = chain.from_iterable(group["params"] for group in own["param_groups"])
        whole = {
            number: shards.join(param, [part.get(number, {}) for part in parts])
            for number, param in zip(numbers, self._params(), strict=True)
        }
        own["state"] = {number: state for number, state in whole.items() if state}
        return own

    def routing_summary(self) -> str:
        """One line for each group, then each parameter: who gets Muon, who gets AdamW.

        Examples
        --------
        >>> import torch
        >>> print(MuonClip([("w", torch.nn.Parameter(torch.ones(2, 3)))]).routing_summary())
        muon   1 tensors, 6 parameters
          w [2, 3]
        """
        return summary(self.param_groups)
