"""YAML and flags into frozen dataclasses: names, types, messages."""

import dataclasses
from typing import Literal

import pytest

from jaxpost.recipes._config import (
    ConfigError,
    from_mapping,
    read_yaml,
    to_mapping,
    with_flags,
)


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """Attributes:
    learning_rate: Step size.
    betas: Moment decays.
    """

    learning_rate: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    name: Literal["adamw", "sgd"] = "adamw"

    def __post_init__(self) -> None:
        if self.learning_rate <= 0:
            raise ValueError(
                f"learning_rate must be positive, got {self.learning_rate}."
            )


@dataclasses.dataclass(frozen=True)
class Config:
    steps: int | None = None
    packing: bool = True
    columns: dict[str, str] = dataclasses.field(default_factory=dict)
    optimizer: Optimizer = Optimizer()


def test_values_are_coerced_by_the_type_of_their_field(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(
        "steps: 1e3\ncolumns: {question: prompt}\n"
        "optimizer: {learning_rate: 1e-4, betas: [0.5, 1]}\n"
    )
    values = read_yaml(path)
    assert values["optimizer"]["learning_rate"] == "1e-4"  # YAML 1.1 reads a string
    config = from_mapping(Config, values)
    assert config.steps == 1000
    assert isinstance(config.steps, int)
    assert config.optimizer == Optimizer(1e-4, (0.5, 1.0))
    assert config.columns == {"question": "prompt"}


def test_round_trip_through_plain_mappings():
    config = Config(steps=3, optimizer=Optimizer(0.5))
    assert from_mapping(Config, to_mapping(config)) == config


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"stesp": 1}, "unknown key 'stesp'. Did you mean 'steps'"),
        (
            {"optimizer": {"learning_rat": 1}},
            "'learning_rat' in section 'optimizer'. Did you mean 'learning_rate'",
        ),
        ({"optimizer": {"zzz": 1}}, "Known keys there: learning_rate, betas, name"),
        ({"steps": 1.5}, "steps must be int, got 1.5"),
        ({"packing": "yes please"}, "packing must be bool, got 'yes please'"),
        ({"optimizer": 3}, "optimizer must be a section, got 3"),
        ({"optimizer": {"name": "adam"}}, "one of adamw, sgd, got 'adam'.*'adamw'"),
        ({"optimizer": {"betas": [1]}}, "optimizer.betas must be"),
        ({"optimizer": {"learning_rate": -1}}, "optimizer: learning_rate must be pos"),
        ({"optimizer": {"learning_rate": True}}, "learning_rate must be float"),
    ],
)
def test_a_wrong_key_or_value_is_named(values, message):
    with pytest.raises(ConfigError, match=message):
        from_mapping(Config, values, where="run.yaml")


def test_unreadable_files_are_named(tmp_path):
    (tmp_path / "stories.yaml").write_text("a: 1\na: 2\n")
    with pytest.raises(ConfigError, match=r"no such config file.*stories\.yaml"):
        read_yaml(tmp_path / "storis.yaml")
    with pytest.raises(ConfigError, match="stories.yaml:2: key 'a' is given twice"):
        read_yaml(tmp_path / "stories.yaml")
    (tmp_path / "broken.yaml").write_text("a: [1\n")
    with pytest.raises(ConfigError, match="not valid YAML"):
        read_yaml(tmp_path / "broken.yaml")
    (tmp_path / "list.yaml").write_text("- 1\n")
    with pytest.raises(ConfigError, match="expected `section"):
        read_yaml(tmp_path / "list.yaml")


def test_flags_override_the_file():
    flags = ["--optimizer.learning-rate", "3e-5", "--steps", "7", "--packing", "False"]
    config = with_flags(Config(steps=1), flags, prog="jaxpost train")
    assert config.steps == 7
    assert config.optimizer.learning_rate == 3e-5
    assert config.packing is False


def test_a_wrong_flag_names_the_nearest(capsys):
    with pytest.raises(SystemExit):
        with_flags(Config(), ["--optimizer.learning-rat", "1"], prog="jaxpost train")
    assert "--optimizer.learning-rate" in capsys.readouterr().err
