"""Train small models with plain DeepSpeed and save as it does: `native_checkpoints.py OUT`.

OUT/<model>_<stage>_<dtype>_<ranks>/ gets DeepSpeed's own checkpoint; truth.safetensors, the float32 masters as the
living engine gives them; and for gpt2 reference.safetensors, what DeepSpeed's own zero_to_fp32 makes of the checkpoint.
"""

import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from forked_ranks import import_everything, run_forked
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F
from transformers import GPT2Config, GPT2LMHeadModel

from bigbatch.recipes.core.engine import import_deepspeed

VOCABULARY_SIZE, ROWS, LENGTH, STEPS = 61, 4, 10, 3
CASES = [("odd", stage, dtype, ranks) for stage in range(4) for dtype in ("fp32", "bf16", "fp16") for ranks in (1, 2)]
CASES += [("odd_fused", 0, "bf16", 2), ("odd_float32_gradients", 1, "bf16", 2), ("odd_round_robin", 2, "bf16", 2)]
CASES += [("odd_small_groups", 3, "bf16", 2), ("gpt2", 2, "bf16", 2), ("gpt2", 3, "fp32", 2)]


class Odd(nn.Module):
    """Sizes that no number of ranks divides, a tied head, a frozen tensor, a buffer, a scalar."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY_SIZE, 7)
        self.frozen = nn.Linear(7, 5)
        self.up = nn.Linear(5, 7)
        self.gain = nn.Parameter(torch.tensor([0.5]))
        self.head = nn.Linear(7, VOCABULARY_SIZE, bias=False)
        self.head.weight = self.embedding.weight
        self.register_buffer("shift", torch.linspace(-1, 1, 7))
        self.register_buffer("count", torch.tensor([3]))
        self.register_buffer("scratch", torch.ones(2), persistent=False)
        self.frozen.requires_grad_(False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        hidden = self.embedding(tokens)
        hidden = hidden + self.shift.to(hidden.dtype)
        return self.head(hidden + self.gain * self.up(torch.tanh(self.frozen(hidden))))


def build(model: str) -> nn.Module:
    """Build a model with random weights."""
    torch.manual_seed(1)
    if model != "gpt2":
        return Odd()
    shape = {"n_layer": 2, "n_embd": 24, "n_head": 2, "n_positions": 16, "initializer_range": 0.3}
    return GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY_SIZE, bos_token_id=0, eos_token_id=0, **shape))


def document(model: str, stage: int, dtype: str) -> dict[str, Any]:
    """Return DeepSpeed's document."""
    precision = {"bf16": {"bf16": {"enabled": True}}, "fp16": {"fp16": {"enabled": True, "initial_scale_power": 8}}}
    zero = {"stage": stage, "stage3_param_persistence_threshold": 10}
    extra = {
        "odd_float32_gradients": {"data_types": {"grad_accum_dtype": "fp32"}},
        "odd_round_robin": {"zero_optimization": zero | {"round_robin_gradients": True}},
        "odd_small_groups": {"zero_optimization": zero | {"sub_group_size": 50}},
    }
    return {
        "train_micro_batch_size_per_gpu": ROWS,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 2}},
        **precision.get(dtype, {}),
        **extra.get(model, {}),
    }


def train(model: str, stage: int, dtype: str, out: Path) -> None:
    """Take a few steps and save, as one rank."""
    torch.set_num_threads(1)
    deepspeed = import_deepspeed()
    deepspeed.init_distributed("gloo", verbose=False)
    module = build(model)
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    groups = [
        {"params": [parameter for parameter in trained if parameter.ndim > 1]},
        {"params": [parameter for parameter in trained if parameter.ndim == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=1e-2)
    if model == "odd_fused":
        pass_for_fused(optimizer)
    engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=document(model, stage, dtype))
    rank = torch.distributed.get_rank()
    for step in range(STEPS):
        generator = torch.Generator().manual_seed(10 * step + rank)
        tokens = torch.randint(VOCABULARY_SIZE, (ROWS, LENGTH), generator=generator)
        output = engine(tokens)
        logits = output.logits if model == "gpt2" else output
        engine.backward(F.cross_entropy(logits.float().flatten(0, 1), tokens.roll(-1, 1).flatten()))
        engine.step()
    engine.save_checkpoint(str(out), tag="step3", client_state={"epoch": 1, "note": "a client's own"})
    masters = {name: master(parameter, engine) for name, parameter in engine.module.named_parameters()}
    if rank == 0:
        save_file(masters, str(out / "truth.safetensors"))
        if model == "gpt2":
            module.config.save_pretrained(out / "like")


def pass_for_fused(optimizer: torch.optim.Optimizer) -> None:
    """Have DeepSpeed take torch's AdamW for its own fused one, whose extension takes minutes to compile."""
    from deepspeed.ops.adam import FusedAdam

    optimizer.__class__ = type("Fused", (torch.optim.AdamW, FusedAdam), {})


def master(parameter: nn.Parameter, engine: Any) -> torch.Tensor:
    """Return a copy of a parameter's float32 master, frozen ones as float32. Collective: every rank must call it."""
    from deepspeed.utils import safe_get_full_fp32_param

    if engine.zero_optimization_stage() == 0:
        return replicated_masters(engine.optimizer).get(parameter, parameter).detach().float().clone()
    if parameter.requires_grad:
        return safe_get_full_fp32_param(parameter).detach().float().clone()
    with import_deepspeed().zero.GatheredParameters([parameter]):
        return parameter.detach().float().clone()


def replicated_masters(wrapper: Any) -> dict[nn.Parameter, torch.Tensor]:
    """Return the masters of stage 0; none in float32, where the weights are their own."""
    masters = {}
    if hasattr(wrapper, "fp32_groups_flat"):
        for group, flat in zip(wrapper.fp16_groups, wrapper.fp32_groups_flat, strict=True):
            pieces = flat.split([weight.numel() for weight in group])
            masters.update({weight: piece.view_as(weight) for weight, piece in zip(group, pieces, strict=True)})
    elif hasattr(wrapper, "fp32_groups"):
        for group, copies in zip(wrapper.fp16_groups, wrapper.fp32_groups, strict=True):
            masters.update(zip(group, copies, strict=True))
    return masters


def main(out: Path) -> int:
    """Run every case in new processes; return 1 if one failed."""
    import_everything()
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    failed = []
    for model, stage, dtype, ranks in CASES:
        folder = out / f"{model}_{stage}_{dtype}_{ranks}"
        folder.mkdir(parents=True)
        log = out / f"{folder.name}.log"
        if any(run_forked(partial(train, model, stage, dtype, folder), ranks, log)):
            failed.append(folder.name)
            print(*(path.read_text() for path in out.glob(f"{folder.name}.*.log")), sep="\n")
        elif model == "gpt2":
            tensors = get_fp32_state_dict_from_zero_checkpoint(str(folder))
            save_file({name: tensor.clone() for name, tensor in tensors.items()}, str(folder / "reference.safetensors"))
    print("failed:", failed)
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
