"""Who trains the same GPT: this project, transformers' Trainer, and a plain torch loop over transformers' model."""

import time
from typing import Any, cast

import numpy as np
import torch
import transformers
from torch import nn

from bigbatch.recipes.core.contestants import Bigbatch, SampleRows, TransformersTrainer, as_transformers, batch_at
from bigbatch.recipes.core.engine import to_device
from bigbatch.recipes.core.errors import UserError
from bigbatch.recipes.core.models.decoder import hugging_face_config, hugging_face_state
from bigbatch.recipes.core.parallel import Mesh
from bigbatch.recipes.core.precision import DTYPES
from bigbatch.recipes.core.recipe import Samples
from bigbatch.recipes.core.train import Run
from bigbatch.recipes.gpt import recipe
from bigbatch.recipes.gpt.config import GptConfig


def contestants(run: Run, mesh: Mesh) -> list[Any]:
    """Set up all three with the same first weights and the same samples in the same order."""
    config = cast(GptConfig, run.config)
    if config.model.num_expert_layers:
        raise UserError("model.num_experts", f"found {config.model.num_experts}; what is compared are dense models: 1")
    data = recipe.open_data(config)
    torch.manual_seed(run.config.seed)
    model = recipe.build_model(config, data.facts)
    transformers.logging.set_verbosity_error()
    settings = hugging_face_config(model.section, model.vocabulary_size)
    rivals = [as_transformers(transformers.AutoModelForCausalLM, settings, hugging_face_state(model)) for _ in range(2)]
    return [
        Bigbatch(run, mesh, model, data.train),
        TransformersTrainer(run, rivals[0], SampleRows(data.train, _row)),
        PlainLoop(run, rivals[1], data.train),
    ]


class PlainLoop:
    """The loop that everybody writes first: autocast, fused AdamW, clipping."""

    name = "plain torch loop"

    def __init__(self, run: Run, model: nn.Module, samples: Samples) -> None:
        section = run.config.optimizer
        self.model, self.samples, self.size, self.step = model.train(), samples, run.config.batch.global_size, 0
        self.dtype, self.clipping = DTYPES[run.config.precision.dtype], section.gradient_clipping
        self.device = next(model.parameters()).device
        self.optimizer = torch.optim.AdamW(
            model.parameters(),
            lr=section.learning_rate,
            betas=section.betas,
            weight_decay=section.weight_decay,
            fused=True,
        )

    def steps(self, count: int) -> tuple[list[float], float]:
        """Take `count` steps."""
        seconds, loss = [], torch.tensor(0.0)
        for _ in range(count):
            begin = time.perf_counter()
            tokens = to_device(batch_at(self.samples, self.step, self.size), self.device)["tokens"]
            with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
                loss = self.model(input_ids=tokens, labels=tokens).loss
            loss.backward()
            if self.clipping:
                torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.clipping)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            seconds.append(time.perf_counter() - begin)
            self.step += 1
        return seconds, loss.item()


def _row(batch: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
    tokens = torch.from_numpy(batch["tokens"][0].copy())
    return {"input_ids": tokens, "labels": tokens}
