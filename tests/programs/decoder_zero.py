"""Train native decoders under ZeRO stages 0 and 3 on 1 and 2 ranks: `decoder_zero.py OUT`, which gets a JSON file each.

The data are the same whatever the number of ranks, so that all results of a model should be equal.
"""

import json
import sys
from functools import partial
from pathlib import Path

import torch
from forked_ranks import run_forked

from bigbatch.recipes.core.engine import import_deepspeed
from bigbatch.recipes.core.generate import Sampling, generate
from bigbatch.recipes.core.models.config import DecoderSection
from bigbatch.recipes.core.models.decoder import Decoder

SHAPE = {"num_layers": 2, "hidden_size": 32, "num_heads": 4, "max_positions": 32, "initializer_range": 0.1}
MODELS = {
    "gpt2": {"family": "gpt2"},
    "gpt2_recompute": {"family": "gpt2", "recompute_activations": True},
    "llama_untied": {"family": "llama", "num_key_value_heads": 2, "tie_embeddings": False},
}
CASES = [(name, *plan) for name in ("gpt2", "llama_untied") for plan in ((0, 1), (3, 1), (3, 2))]
CASES += [("gpt2_recompute", 3, 2)]
ROWS, LENGTH, STEPS, VOCABULARY_SIZE = 4, 16, 4, 101


def train(name: str, stage: int, num_ranks: int, path: Path) -> None:
    """Take a few steps, then generate; the first rank writes the losses of all rows and the tokens."""
    deepspeed = import_deepspeed()
    deepspeed.init_distributed("gloo", verbose=False)
    rank = torch.distributed.get_rank()
    torch.manual_seed(0)
    model = Decoder(DecoderSection(**(SHAPE | MODELS[name])), VOCABULARY_SIZE)
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=torch.optim.AdamW(model.parameters(), lr=3e-3),
        config={
            "train_micro_batch_size_per_gpu": ROWS // num_ranks,
            "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
        },
    )
    losses = []
    for step in range(STEPS):
        tokens = torch.randint(0, VOCABULARY_SIZE, (ROWS, LENGTH), generator=torch.Generator().manual_seed(step))
        documents = (torch.arange(LENGTH) // 6).int().expand(ROWS, LENGTH)
        own = slice(rank * ROWS // num_ranks, (rank + 1) * ROWS // num_ranks)
        loss = engine(tokens[own], tokens[own].roll(-1, 1), documents=documents[own] if step % 2 else None)
        engine.backward(loss * num_ranks / (ROWS * LENGTH))  # the engine takes the mean over ranks
        engine.step()
        total = loss.detach().clone()
        torch.distributed.all_reduce(total)
        losses.append(total.item() / (ROWS * LENGTH))
    ((completion,),) = generate(engine.module, [[1, 2, 3]], Sampling(max_new_tokens=8, temperature=0.0))
    if rank == 0:
        path.write_text(json.dumps({"losses": losses, "tokens": completion.tokens}))


def main(out: Path) -> int:
    """Run every case in new processes; return 1 if one failed."""
    torch.set_num_threads(1)
    import_deepspeed()
    failed = []
    for name, stage, num_ranks in CASES:
        path = out / f"{name}_{stage}_{num_ranks}.json"
        if any(run_forked(partial(train, name, stage, num_ranks, path), num_ranks, path.with_suffix(".log"))):
            failed.append(path.stem)
            print(*(log.read_text() for log in out.glob(f"{path.stem}.*.log")), sep="\n")
    print("failed:", failed)
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
