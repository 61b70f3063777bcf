"""Contrastive learning of node representations, on `jraph.GraphsTuple`.

The container, everywhere: one graph; `nodes` is a dense `[N, F]` array or a
`SparseFeatures`; `senders` and `receivers` are int32 `[E]` and list an undirected edge
in both directions, without self-loops (encoders add their own); `edges` is None, which
is weight 1 for each edge, or weights, float `[E]`. Zero is a dropped edge: shapes stay.
`make_graph` builds one with edges sorted by receiver; any other order works too.

What is sorted once per graph lives in a `GraphPlan` (`plan_graph`, `plan_for`), which
every function takes as an option and makes itself when it is not given.
"""

from jaxpost.graphs._augment import AugmentConfig, augment, keep_columns
from jaxpost.graphs._check import GraphError, GraphWarning
from jaxpost.graphs._clusters import cluster_batches, cluster_order
from jaxpost.graphs._container import (
    SparseFeatures,
    count_nodes,
    edge_weights,
    edges_of,
    features_of,
    make_graph,
    sparse_features,
)
from jaxpost.graphs._encoders import Encoder, EncoderConfig, build_encoder
from jaxpost.graphs._formats import from_networkx, load_edge_list, to_networkx
from jaxpost.graphs._io import (
    NodeData,
    builtin,
    load_dataset,
    load_npz,
    node_data,
    random_masks,
    row_normalize,
    save_npz,
)
from jaxpost.graphs._objectives import (
    Objective,
    ObjectiveConfig,
    init_objective,
    objective,
    project,
)
from jaxpost.graphs._patterns import (
    GraphPlan,
    Pattern,
    edge_pairs,
    make_pattern,
    plan_graph,
    sparse_matmul,
)
from jaxpost.graphs._planetoid import load_pickle, load_planetoid
from jaxpost.graphs._sharded import place_graph, place_plan
from jaxpost.graphs._smooth import smooth
from jaxpost.graphs._train import (
    ContrastiveConfig,
    ContrastiveState,
    embed,
    init_state,
    make_step,
    plan_for,
    train_epochs,
    train_seeds,
    two_views,
)

__all__ = [
    "AugmentConfig",
    "ContrastiveConfig",
    "ContrastiveState",
    "Encoder",
    "EncoderConfig",
    "GraphError",
    "GraphPlan",
    "GraphWarning",
    "NodeData",
    "Objective",
    "ObjectiveConfig",
    "Pattern",
    "SparseFeatures",
    "augment",
    "build_encoder",
    "builtin",
    "cluster_batches",
    "cluster_order",
    "count_nodes",
    "edge_pairs",
    "edge_weights",
    "edges_of",
    "embed",
    "features_of",
    "from_networkx",
    "init_objective",
    "init_state",
    "keep_columns",
    "load_dataset",
    "load_edge_list",
    "load_npz",
    "load_pickle",
    "load_planetoid",
    "make_graph",
    "make_pattern",
    "make_step",
    "node_data",
    "objective",
    "place_graph",
    "place_plan",
    "plan_for",
    "plan_graph",
    "project",
    "random_masks",
    "row_normalize",
    "save_npz",
    "smooth",
    "sparse_features",
    "sparse_matmul",
    "to_networkx",
    "train_epochs",
    "train_seeds",
    "two_views",
]
