"""Sizes of the measurements of operators."""

from dataclasses import dataclass

from trivium.ops.pairs import allowed_pairs


@dataclass(frozen=True)
class SimplicialShape:
    """Sizes of one measurement of 2-simplicial attention."""

    batch: int = 2
    tokens: int = 512
    heads: int = 4
    kv_heads: int = 4
    head_width: int = 32
    window1: int = 128
    window2: int = 16

    @property
    def name(self) -> str:
        heads = f"H{self.heads}" if self.heads == self.kv_heads else f"H{self.heads}/{self.kv_heads}"
        return f"B{self.batch} T{self.tokens} {heads} D{self.head_width} {self.window1}x{self.window2}"

    def reference_bytes(self, tokens: int) -> int:
        """Return about what the reference holds at its peak in float32: three tensors of all triples."""
        return 4 * 3 * self.batch * self.heads * tokens**3

    def flops(self) -> int:
        """Return 4 D per allowed (head, j, k) forward, and 2.5 times that backward."""
        triples = allowed_pairs(self.tokens, self.window1, self.window2)
        return int(3.5 * 4 * self.head_width * self.heads * self.batch * triples)
