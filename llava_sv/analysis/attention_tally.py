"""Shares of attention added up over pictures, one at a time: means, spread, and the series over an answer's tokens.

Called by `analyze attention` with what `attention_rows` took down. I pictures, S generated tokens, L layers, H heads,
G groups and one more column, the first token's.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor

from llava_sv.analysis.attention_rows import FIRST, GROUPS
from llava_sv.analysis.common import finite_mean

VISUAL = ("retained", "fine", "summary", "skipped")


class Tally:
    """Adds up pictures. A picture's share of a group is the mean over heads and over its answer's tokens."""

    def __init__(self, config: Any, max_new_tokens: int) -> None:
        layers, heads, columns = config.num_hidden_layers, config.num_attention_heads, FIRST + 1
        self.names: list[str] = []
        self._share: list[np.ndarray] = []
        self._per_token: list[np.ndarray] = []
        self._over_even: list[np.ndarray] = []
        self._tokens: list[np.ndarray] = []
        self._generated: list[int] = []
        self._heads = np.zeros((layers, heads, columns))
        self._by_token = np.zeros((max_new_tokens, layers, columns))
        self._answers = np.zeros(max_new_tokens, dtype=int)

    def add(self, name: str, shares: Tensor, seen: Tensor) -> None:
        """shares: [S, L, H, G + 1], of which groups sum to 1; seen: [S, L, G + 1] positions that a row could see."""
        all_heads, counts = shares.double().numpy(), seen.double().numpy()
        mean = all_heads.mean(axis=2)
        steps = len(mean)
        self.names.append(name)
        self._share.append(mean.mean(axis=0))
        with np.errstate(divide="ignore", invalid="ignore"):
            each = np.where(counts > 0, mean / counts, np.nan)
        total = counts[..., :FIRST].sum(axis=-1, keepdims=True)
        self._per_token.append(finite_mean(each))
        self._over_even.append(finite_mean(each * total))
        self._tokens.append(counts[0].max(axis=0))
        self._generated.append(steps)
        self._heads += all_heads.mean(axis=0)
        self._by_token[:steps] += mean
        self._answers[:steps] += 1

    @property
    def groups(self) -> list[str]:
        """Those that some picture had, in the sequence's order of `GROUPS`."""
        had = np.stack(self._tokens)[:, :FIRST].max(axis=0)
        return [name for i, name in enumerate(GROUPS) if had[i] > 0 or name in ("text", "generated")]

    def share(self) -> np.ndarray:
        """[L, groups]: mean over pictures; sums to 1 over groups."""
        return np.stack(self._share).mean(axis=0)[:, self._index]

    def spread(self) -> np.ndarray:
        """[L, groups]: standard deviation of the share over pictures."""
        return np.stack(self._share).std(axis=0)[:, self._index]

    def per_token(self) -> np.ndarray:
        """[L, groups]: share of one token of the group, mean over the pictures and rows that saw such tokens."""
        return finite_mean(np.stack(self._per_token))[:, self._index]

    def over_even(self) -> np.ndarray:
        """[L, groups]: the same, as a multiple of what each token would get were attention even; 1 is the average."""
        return finite_mean(np.stack(self._over_even))[:, self._index]

    def first_token(self) -> np.ndarray:
        """[L]: share of the sequence's first token, which is counted under its group too."""
        return np.stack(self._share).mean(axis=0)[:, FIRST]

    def by_token(self) -> np.ndarray:
        """[S, L, groups]: share by number of the generated token, over the answers that are as long."""
        steps = int((self._answers > 0).sum())
        return (self._by_token[:steps] / self._answers[:steps, None, None])[..., self._index]

    @property
    def _index(self) -> list[int]:
        return [list(GROUPS).index(name) for name in self.groups]

    def visual_over_text(self) -> np.ndarray:
        """[L]: attention to everything of the image over attention to text; nan where text gets none."""
        share, groups = self.share(), self.groups
        visual = share[:, [i for i, name in enumerate(groups) if name in VISUAL]].sum(axis=1)
        text = share[:, groups.index("text")]
        return np.divide(visual, text, out=np.full_like(text, np.nan), where=text > 0)

    def numbers(self) -> dict[str, Any]:
        """For the JSON."""
        share, spread, each, over = self.share(), self.spread(), self.per_token(), self.over_even()
        ratio, first = self.visual_over_text(), self.first_token()
        layers = [
            {
                "layer": i, "share": self._named(share[i]), "share_std": self._named(spread[i]),
                "share_per_token": self._named(each[i]), "times_even": self._named(over[i]),
                "visual_over_text": ratio[i], "first_token": first[i],
            }
            for i in range(len(share))
        ]  # fmt: skip
        tokens = np.stack(self._tokens)[:, self._index].mean(axis=0)
        overall = share.mean(axis=0)
        visual = sum(value for name, value in zip(self.groups, overall) if name in VISUAL)
        text = overall[self.groups.index("text")]
        by_token = self.by_token().mean(axis=1)
        return {
            "groups": self.groups,
            "prompt_tokens": {k: v for k, v in self._named(tokens).items() if k != "generated"},
            "generated_tokens": float(np.mean(self._generated)),
            "all_layers": {
                "share": self._named(overall),
                "visual_over_text": visual / text if text else None,
                "first_token": first.mean(),
            },
            "per_layer": layers,
            "per_generated_token": [
                {"token": i + 1, "answers": int(self._answers[i]), "share": self._named(row)}
                for i, row in enumerate(by_token)
            ],
        }

    def arrays(self) -> dict[str, np.ndarray]:
        """For the npz: picture by picture, by head, and by generated token."""
        index = self._index
        return {
            "groups": np.array(self.groups),
            "names": np.array(self.names),
            "share": np.stack(self._share)[..., index].astype(np.float32),
            "share_per_token": np.stack(self._per_token)[..., index].astype(np.float32),
            "times_even": np.stack(self._over_even)[..., index].astype(np.float32),
            "first_token": np.stack(self._share)[..., FIRST].astype(np.float32),
            "heads": (self._heads / len(self.names))[..., index].astype(np.float32),
            "by_token": self.by_token().astype(np.float32),
            "answers": self._answers[self._answers > 0],
            "generated_tokens": np.array(self._generated),
        }

    def in_words(self) -> str:
        """One line: all layers, all pictures."""
        shares = self.share().mean(axis=0)
        parts = ", ".join(f"{name} {100 * value:.1f}%" for name, value in zip(self.groups, shares))
        return f"attention of generated tokens, mean of all layers: {parts}"

    def _named(self, row: np.ndarray) -> dict[str, float]:
        return {name: float(value) for name, value in zip(self.groups, row)}
