"""Who trains the same GPT: this project, transformers' Trainer, and a plain torch loop over transformers' model."""

import itertools
import os
import tempfile
import time
from typing import Any, cast

import numpy as np
import torch
import transformers
from torch import nn

from bigbatch.recipes.core.engine import Engine, to_device
from bigbatch.recipes.core.models.decoder import Decoder, hugging_face_config, hugging_face_tensors
from bigbatch.recipes.core.models.hugging_face import to_hugging_face
from bigbatch.recipes.core.parallel import Mesh
from bigbatch.recipes.core.recipe import Samples
from bigbatch.recipes.core.train import DTYPES, Run
from bigbatch.recipes.gpt import recipe
from bigbatch.recipes.gpt.config import GptConfig


def contestants(run: Run, mesh: Mesh) -> list[Any]:
    """Set up all three with the same first weights and the same samples in the same order."""
    config = cast(GptConfig, run.config)
    data = recipe.open_data(config)
    torch.manual_seed(run.config.seed)
    model = recipe.build_model(config, data.facts)
    transformers.logging.set_verbosity_error()
    rivals = [_as_transformers(model), _as_transformers(model)]
    return [
        Bigbatch(run, mesh, model, data.train),
        TransformersTrainer(run, rivals[0], data.train),
        PlainLoop(run, rivals[1], data.train),
    ]


def _as_transformers(model: Decoder) -> nn.Module:
    config = hugging_face_config(model.section, model.vocabulary_size)
    twin = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**config))
    table = hugging_face_tensors(model.section, model.vocabulary_size)
    state = {
        piece.name: to_hugging_face(parameter.detach(), piece)
        for name, parameter in model.named_parameters()
        for piece in table[name]
    }
    twin.load_state_dict(state, strict=False)  # a tied head has no weight of its own
    return twin


class Bigbatch:
    """This project's engine."""

    name = "bigbatch"

    def __init__(self, run: Run, mesh: Mesh, model: nn.Module, samples: Samples) -> None:
        self.engine = Engine(model, run.config, run.deepspeed, mesh)
        self.samples, self.size, self.step = samples, run.config.batch.global_size, 0

    def steps(self, count: int) -> tuple[list[float], float]:
        """Take `count` steps as the training loop does: batch, step, figures."""
        seconds, loss = [], 0.0
        for _ in range(count):
            begin = time.perf_counter()
            batch = _batch(self.samples, self.step, self.size)
            loss = self.engine.train_step(self.step, [batch], recipe.loss, recipe.count_targets(batch)).loss
            seconds.append(time.perf_counter() - begin)
            self.step += 1
        return seconds, loss


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
            tokens = to_device(_batch(self.samples, self.step, self.size), self.device)["tokens"]
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


class TransformersTrainer:
    """transformers' own Trainer, timed from one step's begin to the next one's, its data loading included."""

    name = "transformers Trainer"

    def __init__(self, run: Run, model: nn.Module, samples: Samples) -> None:
        self.run, self.model, self.samples = run, model, samples
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
            os.environ.pop(name, None)  # else it wraps its model for data parallelism over one rank

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
            trainer = transformers.Trainer(self.model, arguments, train_dataset=_Rows(self.samples), callbacks=[clock])
            trainer.remove_callback(transformers.PrinterCallback)
            loss = trainer.train().training_loss
        return clock.seconds()[1:], loss


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


class _Rows(torch.utils.data.Dataset):
    def __init__(self, samples: Samples) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return self.samples.num_samples

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids = np.array([index])
        tokens = torch.from_numpy(self.samples.batch(ids, np.zeros_like(ids))["tokens"][0].copy())
        return {"input_ids": tokens, "labels": tokens}


def _batch(samples: Samples, step: int, size: int) -> dict[str, np.ndarray]:
    ids = np.arange(step * size, (step + 1) * size) % samples.num_samples
    return samples.batch(ids, np.zeros_like(ids))
