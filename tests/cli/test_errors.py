"""What cannot be done is said in one line on stderr, with exit code 1 and no traceback."""

import json
import logging
import os
import shutil
import subprocess
import sys
import warnings
from types import SimpleNamespace

import pytest
import typer
from typer.testing import CliRunner

from alphaedit_peft.cli import app, printing
from alphaedit_peft.cli.printing import CommandGroup, one_line
from alphaedit_peft.messages import LONGEST

EDIT = {"subject": "Ada", "prompt": "{} was born in", "target_new": "Rome"}


def said(result) -> str:
    """The one line on stderr."""
    lines = result.stderr.splitlines()
    assert len(lines) == 1, result.stderr
    assert result.stdout == ""
    assert lines[0].startswith("alphaedit: ")
    return lines[0]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("", "there is no edit in it"),
        ("{", "line 1"),
        ("[1]", "record 0: 1 is a int, no JSON object"),
        (json.dumps({"subject": "Ada"}), r"missing fields"),
        (json.dumps({**EDIT, "subject": " "}), "is empty"),
        (json.dumps({**EDIT, "prompt": "born"}), "does not hold the subject 'Ada'"),
        (json.dumps({**EDIT, "targets": "x"}), "unknown fields"),
    ],
)
def test_unusable_edits(run, tmp_path, lines, message):
    path = tmp_path / "edits.jsonl"
    path.write_text(lines)
    assert message in said(run("edit", "embedded", path, "--out", tmp_path / "p", code=1))


@pytest.fixture
def good(tmp_path):
    path = tmp_path / "good.jsonl"
    path.write_text(json.dumps(EDIT))
    return path


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--null-space", "/no/ns"], "/no/ns is no folder"),
        (["--set", "ridgge=1"], r"settings ['ridgge'] are unknown"),
        (["--set", "ridge=-1"], "ridge=-1"),
        (["--set", "kl_prompt=x"], "kl_prompt='x'"),
        (["--set", "ridge=NaN"], "ridge='NaN' must be a number"),
        (["--set", "kl_prompt=" + "[" * 20_000], "kl_prompt='[[["),
        (["--set", "base_model_name_or_path=7"], "base_model_name_or_path=7 must be of type"),
        (["--set", "task_type=x"], "settings ['task_type'] are unknown"),
        (["--config", "/no/config.json"], "/no/config.json: there is no such file"),
        (["--layers", "40"], "rewrite_layers=[40] is outside this model's"),
        ([], "on the command line --null-space DIR, which 'alphaedit nullspace' writes"),
        (["--set", "objective=memit"], "--key-moments DIR, which 'alphaedit nullspace --moments"),
        (["--device", "moon"], "--device 'moon' cannot be used"),
        (["--device", "cuda:99"], "--device 'cuda:99' cannot be used"),
        (["--set", "rige=1"], "settings ['rige'] are unknown; did you mean ridge"),
        (["--set", "=".join("x" * 999)], "are unknown; docs/settings.md lists all"),
    ],
)
def test_unusable_settings(run, tmp_path, good, embedded_model, words, message):
    result = run("edit", "embedded", good, "--out", tmp_path / "p", *words, code=1)
    assert message in said(result)
    assert len(said(result)) <= len("alphaedit: ") + LONGEST
    assert not (tmp_path / "p").exists()


def test_layers_that_no_model_has_are_refused_at_once(run, tmp_path, good):
    words = ["edit", "embedded", good, "--out", tmp_path / "p", "--layers", "1-9999999999"]
    assert "names blocks that no model has" in " ".join(run(*words, code=2).stderr.split())


@pytest.mark.parametrize("text", ["{", "[]"])
def test_an_unusable_config_file(run, tmp_path, good, text):
    path = tmp_path / "config.json"
    path.write_text(text)
    result = run("edit", "embedded", good, "--out", tmp_path / "p", "--config", path, code=1)
    assert f"--config {path}" in said(result)


@pytest.mark.parametrize(
    "words", [["edit", "no-such-file.jsonl"], ["merge", "/no/pack"], ["rollback", "/no/pack"]]
)
def test_missing_files(run, tmp_path, words):
    command, path = words
    assert path in said(run(command, "embedded", path, "--out", tmp_path / "p", code=1))


def test_missing_texts(run, tmp_path):
    words = ["nullspace", "embedded", "--texts", "no.txt", "--out", tmp_path / "ns"]
    assert "--texts no.txt is no file" in said(run(*words, code=1))


def test_a_folder_without_a_model(run, tmp_path, good):
    result = run("edit", tmp_path, good, "--out", tmp_path / "p", code=1)
    told = said(result)
    assert f"model '{tmp_path}' cannot be loaded: the folder holds no config.json" in told
    result = run("edit", good, good, "--out", tmp_path / "p", code=1)
    assert f"model '{good}' cannot be loaded: it is a file" in said(result)


def test_a_file_where_the_output_folder_should_be(run, good):
    result = run("edit", "embedded", good, "--out", good, code=1)
    assert f"{good} is a file" in said(result)


@pytest.mark.parametrize("command", ["compare embedded --edits 4", "demo"])
def test_a_folder_that_may_not_be_written_is_refused_before_any_work(
    run, tmp_path, monkeypatch, command
):
    monkeypatch.setattr(os, "access", lambda _, how: how != os.W_OK)
    result = run(*command.split(), "--out", tmp_path, code=1)
    assert said(result) == f"alphaedit: {tmp_path}: nothing may be written there; name another"


def test_merge_does_not_write_over_what_is_there(run, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    result = run("merge", "embedded", "pack", "--out", tmp_path, code=1)
    assert "is not empty" in said(result)


def test_a_damaged_pack(shown, run, tmp_path):
    pack = tmp_path / "pack"
    shutil.copytree(shown[0] / "pack", pack)
    (pack / "alphaedit" / "edits.jsonl").write_text("{")
    assert "edits.jsonl, line 1" in said(run("inspect", pack, code=1))


def test_settings_of_a_pack_are_fixed(shown, run, good, tmp_path):
    words = ["edit", "embedded", good, "--pack", shown[0] / "pack", "--out", tmp_path / "p"]
    message = said(run(*words, "--layers", "3", code=1))
    assert "rewrite_layers cannot be changed while going on from" in message


def test_more_batches_than_there_are(shown, run, tmp_path):
    words = ["rollback", "embedded", shown[0] / "pack", "--null-space", shown[0] / "null_space"]
    message = said(run(*words, "--batches", "5", "--out", tmp_path / "p", code=1))
    assert "batches=5 cannot be taken back" in message


def test_a_shell_sees_the_same(shell, tmp_path):
    done = shell("inspect", tmp_path / "nothing")
    assert done.returncode == 1
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("how", ["option", "environment"])
def test_developers_get_the_error_itself(tmp_path, how):
    words = ["--traceback"] if how == "option" else []
    environment = {"ALPHAEDIT_TRACEBACK": "1" if how == "environment" else ""}
    words += ["inspect", str(tmp_path / "nothing")]
    result = CliRunner(env=environment).invoke(app, words)
    assert isinstance(result.exception, FileNotFoundError)
    assert result.stderr == ""


def raising(error: BaseException):
    app = typer.Typer(cls=CommandGroup)

    @app.callback()
    def main() -> None:
        pass

    @app.command()
    def go() -> None:
        raise error

    return CliRunner().invoke(app, ["go"])


def test_ctrl_c_exits_with_130():
    result = raising(KeyboardInterrupt())
    assert (result.exit_code, result.stderr) == (130, "alphaedit: interrupted\n")


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("a\n  b"), "a b"),
        (ValueError("a pack named \x1b[2Jb"), "a pack named [2Jb"),
        (ValueError("no file is named \udce6"), "no file is named \\udce6"),
        (RuntimeError(), "RuntimeError"),
        (OSError(28, "No space left on device", "p"), "p: No space left on device"),
        (OSError(28, "No space left on device"), "No space left on device"),
    ],
)
def test_messages_become_one_line(error, line):
    assert one_line(error) == line
    result = raising(error)
    assert (result.exit_code, result.stderr) == (1, f"alphaedit: {line}\n")


def test_a_mistake_in_the_program_keeps_its_type():
    result = raising(KeyError("x"))
    assert isinstance(result.exception, KeyError)


def test_warnings_for_users_are_one_line_and_others_are_silent(capsys):
    with printing.warnings_in_one_line():
        warnings.warn("two\nlines", stacklevel=1)
        warnings.warn("old", FutureWarning, stacklevel=1)
    assert capsys.readouterr().err == "alphaedit: warning: two lines\n"


def test_only_the_line_about_an_optional_kernel_is_dropped_from_the_log(caplog):
    name, begins = printing.OPTIONAL_KERNEL
    logger = logging.getLogger(name)
    with printing.optional_kernel_unmentioned():
        logger.warning(f"{begins} from somewhere: %s", ImportError("no kernels"))
        logger.warning("the processor is on fire")
    logger.warning(f"{begins} again")
    shown = [record.getMessage() for record in caplog.records]
    assert shown == ["the processor is on fire", f"{begins} again"]


@pytest.mark.parametrize("what", ["pack", "null space"])
def test_a_missing_folder_that_could_be_a_repository(shell, tmp_path, good, what):
    words = ["inspect", "no-such-pack"]
    if what == "null space":
        words = ["edit", "embedded", good, "--out", tmp_path / "p", "--null-space", "no-such-pack"]
    done = shell(*words, HF_HUB_OFFLINE="1")
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1
    assert "no-such-pack: no such folder here" in done.stderr
    assert "no Hub repository" in done.stderr


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
@pytest.mark.parametrize("words", ["--help", "edit --help", "--version"])
def test_help_on_a_full_disk(words):
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "alphaedit_peft.cli", *words.split()],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert done.returncode == 1
    assert "No space left on device" in said(SimpleNamespace(stdout="", stderr=done.stderr))


@pytest.mark.skipif(os.name == "nt", reason="needs a shell")
@pytest.mark.parametrize("closed", ["1>&-", "2>&-", "0<&- 1>&- 2>&-"])
def test_standard_streams_that_are_closed(shown, tmp_path, closed):
    words = [sys.executable, "-m", "alphaedit_peft.cli", "remove", str(shown[0] / "pack")]
    words += [edit_id(shown[0] / "pack"), "--out", str(tmp_path / "smaller")]
    done = subprocess.run(
        ["sh", "-c", f'"$@" {closed}', "sh", *words], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "smaller" / "adapter_model.safetensors").is_file()
    words[4] = str(tmp_path / "nothing")
    done = subprocess.run(["sh", "-c", f'"$@" {closed}', "sh", *words], check=False)
    assert done.returncode == 1


def edit_id(pack):
    with open(pack / "alphaedit" / "edits.jsonl", encoding="utf-8") as file:
        return json.loads(file.readline())["edit"]["id"]
