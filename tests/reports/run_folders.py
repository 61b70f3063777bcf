"""Run folders made by hand, as a training run leaves them."""

import json
import pathlib


def write_run(
    folder: pathlib.Path,
    *,
    steps: int = 5,
    loss: float = 2.0,
    learning_rate: float = 1e-3,
    samples: list[dict] | None = None,
) -> pathlib.Path:
    """A complete run folder whose loss falls from `loss` by 0.1 a step."""
    folder.mkdir(parents=True)
    lines = [{"step": 0, "eval_loss": loss + 0.5}]
    for step in range(1, steps + 1):
        lines.append(
            {"step": step, "loss": loss - 0.1 * step, "tokens_per_s": 100 + step}
        )
    lines.append({"step": steps, "eval_loss": loss})
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "metrics.jsonl").write_text(text)
    config = f"recipe: sft\noptimizer:\n  learning_rate: {learning_rate}\n  b1: 0.9\n"
    (folder / "config.yaml").write_text(config)
    environment = {"jax": "0.10.2", "device": {"kind": "cpu", "count": 2}}
    (folder / "environment.json").write_text(json.dumps(environment))
    if samples is None:
        samples = [{"step": steps, "prompt": "1 + 1 =", "completion": " 2"}]
    text = "".join(json.dumps(sample) + "\n" for sample in samples)
    (folder / "samples.jsonl").write_text(text)
    return folder
