"""Draws pairwise_losses.svg for docs/preferences.md.

python docs/figures/pairwise_losses.py [FOLDER]
"""

import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np

from jaxpost import losses

HERE = pathlib.Path(__file__).parent
CURVES = {
    "Bradley–Terry": losses.PairwiseConfig(),
    "smoothed (cDPO), e = 0.2": losses.PairwiseConfig(label_smoothing=0.2),
    "robust DPO, e = 0.2": losses.PairwiseConfig("robust_dpo", flip_rate=0.2),
    "hinge": losses.PairwiseConfig("hinge"),
    "R³M, λ = 0.6": losses.PairwiseConfig("r3m", lam=0.6),
    "adaptive, ρ₀ = 0.1, τ in [0.1, 3]": losses.PairwiseConfig(
        "adaptive_scaling", rho0=0.1, tau_min=0.1, tau_max=3.0
    ),
}
# Okabe and Ito's colours, told apart by most readers; line styles for the others.
STYLES = [
    ("#000000", "-"),
    ("#E69F00", "--"),
    ("#D55E00", ":"),
    ("#009E73", "-."),
    ("#0072B2", "-"),
    ("#CC79A7", "-"),
]


def curves() -> dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Margins, values and slopes of each loss."""
    margins = jnp.linspace(-5.0, 5.0, 501)
    found = {}
    for name, config in CURVES.items():
        loss = losses.pairwise_loss(config)
        slopes = jax.grad(lambda m, loss=loss: jnp.sum(loss(m).values))(margins)
        found[name] = tuple(map(np.asarray, (margins, loss(margins).values, slopes)))
    return found


def draw(folder: pathlib.Path) -> pathlib.Path:
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    settings = {"svg.hashsalt": "jaxpost", "svg.fonttype": "none", "font.size": 9}
    with plt.rc_context(settings):
        figure, (left, right) = plt.subplots(
            1, 2, figsize=(9, 3.8), layout="constrained"
        )
        for (name, (margins, values, slopes)), (colour, line) in zip(
            curves().items(), STYLES, strict=True
        ):
            left.plot(margins, values, line, color=colour, label=name)
            right.plot(margins, slopes, line, color=colour)
        left.set(xlabel="margin", ylabel="loss", ylim=(-2.2, 6.0))
        right.set(xlabel="margin", ylabel="slope", ylim=(-1.45, 0.35))
        for axes in (left, right):
            axes.grid(color="#dddddd", linewidth=0.6)
            axes.axvline(0.0, color="#999999", linewidth=0.8)
        left.legend(frameon=False, fontsize=8)
        place = folder / "pairwise_losses.svg"
        figure.savefig(place, metadata={"Date": None, "Creator": None})
        plt.close(figure)
    return place


if __name__ == "__main__":
    draw(pathlib.Path(sys.argv[1]) if len(sys.argv) > 1 else HERE)
