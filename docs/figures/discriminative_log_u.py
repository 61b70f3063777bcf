"""Draws discriminative_log_u.svg for docs/discriminative.md.

A fixed policy over 64 answers, 2000 examples, two negatives per visit drawn from P0:
how far `u` is from the sum it estimates, and from how many visits on it stays there.

python docs/figures/discriminative_log_u.py [FOLDER]
"""

import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np

from jaxpost import losses

HERE = pathlib.Path(__file__).parent
CURVES: dict[str, float | None] = {
    "γ = 1 / visits": None,
    "γ = 0.1": 0.1,
    "γ = 0.3": 0.3,
    "γ = 0.85": 0.85,
}
STYLES = [("#000000", "-"), ("#009E73", "-."), ("#E69F00", "--"), ("#D55E00", ":")]
VISITS = 256


def curves(examples: int = 2000) -> dict[str, np.ndarray]:
    """Root mean square of `u / limit - 1` after each visit, `[VISITS]` by name."""
    rng = np.random.default_rng(0)
    policy, proposal = rng.normal(size=(2, 64))
    policy, proposal = (x - np.log(np.sum(np.exp(x))) for x in (policy, proposal))
    drawn = rng.choice(64, size=(VISITS, examples, 2), p=np.exp(proposal))
    found = {}
    for name, constant in CURVES.items():
        log_u, errors = jnp.zeros(examples), []
        for visit in range(VISITS):
            log_u = losses.discriminative(
                jnp.zeros(examples),
                jnp.asarray(policy[drawn[visit]]),
                log_u,
                tau=1.0,  # the sum over all answers is then 1
                gamma=constant or 1.0 / (visit + 1),
                ref_neg_logps=jnp.asarray(proposal[drawn[visit]]),
            ).log_u
            errors.append(float(jnp.sqrt(jnp.mean(jnp.square(jnp.expm1(log_u))))))
        found[name] = np.array(errors)
    return found


def stationary(gamma: float) -> float:
    """Spread at a constant `gamma` over that of one visit: `sqrt(g / (2 - g))`."""
    return float(np.sqrt(gamma / (2.0 - gamma)))


def draw(folder: pathlib.Path) -> pathlib.Path:
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    settings = {"svg.hashsalt": "jaxpost", "svg.fonttype": "none", "font.size": 9}
    with plt.rc_context(settings):
        figure, axes = plt.subplots(figsize=(6, 3.8), layout="constrained")
        visits, found = np.arange(1, VISITS + 1), curves()
        single = found["γ = 1 / visits"][0]
        for (name, errors), (colour, line) in zip(found.items(), STYLES, strict=True):
            axes.loglog(visits, errors, line, color=colour, label=name)
            if (gamma := CURVES[name]) is not None:
                axes.axhline(single * stationary(gamma), color=colour, linewidth=0.5)
        axes.set(xlabel="visits", ylabel="spread of u around the sum, relative")
        axes.grid(color="#dddddd", linewidth=0.6)
        axes.legend(frameon=False, fontsize=8)
        place = folder / "discriminative_log_u.svg"
        figure.savefig(place, metadata={"Date": None, "Creator": None})
        plt.close(figure)
    return place


if __name__ == "__main__":
    with jax.enable_x64(True):
        draw(pathlib.Path(sys.argv[1]) if len(sys.argv) > 1 else HERE)
