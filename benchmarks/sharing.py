"""Parameter sharing trained from scratch, at equal numbers of parameters: STABLE-RPS, and feature multiplexing.

rps: an MLP 64-256-256-10 on scikit-learn's digits (1347 images to train, 450 to test; both drawn anew for every seed),
its weights read from an array of 1/10 and 1/50 as many numbers, against magnitude pruning with retraining (twice the
steps) and a smaller dense net; then one tenth under SGD, for three sizes of the array's first values.
multiplexing: synthetic clicks, 8 features with Zipf ids of 10 … 10⁴ values, a teacher with pairwise terms, 40 000 rows
to train, 20 000 to test: area under the ROC curve.
Differences are paired over seeds, ± standard error. A claim holds beyond two of those, "≥" above minus two of them.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Mapping
from math import prod

import torch
from paretoc.plugins import UnifiedEmbedding
from paretoc.plugins.feature_multiplexing import hashed_rows, hashes
from paretoc.plugins.stable_rps import gradient_scale, plan
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

Shapes = dict[str, tuple[int, ...]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", nargs="*", default=["rps", "multiplexing"])
    parser.add_argument("--seeds", type=int, default=5)
    given = parser.parse_args()
    torch.set_num_threads(1)
    if "rps" in given.part:
        rps(given.seeds)
        inits(given.seeds)
    if "multiplexing" in given.part:
        multiplexing(given.seeds)


def compare(claim: str, first: list[float], second: list[float], at_least: bool = False) -> None:
    change = torch.tensor(first) - torch.tensor(second)
    error = float(change.std()) / len(change) ** 0.5
    holds = float(change.mean()) > (-2 if at_least else 2) * error
    print(f"  {'holds' if holds else 'does not hold':14s} {claim}: {change.mean():+.4f} ± {error:.4f}", flush=True)


# -- STABLE-RPS ---------------------------------------------------------------------------------------------


class Digits:
    """Inputs `[n, 64]` in 0 … 1 and labels, split by the seed."""

    def __init__(self, seed: int) -> None:
        from sklearn.datasets import load_digits

        data = load_digits()
        x, y = torch.tensor(data.data, dtype=torch.float32) / 16, torch.tensor(data.target)
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
        (self.x, self.test_x), (self.y, self.test_y) = x[order].split([1347, 450]), y[order].split([1347, 450])

    def trained(
        self, parameters: list[Tensor], run: Callable[[Tensor], Tensor], epochs: int = 30, rate: float = 0.0
    ) -> float:
        """Accuracy after Adam, or after SGD at a `rate`."""
        optimiser = torch.optim.SGD(parameters, rate, 0.9) if rate else torch.optim.Adam(parameters, 2e-3)
        for _ in range(epochs):
            for batch in torch.randperm(len(self.x)).split(64):
                optimiser.zero_grad()
                F.cross_entropy(run(self.x[batch]), self.y[batch]).backward()
                optimiser.step()
        with torch.no_grad():
            return float((run(self.test_x).argmax(1) == self.test_y).float().mean())


def mlp(width: int = 256) -> nn.Sequential:
    sizes = (64, width, width, 10)
    layers = [nn.Linear(*sizes[i : i + 2]) for i in range(3)]
    return nn.Sequential(layers[0], nn.ReLU(), layers[1], nn.ReLU(), layers[2])


def shapes_of(model: nn.Module) -> Shapes:
    return {name: tuple(p.shape) for name, p in model.named_parameters() if p.ndim > 1}


def shared(
    data: Digits,
    compression: float,
    chunk: int,
    seed: int,
    spread: float = 0.06,
    rate: float = 0.0,
    scaled: bool = False,
) -> float:
    """Accuracy of weights that read one array, drawn from −spread … spread: 0.06 is 1 / √256."""
    model = mlp()
    shapes = shapes_of(model)
    encodings = plan(shapes, compression, chunk, seed, spread)
    values = torch.empty(encodings["0.weight"].slots).uniform_(-spread, spread).requires_grad_()
    if scaled:
        by = gradient_scale(encodings, shapes)
        values.register_hook(lambda gradient: gradient / by)
    places = {name: encoding.places(prod(shapes[name])) for name, encoding in encodings.items()}
    read = {name: (index, scale.float(), shapes[name]) for name, (index, scale) in places.items()}

    def run(x: Tensor) -> Tensor:
        weights = {name: (values[index] * scale).reshape(shape) for name, (index, scale, shape) in read.items()}
        logits: Tensor = functional_call(model, weights, x)
        return logits

    biases = [p for p in model.parameters() if p.ndim == 1]
    return data.trained([values, *biases], run, rate=rate)


def pruned(data: Digits, kept: int) -> float:
    """Train, keep the largest weights of all layers together, train again from there."""
    model = mlp()
    data.trained(list(model.parameters()), model)
    weights = {name: p for name, p in model.named_parameters() if p.ndim > 1}
    least = torch.cat([w.detach().abs().flatten() for w in weights.values()]).topk(kept).values[-1]
    masks = {name: (w.detach().abs() >= least).float() for name, w in weights.items()}

    def run(x: Tensor) -> Tensor:
        logits: Tensor = functional_call(model, {name: w * masks[name] for name, w in weights.items()}, x)
        return logits

    return data.trained(list(model.parameters()), run)


def smaller(data: Digits, numbers: int) -> float:
    """The dense net of the same form with as many weights: h² + 74·h of them."""
    model = mlp(int((math.sqrt(74**2 + 4 * numbers) - 74) / 2))
    return data.trained(list(model.parameters()), model)


def rps(seeds: int) -> None:
    shapes = shapes_of(mlp())
    total = sum(map(prod, shapes.values()))
    for compression in (1, 10, 50):
        numbers = math.ceil(total / compression)
        kinds: dict[str, Callable[[Digits, int], float]] = {
            name: lambda data, seed, c=compression, chunk=chunk: shared(data, c, chunk, seed)
            for name, chunk in (("STABLE-RPS", 0), ("ROAST, chunks of 16", 16), ("HashedNet", 1))
        }
        if compression == 1:
            kinds["dense"] = lambda data, seed: data.trained(list((model := mlp()).parameters()), model)
        else:
            kinds["magnitude, retrained"] = lambda data, seed, n=numbers: pruned(data, n)
            kinds["smaller dense"] = lambda data, seed, n=numbers: smaller(data, n)
        found = runs(kinds, seeds, Digits, f"digits, {compression} ×, {numbers} weights: accuracy")
        for name in list(kinds)[1:]:
            compare(f"STABLE-RPS ≥ {name}", found["STABLE-RPS"], found[name], at_least=True)


def runs(
    kinds: Mapping[str, Callable[..., float]], seeds: int, data: Callable[[int], object], title: str
) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {name: [] for name in kinds}
    for seed in range(seeds):
        drawn = data(seed)
        for name, kind in kinds.items():
            torch.manual_seed(seed)
            found[name].append(kind(drawn, seed))
    print(f"{title}, mean ± standard error over {seeds} seeds")
    for name, values in found.items():
        print(
            f"  {name:32s} {torch.tensor(values).mean():.4f} ± {torch.tensor(values).std() / seeds**0.5:.4f}",
            flush=True,
        )
    return found


def inits(seeds: int) -> None:
    """Z of any size is the same first model: the scales s make up for it. The steps differ."""
    kinds = {
        f"{name}, first values ± {spread}": lambda data, seed, spread=spread, chunk=chunk, scaled=scaled: shared(
            data, 10, chunk, seed, spread, 0.05, scaled
        )
        for name, chunk, scaled in (("STABLE-RPS", 0, True), ("ROAST", 16, False))
        for spread in (0.015, 0.06, 0.25, 1.0)
    }
    runs(kinds, seeds, Digits, "digits, 10 ×, SGD 0.05, momentum 0.9: accuracy")


# -- feature multiplexing -----------------------------------------------------------------------------------


CARDINALITIES = (10, 30, 100, 300, 1000, 3000, 10000, 10000)


class Clicks:
    """Ids `[n, 8]` and clicks, from a teacher that the seed draws."""

    def __init__(self, seed: int, train: int = 40000, test: int = 20000) -> None:
        draw = torch.Generator().manual_seed(seed)
        columns, vectors = [], []
        for count in CARDINALITIES:
            odds = 1.0 / torch.arange(1, count + 1) ** 1.1
            ids = torch.multinomial(odds, train + test, replacement=True, generator=draw)
            columns.append(torch.randperm(count, generator=draw)[ids])
            vectors.append(torch.randn(count, 5, generator=draw)[columns[-1]])
        stacked = torch.stack(vectors)
        pairs = (stacked[..., 1:].sum(0).square() - stacked[..., 1:].square().sum(0)).sum(-1) / 2
        logits = stacked[..., 0].sum(0) * 0.6 + pairs * 0.15 - 1
        clicks = (torch.rand(train + test, generator=draw) < logits.sigmoid()).float()
        (self.x, self.test_x), (self.y, self.test_y) = (
            t.split([train, test]) for t in (torch.stack(columns, 1), clicks)
        )

    def area(self, embedding: nn.Module, width: int, epochs: int = 3) -> float:
        """Under the ROC curve, of an MLP over what the embedding gives."""
        from sklearn.metrics import roc_auc_score

        model = nn.Sequential(
            embedding, nn.Linear(width, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 1)
        )
        nn.init.normal_(next(embedding.parameters()), std=0.1)
        optimiser = torch.optim.Adam(model.parameters(), 4e-3)
        for _ in range(epochs):
            for batch in torch.randperm(len(self.x)).split(512):
                optimiser.zero_grad()
                F.binary_cross_entropy_with_logits(model(self.x[batch])[:, 0], self.y[batch]).backward()
                optimiser.step()
        with torch.no_grad():
            return float(roc_auc_score(self.test_y, model(self.test_x)[:, 0]))


class Split(nn.Module):
    """A table of its own for each feature, hashed into its rows: one table of which each feature has a part."""

    def __init__(self, rows: list[int], width: int, seed: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(sum(rows), width))
        a, b = zip(*(hashes(feature, 1, seed) for feature in range(len(rows))), strict=True)
        self.hashes, self.rows = (torch.cat(a), torch.cat(b)), torch.tensor(rows)

    def forward(self, ids: Tensor) -> Tensor:
        exact = self.rows >= torch.tensor(CARDINALITIES)  # no hash where every value has a row
        place = torch.where(exact, ids, hashed_rows(ids, *self.hashes, self.rows))
        return F.embedding(place + self.rows.cumsum(0) - self.rows, self.weight).flatten(1)


def multiplexing(seeds: int, width: int = 8) -> None:
    features, total = len(CARDINALITIES), sum(CARDINALITIES)
    for table in (250, 1000, 4000):
        by_size = [max(round(table * count / total), 1) for count in CARDINALITIES]
        kinds = {
            "multiplexed, 1 lookup": lambda data, seed, v=table: data.area(
                UnifiedEmbedding(v, width, [1] * features, seed), features * width
            ),
            "multiplexed, 2 lookups": lambda data, seed, v=table: data.area(
                UnifiedEmbedding(2 * v, width // 2, [2] * features, seed), features * width
            ),
            "split by cardinality": lambda data, seed, r=by_size: data.area(Split(r, width, seed), features * width),
            "split evenly": lambda data, seed, v=table: data.area(
                Split([v // features] * features, width, seed), features * width
            ),
        }
        found = runs(kinds, seeds, Clicks, f"clicks, {table} rows of {width}: area under the ROC curve")
        for one in list(kinds)[:2]:
            for other in list(kinds)[2:]:
                compare(f"{one} > {other}", found[one], found[other])


if __name__ == "__main__":
    main()
