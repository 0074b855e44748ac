"""Every setting of every command line: a wrong value is refused in a sentence, help names it, lists go by spaces."""

import types
from typing import Literal, Union, get_args, get_origin

import pytest
import yaml

from diffit.cli import encode, sample, train
from diffit.cli.parser import parse
from diffit.cli.settings import help_text, settings_of

PARSE = {"sample": sample.parse_sample, "train": train.parse_train, "encode": encode.parse_encode}
COMMANDS = {"sample": sample.COMMAND, "train": train.COMMAND, "encode": encode.COMMAND}
SETTINGS = {name: list(settings_of(command.config_class)) for name, command in COMMANDS.items()}
NODES = {name: {s.key.rpartition(".")[0] for s in settings} - {""} for name, settings in SETTINGS.items()}
ALL = [pytest.param(name, s, id=f"{name}-{s.key}") for name, settings in SETTINGS.items() for s in settings]
DIALECT = ("Union", "ubtype", "typing", "class '", "Literal", "Optional", "Traceback")


def refusal(name, arguments, capsys) -> str:
    with pytest.raises(SystemExit) as caught:
        PARSE[name](arguments)
    assert caught.value.code == 2
    out, error = capsys.readouterr()
    assert out == ""
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert not [word for word in DIALECT if word in error]
    return error


def alternatives(hint):
    found = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    return [each for each in found if each is not types.NoneType]


def allowed(hint) -> list[str]:
    """Words that an answer must hold to say what a value may be."""
    words = {int: ["whole number"], float: ["number"], str: ["text"], bool: ["true", "false"]}
    found = []
    for each in alternatives(hint):
        inner = get_args(each)
        if get_origin(each) is Literal:
            found += inner
        elif get_origin(each) is tuple:
            found += ["two", *allowed(inner[0])]
        else:
            found += ["mapping"] if get_origin(each) is dict else words.get(each) or allowed(inner[0])
    return found


@pytest.mark.parametrize(("name", "setting"), ALL)
def test_a_wrong_value_is_one_sentence(name, setting, tmp_path, capsys):
    """By a flag, except where any text will do, and in a file."""
    answers = []
    if not {str, list[str]} & set(alternatives(setting.hint)):
        answers.append(refusal(name, [f"--{setting.key}", "perhaps"], capsys))
    if get_origin(setting.hint) is not dict:
        tree = {"what": "is this"}
        for part in reversed(setting.key.split(".")):
            tree = {part: tree}
        recipe = tmp_path / "recipe.yaml"
        recipe.write_text(yaml.safe_dump(tree))
        answers.append(refusal(name, ["--config", str(recipe)], capsys))
    for answer in answers:
        assert f"--{setting.key}" in answer
        assert all(word in answer for word in allowed(setting.hint)), answer


@pytest.mark.parametrize(("name", "setting"), ALL)
def test_a_flag_without_a_value(name, setting, capsys):
    if setting.hint is not bool and setting.key != "class_labels":
        answer = refusal(name, [f"--{setting.key}"], capsys)
        assert f"--{setting.key} needs a value" in answer
        assert all(word in answer for word in allowed(setting.hint))


@pytest.mark.parametrize("name", PARSE)
def test_a_value_for_a_group(name, tmp_path, capsys):
    for node in NODES[name]:
        recipe = tmp_path / "recipe.yaml"
        recipe.write_text(f"{node}: 3\n")
        for arguments in ([f"--{node}", "3"], ["--config", str(recipe)]):
            assert f"--{node}.NAME" in refusal(name, arguments, capsys)


@pytest.mark.parametrize("name", PARSE)
def test_help_names_every_setting_and_the_everyday_ones_first(name, capsys):
    with pytest.raises(SystemExit) as caught:
        PARSE[name](["--help"])
    assert caught.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("usage: ")
    assert lines[1] == ""
    listed = [line.split()[0][2:] for line in lines if line.startswith("  --")]
    keys = {setting.key for setting in SETTINGS[name]}
    assert [key for key in listed if key in keys and listed.count(key) > 1] == []
    assert keys <= set(listed)
    assert listed[: len(COMMANDS[name].everyday) + 1] == ["config", *COMMANDS[name].everyday]
    text = " ".join(" ".join(lines).split())
    assert all(setting.doc and setting.doc in text for setting in SETTINGS[name])
    assert not [word for word in DIALECT if word in text]


def test_help_fits_the_terminal(monkeypatch):
    for columns in (60, 100):
        monkeypatch.setenv("COLUMNS", str(columns))
        settings = help_text(COMMANDS["train"]).partition("everyday")[2].splitlines()
        explained = [line for line in settings if line.startswith(" " * 26)]
        assert max(map(len, explained)) <= columns


def test_lists_are_given_by_spaces():
    for interval in ("--guidance.interval 1 5", "--guidance.interval [1,5]", "--guidance.interval=[1,5]"):
        assert sample.parse_sample(interval.split()).config.guidance.interval == (1, 5)
    assert sample.parse_sample(["--guidance.interval", "null"]).config.guidance.interval is None
    config = train.parse_train(
        ["--optimizer.betas", "0.9", "0.99", "--ema_decay", "0.9999", "0.999", "--seed", "3"]
    ).config
    assert (config.optimizer.betas, config.ema_decay, config.seed) == ((0.9, 0.99), [0.9999, 0.999], 3)
    assert train.parse_train(["--ema_half_life", "5e5", "1e6"]).config.ema_rates == [5e5, 1e6]
    assert train.parse_train(["--ema_decay", "0.99"]).config.ema_rates == [0.99]


@pytest.mark.parametrize("name", ["sample", "train"])
def test_an_empty_interval(name, capsys):
    answer = refusal(name, ["--guidance.interval", "5", "1"], capsys)
    assert "--guidance.interval 5 1 is empty: its first timestep must not lie above its last" in answer


def test_a_switch_alone_is_true():
    config = sample.parse_sample(["--dry_run", "--save_png", "--fast", "false"]).config
    assert (config.dry_run, config.save_png, config.fast) == (True, True, False)


@pytest.mark.parametrize(
    ("written", "value"),
    [("1e-4", 1e-4), ("1.5E+3", 1500), (".5", 0.5), ("-1.", -1), ("+2", 2), ("1_000", 1000), ("007", 7), ("0x10", 16)],
)
def test_numbers_mean_what_they_say(written, value):
    assert parse(train.COMMAND, [f"--guidance.scale={written}"]) == {"guidance.scale": value}


@pytest.mark.parametrize("written", ["1:30", "010", "0b1", "1:30.5", "2024-01-01", "nan", "1e999", "true"])
def test_numbers_of_yaml_1_1_are_refused(written, tmp_path):
    """Else 1:30 would be 90, and 010 would be 8."""
    (tmp_path / "a.yaml").write_text(f"seed: {written}\n")
    for arguments in (["--seed", written], ["--config", str(tmp_path / "a.yaml")]):
        with pytest.raises(ValueError, match="--seed must be a whole number"):
            parse(train.COMMAND, arguments)
