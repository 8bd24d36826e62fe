"""Who trains the same model in `bigbatch bench train`: this project's engine, and transformers' Trainer."""

import itertools
import os
import tempfile
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import transformers
from torch import nn

from bigbatch.recipes.core.engine import Engine
from bigbatch.recipes.core.parallel import Mesh
from bigbatch.recipes.core.recipe import Samples
from bigbatch.recipes.core.train import Run

Rows = torch.utils.data.Dataset[dict[str, torch.Tensor]]


class Bigbatch:
    """This project's engine."""

    name = "bigbatch"

    def __init__(self, run: Run, mesh: Mesh, model: nn.Module, samples: Samples) -> None:
        self.engine, self.recipe = Engine(model, run.config, run.deepspeed, mesh), run.recipe
        self.samples, self.size, self.step = samples, run.config.batch.global_size, 0

    def steps(self, count: int) -> tuple[list[float], float]:
        """Take `count` steps as the training loop does: batch, step, figures."""
        seconds, loss = [], 0.0
        for _ in range(count):
            begin = time.perf_counter()
            batch = batch_at(self.samples, self.step, self.size)
            num_targets = self.recipe.count_targets(batch)
            loss = self.engine.train_step(self.step, [batch], self.recipe.loss, num_targets).loss
            seconds.append(time.perf_counter() - begin)
            self.step += 1
        return seconds, loss


class TransformersTrainer:
    """transformers' own Trainer, timed from one step's begin to the next one's, its data loading included.

    `useful_tokens` a step is given where not every token of a batch is.
    """

    def __init__(
        self,
        run: Run,
        model: nn.Module,
        rows: Rows,
        name: str = "transformers Trainer",
        useful_tokens: float | None = None,
    ) -> None:
        self.run, self.model, self.rows = run, model, rows
        self.name, self.useful_tokens = name, useful_tokens
        for variable in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
            os.environ.pop(variable, None)  # else it wraps its model for data parallelism over one rank

    def steps(self, count: int) -> tuple[list[float], float]:
        """Train for one step more than is counted: the first one sets up."""
        config, clock = self.run.config, _Clock()
        with tempfile.TemporaryDirectory() as folder:
            arguments = transformers.TrainingArguments(
                output_dir=folder,
                max_steps=count + 1,
                per_device_train_batch_size=config.batch.global_size,
                learning_rate=config.optimizer.learning_rate,
                weight_decay=config.optimizer.weight_decay,
                adam_beta1=config.optimizer.betas[0],
                adam_beta2=config.optimizer.betas[1],
                max_grad_norm=config.optimizer.gradient_clipping or 0.0,
                optim="adamw_torch_fused",
                lr_scheduler_type="constant",
                use_cpu=not torch.cuda.is_available(),
                logging_strategy="no",
                save_strategy="no",
                report_to=[],
                disable_tqdm=True,
                dataloader_pin_memory=torch.cuda.is_available(),
                bf16=config.precision.dtype == "bf16",
                fp16=config.precision.dtype == "fp16",
            )
            trainer = transformers.Trainer(self.model, arguments, train_dataset=self.rows, callbacks=[clock])
            trainer.remove_callback(transformers.PrinterCallback)
            loss = trainer.train().training_loss
        return clock.seconds()[1:], loss


class SampleRows(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """Samples one by one, each turned into what transformers' models take: `convert` gets a batch of one."""

    def __init__(self, samples: Samples, convert: Callable[[dict[str, np.ndarray]], dict[str, torch.Tensor]]) -> None:
        self.samples, self.convert = samples, convert

    def __len__(self) -> int:
        """Return the number of samples."""
        return self.samples.num_samples

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """Return a sample of epoch 0."""
        ids = np.array([index])
        return self.convert(self.samples.batch(ids, np.zeros_like(ids)))


def as_transformers(auto_class: Any, config: dict[str, Any], state: dict[str, torch.Tensor]) -> nn.Module:
    """Build transformers' own model of a configuration with these weights."""
    twin = auto_class.from_config(transformers.AutoConfig.for_model(**config))
    twin.load_state_dict(state, strict=False)  # a tied head has no weight of its own
    return twin


def batch_at(samples: Samples, step: int, size: int) -> dict[str, np.ndarray]:
    """Return the samples of a step in their own order."""
    ids = np.arange(step * size, (step + 1) * size) % samples.num_samples
    return samples.batch(ids, np.zeros_like(ids))


class _Clock(transformers.TrainerCallback):
    def __init__(self) -> None:
        self.begins: list[float] = []
        self.end = 0.0

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.begins.append(time.perf_counter())

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.end = time.perf_counter()

    def seconds(self) -> list[float]:
        marks = [*self.begins, self.end]
        return [after - before for before, after in itertools.pairwise(marks)]
