"""Stacks: several heads fitted side by side, to their outputs on the same rows.

A sweep fits many heads on one store. What costs is the product of the rows with the first factors
of a head, and reading the rows. Heads of a group share both: the factors of all of them are one
factor, and what comes after is batched over the heads of equal shape, whose parameters are stacked
along a first axis of variants. Each head keeps parameters of its own, so each can have its own
optimiser, stop on its own and leave the group.

Axes: v heads of equal shape, r rows, d embedding, k experts, m rows of the factors of one head.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call

from ctfm.heads.adapters import Coefficients
from ctfm.heads.batches import Layout
from ctfm.heads.head import Head, RowOutput, times
from ctfm.heads.molre import as_factor


class HeadGroup:
    """Heads that read the same rows.

    Args:
        heads: At least one; all of one embedding width.
    """

    def __init__(self, heads: Sequence[Head]) -> None:
        by_shape: dict[object, list[int]] = {}
        for index, head in enumerate(heads):
            by_shape.setdefault(_shape(head), []).append(index)
        self._members = list(by_shape.values())
        self._stacks = [_Stack([heads[index] for index in one]) for one in self._members]

    def __call__(
        self,
        x: Float[Tensor, "r d"],
        layout: Layout,
        *,
        noise: Sequence[Float[Tensor, "r k"] | None],
    ) -> list[RowOutput]:
        """The output of each head, in the order of `heads`; the same as `Head.of_rows` gives.

        Args:
            x: Rows of a batch; padding holds finite numbers.
            layout: How they belong to its scans.
            noise: For each head standard normal numbers for noisy routing, or None.
        """
        factors = [stack.factors() for stack in self._stacks]
        x = as_factor(x, factors[0].dtype)
        product = times(x, torch.cat([factor.flatten(0, 1) for factor in factors]))
        parts = torch.split(product, [factor.shape[0] * factor.shape[1] for factor in factors], -1)
        outputs: dict[int, RowOutput] = {}
        for members, stack, factor, part in zip(
            self._members, self._stacks, factors, parts, strict=True
        ):
            projected = part.reshape(len(x), *factor.shape[:2]).movedim(0, 1)
            own = [noise[index] for index in members]
            outputs |= zip(members, stack.finish(projected, x, layout, noise=own), strict=True)
        return [outputs[index] for index in range(len(outputs))]


class _Stack:
    """Heads of one shape; a single one is used as it is."""

    def __init__(self, heads: Sequence[Head]) -> None:
        self._heads = heads
        self._step = _Step(heads[0])
        self._stacked: dict[str, Tensor] = {}

    def factors(self) -> Float[Tensor, "v m d"]:
        """Of all heads; to be called once a step, before `finish`."""
        if len(self._heads) == 1:
            return self._heads[0].factors().unsqueeze(0)
        named = [dict(head.named_parameters(prefix="head")) for head in self._heads]
        self._stacked = {name: torch.stack([one[name] for one in named]) for name in named[0]}
        factors: Tensor = functional_call(self._step, self._stacked, ("factors",))
        return factors

    def finish(
        self,
        projected: Float[Tensor, "v r m"],
        x: Float[Tensor, "r d"],
        layout: Layout,
        *,
        noise: Sequence[Float[Tensor, "r k"] | None],
    ) -> list[RowOutput]:
        if len(self._heads) == 1:
            return [self._heads[0].finish(projected[0], x, layout, noise=noise[0])]
        together = (
            None if noise[0] is None else torch.stack([one for one in noise if one is not None])
        )
        output: RowOutput = functional_call(
            self._step, self._stacked, ("finish", projected, x, layout), {"noise": together}
        )
        return [
            RowOutput(
                output.logits[v],
                output.attention[v],
                Coefficients(*(of_all[v] for of_all in output.routed)),
            )
            for v in range(len(self._heads))
        ]


class _Step(nn.Module):
    """A method of a head as a module, for `functional_call`."""

    def __init__(self, head: Head) -> None:
        super().__init__()
        self.head = head

    def forward(self, method: str, *args: object, **options: object) -> object:
        return getattr(self.head, method)(*args, **options)


def _shape(head: Head) -> object:
    """Equal for heads that can be computed as one: the same parts with parameters of equal size."""
    routing = None if head.molre is None else head.molre.routing
    sizes = tuple((name, tuple(value.shape)) for name, value in head.named_parameters())
    return type(head.adapter), type(head.pool), routing, sizes
