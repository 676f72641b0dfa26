"""A small GPT over bytes: pre-norm transformer blocks, learned positions, head tied or not."""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

BYTES = 256
HEAD_WIDTH = 32


class GPT(nn.Module):
    """Predicts each byte of a text from those before it.

    Args:
        context: the longest text that it takes, in bytes.
        layers: number of blocks.
        width: numbers per byte in the residual stream, a multiple of 32.
        untied: whether the head has weights of its own.
    """

    def __init__(self, *, context: int, layers: int, width: int, untied: bool = False) -> None:
        super().__init__()
        self.embedding = nn.Embedding(BYTES, width)
        self.positions = nn.Parameter(torch.empty(context, width))
        self.blocks = nn.ModuleList(Block(width) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, BYTES, bias=False) if untied else None
        self._initialize()

    def forward(self, text: torch.Tensor) -> torch.Tensor:
        """int64 (batch, length) -> logits of the next byte (batch, length, 256)."""
        x = self.embedding(text) + self.positions[: text.shape[1]]
        for block in self.blocks:
            x = block(x)
        head = self.embedding if self.head is None else self.head
        return F.linear(self.norm(x), head.weight)

    def loss(self, windows: torch.Tensor) -> torch.Tensor:
        """Mean cross-entropy in nats of every byte of `windows` (batch, context + 1) but the first."""
        logits = self(windows[:, :-1])
        return F.cross_entropy(logits.flatten(0, 1).float(), windows[:, 1:].flatten())

    def _initialize(self) -> None:
        """GPT-2's: the sum over all residual branches keeps the scale of one."""
        for p in self.parameters():
            if p.ndim == 2:
                nn.init.normal_(p, std=0.02)
        for block in self.blocks:
            for last in (block.attention.project, block.contract):
                nn.init.normal_(last.weight, std=0.02 / (2 * len(self.blocks)) ** 0.5)


class Block(nn.Module):
    """Attention, then a two-layer perceptron, each on the normalised residual stream."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(width)
        self.attention = Attention(width)
        self.perceptron_norm = nn.LayerNorm(width)
        self.expand = nn.Linear(width, 4 * width, bias=False)
        self.contract = nn.Linear(4 * width, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attention(self.attention_norm(x))
        return x + self.contract(F.gelu(self.expand(self.perceptron_norm(x))))


class Attention(nn.Module):
    """Causal self-attention with heads of 32."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.query_key_value = nn.Linear(width, 3 * width, bias=False)
        self.project = nn.Linear(width, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        heads = self.query_key_value(x).unflatten(-1, (3, -1, HEAD_WIDTH))
        query, key, value = heads.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        return self.project(mixed.transpose(1, 2).flatten(2))
