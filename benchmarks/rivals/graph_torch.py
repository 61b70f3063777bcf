"""GRACE's and CLNR's epochs on Cora with torch-geometric.

`--adjacency edges` is GCNConv on an edge list (gather and scatter), dense features, as
the published code has it; `sparse` is GCNConv on a sparse matrix of the kept edges.
`--features sparse` multiplies the first layer's weights by a sparse feature matrix.
`--loss published` forms four products of embeddings, as GRACE's code does; `lean`
three. `--compile` passes the step through torch.compile. Prints one JSON line.
"""

import itertools
import json
import os
import statistics
import time
import warnings

import numpy as np
import torch
import torch.nn.functional as F
import torch_geometric
from graph_settings import METHODS, SIZES, cora
from sft_settings import Clock, parse, peak_bytes
from torch_geometric.nn import GCNConv
from torch_geometric.utils import dropout_edge


class Encoder(torch.nn.Module):
    """Two graph convolutions with ReLU, also after the last where asked for."""

    def __init__(self, inputs: int, widths: tuple, activate_last: bool) -> None:
        super().__init__()
        sizes = (inputs, *widths)
        self.layers = torch.nn.ModuleList(
            GCNConv(a, b) for a, b in itertools.pairwise(sizes)
        )
        self.activate_last = activate_last

    def forward(self, x, edges):
        for number, layer in enumerate(self.layers):
            x = layer(x, edges)
            if self.activate_last or number < len(self.layers) - 1:
                x = F.relu(x)
        return x


class SparseFirst(torch.nn.Module):
    """`x @ W` for sparse `x` inside the first convolution."""

    def __init__(self, linear: torch.nn.Module) -> None:
        super().__init__()
        self.weight = linear.weight

    def forward(self, x):
        return torch.sparse.mm(x, self.weight.t())


class Method(torch.nn.Module):
    """Encoder, head and loss of one of the two methods."""

    def __init__(self, name: str, inputs: int, sizes: dict, lean: bool) -> None:
        super().__init__()
        self.sizes, self.lean, self.clnr = sizes, lean, name == "clnr"
        self.encoder = Encoder(inputs, sizes["widths"], sizes["activate_last"])
        width = sizes["widths"][-1]
        if not self.clnr:
            self.head = torch.nn.Sequential(
                torch.nn.Linear(width, sizes["head"]),
                torch.nn.ELU(),
                torch.nn.Linear(sizes["head"], width),
            )

    def forward(self, first, second, rows):
        z1, z2 = (self.transform(self.encoder(*view)) for view in (first, second))
        if rows is not None:
            z1, z2 = z1[rows], z2[rows]
        z1, z2 = F.normalize(z1), F.normalize(z2)
        return self.lean_loss(z1, z2) if self.lean else self.published_loss(z1, z2)

    def transform(self, u):
        return (u - u.mean(0)) / u.std(0) if self.clnr else self.head(u)

    def one_way(self, z1, z2):
        tau = self.sizes["temperature"]
        refl = torch.exp(z1 @ z1.t() / tau)
        between = torch.exp(z1 @ z2.t() / tau)
        total = refl.sum(1) + between.sum(1) - refl.diagonal()
        return -torch.log(between.diagonal() / total)

    def published_loss(self, z1, z2):
        return ((self.one_way(z1, z2) + self.one_way(z2, z1)) / 2).mean()

    def lean_loss(self, z1, z2):
        tau = self.sizes["temperature"]
        between = torch.exp(z1 @ z2.t() / tau)
        first, second = (torch.exp(z @ z.t() / tau) for z in (z1, z2))
        one = between.sum(1) + first.sum(1) - first.diagonal()
        two = between.sum(0) + second.sum(1) - second.diagonal()
        return ((one.log() + two.log()) / 2 - between.diagonal().log()).mean()


class Views:
    """Draws views as the published code does, in the layout that is asked for."""

    def __init__(self, held: dict, sizes: dict, adjacency: str, features: str) -> None:
        self.sizes, self.adjacency = sizes, adjacency
        self.nodes, self.width = held["shape"]
        self.edges = torch.from_numpy(held["edges"])
        self.sparse = features == "sparse"
        self.columns = torch.from_numpy(held["columns"].astype(np.int64))
        self.indptr = torch.from_numpy(held["indptr"].astype(np.int64))
        self.values = torch.from_numpy(held["values"])
        csr = torch.sparse_csr_tensor(
            self.indptr, self.columns, self.values, size=held["shape"]
        )
        self.dense = None if self.sparse else csr.to_dense()

    def draw(self, number: int):
        edges, _ = dropout_edge(self.edges, p=self.sizes["edge_drop"][number])
        kept = torch.rand(self.width) >= self.sizes["feature_mask"][number]
        if self.sparse:
            x = torch.sparse_csr_tensor(
                self.indptr,
                self.columns,
                self.values * kept[self.columns],
                size=(self.nodes, self.width),
            )
        else:
            x = self.dense.clone()
            x[:, ~kept] = 0
        return x, self.layout(edges)

    def layout(self, edges):
        if self.adjacency == "edges":
            return edges
        # GCNConv takes the transposed adjacency; it adds self-loops and normalises.
        ones = torch.ones(edges.shape[1])
        size = (self.nodes, self.nodes)
        return torch.sparse_coo_tensor(edges.flip(0), ones, size).to_sparse_csr()

    def rows(self):
        batch = self.sizes["batch"]
        return None if batch is None else torch.randperm(self.nodes)[:batch]


def make_step(args, views: Views, inputs: int):
    """One epoch: views, loss, gradients, Adam."""
    sizes = METHODS[args.method]
    method = Method(args.method, inputs, sizes, args.loss == "lean")
    if views.sparse:
        method.encoder.layers[0].lin = SparseFirst(method.encoder.layers[0].lin)
    optimizer = torch.optim.Adam(
        method.parameters(),
        lr=sizes["learning_rate"],
        weight_decay=sizes["weight_decay"],
    )
    forward = torch.compile(method, dynamic=True) if args.compile else method

    def step():
        optimizer.zero_grad()
        loss = forward(views.draw(0), views.draw(1), views.rows())
        loss.backward()
        optimizer.step()
        return loss.item()

    return step


def main() -> None:
    warnings.filterwarnings("ignore", message="Sparse CSR tensor support")
    args = parse(
        __doc__,
        unit="epochs",
        count=30,
        sizes=SIZES,
        method={"choices": tuple(METHODS), "default": "grace"},
        adjacency={"choices": ("edges", "sparse"), "default": "edges"},
        features={"choices": ("dense", "sparse"), "default": "dense"},
        loss={"choices": ("published", "lean"), "default": "published"},
        compile={"action": "store_true"},
    )
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    nodes = args.sizes["nodes"]
    METHODS[args.method]["batch"] = METHODS[args.method]["batch"] and min(
        METHODS[args.method]["batch"], nodes
    )
    held = cora(nodes)
    views = Views(held, METHODS[args.method], args.adjacency, args.features)
    start = time.perf_counter()
    step = make_step(args, views, held["shape"][1])
    clock = Clock(args.warmup)
    loss = 0.0
    for _ in range(args.warmup + args.epochs):
        loss = step()
        clock.tick()
    layout = f"{args.adjacency} adjacency, {args.features} features, {args.loss} loss"
    print(
        json.dumps(
            {
                "name": "torch-geometric",
                "epochs_per_s": 1.0 / statistics.median(clock.steps_s),
                "cpu_epoch_s": statistics.median(clock.cpu_steps_s),
                "compile_s": clock.ticks[1] - start if args.compile else 0.0,
                "loss": loss,
                "peak_bytes": peak_bytes(),
                "threads": args.threads,
                "sizes": args.sizes,
                "settings": f"{args.method}, {layout}"
                + (", torch.compile" if args.compile else ""),
                "versions": f"torch {torch.__version__}, torch-geometric "
                f"{torch_geometric.__version__}",
                "malloc": os.environ.get("GLIBC_TUNABLES", ""),
            }
        ),
        flush=True,
    )


if __name__ == "__main__":
    main()
