"""Image classification under every plan: against the golden losses, transformers' own model, and itself resumed.

BIGBATCH_WRITE_GOLDEN=1 writes tests/golden/classify_images.json anew; say in the change why the losses differ.
"""

import json
import math

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from trained_runs import EVERY_PLAN, RANKS, STAGES, STEPS, Plans, first, losses, opened, plain_steps, rows

from bigbatch.recipes.classify_images import recipe
from bigbatch.recipes.classify_images.config import ClassifyImagesConfig
from bigbatch.recipes.core.checkpoint import Reader, checkpoint_dir
from bigbatch.recipes.core.errors import UserError
from bigbatch.tools.convert import convert
from bigbatch.tools.predict import main as predict

AUGMENT = {"flip": True, "least_area": 0.6, "random_operations": 2, "magnitude": 5, "mixup": 0.4}


@pytest.fixture(scope="module")
def trained(run_program, make_document, tmp_path_factory):
    """Train every document under all its plans in one start; return the folder that holds the runs."""
    out = tmp_path_factory.mktemp("classify_images")
    plans = Plans(out)
    plans.add("plain", make_document(out), *EVERY_PLAN)
    hard = {"augment": AUGMENT, "model": {"dropout": 0.1}, "objective": {"label_smoothing": 0.1}}
    plans.add("augmented", make_document(out, augment=AUGMENT), (1, 0, None), (2, 2, None))
    plans.add("resumed", make_document(out, **hard), (2, 3, 2))
    plans.add("resumed_whole", make_document(out, **hard), (2, 3, None))
    learning = make_document(
        out, schedule={"total_steps": 60}, batch={"global_size": 32, "micro_size": 8}, evaluate={"every_steps": 60}
    )
    plans.add("learning", learning, (2, 1, None))
    return plans.train(run_program)


@pytest.fixture(scope="module")
def golden(trained, kept_golden):
    """Return the losses that are kept; write them first when asked to."""
    names = ("plain", "augmented")
    return kept_golden("classify_images", lambda: {name: losses(trained, name, 1, 0) for name in names})


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("ranks", RANKS)
def test_five_steps_give_the_golden_losses_under_every_plan(trained, golden, ranks, stage):
    manifest = Reader(checkpoint_dir(trained / f"plain_{ranks}_{stage}", STEPS)).manifest
    assert (manifest["ranks"], manifest["zero_stage"]) == (ranks, stage)
    assert losses(trained, "plain", ranks, stage) == pytest.approx(golden["plain"], rel=1e-4)
    assert golden["plain"][0] == pytest.approx(math.log(3))  # a head of zeros


def test_augmented_images_are_the_same_on_one_rank_and_on_two(trained, golden):
    for plan in ((1, 0), (2, 2)):
        assert losses(trained, "augmented", *plan) == pytest.approx(golden["augmented"], rel=1e-4)
    assert golden["augmented"][1:] != pytest.approx(golden["plain"][1:], rel=1e-3)


def test_transformers_own_model_takes_the_same_steps(trained, golden):
    config, data, model = first(trained / "plain_1_0")
    export = recipe.hugging_face(config, data.facts)
    theirs = _as_transformers(export, dict(model.named_parameters()), trained / "first")

    def losses_of(order):
        batch = {name: torch.from_numpy(array) for name, array in data.train.batch(*order).items()}
        yield theirs(pixel_values=batch["pixels"], labels=batch["labels"]).loss

    found = plain_steps(theirs, config, data, losses_of)
    assert found == pytest.approx(golden["plain"], rel=1e-4)


def _as_transformers(export, parameters, folder):
    from safetensors.torch import save_file

    from bigbatch.recipes.core.models.hugging_face import to_hugging_face

    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(export.config))
    pieces = [(piece, parameters[name].detach()) for name, found in export.tensors.items() for piece in found]
    state = {piece.name: to_hugging_face(tensor, piece).clone() for piece, tensor in pieces}
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    return transformers.ViTForImageClassification.from_pretrained(folder).train()


def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(trained):
    whole = losses(trained, "resumed_whole", 2, 3)
    assert losses(trained, "resumed", 2, 3) == whole
    assert len(set(whole)) == STEPS


def test_figures_of_two_ranks_count_each_image_once(trained):
    _, data, model = opened(trained / "learning_2_1")
    ids = np.arange(data.validation.num_samples)
    assert len(ids) == 30
    batch = data.validation.batch(ids, np.zeros_like(ids))
    with torch.no_grad():
        found = model(torch.from_numpy(batch["pixels"])).argmax(-1).numpy()
    (row,) = rows(trained / "learning_2_1", "evaluation")
    assert row["accuracy"] == pytest.approx((found == batch["labels"]).mean())
    assert row["accuracy"] > 0.8


def test_a_converted_run_is_transformers_own_and_predicts_as_before(trained, make_picture, capsys, monkeypatch):
    run_dir, out = trained / "learning_2_1", trained / "converted"
    parity = convert(run_dir, out)
    assert parity.largest_difference <= 1e-5 * max(1.0, parity.largest_logit)
    picture, pixels = make_picture
    theirs = transformers.AutoModelForImageClassification.from_pretrained(out).eval()
    processor = transformers.AutoImageProcessor.from_pretrained(out, backend="pil")
    with torch.no_grad():
        chances = theirs(**processor(pixels[..., None], return_tensors="pt", input_data_format="channels_last"))
    right = chances.logits.softmax(-1)[0]
    assert list(theirs.config.id2label.values()) == ["low", "middle", "top"]
    for model in (run_dir, out):
        monkeypatch.chdir(picture.parent)  # a run's home becomes the current folder
        assert predict([str(model), picture.name, "--top", "3"]) == 0
        line = json.loads(capsys.readouterr().out)
        assert line["text"] == picture.name
        assert line["label"] == theirs.config.id2label[int(right.argmax())]
        assert line["probability"] == pytest.approx(right.max().item(), abs=2e-6)
        assert len(line["labels"]) == 3


@pytest.fixture
def make_picture(tmp_path, make_document):
    """Write an image as a file; give it and its pixels."""
    make_document(tmp_path)
    pixels = np.load(tmp_path / "spots.npz")["image"][4]
    Image.fromarray(pixels).save(tmp_path / "spot.png")
    return tmp_path / "spot.png", pixels


def test_a_file_that_is_no_image_is_told_with_its_name(trained, tmp_path, capsys):
    (tmp_path / "text.png").write_text("no image")
    with pytest.raises(UserError, match=r"TEXT 1: cannot be read as an image"):
        predict([str(trained / "learning_2_1"), str(tmp_path / "text.png")])
    (tmp_path / "list.txt").write_text(f"{tmp_path / 'text.png'}\n{tmp_path / 'gone.png'}\n")
    assert predict([str(trained / "learning_2_1"), "--file", str(tmp_path / "list.txt"), "--format", "jsonl"]) == 0
    first, second = map(json.loads, capsys.readouterr().out.splitlines())
    assert "cannot be read as an image" in first["error"]
    assert second["error"] == f"there is no file {tmp_path / 'gone.png'}"


def test_a_run_starts_from_a_folder_with_its_head_or_a_new_one(trained, make_document, tmp_path):
    out = tmp_path / "start"
    convert(trained / "learning_2_1", out)
    document = make_document(tmp_path, model={"initialize_from": str(out)})
    config = ClassifyImagesConfig.model_validate_json(json.dumps(document))
    _, _, model = opened(trained / "learning_2_1")
    same = recipe.build_model(config, {"labels": ["low", "middle", "top"]})
    expected = model.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in same.state_dict().items())
    other = recipe.build_model(config, {"labels": ["x", "y"]}).state_dict()
    assert torch.equal(other["model.norm.weight"], expected["model.norm.weight"])
    assert not other["model.head.weight"].any()
    wider = make_document(tmp_path, model={"initialize_from": str(out), "num_layers": 3})
    with pytest.raises(UserError, match=r"model.num_layers: 3, but the model in .* has 2"):
        recipe.build_model(ClassifyImagesConfig.model_validate_json(json.dumps(wider)), {"labels": ["x", "y"]})
