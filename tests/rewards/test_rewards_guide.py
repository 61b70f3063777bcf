"""The guide's examples run as printed, and its config is read."""

import pathlib
import re

import yaml

from jaxpost import rewards

GUIDE = pathlib.Path(__file__).parents[2] / "docs" / "rewards.md"


def blocks(language):
    text = GUIDE.read_text("utf-8")
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def test_examples_run(capsys):
    found = blocks("python")
    assert len(found) == 3
    names = {}
    for block in found:
        exec(compile(block, str(GUIDE), "exec"), names)
    # What the comments say is printed.
    said = [line.partition("  # ")[2] for block in found for line in block.splitlines()]
    printed = capsys.readouterr().out
    for line in said:
        if line.startswith(("[", "0.", "reward ")):
            shown = line.partition(":")[0] if line.startswith("[") else line
            assert shown.removesuffix("...") in printed, line
    assert names["gains"].shape == (2, 2)


def test_config_is_one_of_a_scorer():
    (text,) = blocks("yaml")
    *built_in, own = yaml.safe_load(text)["rewards"]
    sections = [rewards.RewardSection(**section) for section in built_in]
    assert [section.shown_as for section in sections] == ["arithmetic", "length"]
    rewards.Scorer(sections)
    assert rewards.RewardSection(**own).shown_as == "polite"


def test_every_built_in_reward_is_in_the_table():
    text = GUIDE.read_text("utf-8")
    for name in ("arithmetic", "exact_match", "regex", "format", "length"):
        assert f"| `{name}` |" in text
