"""Small models with random weights, one for each shape of graph. Reached through the fixture `models`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Mlp(nn.Module):
    """Linear → GELU → Linear."""

    def __init__(self, inputs: int = 16, hidden: int = 32, outputs: int = 8) -> None:
        super().__init__()
        self.up = nn.Linear(inputs, hidden)
        self.down = nn.Linear(hidden, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x)))


class Cnn(nn.Module):
    """A convolution and a depthwise one, each with a batch norm; a linear head with a batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(4, 8, 3, padding=1, bias=False)
        self.stem_norm = nn.BatchNorm2d(8)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.depthwise_norm = nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 16)
        self.head_norm = nn.BatchNorm1d(16)
        trained_norms(self)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem_norm(self.stem(x)))
        x = F.relu(self.depthwise_norm(self.depthwise(x)))
        return self.head_norm(self.head(x.mean((2, 3))))


def trained_norms(model: nn.Module) -> None:
    """Give every batch norm statistics and an affine that are not the identity."""
    for module in model.modules():
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias)


class Attention(nn.Module):
    """Fused qkv projection, as in the original vision transformer code."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        B, T, C = x.shape
        q, k, v = self.qkv(x).reshape(B, T, 3, self.heads, C // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(B, T, C))


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.mlp = Mlp(width, 2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Vit(nn.Module):
    """A pre-norm vision transformer over `[B, T, 12]` patches. `pool`: "mean" (no class token) or "class"."""

    def __init__(self, tokens: int = 16, width: int = 16, heads: int = 2, depth: int = 3, pool: str = "mean") -> None:
        super().__init__()
        self.pool = pool
        self.embed = nn.Linear(12, width)
        self.token = nn.Parameter(torch.randn(1, 1, width)) if pool == "class" else None
        self.position = nn.Parameter(torch.randn(1, tokens + (pool == "class"), width))
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 5)

    def forward(self, patches: Tensor) -> Tensor:
        x = self.embed(patches)
        if self.token is not None:
            x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], dim=1)
        x = x + self.position
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)
        return self.head(x[:, 0] if self.token is not None else x.mean(1))


class TiedLanguageModel(nn.Module):
    """An embedding whose table is also the output projection."""

    def __init__(self, words: int = 48, width: int = 32) -> None:
        super().__init__()
        self.embedding = nn.Embedding(words, width)
        self.middle = nn.Linear(width, width)
        self.lm_head = nn.Linear(width, words, bias=False)
        self.lm_head.weight = self.embedding.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.lm_head(torch.tanh(self.middle(self.embedding(ids))))


_VISION = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "image_size": 32,
    "patch_size": 8,
    "num_labels": 5,
}
_TEXT = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "vocab_size": 50,
    "max_position_embeddings": 40,
}


def hugging_face(name: str, **options: Any) -> nn.Module:
    """A transformers model by class name, in a small random configuration."""
    import transformers

    family = name.split("For")[0].removesuffix("LMHeadModel").removesuffix("Model")
    base = _TEXT if family == "Bert" else _VISION if family in ("ViT", "DeiT") else {}
    config = getattr(transformers, f"{family}Config")(**(base | options))
    return getattr(transformers, name)(config).eval()


def images(batch: int = 2) -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(batch, 3, 32, 32)}


def sentences(batch: int = 2, tokens: int = 7, *, mask: bool = True) -> dict[str, Tensor]:
    call = {"input_ids": torch.randint(0, 50, (batch, tokens))}
    if mask:
        call["attention_mask"] = torch.ones(batch, tokens, dtype=torch.int64)
        call["attention_mask"][-1, tokens // 2 :] = 0
    return call
