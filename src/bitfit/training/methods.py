"""What a method trains: a row of the bank and a head, matrices of the plain model, or adapters.

``bitfit`` and ``frozen`` train one flat tensor ``(K, n + h)``: a row and a head for each of K runs.
``full`` and ``random`` are the paper's controls (Table 3); they change matrices, so they are no
rows, but go through the same loop with fp32 weights. So do the adapters of ``peft:...``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeAlias, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from bitfit.bank import Layout
from bitfit.batches import upload
from bitfit.encoder import Encoder
from bitfit.errors import UsageError
from bitfit.heads import Head
from bitfit.leaves import BankedLinear, ChosenScalars
from bitfit.training.adapters import AdapterMethod
from bitfit.training.lane import Lane, trained_sites
from bitfit.training.settings import PEFT_METHODS, ROW_METHODS, TrainConfig
from bitfit.training.settings import Method as MethodName
from bitfit.training.single import Numbers, SingleRun, init_std


class RowMethod:
    """Train rows of a bank and their heads: one tensor ``(K, n + h)``, a run in each row.

    K runs share every forward pass. Each has its own row, then its head (h is the largest's size;
    what a smaller head leaves stays zero). A run that trains fewer biases than its neighbours has a
    zero in their place, and its gradient there is put to zero.

    Args:
        encoder: the base.
        layouts: what each run that will ever come trains; the row has the union.
        heads: their heads.
        slots: K.
    """

    def __init__(
        self, encoder: Encoder, layouts: Sequence[Layout], heads: Sequence[Head], slots: int
    ) -> None:
        paths = {site.path for layout in layouts for site in layout.sites}
        self.layout = Layout(tuple(s for s in encoder.sites if s.path in paths))
        self.base, self.dtype = encoder.biases(self.layout), encoder.dtype
        partial = any(layout.n < self.layout.n for layout in layouts)
        self.head_size = max(head.size for head in heads)
        self.std = init_std(encoder)
        shape = slots, self.layout.n + self.head_size
        self.flat = torch.zeros(shape, device=encoder.device, requires_grad=True)
        self.mask = torch.ones(shape, device=encoder.device) if partial else None
        self.tensors = [self.flat]

    @property
    def slots(self) -> int:
        """How many runs train side by side."""
        return len(self.flat)

    def encoder_count(self, layout: Layout) -> int:
        """Return how many values of the encoder a run of ``layout`` trains."""
        return layout.n

    @torch.no_grad()
    def begin(self, slot: int, layout: Layout, head: Head, seed: int) -> None:
        """Give ``slot`` to a new run: a zero row (the base) and a fresh head."""
        self.flat[slot] = 0
        n = self.layout.n
        self.flat[slot, n : n + head.size] = head.init(seed, self.std).to(self.flat.device)
        if self.mask is not None:
            self.mask[slot, :n] = layout.expand(self.mask.new_ones(layout.n), self.layout)

    @torch.no_grad()
    def clear(self, slot: int) -> None:
        """Make ``slot`` empty."""
        self.flat[slot] = 0

    def read(self, slot: int) -> Numbers:
        """Return a copy of what the run in ``slot`` has trained."""
        return [self.flat.detach()[slot].clone()]

    @torch.no_grad()
    def write(self, slot: int, numbers: Numbers) -> None:
        """Put back what :meth:`read` gave."""
        self.flat[slot].copy_(numbers[0])

    def views(self) -> tuple[dict[str, Tensor], Tensor]:
        """Return each run's biases by module path, ``(K, length)``, and its head, ``(K, h)``.

        The base's are in the biases: one sum for all sites together. So is the cast of a single
        run, whose biases are part of the products; those of several stay fp32, as their gradients.
        """
        rows, heads = torch.split(self.flat, [self.layout.n, self.head_size], dim=1)
        biases = rows + self.base
        return self.layout.split(biases.to(self.dtype) if self.slots == 1 else biases), heads

    def trained(self, slot: int, layout: Layout, head: Head) -> tuple[Tensor, dict[str, Tensor]]:
        """Return a run's row ``(n,)`` in its own layout and its head's tensors by name."""
        flat, n = self.flat.detach()[slot], self.layout.n
        row = layout.take(flat[:n], self.layout)
        return row, head.split(flat[n : n + head.size])

    def after_backward(self) -> None:
        """Put to zero the gradient of what a run does not train."""
        if self.mask is not None and self.flat.grad is not None:
            self.flat.grad.mul_(self.mask)

    def moved(self) -> None:
        """Nothing: the encoder is given the rows at each pass."""

    @torch.no_grad()
    def clip(self, max_norms: Sequence[float]) -> None:
        """Scale each run's gradient, row and head together, to its greatest norm; 0: leave it."""
        if self.flat.grad is not None and any(max_norms):
            limits = upload(torch.tensor([m or torch.inf for m in max_norms]), self.flat.device)
            norms = torch.linalg.vector_norm(self.flat.grad, dim=1)
            self.flat.grad.mul_((limits / (norms + 1e-6)).clamp(max=1.0)[:, None])

    def install(self) -> None:
        """Nothing to put in place: the encoder reads the row it is given."""

    def uninstall(self) -> None:
        """Nothing to take back: the encoder was never changed."""


class FullMethod(SingleRun):
    """Train all of the model's own parameters, and the head."""

    def __init__(self, encoder: Encoder, head: Head) -> None:
        _check_fp32(encoder)
        super().__init__(encoder, head)
        self.parameters = encoder_parameters(encoder, head)
        self.original = {name: p.data for name, p in self.parameters.items()}
        self.values = {name: p.data.clone() for name, p in self.parameters.items()}
        self.tensors = [*self.parameters.values(), self.flat]

    def numbers(self) -> Numbers:
        """Return this run's own copy of the parameters, and the head; not copies of these."""
        return [*self.values.values(), self.flat]

    def encoder_count(self, layout: Layout) -> int:
        """Return how many values of the encoder a run trains."""
        return sum(p.numel() for p in self.parameters.values())

    @torch.no_grad()
    def begin(self, slot: int, layout: Layout, head: Head, seed: int) -> None:
        """Start a run from the base's own values and a fresh head."""
        for name, value in self.values.items():
            value.copy_(self.original[name])
        self.flat.copy_(head.init(seed, self.std))

    def install(self) -> None:
        """Let the encoder compute with this run's own copy of the parameters."""
        for name, parameter in self.parameters.items():
            parameter.data = self.values[name]
            parameter.requires_grad_(True)

    def uninstall(self) -> None:
        """Give the encoder its own parameters back, frozen."""
        for name, parameter in self.parameters.items():
            parameter.data = self.original[name]
            parameter.grad = None
            parameter.requires_grad_(False)


class RandomMethod(SingleRun):
    """Train a random choice of the model's scalars, and the head.

    What is chosen is one flat tensor ``(count,)``, so that the optimizer, clipping, checkpoints
    and processes handle a hundred thousand numbers and not the whole model. The matrices of Linear
    layers give gradients of what was chosen only, the word embeddings of the batch's words; of
    other parameters autograd gives whole ones, and the chosen ones are read from them.
    """

    def __init__(self, encoder: Encoder, head: Head, config: TrainConfig) -> None:
        _check_fp32(encoder)
        super().__init__(encoder, head)
        places = random_places(encoder, head, config)
        parameters = encoder_parameters(encoder, head)
        self.places = {name: index for name, index in places.items() if len(index)}
        """Which scalars of a parameter are trained, by its name: places in it flattened."""
        self.parameters = {name: parameters[name] for name in self.places}
        self.counts = [len(index) for index in self.places.values()]
        leaves = linear_weights(encoder, head)
        self.leaves = {name: leaves[name] for name in self.places if name in leaves}
        """The Linear layers whose matrices have chosen scalars, by the matrix' name."""
        self.whole = {n: p for n, p in self.parameters.items() if n not in self.leaves}
        """The parameters of which autograd gives whole gradients."""
        self.tables = [
            table for table in encoder.model.modules()
            if isinstance(table, nn.Embedding) and table.num_embeddings > _LARGE_TABLE
            and any(table.weight is parameter for parameter in self.whole.values())
        ]  # fmt: skip
        """The tables of embeddings of which autograd gives sparse gradients."""
        widths = {name: leaf.in_features for name, leaf in self.leaves.items()}
        self._inside = {n: (self.places[n] // w, self.places[n] % w) for n, w in widths.items()}
        parts = [p.detach().flatten()[self.places[n]] for n, p in self.parameters.items()]
        self.original = torch.cat(parts)
        self.chosen = self.original.clone().requires_grad_()
        self.tensors = [self.chosen, self.flat]

    def numbers(self) -> Numbers:
        """Return the chosen scalars ``(count,)`` and the head; not copies."""
        return self.tensors

    def encoder_count(self, layout: Layout) -> int:
        """Return how many values of the encoder a run trains."""
        return len(self.chosen)

    @torch.no_grad()
    def begin(self, slot: int, layout: Layout, head: Head, seed: int) -> None:
        """Start a run from the base's own values and a fresh head."""
        self.chosen.copy_(self.original)
        self.flat.copy_(head.init(seed, self.std))
        self.moved()

    def write(self, slot: int, numbers: Numbers) -> None:
        """Put back what :meth:`read` gave."""
        super().write(slot, numbers)
        self.moved()

    def named(self) -> dict[str, Tensor]:
        """Return the chosen scalars of each parameter, ``(count,)`` each, by its name."""
        return dict(zip(self.places, self.chosen.detach().split(self.counts), strict=True))

    def views(self) -> tuple[dict[str, Tensor], Tensor]:
        """Return no row (the model itself changes) and the head, ``(1, h)``.

        Each Linear layer gets its piece of the chosen scalars, for the gradients of this pass.
        """
        pieces = dict(zip(self.places, self.chosen.split(self.counts), strict=True))
        for name, leaf in self.leaves.items():
            leaf.chosen = ChosenScalars(pieces[name], *self._inside[name])
        return super().views()

    @torch.no_grad()
    def after_backward(self) -> None:
        """Take the gradients that autograd gave of whole parameters to those of the Linears."""
        if self.chosen.grad is None:
            self.chosen.grad = torch.zeros_like(self.chosen)
        pieces = dict(zip(self.places, self.chosen.grad.split(self.counts), strict=True))
        for name, parameter in self.whole.items():
            if parameter.grad is not None:
                pieces[name].copy_(_at_places(parameter.grad, self.places[name]))
                parameter.grad = None

    def moved(self) -> None:
        """Put the chosen scalars into their parameters."""
        self._put(self.chosen)

    def install(self) -> None:
        """Put the chosen scalars into the encoder, and ask for gradients of whole parameters."""
        self.moved()
        for parameter in self.whole.values():
            parameter.requires_grad_(True)
        self._make_sparse(True)

    def uninstall(self) -> None:
        """Give the encoder its own numbers back, frozen."""
        self._put(self.original)
        for leaf in self.leaves.values():
            leaf.chosen = None
        self._make_sparse(False)
        for parameter in self.whole.values():
            parameter.grad = None
            parameter.requires_grad_(False)

    def _make_sparse(self, wanted: bool) -> None:
        for table in self.tables:
            table.sparse = wanted

    @torch.no_grad()
    def _put(self, numbers: Tensor) -> None:
        for (name, index), part in zip(
            self.places.items(), numbers.split(self.counts), strict=True
        ):
            self.parameters[name].view(-1)[index] = part


def _at_places(grad: Tensor, places: Tensor) -> Tensor:
    """Return a gradient's values at places in it flattened; one of a table may be sparse."""
    if not grad.is_sparse:
        return grad.flatten()[places]
    grad, width = grad.coalesce(), grad.shape[1]
    known, wanted = grad.indices()[0], places // width
    if not len(known):
        return grad.values().new_zeros(len(places))
    found = torch.searchsorted(known, wanted).clamp(max=len(known) - 1)
    values = grad.values()[found, places % width]
    return torch.where(known[found] == wanted, values, 0.0)


# Rows from which on a table of embeddings has sparse gradients: more than a batch has tokens, or
# the sparse ones cost more than zeros for the rest.
_LARGE_TABLE = 4096
_SAME_IN_MATRICES = ("method", "terms", "seed", "pooling", "recipe")
Method: TypeAlias = RowMethod | FullMethod | RandomMethod | AdapterMethod


def _check_fp32(encoder: Encoder) -> None:
    if encoder.dtype != torch.float32:
        raise UsageError("methods full and random train fp32 weights: use --dtype fp32")


def encoder_parameters(encoder: Encoder, head: Head) -> dict[str, nn.Parameter]:
    """Return every parameter of the encoder and, where the head uses it, of the pooler."""
    named = dict(encoder.model.named_parameters())
    if encoder.pooler is not None and head.pooling == "pooler":
        named |= {f"pooler.{k}": p for k, p in encoder.pooler.named_parameters()}
    return named


def linear_weights(encoder: Encoder, head: Head) -> dict[str, BankedLinear]:
    """Return the Linear layers of :func:`encoder_parameters`, by their matrices' names there."""
    modules = dict(encoder.model.named_modules())
    if encoder.pooler is not None and head.pooling == "pooler":
        modules |= {f"pooler.{k}" if k else "pooler": m for k, m in encoder.pooler.named_modules()}
    return {f"{path}.weight": m for path, m in modules.items() if isinstance(m, BankedLinear)}


def make_method(encoder: Encoder, lanes: Sequence[Lane], slots: int = 1) -> Method:
    """Return what trains ``lanes`` on ``encoder``, ``slots`` of them side by side.

    Raises:
        UsageError: an unknown method, several methods, or runs that cannot be side by side.
    """
    config, head = lanes[0].config, lanes[0].head
    if all(lane.config.method in ROW_METHODS for lane in lanes):
        if slots > 1 and not encoder.shares_passes:
            raise UsageError(
                f"base {encoder.base.name!r} does not run packed, so its runs cannot share a "
                "forward pass: train them one after the other (--lanes 1)"
            )
        return RowMethod(
            encoder, [lane.layout for lane in lanes], [lane.head for lane in lanes], slots
        )
    # The matrices' random choice is made once, for all runs; adapters are drawn for each.
    same = ("method", "pooling") if config.method in PEFT_METHODS else _SAME_IN_MATRICES
    if any(getattr(lane.config, f) != getattr(config, f) for lane in lanes for f in same):
        raise UsageError(f"runs of method {config.method!r} share {', '.join(same)}, or come alone")
    if slots > 1:
        raise UsageError(f"method {config.method!r} changes the model: one run at a time")
    if config.method in PEFT_METHODS:
        return AdapterMethod(encoder, head, config.method)
    if config.method == "full":
        return FullMethod(encoder, head)
    if config.method not in get_args(MethodName):
        raise UsageError(f"unknown method {config.method!r}: {', '.join(get_args(MethodName))}")
    return RandomMethod(encoder, head, config)


def random_places(encoder: Encoder, head: Head, config: TrainConfig) -> dict[str, Tensor]:
    """Return which scalars of each parameter a random method trains: their places in it flattened.

    Each in rising order, and once.

    ``random`` draws as many scalars as bias tuning trains of ``config.terms``, uniformly from the
    whole model without replacement. ``released:random`` draws a quota per tensor with replacement,
    as the released code does; ``released:row_col`` takes per matrix one random column, or as many
    random rows as hold the bias' length (Ben Zaken et al. 2022, Table 3, "rand 100k"; the printed
    ACL version has the second).
    """
    parameters = encoder_parameters(encoder, head)
    random = np.random.default_rng((config.seed, 1))
    count = sum(site.length for site in trained_sites(encoder, head, config))
    if config.method == "random":
        chosen = _draw_exact(random, {k: p.numel() for k, p in parameters.items()}, count)
    elif config.method == "released:random":
        chosen = _draw_quota(random, {k: p.numel() for k, p in parameters.items()}, count)
    else:
        chosen = _draw_row_col(random, encoder, head)
    return {
        name: torch.from_numpy(np.unique(chosen.get(name, np.empty(0, np.int64))))
        .to(encoder.device)
        for name in parameters
    }  # fmt: skip


Places = dict[str, NDArray[np.int64]]


def _draw_exact(random: np.random.Generator, sizes: Mapping[str, int], count: int) -> Places:
    total = sum(sizes.values())
    places = np.sort(random.choice(total, size=min(count, total), replace=False))
    bounds = np.cumsum([0, *sizes.values()])
    return {
        name: places[np.searchsorted(places, low) : np.searchsorted(places, high)] - low
        for name, low, high in zip(sizes, bounds[:-1], bounds[1:], strict=True)
    }


def _draw_quota(random: np.random.Generator, sizes: Mapping[str, int], count: int) -> Places:
    total = sum(sizes.values())
    return {n: random.integers(0, size, int(count * size / total)) for n, size in sizes.items()}


def _draw_row_col(random: np.random.Generator, encoder: Encoder, head: Head) -> Places:
    places: Places = {}
    for name, linear in linear_weights(encoder, head).items():
        if linear.bias is not None:
            out, width = linear.weight.shape
            if random.random() < 0.5:
                column = random.integers(width)
                places[name] = np.arange(out) * width + column
            else:
                rows = random.choice(out, size=max(1, round(out / width)), replace=False)
                grid = rows[:, None] * width + np.arange(width)
                places[name] = grid.flatten()
    return places
