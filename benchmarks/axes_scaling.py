"""Time of the analyses against the size of the graph: sites and axes on graphs of 1 k, 4 k and 16 k nodes.

    python benchmarks/axes_scaling.py

A stack of pre-norm transformer blocks, built node by node. Processor time of the fastest of several runs, on one
thread; time per node must not grow with the graph.
"""

from __future__ import annotations

import gc
import time

import torch
from paretoc.compiler.axes import find_axes
from paretoc.compiler.capture import capture
from paretoc.compiler.program import Program
from paretoc.compiler.sites import attention_sites, weight_sites
from torch import Tensor, nn
from torch.nn import functional as F

SIZES = (1_000, 4_000, 16_000)
RUNS = 5
WIDTH, HEADS = 16, 2


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.other_norm = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        parts = self.qkv(self.norm(x)).chunk(3, -1)
        q, k, v = (part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in parts)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.other_norm(x))))


def stack(nodes: int) -> Program:
    """One captured block, repeated behind itself with weights of its own until the graph has so many nodes."""
    program = capture(nn.Sequential(Block()).eval(), (torch.randn(2, 5, WIDTH),))
    graph, block = program.graph, list(program.graph.nodes)
    stream, output = program.placeholders[0], program.output
    (last,) = program.outputs
    for number in range(1, nodes // len(block)):
        copies = {stream: last}
        read = copies.__getitem__
        with graph.inserting_before(output):
            for node in block:
                if node.op == "get_attr":
                    name = f"{number}.{node.target}"
                    program.set(name, program.get(str(node.target)))
                    copies[node] = graph.get_attr(name)
                elif node.op == "call_function":
                    copies[node] = graph.node_copy(node, read)
                else:
                    continue
                copies[node].meta = dict(node.meta)
        last = copies[block[-2]]
    output.args = ((last,),)
    program.state_names = {name: name for name in program.weights()}
    return program


def milliseconds(program: Program) -> tuple[float, float]:
    """(sites, axes) of processor time: the fastest of several runs, on one thread."""
    times: list[tuple[float, float]] = []
    gc.collect()
    gc.freeze()  # what the graph itself holds is not walked over again by Python's collector
    for _ in range(RUNS):
        start = time.process_time()
        weight_sites(program), attention_sites(program)
        middle = time.process_time()
        list(find_axes(program))
        times.append((1e3 * (middle - start), 1e3 * (time.process_time() - middle)))
    gc.unfreeze()
    sites, axes = zip(*times, strict=True)
    return min(sites), min(axes)


def main() -> None:
    torch.set_num_threads(1)
    print("nodes   axes   sites ms  axes ms  µs per node")
    for size in SIZES:
        program = stack(size)
        nodes, found = len(program.graph.nodes), len(find_axes(program))
        sites, axes = milliseconds(program)
        print(f"{nodes:6d} {found:5d} {sites:10.1f} {axes:8.1f} {1e3 * (sites + axes) / nodes:12.2f}")


if __name__ == "__main__":
    main()
