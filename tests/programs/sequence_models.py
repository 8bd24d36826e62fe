"""Models over two sequence ranks, without an engine: `sequence_models.py OUT`; rank r writes OUT/<r>.safetensors.

`<case>/...` are the results of a case. OUT/traps_<r>.json gets what DeepSpeed makes of the ranks' gradients when it is
told of the sequence ranks in its own ways.
"""

import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from forked_ranks import import_everything, run_forked
from safetensors.torch import save_file
from torch import nn

from bigbatch.recipes.core import runtime
from bigbatch.recipes.core.engine import import_deepspeed
from bigbatch.recipes.core.models.config import DecoderSection, EncoderSection
from bigbatch.recipes.core.models.decoder import Decoder
from bigbatch.recipes.core.models.encoder import MaskedLanguageModel
from bigbatch.recipes.core.parallel import ALONE, Axis
from bigbatch.recipes.core.sequence_parallel import counted_once, first_token, own_tokens, to_heads, to_tokens

VOCABULARY_SIZE, RANKS = 101, 2
SHAPE = {"num_layers": 2, "hidden_size": 32, "num_heads": 4, "max_positions": 32, "initializer_range": 0.1}
LLAMA = {"family": "llama", "num_key_value_heads": 2, "feed_forward_size": 48, "tie_embeddings": False}
DECODERS = {
    "gpt2": SHAPE | {"family": "gpt2"},
    "llama": SHAPE | LLAMA,
    "recompute": SHAPE | {"family": "gpt2", "recompute_activations": True},
    "dropout": SHAPE | {"family": "gpt2", "dropout": 0.2},
}


def batch(num_tokens: int = 16) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return tokens, labels and documents [3, T]; one document lies across the ranks' border, some labels are none."""
    tokens = torch.randint(0, VOCABULARY_SIZE, (3, num_tokens), generator=torch.Generator().manual_seed(1))
    labels = tokens.roll(-1, 1)
    labels[0, :5] = -100
    columns = torch.arange(num_tokens)
    return tokens, labels, torch.stack([columns // 6, columns // 5, columns // 20])


def decoder(name: str, sequence: Axis, num_tokens: int = 16) -> dict[str, torch.Tensor]:
    """Build a decoder, run it forward and backward; return all that came of it."""
    torch.manual_seed(0)
    model = Decoder(DecoderSection(**DECODERS[name]), VOCABULARY_SIZE, sequence=sequence)
    tokens, labels, documents = batch(num_tokens)
    torch.manual_seed(7)
    total = model(tokens, labels, documents=documents if name == "llama" else None)
    total.backward()
    return {"loss": total.detach(), "logits": model.eval()(tokens).detach(), **gradients(model)}


def encoder(sequence: Axis, last_target: int) -> dict[str, torch.Tensor]:
    """Do the same with an encoder that fills in tokens up to a place, and judges pairs."""
    torch.manual_seed(0)
    section = EncoderSection(**SHAPE, dropout=0.0)
    model = MaskedLanguageModel(section, VOCABULARY_SIZE, True, sequence=sequence)
    tokens, _, documents = batch()
    targets = torch.tensor([[0, 3, 7], [1, 2, last_target], [5, last_target, 6]])
    labels = torch.tensor([[9, 8, 7], [6, 100, 5], [4, 3, -100]])
    others = {"documents": documents, "segments": (documents > 0).long()}
    total, pairs = model(tokens, targets, labels, **others, with_pairs=True)
    (total + pairs.square().sum()).backward()
    return {"loss": total.detach(), "pairs": pairs.detach(), **gradients(model)}


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return them by name."""
    return {
        f"grad/{name}": parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None
    }


def exchange(axis: Axis) -> dict[str, torch.Tensor]:
    """Exchange numbers that say where they belong, and learn from the first token of each row."""
    whole = torch.arange(2 * 6 * 4 * 3.0).view(2, 6, 4, 3)  # [B, T, H, E]
    own = own_tokens(whole, axis).clone().requires_grad_()
    heads, fewer = to_heads((own, own[:, :, :2]), axis)
    back = to_tokens(heads.flatten(2), axis)
    first = first_token(own, axis)
    counted_once(first, axis).sum().backward()
    return {
        "heads": heads.detach(),
        "fewer": fewer.detach(),
        "back": back.detach(),
        "first": first.detach(),
        "grad": own.grad,
    }


def all_results(axis: Axis) -> dict[str, torch.Tensor]:
    """Run every case on one rank of an axis."""
    results = {name: decoder(name, axis) for name in DECODERS}
    results["one_token"] = decoder("gpt2", axis, num_tokens=RANKS)
    results |= {"encoder": encoder(axis, last_target=15), "no_target": encoder(axis, last_target=4)}
    results["exchange"] = exchange(axis)
    return {
        f"{case}/{key}": value.clone(memory_format=torch.contiguous_format)
        for case, found in results.items()
        for key, value in found.items()
    }


def deepspeeds_gradient(stage: int, **told: Any) -> float:
    """Return what a rank's weight is changed by when the ranks' gradients are 1 and 2."""
    deepspeed = import_deepspeed()
    rank = torch.distributed.get_rank()
    model = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(model.weight)
    document = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": stage}}
    document |= {"zero_allow_untested_optimizer": True, "gradient_clipping": 0.0}
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=document, **told)
    engine.backward(engine(torch.full((1, 1), rank + 1.0)).sum())
    engine.step()
    with deepspeed.zero.GatheredParameters(list(model.parameters()), enabled=stage == 3):
        return -model.weight.item()


def traps() -> dict[str, float]:
    """Tell DeepSpeed in both of its ways that two ranks are one data rank."""
    deepspeed = import_deepspeed()
    from deepspeed.runtime.sequence_parallel import parallel_state_sp as state

    state.initialize_sequence_parallel(RANKS)
    found = {f"mpu_{stage}": deepspeeds_gradient(stage, mpu=state) for stage in range(4)}
    deepspeed.utils.groups.mpu = None
    return found | {f"mesh_param_{stage}": deepspeeds_gradient(stage, mesh_param=(1, RANKS)) for stage in (0, 1)}


def run(out: Path) -> None:
    """Be one of the ranks."""
    torch.set_num_threads(1)
    mesh = runtime.start_mesh(sequence_ranks=RANKS)
    save_file(all_results(mesh.sequence), out / f"{mesh.rank}.safetensors")
    (out / f"traps_{mesh.rank}.json").write_text(json.dumps(traps()))
    runtime.leave_mesh(mesh)


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    torch.set_num_threads(1)
    save_file(all_results(ALONE), folder / "whole.safetensors")
    import_everything()
    statuses = run_forked(partial(run, folder), RANKS, folder / "log.txt")
    print(*(path.read_text() for path in folder.glob("log.*.txt")))
    sys.exit(int(any(statuses)))
