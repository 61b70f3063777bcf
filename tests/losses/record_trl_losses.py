"""Writes trl_losses.json: what TRL's own DPO code makes of random log-probabilities.

    PYTHON_WITH_TRL tests/losses/record_trl_losses.py

Calls `DPOTrainer._compute_loss` itself, in float64, one pair at a time, with a model
that returns given log-probabilities; none of the formulas is written here.
"""

import json
import pathlib
from types import SimpleNamespace
from unittest import mock

import torch
import trl
from trl.trainer.dpo_trainer import DPOTrainer

BETA, SMOOTHING, PAIRS, LENGTH = 0.3, 0.2, 6, 9
KINDS = ["sigmoid", "hinge", "ipo", "robust", "sigmoid_norm"]


def loss(kind, policy, reference, mask):
    def model(**_):
        zeros = torch.zeros_like(policy)
        return SimpleNamespace(
            log_probs=policy, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool()
        )

    trainer = mock.MagicMock(
        aux_loss_enabled=False,
        ld_alpha=None,
        precompute_ref_logps=True,
        f_divergence_type="reverse_kl",
        beta=BETA,
        label_smoothing=SMOOTHING,
        loss_types=[kind],
        loss_weights=[1.0],
        use_weighting=False,
        _total_train_tokens=0,
        _tp_size=1,
    )
    trainer.accelerator.device = "cpu"
    trainer.accelerator.gather = trainer.accelerator.gather_for_metrics = lambda x: x
    tokens = torch.zeros_like(mask)
    sums = (reference * mask[:, 1:]).sum(1)
    inputs = {
        "input_ids": tokens,
        "attention_mask": torch.ones_like(mask),
        "completion_mask": mask,
        "ref_chosen_logps": sums[:1],
        "ref_rejected_logps": sums[1:],
    }
    return float(DPOTrainer._compute_loss(trainer, model, inputs, False))


def main():
    torch.manual_seed(0)
    inputs, losses = [], {kind: [] for kind in KINDS}
    for _ in range(PAIRS):
        starts = torch.randint(1, LENGTH - 1, (2,))
        mask = (torch.arange(LENGTH) >= starts[:, None]).long()
        # Outside the answer log-probs are zero, as TRL's model wrapper leaves them.
        policy, reference = (
            -4.0 * torch.rand((2, 2, LENGTH - 1), dtype=torch.float64) * mask[:, 1:]
        )
        for kind in KINDS:
            losses[kind].append(loss(kind, policy, reference, mask))
        inputs.append(
            {
                "policy": policy.sum(1).tolist(),
                "reference": reference.sum(1).tolist(),
                "lengths": mask.sum(1).tolist(),
            }
        )
    recorded = {
        "trl": trl.__version__,
        "beta": BETA,
        "label_smoothing": SMOOTHING,
        "pairs": inputs,
        "losses": losses,
    }
    place = pathlib.Path(__file__).with_name("trl_losses.json")
    place.write_text(json.dumps(recorded, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
