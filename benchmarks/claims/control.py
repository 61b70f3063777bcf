"""Do robust and adaptive losses help where a reward is learned for control?

python benchmarks/claims/control.py [--quick] [--section.key value ...]

Runs configs/control/pendulum.yaml (or pendulum_quick.yaml) in a folder of its own and
keeps what it found: benchmarks/claims/results/control.json and
docs/figures/control_pendulum.svg. With --quick, nothing is kept.
"""

import pathlib
import shutil
import sys
import tempfile

from jaxpost import cli

ROOT = pathlib.Path(__file__).resolve().parents[2]


def main(arguments: list[str]) -> int:
    quick = "--quick" in arguments
    name = "pendulum_quick" if quick else "pendulum"
    flags = [word for word in arguments if word != "--quick"]
    config = ROOT / "configs" / "control" / f"{name}.yaml"
    with tempfile.TemporaryDirectory() as folder:
        status = cli.main(["train", str(config), "--run-root", folder, *flags])
        if status or quick:
            return status
        found = pathlib.Path(folder) / name
        results = ROOT / "benchmarks" / "claims" / "results"
        results.mkdir(parents=True, exist_ok=True)
        shutil.copy(found / "results.json", results / "control.json")
        figure = ROOT / "docs" / "figures" / "control_pendulum.svg"
        shutil.copy(found / "control.svg", figure)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
