import argparse
import json
import os
import pickle
import re
import shutil
import subprocess
import sys

import pytest
import torch
import transformers
from safetensors.torch import load_file
from tokenizers import Tokenizer, models

from bigbatch.recipes.core.errors import UserError
from bigbatch.recipes.core.models.decoder import Decoder, load_hugging_face, section_from_hugging_face
from bigbatch.tools.import_deepspeed import import_deepspeed, main

CASES = [f"odd_{stage}_{dtype}_{ranks}" for stage in range(4) for dtype in ("fp32", "bf16", "fp16") for ranks in (1, 2)]
CASES += [
    "odd_fused_0_bf16_2",
    "odd_float32_gradients_1_bf16_2",
    "odd_round_robin_2_bf16_2",
    "odd_small_groups_3_bf16_2",
]
CASES += ["gpt2_2_bf16_2", "gpt2_3_fp32_2"]


@pytest.fixture(scope="module")
def checkpoints(run_program, tmp_path_factory):
    """Train and save every case with plain DeepSpeed."""
    out = tmp_path_factory.mktemp("native")
    run_program("native_checkpoints.py", out)
    return out


@pytest.fixture
def copied(checkpoints, tmp_path):
    """Give a function that copies a case's checkpoint, to be damaged."""

    def copy(case):
        shutil.copytree(checkpoints / case, tmp_path / case)
        return tmp_path / case

    return copy


def refusal(folder, out, **settings):
    """Return the one line that an import ends with; nothing may be left behind."""
    with pytest.raises(UserError) as error:
        import_deepspeed(folder, out, **settings)
    assert not list(out.parent.glob(f"{out.name}*"))
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("case", CASES)
def test_every_parameter_is_the_living_engines_float32_master_bit_for_bit(checkpoints, case, tmp_path):
    facts = import_deepspeed(checkpoints / case, tmp_path / "out")
    tensors, truth = load_file(tmp_path / "out/model.safetensors"), load_file(checkpoints / case / "truth.safetensors")
    assert {name: tensor.dtype for name, tensor in truth.items()} == dict.fromkeys(truth, torch.float32)
    for name, master in truth.items():
        assert torch.equal(tensors[name], master), name
    assert facts["parameters"] == sum(master.numel() for master in truth.values())
    *_, stage, _, ranks = case.split("_")
    assert (facts["zero_stage"], facts["ranks"], facts["step"]) == (int(stage), int(ranks), 3)
    if case.startswith("odd"):
        assert facts["shared"] == {"head.weight": "embedding.weight"}
        assert tensors.keys() - truth.keys() == {"shift", "count"} == set(facts["buffers"])
        assert torch.equal(tensors["shift"], torch.linspace(-1, 1, 7))
        assert torch.equal(tensors["count"], torch.tensor([3]))  # an integer stays one


def test_masters_carry_more_than_the_low_precision_weights(checkpoints, tmp_path):
    import_deepspeed(checkpoints / "odd_0_bf16_1", tmp_path / "out")
    master = load_file(tmp_path / "out/model.safetensors")["embedding.weight"]
    assert not torch.equal(master, master.bfloat16().float())


@pytest.fixture
def like(checkpoints, tmp_path):
    """Make the Hugging Face folder that the GPT-2 was configured by: no weights, and a tokenizer."""
    shutil.copytree(checkpoints / "gpt2_2_bf16_2/like", tmp_path / "like")
    Tokenizer(models.WordLevel({f"w{index}": index for index in range(61)}, "w0")).save(
        str(tmp_path / "like/tokenizer.json")
    )
    return tmp_path / "like"


@pytest.mark.parametrize("case", ["gpt2_2_bf16_2", "gpt2_3_fp32_2"])
def test_a_gpt2_trained_with_deepspeed_gives_the_logits_of_deepspeeds_own_consolidation(
    checkpoints, case, like, tmp_path
):
    out = tmp_path / "out"
    import_deepspeed(checkpoints / case, out, like=like)
    reference = transformers.GPT2LMHeadModel(transformers.GPT2Config.from_pretrained(like)).eval()
    reference.load_state_dict(load_file(checkpoints / case / "reference.safetensors"))
    imported, notes = transformers.AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(notes.values())
    assert imported.dtype == torch.float32
    tokens = torch.randint(61, (2, 16), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = reference(tokens).logits
        assert torch.equal(imported.eval()(tokens).logits, expected)
        section = section_from_hugging_face(json.loads((out / "config.json").read_text()))
        native = Decoder(section, 61).eval()
        load_hugging_face(native, out)  # what model.initialize_from does
        assert (native(tokens) - expected).abs().max() < 1e-5
    assert expected.std() > 0.1  # the models say something
    assert Tokenizer.from_file(str(out / "tokenizer.json")).get_vocab_size() == 61


def test_the_record_says_where_the_weights_come_from(checkpoints, tmp_path, capsys):
    assert main([str(checkpoints / "odd_2_bf16_2"), str(tmp_path / "out")]) == 0
    record = json.loads((tmp_path / "out/conversion.json").read_text())
    assert record["tag"] == "step3"
    assert record["deepspeed"].startswith("0.")
    assert record["file"]["bytes"] == (tmp_path / "out/model.safetensors").stat().st_size
    shown = capsys.readouterr()
    assert shown.out == f"{tmp_path / 'out'}\n"
    assert "510 parameters, float32, from ZeRO-2 on 2 ranks" in shown.err


def test_a_tag_is_chosen_by_name_by_latest_or_by_its_folder(copied, tmp_path):
    folder = copied("odd_2_bf16_1")
    (folder / "step3").rename(folder / "best")
    assert refusal(folder, tmp_path / "out") == f"{folder}: has no checkpoint 'step3'"
    assert import_deepspeed(folder, tmp_path / "a", tag="best")["tag"] == "best"
    assert import_deepspeed(folder / "best", tmp_path / "b")["tag"] == "best"
    (folder / "latest").unlink()
    assert "name one with --tag: best" in refusal(folder, tmp_path / "out")
    assert "and no checkpoint in it" in refusal(tmp_path / "nowhere", tmp_path / "out")


# ------------------------------------------------------------------------------------------------------- not unpickled


class Trap:
    """Makes a folder when it is unpickled."""

    def __init__(self, marker):
        self.marker = str(marker)

    def __reduce__(self):
        return os.mkdir, (self.marker,)


def forged_states(folder):
    """Return the paths of a model file and an optimizer file."""
    return [
        folder / "step3/mp_rank_00_model_states.pt",
        folder / "step3/bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt",
    ]


@pytest.mark.parametrize("index", [0, 1], ids=["model", "optimizer"])
@pytest.mark.parametrize("form", ["zip", "zip_protocol_4", "bare_pickle"])
def test_a_pickle_that_would_run_something_is_refused_and_runs_nothing(copied, tmp_path, index, form):
    folder, marker = copied("odd_2_bf16_2"), tmp_path / "was_here"
    path = forged_states(folder)[index]
    content = {**torch.load(path, weights_only=False), "note": Trap(marker)}
    if form == "bare_pickle":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path, pickle_protocol=4 if form == "zip_protocol_4" else 2)
    said = refusal(folder, tmp_path / "out")
    assert said.startswith(f"{path}: ")
    if form == "zip":
        assert said.endswith("is refused: it would make objects of posix.mkdir")
    assert not marker.exists()
    with path.open("rb") as file:  # the trap is a real one: who opens it without care is caught
        pickle.load(file) if form == "bare_pickle" else torch.load(file, weights_only=False)
    assert marker.exists()


def test_an_object_of_a_users_own_class_is_refused_by_its_name(copied, tmp_path):
    folder = copied("odd_2_bf16_2")
    path = forged_states(folder)[0]
    content = torch.load(path, weights_only=False)
    torch.save({**content, "arguments": argparse.Namespace(lr=1e-4)}, path)
    assert refusal(folder, tmp_path / "out") == f"{path}: is refused: it would make objects of argparse.Namespace"


def test_nothing_of_deepspeed_is_loaded(checkpoints, tmp_path):
    code = "import sys; from bigbatch.tools.import_deepspeed import main; main(sys.argv[1:])\n"
    code += "print([name for name in sys.modules if name.startswith('deepspeed')])"
    command = [sys.executable, "-c", code, checkpoints / "odd_2_bf16_2", tmp_path / "out"]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert result.stdout.splitlines() == [str(tmp_path / "out"), "[]"]


# ------------------------------------------------------------------------------------------------------- damaged files


def truncate(folder):
    path = folder / "step3/bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt"
    path.write_bytes(path.read_bytes()[:-1000])


def remove_shard(folder):
    (folder / "step3/bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt").unlink()


def add_stale_shard(folder):
    names = ("bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt", "bf16_zero_pp_rank_2_mp_rank_00_optim_states.pt")
    shutil.copy(folder / "step3" / names[0], folder / "step3" / names[1])


def remove_model(folder):
    (folder / "step3/mp_rank_00_model_states.pt").unlink()


def change(folder, alter):
    path = folder / "step3/mp_rank_00_model_states.pt"
    content = torch.load(path, weights_only=False)
    alter(content)
    torch.save(content, path)


DAMAGES = {
    "truncated": (truncate, r"rank_1_mp_rank_00_optim_states\.pt: cannot be read"),
    "lost": (remove_shard, r"has 1 files \*_optim_states\.pt; ZeRO-2 on 2 ranks wrote 2"),
    "stale": (add_stale_shard, r"has 3 files \*_optim_states\.pt; ZeRO-2 on 2 ranks wrote 2"),
    "no_model": (remove_model, r"has no \*_model_states\.pt"),
    "pipeline": (
        lambda folder: (folder / "step3/layer_00-model_states.pt").touch(),
        r"layer_00-model_states\.pt: is of a pipeline or of experts",
    ),
    "model_parallel": (
        lambda folder: change(folder, lambda content: content.update(mp_world_size=2)),
        r"is of 2 model-parallel ranks; 1 would be right",
    ),
    "grown": (
        lambda folder: change(folder, lambda c: c["param_shapes"][0].update({"up.weight": torch.Size([7, 6])})),
        r"holds 35 of the 42 elements of 'up\.weight'",
    ),
    "foreign": (
        lambda folder: change(folder, lambda content: content.pop("module")),
        r"is not laid out as DeepSpeed 0\.19 does it \(KeyError: 'module'\)",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_checkpoint_that_is_not_whole_is_refused_in_one_line(copied, tmp_path, damage):
    folder = copied("odd_2_bf16_2")
    act, message = DAMAGES[damage]
    act(folder)
    assert re.search(message, refusal(folder, tmp_path / "out"))


def test_a_master_that_fits_no_weight_is_refused(copied, tmp_path):
    folder = copied("odd_0_bf16_1")
    change(folder, lambda content: content["optimizer"]["fp32_groups"][0][1].data.add_(1))
    assert "35 elements of the float32 masters belong to none of the weights" in refusal(folder, tmp_path / "out")


def test_a_shard_of_stage_3_whose_groups_do_not_add_up_is_refused(copied, tmp_path):
    folder = copied("odd_3_bf16_2")
    for path in (folder / "step3").glob("*_optim_states.pt"):
        content = torch.load(path, weights_only=False)
        flat = content["optimizer_state_dict"]["fp32_flat_groups"]
        flat[0] = torch.cat([flat[0].detach(), torch.zeros(2)])
        torch.save(content, path)
    assert re.search(r"group 0 has \d+ elements a rank; its parameters need \d+", refusal(folder, tmp_path / "out"))


def test_a_folder_that_exists_is_never_written_into(checkpoints, tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match="exists already"):
        import_deepspeed(checkpoints / "odd_2_bf16_1", tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_layer": 3}, r"has 'transformer\.h\.2\.ln_1\.weight', the checkpoint has not"),
        ({"n_layer": 1}, r"has no 'transformer\.h\.1\..*', one of 12 tensors that only the checkpoint has"),
        ({"vocab_size": 62}, r"has 'transformer\.wte\.weight' of shape \(62, 24\), the checkpoint of \(61, 24\)"),
        ({"tie_word_embeddings": False}, r"has 'lm_head\.weight', .* it shares 'transformer\.wte\.weight'"),
        ({"model_type": "opt"}, r"model_type is 'opt'; the native ones are gpt2, llama, mixtral"),
    ],
)
def test_a_folder_of_another_model_is_refused_by_the_first_difference(checkpoints, like, tmp_path, changes, message):
    config = json.loads((like / "config.json").read_text()) | changes
    (like / "config.json").write_text(json.dumps(config))
    assert re.search(message, refusal(checkpoints / "gpt2_2_bf16_2", tmp_path / "out", like=like))
