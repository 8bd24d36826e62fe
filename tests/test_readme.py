"""What the README files say: every command is one that the command line takes, every name and link is there."""

import argparse
import itertools
import re
import shlex
from pathlib import Path

import pytest

from bigbatch.launcher import __main__, cli, quickstart
from bigbatch.launcher.documents import document_names
from bigbatch.launcher.resolve import resolve
from bigbatch.launcher.run_dir import RunDir, choose
from bigbatch.recipes.core.recipe import recipe_names

ROOT = Path(__file__).parents[1]
PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text()
    for path in [
        ROOT / "README.md",
        ROOT / "ds_configs/README.md",
        ROOT / "slurm/README.md",
        ROOT / "tools/quantization/README.md",
        *ROOT.glob("recipes/*/README.md"),
    ]
}
CHEAP = ("show", "check", "recipes")


def blocks(text: str) -> list[list[str]]:
    """Return the lines of each block of code."""
    return [block.splitlines() for block in re.findall(r"^```\w*\n(.*?)^```", text, re.DOTALL | re.MULTILINE)]


def commands(lines: list[str], program: str) -> list[list[str]]:
    """Return the arguments of the lines that start with a program, a prompt before it or not."""
    typed = [line.removeprefix("$ ") for line in lines]
    return [
        shlex.split(line, comments=True)[len(program.split()) :] for line in typed if line.startswith(f"{program} ")
    ]


def all_commands(program: str) -> list[list[str]]:
    """Return a program's commands from all pages, those inside sentences too."""
    found = []
    for text in PAGES.values():
        prose = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
        inline = [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", prose)]
        found += [command for lines in [*blocks(text), inline] for command in commands(lines, program)]
    return found


def table(text: str, heading: str) -> list[list[str]]:
    """Return the cells of the first table below a heading, its own head left out."""
    section = text.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


class ParsedError(BaseException):
    """Raised in place of what a command would do."""


@pytest.fixture
def parse_only(monkeypatch):
    """Let every parser read its arguments, and nothing happen after."""
    parse = argparse.ArgumentParser.parse_args

    def parse_and_leave(self, *arguments):
        parse(self, *arguments)
        raise ParsedError

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_and_leave)


@pytest.mark.parametrize("arguments", all_commands("bigbatch"), ids=" ".join)
def test_every_command_is_one_that_the_command_line_takes(arguments, parse_only):
    if arguments == ["--help"]:
        with pytest.raises(SystemExit, match="0"):
            cli.main(arguments)
        return
    with pytest.raises(ParsedError):
        cli.main(arguments)


def test_a_command_with_a_mistake_would_be_found(parse_only, capsys):
    assert cli.main(["train", "gpt/quick", "--rank", "2"]) == 2
    assert "unrecognized arguments: --rank 2" in capsys.readouterr().err
    with pytest.raises((SystemExit, cli.UserError)):
        cli._run_tool("convert", ["runs/x"])


@pytest.mark.parametrize("arguments", [line for line in all_commands("bigbatch") if line[0] in CHEAP], ids=" ".join)
def test_every_command_that_only_looks_runs(arguments, tmp_path, monkeypatch, capsys):
    (tmp_path / "data/text").mkdir(parents=True)
    (tmp_path / "data/text/own.jsonl").write_text('{"text": "What a user brings."}\n')
    monkeypatch.chdir(tmp_path)
    assert cli.main(arguments) == 0
    assert capsys.readouterr().out


@pytest.mark.parametrize("arguments", all_commands("python3 launcher"), ids=" ".join)
def test_every_verb_of_the_launcher_exists(arguments, parse_only):
    if arguments[0] == "test":  # the set-up's own, no part of the installed command
        assert "\n    python3 launcher test " in str(__main__.__doc__)
        return
    with pytest.raises(ParsedError):
        cli.main(arguments)


@pytest.mark.parametrize("page", PAGES)
def test_the_commands_of_a_block_name_run_folders_that_those_before_them_make(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for lines in blocks(PAGES[page]):
        for arguments in commands(lines, "bigbatch"):
            if arguments[0] in ("train", "submit"):
                options = cli._parser().parse_args(arguments)
                if not RunDir(Path(options.run)).exists():
                    resolve(options.run, options.overrides)
                folder = choose(options.run, options.run_dir)
                folder.path.mkdir(parents=True, exist_ok=True)
                folder.run.touch()
            named = [argument for argument in arguments if argument.startswith("runs/")]
            assert [name for name in named if not Path(name).is_dir()] == []


def test_the_quick_start_does_what_is_shown_of_it(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    steps = quickstart._steps(quickstart._fresh_folder())
    (shown,) = [lines for lines in blocks(PAGES["README.md"]) if lines[0].startswith("[1/")]
    titles = [line for line in shown if line.startswith("[")]
    assert titles == [f"[{number}/{len(steps)}] {step.purpose}" for number, step in enumerate(steps, start=1)]
    for title, line in itertools.pairwise(shown):
        if line.startswith("$ "):
            assert line == f"$ {quickstart._typed(steps[titles.index(title)].arguments)}"


def test_the_table_of_recipes_names_those_that_exist_and_their_run_documents():
    rows = table(PAGES["README.md"], "Recipes")
    links = [re.fullmatch(r"\[(\w+)\]\(recipes/(\w+)/README\.md\)", recipe) for recipe, *_ in rows]
    assert sorted(link[1] for link in links) == sorted(link[2] for link in links) == recipe_names()
    for link, (*_, reaches, runs) in zip(links, rows, strict=True):
        named = re.findall(r"`([^`]+)`", runs)
        assert f"{link[1]}/quick" in named
        assert any(f"{link[1]}/" in name and name in reaches for name in document_names())
        assert set(named) <= {name for name in document_names() if name.startswith(f"{link[1]}/")}


@pytest.mark.parametrize("recipe", recipe_names())
def test_a_recipes_own_page_describes_all_its_run_documents(recipe):
    rows = table(PAGES[f"recipes/{recipe}/README.md"], "Run documents")
    named = [f"{recipe}/{name}" for names, *_ in rows for name in re.findall(r"`([^`]+)`", names)]
    assert sorted(named) == [name for name in document_names() if name.startswith(f"{recipe}/")]


def test_the_table_of_profiles_names_those_that_are_shipped():
    named = [re.sub("`", "", name) for name, _ in table(PAGES["slurm/README.md"], "Profiles")]
    assert sorted(named) == sorted(path.name.partition(".")[0] for path in (ROOT / "slurm/profiles").glob("*.json"))


@pytest.mark.parametrize("page", PAGES)
def test_every_link_leads_to_a_file(page):
    for target in re.findall(r"\]\(([^)#]+)", PAGES[page]):
        assert target.startswith("https://") or ((ROOT / page).parent / target).exists(), target
