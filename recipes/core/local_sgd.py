"""Ranks that train alone and meet every so many steps: local SGD with an outer Nesterov step.

DiLoCo (https://arxiv.org/abs/2311.08105), algorithm 1: each data rank takes `every_steps` steps of its own optimizer on
its own share of each batch; then the parameters of the last meeting less the mean of all ranks' parameters are the
gradient of an outer SGD with Nesterov momentum, whose result every rank goes on from. The inner optimizers' state stays
with its rank.

A checkpoint has each rank's own parameters and optimizer state, so that as many ranks go on bit for bit. Under any
other plan a run goes on from the means of both: lost is how far the ranks had parted. The outer parameters and their
momentum stay as they were, but a plan that is synchronous has no use for them.

Under DeepSpeed each data rank is a run of its own at stage 0: what it takes for the data-parallel group has one rank.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from bigbatch.recipes.core.config import RunConfig
from bigbatch.recipes.core.fragments import Fragment
from bigbatch.recipes.core.parallel import Mesh

ANCHOR, MOMENTUM = "outer_parameters", "outer_momentum"


class LocalSgd:
    """The outer optimizer of one rank; equal on all data ranks."""

    def __init__(
        self, config: RunConfig, mesh: Mesh, fragments: Callable[[], list[Fragment]], write_back: Callable[[], None]
    ) -> None:
        """Begin at the parameters at hand; `write_back` brings the working weights up to date with the masters."""
        self.settings, self.total_steps = config.parallel.local_sgd, config.schedule.total_steps
        self.mesh, self._fragments, self._write_back = mesh, fragments, write_back
        self.begin()

    def begin(self) -> None:
        """Take the parameters at hand for those of a meeting, without momentum."""
        self.is_met = True
        """Whether all ranks have the same parameters: there was no step since they met."""
        self.anchor = self._masters()  # [N], of the last meeting
        self.momentum = torch.zeros_like(self.anchor)

    def after_step(self, step: int) -> None:
        """Meet when optimizer step `step` (0 is the first) is the last of its round, or of the schedule.

        Collective: every rank must call it.
        """
        self.is_met = (step + 1) % self.settings.every_steps == 0 or step + 1 == self.total_steps
        if self.is_met:
            self.meet()

    def meet(self) -> None:
        """Take an outer step, as torch.optim.SGD(nesterov=True) does. Collective: every rank must call it."""
        gradient = self.anchor - self._mean()
        self.momentum.mul_(self.settings.outer_momentum).add_(gradient)
        gradient.add_(self.momentum, alpha=self.settings.outer_momentum)
        self.anchor.sub_(gradient, alpha=self.settings.outer_learning_rate)
        self._set_masters(self.anchor)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Give every rank the mean of all ranks' parameters for a while, to evaluate them.

        Collective: every rank must call it.
        """
        if self.is_met:
            yield
            return
        own = self._masters()
        self._set_masters(self._mean())
        yield
        self._set_masters(own)

    def pieces(self) -> Iterator[tuple[Fragment, dict[str, torch.Tensor]]]:
        """Yield each piece of the masters with views of its outer state, by kind."""
        fragments = self._fragments()
        sizes = [fragment.master.numel() for fragment in fragments]
        for fragment, *views in zip(fragments, self.anchor.split(sizes), self.momentum.split(sizes), strict=True):
            yield fragment, dict(zip((ANCHOR, MOMENTUM), views, strict=True))

    def _masters(self) -> torch.Tensor:
        return torch.cat([fragment.master for fragment in self._fragments()])

    def _mean(self) -> torch.Tensor:
        mean = self._masters()
        self.mesh.sum_in_place(mean)
        return mean.div_(self.mesh.data_ranks)

    def _set_masters(self, flat: torch.Tensor) -> None:
        fragments = self._fragments()
        for fragment, values in zip(fragments, flat.split([f.master.numel() for f in fragments]), strict=True):
            fragment.master.copy_(values)
        self._write_back()


def spread_failure(gradients: list[torch.Tensor], mesh: Mesh) -> None:
    """Make every rank's gradients not finite where one rank's are, so that all ranks pass over the same steps.

    Collective: every rank must call it.
    """
    # The largest element, for it cannot overflow as the norm of fp16 gradients does.
    largest = torch.nn.utils.get_total_norm(gradients, norm_type=float("inf"))
    has_failed = torch.tensor([float(not torch.isfinite(largest))], device=mesh.device)
    torch.distributed.all_reduce(has_failed)
    if has_failed.item():
        for gradient in gradients:
            gradient.fill_(float("nan"))
