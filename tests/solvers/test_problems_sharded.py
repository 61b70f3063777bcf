"""A logistic problem solved with its rows over eight devices: as on one."""

import jax
import numpy as np
import pytest

from jaxpost import parallel, solvers
from jaxpost.solvers import problems


@pytest.mark.parametrize(
    "method", ["exact", pytest.param("minres", marks=pytest.mark.slow)]
)
def test_eight_devices_solve_as_one(method):
    with jax.enable_x64(True):
        rng = np.random.default_rng(3)
        features = rng.normal(size=(45, 20))  # 45 rows do not divide by 8
        labels = np.where(features @ rng.normal(size=20) > 0, 1.0, -1.0)
        problem = problems.constrained_logistic(
            features, labels, key=jax.random.key(1), num_linear=4
        )
        mesh = parallel.make_mesh({"data": 4, "fsdp": 2})
        split = problems.shard_rows(problem.args, mesh)
        assert len({s.device for s in split.features.addressable_shards}) == 8
        options = solvers.SolveOptions(
            method=method, max_iterations=40, tolerance=1e-9, delta=1e-8, delta_min=1e-8
        )

        def solve(args):
            return solvers.solve(
                problem.objective,
                problem.constraint,
                problem.x0,
                args,
                multipliers=problem.multipliers,
                options=options,
                key=jax.random.key(0),
            )

        one, eight = solve(problem.args), solve(split)
        assert int(one.status) == solvers.Status.CONVERGED
        assert int(eight.status) == int(one.status)
        assert int(eight.iterations) == int(one.iterations)
        for name in ("x", "multipliers"):
            found, wanted = getattr(eight, name), getattr(one, name)
            np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-10)
