#!/usr/bin/env bash
# Make the rivals' environments in the project root, so that benchmarks can run them:
#   .venv-rivals-torch   torch (CPU), transformers, TRL, torch-geometric
#   .venv-rivals-tunix   google-tunix with its own jax and flax (CPU)
# A second call installs nothing. Usage: benchmarks/rivals/setup.sh [torch|tunix]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
PYTHON=${PYTHON:-python3}
which=${1:-all}

make_env() { # folder
  [ -x "$1/bin/python" ] || "$PYTHON" -m venv "$1"
}
install() { # folder, then what pip takes
  "$1/bin/python" -m pip --disable-pip-version-check -q install "${@:2}"
}

if [ "$which" = all ] || [ "$which" = torch ]; then
  env=.venv-rivals-torch
  if [ ! -f $env/.done ]; then
    make_env $env
    # First and alone: resolved together with the others, pip may take another build.
    install $env torch==2.13.0
    install $env 'transformers>=5,<6' trl accelerate datasets
    touch $env/.done
  fi
  if [ ! -f $env/.done-graph ]; then
    install $env 'torch-geometric>=2.8,<3'
    touch $env/.done-graph
  fi
fi

if [ "$which" = all ] || [ "$which" = tunix ]; then
  env=.venv-rivals-tunix
  if [ ! -f $env/.done ]; then
    make_env $env
    # The jax that jaxpost itself runs on, so that both are compiled by one XLA.
    install $env 'jax>=0.10,<0.11' 'flax>=0.12.7,<0.13' google-tunix==0.1.7
    touch $env/.done
  fi
fi

for env in .venv-rivals-torch .venv-rivals-tunix; do
  [ -f $env/.done ] || continue
  echo "$env:"
  $env/bin/python -m pip --disable-pip-version-check list 2>/dev/null |
    grep -iE '^(torch|transformers|trl|accelerate|datasets|torch[-_]geometric|google-tunix|jax|jaxlib|flax|optax|numpy) ' |
    sed 's/^/  /'
done
