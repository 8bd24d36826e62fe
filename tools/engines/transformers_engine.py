"""Models that transformers runs: any folder of its own, quantized ones too."""

import inspect
from pathlib import Path
from typing import Any

import torch

from bigbatch.recipes.core.errors import UserError, one_line
from bigbatch.recipes.core.models.hugging_face import read_json
from bigbatch.recipes.core.precision import multiply_fast
from bigbatch.tools.opened import OPENING_ERRORS

OUTPUTS = ("logits", "start_logits", "end_logits", "last_hidden_state")


def open_session(folder: Path, threads: int | None = None) -> "TransformersSession":
    """Open a folder of safetensors with the class that its config.json names; raise UserError where that fails.

    float32, but for a model that is quantized. `threads` are torch's, of the whole process.
    """
    import transformers

    if threads:
        torch.set_num_threads(threads)
    settings = read_json(folder / "config.json")
    name = (settings.get("architectures") or [""])[0]
    kind = getattr(transformers, name, None) if isinstance(name, str) else None
    if not (inspect.isclass(kind) and issubclass(kind, transformers.PreTrainedModel)):
        raise UserError(str(folder / "config.json"), f"architectures is {name!r}, which transformers has no class for")
    transformers.utils.logging.disable_progress_bar()
    further: dict[str, Any] = {"dtype": "auto" if settings.get("quantization_config") else torch.float32}
    if name == "BertModel":
        further["add_pooling_layer"] = False
    try:
        model: Any = kind.from_pretrained(
            folder, use_safetensors=True, trust_remote_code=False, local_files_only=True, **further
        )
    except OPENING_ERRORS as error:
        raise UserError(str(folder), f"cannot be opened by transformers: {one_line(str(error))}") from None
    if hasattr(model, "ct_decompress_hook"):  # else at the first call of the whole, and an encoder is called alone
        model.hf_quantizer.compressor.decompress_model(model)
    if name.endswith("ForSequenceClassification") and model.config.pad_token_id is None:
        model.config.pad_token_id = settings.get("eos_token_id")  # a decoder classifies by its last token that is none
    opened = model.eval()
    if torch.cuda.is_available() and not hasattr(model, "hf_device_map"):
        opened = opened.to("cuda")
    if opened.device.type == "cpu":
        multiply_fast(opened.dtype)
    return TransformersSession(opened)


class TransformersSession:
    """A model of transformers as a `core.foreign.DecoderSession`."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.known = set(inspect.signature(model.forward).parameters)

    def __call__(self, **inputs: torch.Tensor) -> dict[str, torch.Tensor]:
        """Run the model on a batch."""
        device = next(iter(inputs.values())).device
        found = self._run(use_cache=False, **inputs)
        return {name: found[name].to(device) for name in OUTPUTS if name in found}

    def open_cache(self, **inputs: torch.Tensor) -> "TransformersCache":
        """Return an empty cache, of an encoder-decoder with its sources encoded."""
        from transformers import DynamicCache, EncoderDecoderCache

        if not inputs:
            return TransformersCache(DynamicCache(), {})
        inputs = {name: array.to(self.model.device) for name, array in inputs.items()}
        with torch.no_grad():
            states = self.model.get_encoder()(**inputs).last_hidden_state
        read = {"states": states, "attention_mask": inputs["attention_mask"]}
        return TransformersCache(EncoderDecoderCache(DynamicCache(), DynamicCache()), read)

    def decode(self, cache: "TransformersCache", **inputs: torch.Tensor) -> torch.Tensor:
        """Return the logits [B, 1, V] behind the last of the next tokens."""
        device, further = next(iter(inputs.values())).device, {}
        if cache.source:
            further["encoder_outputs"] = (cache.source["states"],)
            inputs["attention_mask"] = cache.source["attention_mask"]
        found = self._run(past_key_values=cache.memory, use_cache=True, logits_to_keep=1, **inputs, **further)
        return found["logits"][:, -1:].to(device)

    @torch.no_grad()
    def _run(self, **inputs: Any) -> Any:
        moved = {
            name: value.to(self.model.device) if isinstance(value, torch.Tensor) else value
            for name, value in inputs.items()
            if name in self.known
        }
        return self.model(**moved)


class TransformersCache:
    """Keys and values, and of an encoder-decoder what its encoder has made of the sources."""

    def __init__(self, memory: Any, source: dict[str, torch.Tensor]) -> None:
        self.memory, self.source = memory, source

    def select(self, rows: torch.Tensor) -> None:
        """Let each row go on as another one has begun."""
        if self.memory.get_seq_length():
            self.memory.reorder_cache(rows)
        self.source = {name: array[rows.to(array.device)] for name, array in self.source.items()}
