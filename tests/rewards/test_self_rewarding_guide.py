"""The guide's example runs as printed, its commands and settings exist."""

import pathlib
import re

from jaxpost import recipes
from jaxpost.recipes._config import from_mapping, read_yaml
from jaxpost.recipes.self_rewarding_ppo import SelfRewardingPPOConfig

ROOT = pathlib.Path(__file__).parents[2]
GUIDE = ROOT / "docs" / "self_rewarding_ppo.md"


def test_the_example_runs(capsys):
    text = GUIDE.read_text("utf-8")
    (block,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    exec(compile(block, str(GUIDE), "exec"), {})
    assert "[1.1631" in capsys.readouterr().out


def test_its_configs_and_settings_exist():
    text = GUIDE.read_text("utf-8")
    for path in re.findall(r"configs/\S+\.yaml", text):
        values = read_yaml(ROOT / path)
        config = from_mapping(recipes.config_type(values, path), values)
        assert config.name == pathlib.Path(path).stem
    config = SelfRewardingPPOConfig()
    sections = "rollout|advantage|kl|self_reward|critic"
    names = re.findall(rf"`({sections})\.(\w+)", text)
    assert len(set(names)) > 10
    for section, key in names:
        assert hasattr(getattr(config, section), key), (section, key)
