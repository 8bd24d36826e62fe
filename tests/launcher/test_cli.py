"""The command line: light to start, one line a mistake, the right exit status."""

import errno
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from bigbatch.launcher import cli, quickstart
from bigbatch.launcher import resolve as resolve_module
from bigbatch.launcher.begin import set_up
from bigbatch.launcher.resolve import resolve
from bigbatch.launcher.run_dir import RunDir, hold, write
from bigbatch.recipes.core.engine_config import complete
from bigbatch.recipes.core.errors import UserError

COMMAND = [sys.executable, "-P", "-m", "bigbatch.launcher.cli"]


def error_lines(capsys: pytest.CaptureFixture, *arguments: str) -> list[str]:
    """Return what a mistaken command writes to standard error, after checking that it is told as a mistake."""
    assert cli.main(arguments) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert "Traceback" not in output.err
    return output.err.splitlines()


@pytest.fixture
def begun(tmp_path: Path) -> RunDir:
    """Return the folder of a run that has a checkpoint."""
    folder = RunDir(tmp_path / "run")
    resolved = resolve("gpt/quick")
    (folder.checkpoints / "step_00000100").mkdir(parents=True)
    (folder.checkpoints / "step_00000100" / "manifest.json").write_text("{}")
    write(folder, resolved.document, complete(resolved.config, resolved.deepspeed, 1), resolved.content_id)
    return folder


def test_help_imports_nothing_heavy():
    heavy = ("torch", "deepspeed", "transformers", "datasets", "numpy", "pydantic", "rich")
    code = (
        "import sys\nfrom bigbatch.launcher.cli import main\n"
        "try: main(['--help'])\n"
        f"except SystemExit: sys.exit(' '.join(sorted(set({heavy}) & set(sys.modules))))"
    )
    result = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=False)
    assert result.stderr.strip() == ""
    assert "usage: bigbatch" in result.stdout


def test_help_names_every_verb(capsys):
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    text = capsys.readouterr().out
    assert all(f"\n    {verb}" in text for verb in [*cli.VERBS, *cli.TOOLS])


@pytest.mark.parametrize("verb", cli.VERBS)
def test_every_verb_explains_itself(verb, capsys):
    with pytest.raises(SystemExit) as end:
        cli.main([verb, "--help"])
    assert end.value.code == 0
    assert f"usage: bigbatch {verb}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["trian", "gpt/quick"], "error: bigbatch trian: there is no such verb; did you mean train?"),
        (["train"], "error: bigbatch train: the following arguments are required: RUN | RUN_DIR"),
        (["train", "gpt/quick", "--rank", "2"], "error: bigbatch: unrecognized arguments: --rank 2"),
        (
            ["train", "gpt/quick", "--ranks", "0"],
            "error: bigbatch train: argument --ranks: found '0'; right is a number",
        ),
        (["train", "gpt/quick", "--ranks", "two"], "error: bigbatch train: argument --ranks: found 'two'; right is"),
        (["train", "gpt/quick", "--resume", "yes"], "error: bigbatch train: argument --resume: invalid choice: 'yes'"),
        (["evaluate", "/nowhere"], "error: /nowhere: is no run folder"),
        (["evaluate", "x", "--split", "train"], "error: bigbatch evaluate: argument --split: invalid choice: 'train'"),
        (["predict"], "error: bigbatch predict: the following arguments are required: MODEL; see bigbatch"),
        (
            ["predict", "/nowhere", "a text"],
            "error: /nowhere: there is no such folder; give a run folder, a checkpoint",
        ),
        (["evaluate", "a" * 300], f"error: {'a' * 300}/run.json: File name too long"),
        (["train", "two\nlines\x1b[31m"], r"error: two lines\x1b[31m: no document of this name"),
        (["report"], "error: bigbatch report: the following arguments are required: run_dir; see bigbatch report"),
        (["doctor", "--jsno"], "error: bigbatch doctor: unrecognized arguments: --jsno; see bigbatch doctor --help"),
        (["checkpoint", "lst", "x"], "error: bigbatch checkpoint: argument action: invalid choice: 'lst'"),
        (["convert", "x"], "error: bigbatch convert: the following arguments are required: OUT"),
        (["train", ""], "error: RUN: no document of this name"),
        (["show", "gpt/quik"], "error: gpt/quik: no document of this name; did you mean 'gpt/quick'?"),
        (["show", "gpt/quick", "--set", "modle.num_layers=2"], "error: --set modle.num_layers: unknown key"),
        (["train", "gpt/quick", "--ranks", "3"], "error: batch.global_size: "),
    ],
)
def test_a_mistake_is_told_in_one_line(arguments, told, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (line,) = error_lines(capsys, *arguments)
    assert line.startswith(told)
    assert list(tmp_path.iterdir()) == []  # nothing was begun


def test_several_mistakes_are_told_in_one_line_each(capsys):
    mistakes = ["--set", "batch.global_size=0", "--set", 'model.family="gpt9"']
    lines = error_lines(capsys, "show", "gpt/quick", *mistakes)
    assert [line.split(":")[1].strip() for line in sorted(lines)] == ["batch.global_size", "model.family"]


def test_an_unexpected_exception_is_one_line_and_a_file_with_the_traceback(capsys, monkeypatch):
    def fail() -> int:
        """Fail."""
        raise ZeroDivisionError("of\nour own")

    monkeypatch.setitem(cli.VERBS, "quickstart", cli.Verb(fail, ()))
    monkeypatch.delenv("BIGBATCH_DEBUG", raising=False)
    assert cli.main(["quickstart"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ZeroDivisionError: of our own (traceback: ")
    file = Path(line.removesuffix(")").rpartition(" ")[2])
    assert "in fail" in file.read_text()
    file.unlink()
    monkeypatch.setenv("BIGBATCH_DEBUG", "1")
    with pytest.raises(ZeroDivisionError):
        cli.main(["quickstart"])


def test_a_full_disk_is_no_reason_for_a_traceback(capsys, monkeypatch):
    full = OSError(errno.ENOSPC, "No space left on device")

    def fail(*_, **__):
        raise full

    monkeypatch.setattr(resolve_module, "resolve", fail)
    assert error_lines(capsys, "show", "gpt/quick") == ["error: No space left on device"]
    monkeypatch.setattr(resolve_module, "resolve", lambda *_: 1 / 0)
    monkeypatch.setattr(tempfile, "NamedTemporaryFile", fail)
    assert cli.main(["show", "gpt/quick"]) == 1
    assert capsys.readouterr().err == (
        "error: ZeroDivisionError: division by zero (traceback: BIGBATCH_DEBUG=1 shows it)\n"
    )


def test_a_reader_that_has_seen_enough_is_no_error():
    command = [*COMMAND, "show", "gpt/quick", "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait(timeout=30) == 0


def test_recipes_lists_what_every_shipped_document_is_for(capsys):
    assert cli.main(["recipes", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert "gpt/quick" in [recipe["name"] for recipe in listed]
    assert all(recipe["purpose"] and recipe["needs"] and recipe["expect"] for recipe in listed)
    assert cli.main(["recipes"]) == 0
    text = capsys.readouterr().out
    assert all(recipe["purpose"] in text for recipe in listed)


def test_show_prints_the_resolved_document_a_line_a_setting_or_as_json(capsys):
    resolved = resolve("gpt/quick", ["seed=5"])
    assert cli.main(["show", "gpt/quick", "--set", "seed=5", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown == {"content_id": resolved.content_id, "run": resolved.document, "deepspeed": resolved.deepspeed}
    assert cli.main(["show", "gpt/quick", "--set", "seed=5"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert {"run.seed = 5", "run.model.num_layers = 4", f'content_id = "{resolved.content_id}"'} <= set(lines)


def test_check_prints_its_findings_as_a_table_or_as_json(capsys):
    assert cli.main(["check", "gpt/quick", "--ranks", "2", "--json"]) == 0
    assert all(finding["severity"] != "error" for finding in json.loads(capsys.readouterr().out))
    assert cli.main(["check", "gpt/quick", "--ranks", "3"]) == 2
    assert "batch.global_size" in capsys.readouterr().out


def test_a_begun_run_is_shown_as_it_was_started(begun, capsys):
    assert cli.main(["show", str(begun.path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["run"] == json.loads(begun.run.read_text())


def test_a_begun_run_refuses_what_its_checkpoint_cannot_follow(begun, capsys):
    before = begun.run.read_text()
    (line,) = error_lines(capsys, "train", str(begun.path), "--set", "model.num_layers=5")
    assert line.startswith("error: model.num_layers: 4 -> 5, but the run has begun")
    assert begun.run.read_text() == before


def test_a_begun_run_says_what_changes_its_optimization_and_takes_it(begun, capsys):
    resolved = resolve(str(begun.run), ["optimizer.learning_rate=0.5", "report.every_steps=3"])
    set_up(begun, resolved, {}, "auto")
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "changed: optimizer.learning_rate: 0.003 -> 0.5 (changes optimization)",
        "changed: report.every_steps: 10 -> 3 (harmless)",
    ]
    assert json.loads(begun.run.read_text())["optimizer"]["learning_rate"] == 0.5
    assert json.loads(begun.environment.read_text())["earlier_starts"][0]["content_id"] != resolved.content_id


def test_a_run_that_has_saved_nothing_yet_may_change_in_any_way(begun):
    (begun.checkpoints / "step_00000100" / "manifest.json").unlink()
    resolved = resolve(str(begun.run), ["model.num_layers=5"])
    set_up(begun, resolved, {}, "auto")
    assert json.loads(begun.run.read_text())["model"]["num_layers"] == 5


def test_a_damaged_record_of_a_begun_run_is_named_and_a_missing_document_is_written_anew(begun, capsys):
    begun.run.write_text("{")
    told = error_lines(capsys, "train", "gpt/quick", "--run-dir", str(begun.path))
    assert told == [
        f"error: {begun.run}: not JSON at line 1 column 2: Expecting property name enclosed in double quotes"
    ]
    begun.run.unlink()
    resolved = resolve("gpt/quick")
    set_up(begun, resolved, {}, "auto")
    assert json.loads(begun.run.read_text()) == resolved.document


def test_a_folder_that_is_no_run_is_told_so(tmp_path, capsys):
    for verb in ("train", "check", "show", "prepare"):
        assert cli.main([verb, str(tmp_path)]) == 2
        output = capsys.readouterr()
        assert "is a folder without a run.json, so no run folder" in output.out + output.err


def test_resume_must_and_never_are_kept(begun, tmp_path, capsys):
    (line,) = error_lines(capsys, "train", str(begun.path), "--resume", "never")
    assert line.startswith("error: --resume: never:")
    (line,) = error_lines(capsys, "train", "gpt/quick", "--run-dir", str(tmp_path / "new"), "--resume", "must")
    assert line.startswith("error: --resume: must:")


def test_a_run_folder_in_use_is_refused(begun, capsys):
    with hold(begun):
        result = subprocess.run([*COMMAND, "train", str(begun.path)], capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert result.stderr.startswith(f"error: {begun.path}: in use by process ")
    assert len(result.stderr.splitlines()) == 1


def test_without_the_extra_a_verb_that_trains_says_what_to_install(monkeypatch):
    monkeypatch.setattr(cli.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'bigbatch\[train\]'"):
        cli.prepare("gpt/quick", [])


def test_every_command_of_the_quick_start_is_one_that_the_command_line_takes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    commands = [step.arguments for step in quickstart._steps("runs/quickstart")]
    for arguments in [*commands, *quickstart._next_commands("runs/quickstart")]:
        if arguments[0] in cli.TOOLS:
            continue
        options = cli._parser().parse_args(arguments)
        if arguments[:2] == ["train", "gpt/quick"]:
            resolve(options.run, options.overrides)
    assert {arguments[0] for arguments in commands} >= {"train", "evaluate", "convert", "generate", "report"}


def test_the_quick_start_never_takes_a_folder_that_is_there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for expected in ("runs/quickstart", "runs/quickstart-2", "runs/quickstart-3"):
        assert quickstart._fresh_folder() == expected
        Path(expected).mkdir(parents=True)


def test_a_row_that_cannot_be_taken_is_told_or_left_out_as_on_error_says(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    lines = [f'{{"text": "a good text {number}", "label": "{number % 2}"}}' for number in range(20)]
    Path("rows.jsonl").write_text("\n".join([*lines, '{"text": "", "label": "1"}']))
    data = {"train": ["rows.jsonl"], "tokenizer": {"kind": "character"}, "sequence_length": 32}
    Path("run.json").write_text(json.dumps({"version": 1, "recipe": "classify", "extends": "classify/quick"}))
    changes = [f"--set=data.{name}={json.dumps(value)}" for name, value in data.items()]
    changes += ['--set=data.text_columns=["text"]', "--set=data.label_column=label"]
    (line,) = error_lines(capfd, "prepare", "run.json", *changes)
    assert line.endswith("rows.jsonl:21: has an empty text; data.on_error 'skip' leaves such rows out")
    assert cli.main(["prepare", "run.json", *changes, "--on-error", "skip"]) == 0
    assert "left out: 1 empty\n" in capfd.readouterr().err
    (line,) = error_lines(capfd, "prepare", "run.json", "--on-error", "maybe")
    assert "found 'maybe'; right is fail or skip" in line
