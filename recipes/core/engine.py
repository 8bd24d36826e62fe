"""One train step over DeepSpeed's engine; all that is peculiar to DeepSpeed ends here."""

import io
import logging
import math
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, redirect_stdout
from itertools import repeat
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from bigbatch.recipes.core.batch import plan_batch
from bigbatch.recipes.core.config import RunConfig
from bigbatch.recipes.core.engine_config import deepspeed_batch_size
from bigbatch.recipes.core.errors import UserError
from bigbatch.recipes.core.fragments import (
    Fragment,
    fragments,
    frozen,
    inner_optimizer,
    is_replicated,
    segments,
    write_back,
)
from bigbatch.recipes.core.layout import logical_parameters, logical_shapes, share_of
from bigbatch.recipes.core.local_sgd import LocalSgd, spread_failure
from bigbatch.recipes.core.optim import Lamb, build_optimizer
from bigbatch.recipes.core.parallel import Axis, Mesh
from bigbatch.recipes.core.pipeline import Stage, pipeline_module
from bigbatch.recipes.core.precision import DTYPES, multiply_fast
from bigbatch.recipes.core.recipe import Batch, Loss
from bigbatch.recipes.core.schedule import learning_rate_factor

LossFunction = Callable[[nn.Module, Batch], Loss]


class StepResult(NamedTuple):
    """What one optimizer step did."""

    loss: float
    """Mean over all targets of the global batch."""
    num_targets: int
    grad_norm: float
    """Global 2-norm before clipping; where ranks train alone, the root mean square of theirs."""
    learning_rate: float
    loss_scale: float
    skipped: bool
    """The gradient was not finite and the weights stayed as they were."""


class Engine:
    """A model under DeepSpeed: train steps, evaluation, and access to its state.

    `module` is the model itself; under ZeRO-3 its weights are there only inside a forward pass, in a pipeline only
    those of this rank's layers.
    """

    def __init__(
        self,
        module: nn.Module,
        config: RunConfig,
        document: dict[str, Any],
        mesh: Mesh,
        learning_rate_scales: dict[str, float] | None = None,
    ) -> None:
        """Wrap the module. Collective: every rank must call it."""
        self.config, self.mesh, self.module = config, mesh, module
        self.stage = Stage(module, mesh.pipeline, mesh.device) if mesh.pipeline.size > 1 else None
        self._hook_norm, self._own_factor = math.nan, 1.0
        refuse_quantized_communication(document, mesh.device)
        if mesh.device.type == "cpu":
            multiply_fast(DTYPES[config.precision.dtype])
        optimizer = build_optimizer(config.optimizer, module, learning_rate_scales)
        for group in optimizer.param_groups:
            group["lr"] = 0.0  # DeepSpeed may step once while it sets up
        deepspeed = import_deepspeed()
        is_local = config.parallel.sync == "local_sgd"
        mpu, wrapped = _model_parallel_unit(mesh, is_local), module
        if self.stage:
            wrapped, mpu = pipeline_module(deepspeed, self.stage, mesh), None
        deepspeed.utils.groups.mpu = mpu  # else that of an engine before this one stays
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # DeepSpeed's own, about its use of torch
            # Its mixture of experts prints where a command's results go.
            with redirect_stdout(io.StringIO()):
                self.deepspeed, *_ = deepspeed.initialize(model=wrapped, optimizer=optimizer, config=document, mpu=mpu)
        self.optimizer = inner_optimizer(self.deepspeed)
        self.optimizer.state.clear()  # what that step left: Adam's bias correction would be one step ahead
        if is_replicated(self.deepspeed):
            self._divided = {fragment.flat for fragment in self.fragments() if fragment.share or fragment.is_expert}
            self.optimizer.register_step_pre_hook(self._clip_float32_gradients)
        self.before_change: Callable[[], None] = lambda: None
        """Called before masters or optimizer state change, several times a step."""
        self.optimizer.register_step_pre_hook(lambda *_: self.before_change())
        if config.optimizer.keep_zeros:
            self._zeros: list[torch.Tensor] = []
            self.optimizer.register_step_pre_hook(self._note_zeros)
            self.optimizer.register_step_post_hook(self._restore_zeros)
        self.local = LocalSgd(config, mesh, self.fragments, self.write_back) if is_local else None
        """What a rank that trains alone has of the others."""
        if isinstance(self.optimizer, Lamb):
            self.optimizer.set_segments(*segments(self.fragments(), module), self._sum_squares)

    @property
    def answering(self) -> nn.Module:
        """What to call for evaluation."""
        return self.module if self.stage else self.deepspeed

    @property
    def copies(self) -> set[str]:
        """Names of the parameters here that the first stage of the pipeline has too, and saves."""
        return set(self.stage.ties) if self.stage and self.mesh.pipeline.rank > 0 else set()

    def fragments(self) -> list[Fragment]:
        """List this rank's pieces of the masters, with access to the optimizer's state."""
        return fragments(self.deepspeed, self.module)

    def frozen(self) -> list[Fragment]:
        """List this rank's pieces of the weights that are not trained, in their working format."""
        return frozen(self.module, self.mesh.zero.rank)

    def write_back(self) -> None:
        """Bring the working weights up to date with restored masters. Collective: every rank must call it."""
        write_back(self.deepspeed)

    def averaged(self) -> AbstractContextManager[None]:
        """Have the same weights on all data ranks for a while. Collective: every rank must call it."""
        if not self.local:
            return nullcontext()
        self.before_change()
        return self.local.averaged()

    @property
    def loss_scaler(self) -> Any:
        """DeepSpeed's loss scaler (fp16), else None."""
        if self.config.precision.dtype != "fp16":
            return None
        wrapper = self.deepspeed.optimizer
        return getattr(wrapper, "loss_scaler", None) or wrapper.loss_scale_config

    def train_step(
        self, step: int, batches: list[dict[str, np.ndarray]], loss: LossFunction, num_targets: int
    ) -> StepResult:
        """Take optimizer step `step` (0 is the first) on this rank's micro-batches.

        `num_targets` is the true count over all micro-batches and all ranks: the one number that the loss is divided
        by. Collective: every rank must call it with equally many micro-batches.
        """
        engine = self.deepspeed
        engine.train()
        plan = plan_batch(self.config.batch, self.mesh.data_ranks, step)
        size = deepspeed_batch_size(self.config, plan)
        if engine.train_batch_size() != size:
            engine.set_train_batch_size(size)
        rate = self.config.optimizer.learning_rate * learning_rate_factor(self.config.schedule, step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["scale"]
        scale = self.loss_scale
        # DeepSpeed averages over data and sequence ranks; multiplied back, the gradient is that of sum / num_targets.
        factor = self.mesh.zero.size / max(1, num_targets)
        run = self._run_stage if self.stage else self._run_micro_batches
        loss_sum = run(step, batches, loss, factor)
        norm = self._grad_norm()
        total, squares = self.mesh.sum(loss_sum, norm * norm)
        if self.local:
            norm = math.sqrt(squares / self.mesh.data_ranks)
            self.before_change()  # a step that was skipped has not called it
            self.local.after_step(step)
        loss_mean = total / max(1, num_targets)
        skipped = not (math.isfinite(norm) and math.isfinite(loss_mean))
        return StepResult(loss_mean, num_targets, norm, rate, scale, skipped)

    def _run_micro_batches(
        self, step: int, batches: list[dict[str, np.ndarray]], loss: LossFunction, factor: float
    ) -> float:
        """Do a step with `factor` on the loss; return this rank's summed loss."""
        engine, loss_sum, own_targets = self.deepspeed, 0.0, 0
        # At stage 0 it divides by the loss scale but leaves it to us to multiply.
        scale = self.loss_scale if is_replicated(engine) else 1.0
        for index, batch in enumerate(batches):
            self._seed(step, index)
            result = loss(engine, to_device(batch, self.mesh.device))
            engine.backward(result.sum * (scale * factor), scale_wrt_gas=False)
            loss_sum += result.sum.detach().double()
            own_targets += result.num_targets
            if self.local and index == len(batches) - 1:
                self._own_factor = self.mesh.sequence.size / (factor * max(1, own_targets))
                gradients = [parameter.grad for parameter in self.module.parameters() if parameter.grad is not None]
                spread_failure(gradients, self.mesh)
            engine.step()
        return float(loss_sum)

    def _run_stage(self, step: int, batches: list[dict[str, np.ndarray]], loss: LossFunction, factor: float) -> float:
        """Do the same as a stage of the pipeline: DeepSpeed says when the next micro-batch comes, in their order."""
        assert self.stage
        coming, loss_sum = enumerate(batches), 0.0

        def work(own_layers: Any) -> torch.Tensor:
            nonlocal loss_sum
            index, batch = next(coming)
            self._seed(step, index)
            result = loss(own_layers, to_device(batch, self.mesh.device))  # only the last stage comes to its end
            loss_sum += result.sum.detach().double()
            return result.sum * (factor * len(batches))  # DeepSpeed divides by their number

        self.stage.work = work
        nothing = torch.zeros(1)  # each stage has its batches already
        self.deepspeed.train_batch(repeat((nothing, nothing)))
        return float(loss_sum)

    def _seed(self, step: int, index: int) -> None:
        """Let dropout be a function of (seed, step, micro-batch, data rank): a resume needs no saved generator.

        Tensor ranks drop the same of what is replicated, stages of a pipeline and sequence ranks each their own.
        """
        part = self.mesh.pipeline.rank or self.mesh.sequence.rank  # no plan has both
        torch.manual_seed(mix(self.config.seed, step, index, self.mesh.data_rank, *((part,) if part else ())))

    @property
    def loss_scale(self) -> float:
        """The factor on the loss in fp16, else 1."""
        return float(self.loss_scaler.cur_scale) if self.loss_scaler else 1.0

    def _grad_norm(self) -> float:
        if is_replicated(self.deepspeed) and self.config.precision.dtype != "fp16":
            return self._hook_norm
        if getattr(self.deepspeed.optimizer, "overflow", False):
            return math.inf
        return self._hook_norm if is_replicated(self.deepspeed) else float(self.deepspeed.get_global_grad_norm())

    def _sum_squares(self, squares: torch.Tensor) -> None:
        """Add up sums of squares [..., parameter] over the ranks that hold pieces, each piece once."""
        if not is_replicated(self.deepspeed):
            self.mesh.zero.sum_in_place(squares)
        if self.mesh.tensor.size > 1:
            if self.mesh.tensor.rank > 0:
                here = logical_parameters(self.module)
                names = sorted(logical_shapes(self.module))
                whole = [name not in here or share_of(here[name]) is None for name in names]
                squares[..., torch.tensor(whole, device=squares.device)] = 0
            self.mesh.tensor.sum_in_place(squares)

    def _clip_float32_gradients(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        """Clip before a step at stage 0, where DeepSpeed would take the norm of the bf16 gradients in bf16."""
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        if self._own_factor != 1.0:  # from the mean over all ranks' targets to that over this rank's
            for parameter in parameters:
                if parameter.grad is not None:
                    parameter.grad.mul_(self._own_factor)
        norm = self._total_norm([p for p in parameters if p.grad is not None])
        self._hook_norm = float(norm)
        if not math.isfinite(self._hook_norm):
            for parameter in parameters:
                parameter.grad = None  # the update passes over it
        elif self.config.optimizer.gradient_clipping:
            torch.nn.utils.clip_grads_with_norm_(parameters, self.config.optimizer.gradient_clipping, norm)

    def _note_zeros(self, *_: Any) -> None:
        """Remember before the first step, when a checkpoint has been restored, which masters are 0."""
        if not self._zeros:
            self._zeros = [piece.master == 0 for piece in self._matrices()]

    def _restore_zeros(self, *_: Any) -> None:
        for piece, is_zero in zip(self._matrices(), self._zeros, strict=True):
            piece.master.masked_fill_(is_zero, 0)

    def _matrices(self) -> list[Fragment]:
        return [piece for piece in self.fragments() if len(piece.shape) > 1]

    def _total_norm(self, parameters: list[torch.Tensor]) -> torch.Tensor:
        """Return the 2-norm of the gradients over all tensor or expert ranks."""
        # One of the two axes at most has several ranks.
        axis = self.mesh.expert if self.mesh.expert.size > 1 else self.mesh.tensor
        own = parameters if axis.rank == 0 else [p for p in parameters if p in self._divided]
        norm = torch.nn.utils.get_total_norm([p.grad for p in own if p.grad is not None])
        if axis.size == 1:
            return norm
        square = norm.to(self.mesh.device).square()
        axis.sum_in_place(square)
        return square.sqrt()


def _model_parallel_unit(mesh: Mesh, is_local: bool = False) -> Any:
    """Answer what DeepSpeed asks a Megatron about the groups; None without tensor ranks.

    It takes sequence ranks for data ranks: told of them, it adds up their gradients at stages 0 to 2, and averages them
    at stage 3 (0.19.8). `is_local`: this rank is to have no data ranks but these.
    """
    if mesh.tensor.size == 1 and not is_local:
        return None
    alone: Any = dist.new_group([mesh.rank], use_local_synchronization=True) if is_local else None
    data = mesh.zero
    if is_local:
        data = mesh.sequence if mesh.sequence.size > 1 else Axis(group=alone)
    answers = {
        "model_parallel_rank": mesh.tensor.rank,
        "model_parallel_world_size": mesh.tensor.size,
        "model_parallel_group": mesh.tensor.group or alone,
        "data_parallel_rank": data.rank,
        "data_parallel_world_size": data.size,
        "data_parallel_group": data.group,
    }
    return SimpleNamespace(**{f"get_{name}": lambda answer=answer: answer for name, answer in answers.items()})


def partitioned_building(document: dict[str, Any], mesh: Mesh) -> AbstractContextManager[None]:
    """Within it, at stage 3, each layer's weights are divided over the ranks of ZeRO as soon as they are drawn.

    So no rank ever holds the whole model. Collective: every rank must build the same model in it.
    """
    if document["zero_optimization"]["stage"] < 3:
        return nullcontext()
    refuse_quantized_communication(document, mesh.device)
    groups = {"data_parallel_group": mesh.zero_group, "mpu": _model_parallel_unit(mesh)}
    return import_deepspeed().zero.Init(config_dict_or_path=document, **groups)


def refuse_quantized_communication(document: dict[str, Any], device: torch.device) -> None:
    """Raise UserError where a DeepSpeed document asks for ZeRO++'s quantized communication on a CPU."""
    for name in ("zero_quantized_weights", "zero_quantized_gradients", "zero_quantized_nontrainable_weights"):
        if device.type == "cpu" and document["zero_optimization"].get(name):
            raise UserError(f"deepspeed.zero_optimization.{name}", "needs GPUs; on CPUs right would be false")


def to_device(batch: dict[str, np.ndarray], device: torch.device) -> Batch:
    """Move a batch to a rank's device."""
    return {name: torch.from_numpy(array).to(device, non_blocking=True) for name, array in batch.items()}


def import_deepspeed() -> Any:
    """Import DeepSpeed quietly, and without the extension that it would compile for minutes at start."""
    for name in ("DeepSpeed", "deepspeed"):
        logging.getLogger(name).setLevel(logging.WARNING)
    # DeepSpeed calls collectives by names that torch 2.13 deprecates, at every step.
    warnings.filterwarnings("ignore", r"`torch.distributed.\w+` is deprecated", FutureWarning)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import deepspeed  # noqa: PLC0415 - seconds, and not needed by those who import this module for its types
        import deepspeed.ops  # noqa: PLC0415

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # it serves inference_all_reduce alone
    accelerator: Any = deepspeed.get_accelerator()
    if accelerator.device_name() == "cpu":
        accelerator.is_fp16_supported = lambda: True  # not by oneDNN on every CPU, but core.precision does without
    return deepspeed


def mix(*numbers: int) -> int:
    """Mix small numbers into one 63-bit seed."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)
