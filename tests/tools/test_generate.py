import io
import json

import pytest
import tokenizers
import torch
import transformers
from tokenizers import decoders, models, pre_tokenizers

from bigbatch.recipes.core.errors import UserError
from bigbatch.recipes.core.models.config import DecoderSection
from bigbatch.recipes.core.models.decoder import Decoder, hugging_face_config, hugging_face_state
from bigbatch.tools.generate import main, printable

SHAPE = {"num_layers": 1, "hidden_size": 16, "num_heads": 2, "max_positions": 32, "initializer_range": 0.5}


@pytest.fixture
def folder(tmp_path):
    """Save a random model over single bytes: its text is full of broken and of whole characters."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = tokenizers.Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|endoftext|>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    torch.manual_seed(3)
    model = Decoder(DecoderSection(**SHAPE), 257)
    config = hugging_face_config(model.section, 257) | {"eos_token_id": 256}
    twin = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**config))
    twin.load_state_dict(hugging_face_state(model), strict=False)
    twin.save_pretrained(tmp_path)
    return tmp_path


def test_text_streams_to_standard_output_and_figures_to_standard_error(folder, capsys):
    assert main([str(folder), "--prompt", "ab", "--max-new-tokens", "12"]) == 0
    shown = capsys.readouterr()
    assert shown.out.startswith("ab")
    assert "tokens/s" in shown.err
    assert "tokens/s" not in shown.out
    again = main([str(folder), "--prompt", "ab", "--max-new-tokens", "12"]), capsys.readouterr().out
    assert again == (0, shown.out)


def test_a_text_may_stand_behind_the_model_as_for_predict(folder, capsys):
    outputs = []
    for arguments in (["ab", "cd"], ["--prompt", "ab", "--prompt", "cd"], ["ab", "--prompt", "cd"]):
        assert main([str(folder), *arguments, "--max-new-tokens", "5"]) == 0
        outputs.append(capsys.readouterr().out)
    assert "\nab" in outputs[0] and "\ncd" in outputs[0]
    assert len(set(outputs)) == 1


def test_streamed_text_is_the_decoded_text_up_to_a_broken_last_character(folder, capsys):
    for seed in range(6):
        flags = [str(folder), "--prompt", "é", "--max-new-tokens", "20", "--temperature", "1.5", "--seed", str(seed)]
        main(flags)
        streamed = capsys.readouterr().out.removesuffix("\n")
        main([*flags, "--json"])
        whole = "é" + json.loads(capsys.readouterr().out)["text"]
        assert whole.startswith(streamed)
        assert set(whole.removeprefix(streamed)) <= {"\ufffd"}


def test_json_has_a_line_for_each_sample_of_each_prompt(folder, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("from the pipe"))
    flags = ["--prompt", "x", "--prompt", "-", "--num-samples", "2", "--max-new-tokens", "60", "--json"]
    main([str(folder), *flags])
    shown = capsys.readouterr()
    lines = [json.loads(line) for line in shown.out.splitlines()]
    assert [(line["prompt"], line["sample"]) for line in lines] == [
        ("x", 0),
        ("x", 1),
        ("from the pipe", 0),
        ("from the pipe", 1),
    ]
    assert {line["stopped"] for line in lines} <= {"end", "context"}
    assert "stopped where the model's 32 positions are used up" in shown.err


def test_several_rows_are_printed_one_after_another_in_full(folder, capsys):
    flags = [str(folder), "--prompt", "p", "--num-samples", "3", "--max-new-tokens", "9", "--temperature", "0"]
    main(flags)
    blocks = capsys.readouterr().out.split("--- ")[1:]
    assert [block[:7] for block in blocks] == ["1 of 3\n", "2 of 3\n", "3 of 3\n"]
    assert len({block[7:].rstrip("\n") for block in blocks}) == 1  # greedy
    assert blocks[0][7:].startswith("p")


def test_an_empty_prompt_begins_behind_the_end_of_a_text(folder, capsys):
    main([str(folder), "--max-new-tokens", "3", "--json"])
    assert json.loads(capsys.readouterr().out)["prompt"] == ""


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--temperature", "-1"], "found '-1'; right is a number from 0 on"),
        (["--top-p", "1.5"], "found '1.5'; right is a number from 0 to 1"),
        (["--max-new-tokens", "x"], "found 'x'; right is a number from 1 on"),
        (["--prompt", "a" * 32], "prompt: has 32 tokens; the model has 32 positions, one must be free"),
    ],
)
def test_a_flag_that_makes_no_sense_is_refused_with_its_value(folder, flags, message):
    with pytest.raises(UserError) as error:
        main([str(folder), *flags])
    assert message in str(error.value)


def test_a_model_without_a_readable_tokenizer_is_refused(folder):
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match=r"is not a tokenizer\.json"):
        main([str(folder)])
    (folder / "tokenizer.json").unlink()
    with pytest.raises(UserError, match=r"has no tokenizer\.json"):
        main([str(folder)])


def test_text_cannot_steer_a_terminal(monkeypatch):
    text = "a\x1b[2Jb\nc\td é"
    assert printable(text) == text
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    assert printable(text) == "a\\x1b[2Jb\nc\td é"
