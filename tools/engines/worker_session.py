"""A session whose model runs in a worker, in an environment of its own."""

from pathlib import Path

import numpy as np
import torch

from bigbatch.recipes.core.errors import UserError
from bigbatch.recipes.core.models.hugging_face import read_json
from bigbatch.tools.worker import Arrays, Worker

LAYOUT = ("inputs", "outputs", "lengths", "min_length", "max_length")


class WorkerSession:
    """A model of an encoder or of images; rows run one by one."""

    def __init__(self, environment: str, folder: Path, threads: int | None = None) -> None:
        """Open the file that a model folder's deployment.json names; raise UserError where the engine cannot."""
        deployment = read_json(folder / "deployment.json")
        if missing := {"file", *LAYOUT} - deployment.keys():
            raise UserError(
                str(folder / "deployment.json"), f"has no {min(missing)!r}: it is of no {environment} model"
            )
        layout = {name: deployment[name] for name in LAYOUT}
        self.worker = Worker(environment, f"bigbatch.tools.engines.{environment}_worker")
        file = str((folder / Path(deployment["file"]).name).absolute())
        self.worker.call({"do": "open", "file": file, "layout": layout, "threads": threads})

    def __call__(self, **inputs: torch.Tensor) -> dict[str, torch.Tensor]:
        """Run the model on a batch."""
        device = next(iter(inputs.values())).device
        _, found = self.worker.call({"do": "run"}, _arrays(inputs))
        return {name: torch.from_numpy(array).to(device) for name, array in found.items()}

    def seconds(self, repeats: int, **inputs: torch.Tensor) -> list[float]:
        """Return how long the engine takes for a batch, several times, without the way there and back."""
        return self.worker.call({"do": "time", "repeats": repeats}, _arrays(inputs))[0]["seconds"]

    def peak_bytes(self) -> int:
        """Return the worker's peak of memory above what it had before the model was opened."""
        return self.worker.call({"do": "peak"})[0]["bytes"]

    def close(self) -> None:
        """End the worker."""
        self.worker.close()


def _arrays(inputs: dict[str, torch.Tensor]) -> Arrays:
    return {name: np.ascontiguousarray(tensor.detach().cpu().numpy()) for name, tensor in inputs.items()}
