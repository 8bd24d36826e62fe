"""A mixture of experts in place of a feed-forward layer: DeepSpeed's MoE layer over experts of our own making.

What DeepSpeed 0.19.8 does by default is here set right: its experts are copies of one, which begin with the same
weights; with two experts a token it adds noise to the choice of the second, in evaluation too; and its own way to drop
no token (`drop_tokens` False) has buffers of another length at each call, by which a process's memory grows from step
to step, and of different lengths where ranks evaluate different numbers of tokens, so that their exchange fails.

Shapes: B rows, T tokens, D hidden size, E experts of all ranks.
"""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from bigbatch.recipes.core.engine import import_deepspeed
from bigbatch.recipes.core.layers import draw
from bigbatch.recipes.core.layout import logical_shapes
from bigbatch.recipes.core.models.config import DecoderSection
from bigbatch.recipes.core.parallel import ALONE, Axis


class MixtureFeedForward(nn.Module):
    """A router and this rank's experts, under the names that they have among all: `experts.5.down.weight`.

    Every rank draws the weights of all experts and keeps its own. Collective over the axis, also in evaluation: all its
    ranks must call it equally often.
    """

    def __init__(self, section: DecoderSection, make_expert: Callable[[], nn.Module], axis: Axis) -> None:
        """Build it; `make_expert` draws one expert's weights."""
        super().__init__()
        import_deepspeed()
        from deepspeed.moe.layer import MoE  # noqa: PLC0415 - see import_deepspeed

        self.section, self.axis = section, axis
        self.router = nn.Parameter(torch.empty(section.num_experts, section.hidden_size))  # [E, D]
        draw(self.router, section.initializer_range)
        moe = MoE(
            section.hidden_size,
            nn.Identity(),
            section.num_experts,
            axis.size,
            section.experts_per_token,
            min_capacity=1,  # with more, it refuses to generate one token
            top2_2nd_expert_sampling=False,
        )
        # Before the layer that uses them, so that this is where named_parameters finds them.
        self.experts = self._draw_experts(make_expert, moe.expert_group_name)
        moe.deepspeed_moe.experts.deepspeed_experts = nn.ModuleList(self.experts.values())
        del moe.deepspeed_moe.gate.wg
        self.moe = moe
        self.auxiliary_loss = torch.zeros(())
        """The load-balancing loss of the last call's tokens, float32."""

    def forward(self, hidden: torch.Tensor, spread: Axis = ALONE) -> torch.Tensor:
        """Map hidden states [B, T, D] one by one, each by the experts that the router chooses; no plan spreads them."""
        gate: Any = self.moe.deepspeed_moe.gate
        gate.wg = SimpleNamespace(weight=self.router)
        tokens, factor = hidden.flatten(0, 1), self.section.capacity_factor if self.training else None
        # Which tokens are dropped is drawn for a top-1 choice (https://arxiv.org/abs/2109.10465).
        gate.use_rts = factor is not None
        gate.capacity_factor = gate.eval_capacity_factor = factor or self._fullest(tokens)
        mixed, self.auxiliary_loss, _ = self.moe(tokens)
        return mixed.view_as(hidden)

    def _draw_experts(self, make_expert: Callable[[], nn.Module], group_name: str) -> nn.ModuleDict:
        size = self.section.num_experts // self.axis.size
        own = range(size * self.axis.rank, size * (self.axis.rank + 1))
        experts, self.shapes_of_all = nn.ModuleDict(), {}
        for index in range(self.section.num_experts):
            expert = make_expert()
            self.shapes_of_all |= {f"experts.{index}.{name}": shape for name, shape in logical_shapes(expert).items()}
            if index in own:
                experts[str(index)] = expert
                for parameter in expert.parameters():  # as DeepSpeed marks those of its copies
                    parameter.allreduce = False  # type: ignore[attr-defined]
                    parameter.group_name = group_name  # type: ignore[attr-defined]
        return experts

    def _fullest(self, tokens: torch.Tensor) -> float:
        """Return the capacity factor with which no token [N, D] of any rank of the axis is dropped."""
        count, num_experts = self.section.experts_per_token, self.section.num_experts
        with torch.no_grad():
            chosen = F.linear(tokens.float(), self.router.float()).topk(count).indices
            fullest = torch.bincount(chosen.flatten(), minlength=num_experts).max()
        if self.axis.size > 1:
            self.axis.max_in_place(fullest)
        # In steps of a sixteenth to an eighth: with few different sizes, the memory of one call serves the next.
        capacity = int(fullest)
        step = 1 << max(0, capacity.bit_length() - 4)
        capacity = -(-capacity // step) * step
        return (capacity - 0.5) * num_experts / (len(tokens) * count)  # DeepSpeed rounds up
