"""The GPT recipe trained under every plan: against the golden losses, and against transformers' own models.

BIGBATCH_WRITE_GOLDEN=1 writes tests/golden/gpt.json anew; say in the change why the losses are other ones.
"""

from pathlib import Path

import numpy as np
import pytest
import tokenizers
import torch
import transformers
from tokenizers import decoders, models, pre_tokenizers, trainers
from trained_runs import EVERY_PLAN, RANKS, STAGES, STEPS, Plans, losses

from bigbatch.recipes.core.checkpoint import Reader, checkpoint_dir
from bigbatch.recipes.core.data.sampler import sample_order

GLOBAL_SIZE, SEQUENCE_LENGTH, POSITIONS, SEED = 8, 32, 40, 3
LEARNING_RATE, BETAS, EPSILON, WEIGHT_DECAY, CLIPPING = 1e-2, (0.9, 0.95), 1e-8, 0.1, 1.0
END_OF_TEXT = "<|endoftext|>"
SHAPES = {
    "gpt2": {"family": "gpt2", "num_layers": 2, "hidden_size": 32, "num_heads": 4, "max_positions": POSITIONS},
    "llama": {
        "family": "llama",
        "num_layers": 2,
        "hidden_size": 32,
        "num_heads": 4,
        "num_key_value_heads": 2,
        "feed_forward_size": 48,
        "max_positions": POSITIONS,
        "tie_embeddings": False,
        "rope_theta": 500.0,
    },
}
FOLDER_PLANS = ((1, 1), (2, 3))  # ranks and ZeRO stage for runs that start from a folder


def run_document(model: dict, text: Path, tokenizer: dict) -> dict:
    data = {"train": [str(text)], "sequence_length": SEQUENCE_LENGTH, "tokenizer": tokenizer}
    optimizer = {"learning_rate": LEARNING_RATE, "betas": BETAS, "epsilon": EPSILON}
    return {
        "version": 1,
        "recipe": "gpt",
        "model": model,
        "data": {**data, "prepared_dir": str(text.parent / "prepared")},
        "batch": {"global_size": GLOBAL_SIZE, "micro_size": 2},
        "precision": {"dtype": "fp32"},
        "optimizer": {**optimizer, "weight_decay": WEIGHT_DECAY, "gradient_clipping": CLIPPING},
        "schedule": {"name": "constant", "total_steps": STEPS},
        "report": {"every_steps": 1, "tensorboard": False},
        "sample": {"prompts": []},
        "seed": SEED,
    }


def save_tokenizer(texts: list[str], folder: Path) -> int:
    """Train a tokenizer as transformers' users do, save it, and return its size."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=290,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END_OF_TEXT)
    fast.save_pretrained(folder)
    return len(fast)


def save_model(shape: dict, vocabulary_size: int, folder: Path) -> None:
    """Let transformers draw and save a model of a shape."""
    torch.manual_seed(1)
    if shape["family"] == "gpt2":
        config = transformers.GPT2Config(
            vocab_size=vocabulary_size,
            n_layer=shape["num_layers"],
            n_embd=shape["hidden_size"],
            n_head=shape["num_heads"],
            n_positions=shape["max_positions"],
            initializer_range=0.1,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
        )
    else:
        config = transformers.LlamaConfig(
            vocab_size=vocabulary_size,
            num_hidden_layers=shape["num_layers"],
            hidden_size=shape["hidden_size"],
            num_attention_heads=shape["num_heads"],
            num_key_value_heads=shape["num_key_value_heads"],
            intermediate_size=shape["feed_forward_size"],
            max_position_embeddings=shape["max_positions"],
            rope_parameters={"rope_type": "default", "rope_theta": shape["rope_theta"]},
            rms_norm_eps=1e-5,
            initializer_range=0.1,
        )
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)


@pytest.fixture(scope="module")
def trained(run_program, made_documents, write_documents, tmp_path_factory):
    """Train every document under all its plans in one start; return the folder that holds the runs."""
    out = tmp_path_factory.mktemp("gpt")
    text = write_documents(out / "text.jsonl", made_documents)
    plans = Plans(out)
    for family, shape in SHAPES.items():
        plans.add(family, run_document(shape, text, {"kind": "character"}), *EVERY_PLAN)
        folder = out / f"{family}_folder"
        save_model(shape, save_tokenizer(made_documents, folder), folder)
        started = run_document(
            shape | {"initialize_from": str(folder)}, text, {"kind": "pretrained", "path": str(folder)}
        )
        plans.add(f"{family}_started", started, *((*plan, None) for plan in FOLDER_PLANS))
    return plans.train(run_program)


@pytest.fixture(scope="module")
def golden(trained, kept_golden):
    """Return the losses that are kept, by family; write them first when asked to."""
    return kept_golden("gpt", lambda: {family: losses(trained, family, 1, 0) for family in SHAPES})


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("family", SHAPES)
def test_five_steps_give_the_golden_losses_under_every_plan(trained, golden, family, ranks, stage):
    manifest = Reader(checkpoint_dir(trained / f"{family}_{ranks}_{stage}", STEPS)).manifest
    assert (manifest["ranks"], manifest["zero_stage"]) == (ranks, stage)
    assert losses(trained, family, ranks, stage) == pytest.approx(golden[family], rel=1e-4)


def test_the_golden_losses_are_those_of_a_model_that_learns(golden):
    for family in SHAPES:
        assert golden[family][0] - golden[family][-1] > 0.2


def reference_losses(folder: Path, texts: list[str]) -> list[float]:
    """Train transformers' own model of a folder with plain torch; return each step's mean loss before its update."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    stream = [token for text in texts for token in [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]]
    num_samples = (len(stream) - 1) // SEQUENCE_LENGTH
    starts = SEQUENCE_LENGTH * sample_order(SEED, num_samples, 0, STEPS * GLOBAL_SIZE).ids
    windows = torch.tensor(np.array(stream)[starts[:, None] + np.arange(SEQUENCE_LENGTH + 1)])
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    groups = [
        {"params": [p for p in model.parameters() if p.ndim >= 2], "weight_decay": WEIGHT_DECAY},
        {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, LEARNING_RATE, BETAS, EPSILON)
    found = []
    for batch in windows.split(GLOBAL_SIZE):
        loss = model(input_ids=batch, labels=batch).loss  # it shifts the labels itself
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIPPING)
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
    return found


@pytest.mark.parametrize("family", SHAPES)
def test_a_run_from_a_hugging_face_folder_goes_the_way_of_transformers_own_model(trained, made_documents, family):
    expected = reference_losses(trained / f"{family}_folder", made_documents)
    assert expected[0] - expected[-1] > 0.2
    for ranks, stage in FOLDER_PLANS:
        found = losses(trained, f"{family}_started", ranks, stage)
        assert found[0] == pytest.approx(expected[0], rel=1e-5)
        assert found == pytest.approx(expected, rel=1e-4)
