"""Families of equality-constrained problems: CUTEst, logistic regression, a PDE."""

from jaxpost.solvers.problems._cutest import (
    PUBLISHED_CUTEST,
    UnknownProblemError,
    cutest_names,
    from_sif2jax,
)
from jaxpost.solvers.problems._libsvm import LibsvmData, read_libsvm
from jaxpost.solvers.problems._logistic import (
    InfeasibleError,
    LogisticData,
    constrained_logistic,
    logistic_constraint,
    logistic_objective,
    shard_rows,
)
from jaxpost.solvers.problems._pde import (
    PdeData,
    pde,
    pde_constraint,
    pde_objective,
    pde_preconditioner,
)
from jaxpost.solvers.problems._problem import Problem

__all__ = [
    "PUBLISHED_CUTEST",
    "InfeasibleError",
    "LibsvmData",
    "LogisticData",
    "PdeData",
    "Problem",
    "UnknownProblemError",
    "constrained_logistic",
    "cutest_names",
    "from_sif2jax",
    "logistic_constraint",
    "logistic_objective",
    "pde",
    "pde_constraint",
    "pde_objective",
    "pde_preconditioner",
    "read_libsvm",
    "shard_rows",
]
