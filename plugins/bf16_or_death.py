"""The three recipes of "Give Me BF16 or Give Me Death", for the linear layers of the transformer blocks.

Kurtic et al. 2025 (ACL), section 3. The vocabulary head, embeddings and norms stay as they are.

| recipe | weights | activations |
|---|---|---|
| W8A8-FP | E4M3 per channel, rounded | E4M3, range of each token |
| W8A8-INT | int8 per channel, GPTQ | int8, range of each token |
| W4A16-INT | int4 in groups of 128, GPTQ with a clip search | as they are |

W8A8-FP needs no data. Lossy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from ..compiler.errors import OptionError, did_you_mean
from ..compiler.passes import Composite

RECIPES: dict[str, dict[str, object]] = {
    "W8A8-FP": {"scheme": "FP8", "fitter": "rtn"},
    "W8A8-INT": {"scheme": "W8A8-dynamic", "granularity": "token", "fitter": "gptq(norm=None)"},
    "W4A16-INT": {"scheme": "W4A16", "group_size": 128, "fitter": "gptq(norm=2.0)"},
}


@dataclass(frozen=True)
class BF16OrDeath(Composite):
    """`recipe` is one of the three; `targets` are the layers inside blocks: those with a number in their path."""

    name: ClassVar[str] = "bf16_or_death"
    positional: ClassVar[str | None] = "recipe"

    recipe: str = "W8A8-INT"
    targets: tuple[str, ...] = (r"re:\.\d+\.",)

    def __post_init__(self) -> None:
        if self.recipe not in RECIPES:
            raise OptionError(
                f"there is no recipe {self.recipe!r}",
                where="pass 'bf16_or_death'",
                fix=did_you_mean(self.recipe, RECIPES),
            )

    def passes(self) -> Sequence[object]:
        return [{"quantize": {**RECIPES[self.recipe], "targets": self.targets}}]
