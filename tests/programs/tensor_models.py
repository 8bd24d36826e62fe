"""Models over two tensor ranks, without an engine: `tensor_models.py OUT`; rank r writes OUT/<r>.safetensors.

`<case>/...` are the results of a case: its weights, their gradients, its loss, its logits.
"""

import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from forked_ranks import import_everything, run_forked
from safetensors.torch import save_file
from torch import nn

from bigbatch.recipes.core import loss, runtime
from bigbatch.recipes.core.models.config import DecoderSection, EncoderSection
from bigbatch.recipes.core.models.decoder import Decoder, load_hugging_face
from bigbatch.recipes.core.models.encoder import MaskedLanguageModel
from bigbatch.recipes.core.parallel import ALONE, Axis
from bigbatch.recipes.core.tensor_parallel import copy_in, own_random_numbers

VOCABULARY_SIZE, RANKS = 101, 2  # the second rank has rows of padding
SHAPE = {"num_layers": 2, "hidden_size": 32, "num_heads": 4, "max_positions": 32, "initializer_range": 0.1}
LLAMA = {"family": "llama", "num_key_value_heads": 2, "feed_forward_size": 48, "tie_embeddings": False}
DECODERS = {
    "gpt2": SHAPE | {"family": "gpt2"},
    "llama": SHAPE | LLAMA,
    "recompute": SHAPE | {"family": "gpt2", "recompute_activations": True},
    "dropout": SHAPE | {"family": "gpt2", "dropout": 0.2},
    "dropout_recompute": SHAPE | {"family": "gpt2", "dropout": 0.2, "recompute_activations": True},
}


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    """Return tokens and labels [3, 16]; some do not count, and one differs from -100 by the second rank's first row."""
    tokens = torch.randint(0, VOCABULARY_SIZE, (3, 16), generator=torch.Generator().manual_seed(1))
    labels = tokens.roll(-1, 1)
    labels[0, :5] = -100
    return tokens, labels


def decoder(name: str, tensor: Axis = ALONE, spreads: bool = False) -> dict[str, torch.Tensor]:
    """Build a decoder, run it forward and backward; return all that came of it."""
    torch.manual_seed(0)
    model = Decoder(DecoderSection(**DECODERS[name]), VOCABULARY_SIZE, tensor, tensor_sequence=spreads)
    tokens, labels = batch()
    dropped: list[torch.Tensor] = []
    model.embed.dropout.register_forward_hook(lambda *call: dropped.append(call[-1] == 0))
    torch.manual_seed(7)
    total = model(tokens, labels)
    total.backward()
    after = torch.rand(())  # all ranks' generators are at the same place again
    logits = model(tokens)
    found = {"loss": total.detach(), "after": after, "dropped": dropped[0], "logits": logits.detach()}
    return found | tensors(model)


def from_logits(tensor: Axis = ALONE) -> dict[str, torch.Tensor]:
    """Learn from the logits themselves, which are gathered."""
    torch.manual_seed(0)
    model = Decoder(DecoderSection(**DECODERS["llama"]), VOCABULARY_SIZE, tensor)
    model(batch()[0]).square().sum().backward()
    return tensors(model)


def encoder(tensor: Axis = ALONE, spreads: bool = False, **more: Any) -> dict[str, torch.Tensor]:
    """Do the same with an encoder that fills in tokens and judges pairs."""
    torch.manual_seed(0)
    section = EncoderSection(**SHAPE, dropout=0.0, **more)
    model = MaskedLanguageModel(section, VOCABULARY_SIZE, True, tensor, tensor_sequence=spreads)
    tokens, labels = batch()
    total, pairs = model(tokens, labels=labels, with_pairs=True)
    (total + pairs.square().sum()).backward()
    return {"loss": total.detach(), "logits": model(tokens).detach(), **tensors(model)}


def started(folder: Path, tensor: Axis = ALONE) -> dict[str, torch.Tensor]:
    """Start from a Hugging Face folder."""
    model = Decoder(DecoderSection(**DECODERS["llama"]), VOCABULARY_SIZE, tensor)
    load_hugging_face(model, folder)
    return {"logits": model(batch()[0]).detach()}


def cross_entropy(tensor: Axis = ALONE) -> dict[str, torch.Tensor]:
    """Take the loss in float64 over several chunks and blocks, with a bias; labels run over all rows and -100."""
    loss.BLOCK_ELEMENTS = 200
    generator = torch.Generator().manual_seed(2)
    hidden, weight = (torch.randn(rows, 8, generator=generator, dtype=torch.float64) for rows in (240, 256))
    bias, labels = torch.randn(256, generator=generator, dtype=torch.float64), torch.arange(-100, 140)
    labels[:100] = -100
    weight, bias = (whole.chunk(tensor.size)[tensor.rank] for whole in (weight, bias))
    leaves = [leaf.clone().requires_grad_() for leaf in (hidden, weight, bias)]
    arguments = {"chunk_rows": 100, "num_classes": 250, "bias": leaves[2], "tensor": tensor}
    total = loss.chunked_cross_entropy(copy_in(leaves[0], tensor), leaves[1], labels, **arguments)
    (3 * total).backward()
    return {"loss": total.detach(), **{f"grad/{index}": leaf.grad for index, leaf in enumerate(leaves)}}


def tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return weights and gradients by name."""
    parameters = list(model.named_parameters())
    found = {f"weight/{name}": parameter.detach() for name, parameter in parameters}
    return found | {f"grad/{name}": parameter.grad for name, parameter in parameters}


def all_results(folder: Path, tensor: Axis = ALONE) -> dict[str, torch.Tensor]:
    """Run every case on one rank of an axis."""
    results = {name: decoder(name, tensor) for name in DECODERS}
    results |= {"from_logits": from_logits(tensor), "encoder": encoder(tensor), "started": started(folder, tensor)}
    results["cross_entropy"] = cross_entropy(tensor)
    results |= {f"spread_{name}": decoder(name, tensor, spreads=True) for name in DECODERS}
    results["spread_encoder"] = encoder(tensor, spreads=True)
    results["spread_rotary"] = encoder(tensor, spreads=True, norm="pre", positions="rotary")
    with own_random_numbers(tensor, torch.device("cpu")):
        results["random"] = {"inside": torch.rand(8)}
    return {f"{case}/{key}": value.contiguous() for case, found in results.items() for key, value in found.items()}


def run(out: Path) -> None:
    """Be one of the ranks."""
    torch.set_num_threads(1)
    mesh = runtime.start_mesh(tensor_ranks=RANKS)
    save_file(all_results(out / "folder", mesh.tensor), out / f"{mesh.rank}.safetensors")
    runtime.leave_mesh(mesh)


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    torch.set_num_threads(1)
    save_file(all_results(folder / "folder"), folder / "whole.safetensors")
    import_everything()
    statuses = run_forked(partial(run, folder), RANKS, folder / "log.txt")
    print(*(path.read_text() for path in folder.glob("log.*.txt")))
    sys.exit(int(any(statuses)))
