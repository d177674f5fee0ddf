"""Sizes of known language models, encoders and settings, as plain numbers. Read by `flops`; imports no torch.

A setting is one family at one resolution: how many visual tokens an image takes, dense and skipping. `checkpoint` reads
the same from a checkpoint's own config.
"""

from __future__ import annotations

from dataclasses import MISSING, dataclass, fields
from typing import Any

from llava_sv.errors import UserError


@dataclass(frozen=True)
class LlmSize:
    """A LLaMA-shaped decoder. Field names are `LlamaConfig`'s."""

    hidden_size: int
    """C."""
    intermediate_size: int
    """M."""
    num_hidden_layers: int
    """L."""
    num_attention_heads: int
    num_key_value_heads: int
    vocab_size: int
    head_dim: int = 0
    """Width of one attention head; 0 stands for C over the heads."""
    tie_word_embeddings: bool = False
    """Whether the output layer's weights are the embedding's."""

    def __post_init__(self) -> None:
        if not self.head_dim:
            object.__setattr__(self, "head_dim", self.hidden_size // self.num_attention_heads)
        object.__setattr__(self, "tie_word_embeddings", bool(self.tie_word_embeddings))


@dataclass(frozen=True)
class EncoderSize:
    """A vision transformer of CLIP's shape, up to the block whose output is used."""

    hidden_size: int
    """E."""
    intermediate_size: int
    num_blocks: int
    """Blocks that run: hidden state -2 of 24 layers needs 23, and so does the output of block 22 (counted from 0)."""
    patch_size: int
    patches: int
    """N of one view."""
    has_cls: bool = True
    """Whether a CLS row runs beside the patches."""
    num_layers: int = 24
    """Blocks there are, those that do not run included: memory holds them."""

    @property
    def rows(self) -> int:
        """Rows of one view in each block."""
        return self.patches + int(self.has_cls)


@dataclass(frozen=True)
class Setting:
    """One family at one resolution."""

    encoder: EncoderSize
    views: int
    """Views of one image that the encoder sees."""
    dense_tokens: int
    """Visual tokens of one image without skipping."""
    num_retained: int | None
    """The paper's setting, or None where it gives none."""
    num_skipped: int | None
    windows: tuple[tuple[int, int], ...] = ()
    """CoS: (window in cells, queries) a scale of the resampler. Empty: an MLP on every row."""
    projector_depth: int = 2
    """Linear layers of that MLP."""
    projects_cls: bool = False
    """Whether that MLP works on the CLS row too."""
    levels: int = 2
    """CoS: the encoder's feature levels that the resampler reads in sequence."""


@dataclass(frozen=True)
class Budget:
    """What skipping makes of one image's dense tokens."""

    retained: int
    skipped: int
    summaries: int
    pooled: int
    """Tokens that the summaries pool."""
    merged_from: int
    """Tokens that were merged down to `skipped`; 0 without merging."""
    skipping_layers: int | None = None
    """Decoder layers that skip; None: all of them."""
    last_visual_ffn: bool = False
    fine: int = 0
    """CoS: retained tokens that the KV level `fine+skipped` removes."""
    skip_kv: str = "skipped"
    """Level of the skip KV-cache."""
    retained_bounds: tuple[int, int] | None = None
    """Where an image's content says how many are retained: the fewest and the most; `retained` is the average."""


LLMS: dict[str, LlmSize] = {
    "llama-3-8b": LlmSize(4096, 14336, 32, 32, 8, 128256),
    "vicuna-7b": LlmSize(4096, 11008, 32, 32, 32, 32000),
    "vicuna-13b": LlmSize(5120, 13824, 40, 40, 40, 32000),
    "mistral-7b": LlmSize(4096, 14336, 32, 32, 8, 32000),
    "qwen2.5-0.5b": LlmSize(896, 4864, 24, 14, 2, 151936, tie_word_embeddings=True),
    "qwen2.5-7b": LlmSize(3584, 18944, 28, 28, 4, 152064),
    "qwen3-8b": LlmSize(4096, 12288, 36, 32, 8, 151936, head_dim=128),
}

CLIP_L_336 = EncoderSize(1024, 4096, 23, 14, 576)
CLIP_L_224 = EncoderSize(1024, 4096, 23, 14, 256)
CLIP_L_448 = EncoderSize(1024, 4096, 23, 14, 1024)

FAMILIES: dict[str, dict[str, Setting]] = {
    "llava": {
        "100_156": Setting(CLIP_L_336, 1, 576, 100, 156),
        "256_320": Setting(CLIP_L_336, 1, 576, 256, 320),
        "64_156": Setting(CLIP_L_336, 1, 576, 64, 156),
    },
    "llava_hd": {"2x2": Setting(CLIP_L_336, 5, 2880, 576, 576)},
    "cos": {
        "cos_1296": Setting(CLIP_L_448, 1, 1296, 272, 256, ((32, 16), (4, 256), (2, 1024))),
        "cos_336": Setting(CLIP_L_448, 1, 336, None, None, ((32, 16), (8, 64), (4, 256))),
        "cos_80_448": Setting(CLIP_L_448, 1, 80, None, None, ((32, 16), (8, 64))),
        "cos_80": Setting(CLIP_L_224, 1, 80, None, None, ((16, 16), (4, 64))),
    },
}
"""Family -> presets; the first preset of a family is its default."""


def find_setting(family: str, preset: str | None) -> tuple[str, Setting]:
    """(name, setting) of a family's preset, its first by default; `UserError` lists the known ones."""
    if family not in FAMILIES:
        raise UserError(f"--family: unknown family {family!r}; known: {', '.join(FAMILIES)}")
    presets = FAMILIES[family]
    name = preset or next(iter(presets))
    if name not in presets:
        raise UserError(f"--preset: unknown preset {name!r} of family {family!r}; known: {', '.join(presets)}")
    return name, presets[name]


@dataclass(frozen=True)
class Switches:
    """Skip-Vision's switches as a command line gives them; None: as the preset or the checkpoint has them."""

    skip_ffn: bool | None = None
    merge: bool | None = None
    former_summary: bool | None = None
    latter_summary: bool | None = None
    last_visual_ffn: bool | None = None
    skip_layers: str | None = None
    skip_kv: str | None = None

    @property
    def given(self) -> dict[str, bool | str]:
        """Those that are given, by their names in a checkpoint's `skip_vision`."""
        return {field.name: value for field in fields(self) if (value := getattr(self, field.name)) is not None}


def find_budget(
    setting: Setting, num_retained: int | None, num_skipped: int | None, switches: Switches | None = None
) -> Budget:
    """What skipping makes of a setting's image, with both summaries and merging where it makes fewer tokens, unless
    switched off; a number that is None is the preset's. `UserError` where that gives none."""
    switches = switches or Switches()
    retained = setting.num_retained if num_retained is None else num_retained
    merges = switches.merge is not False
    if not merges and num_skipped is not None:
        raise UserError(f"--num-skipped {num_skipped} does not go with --no-merge: all that is not retained is skipped")
    if retained is not None and not merges:
        skipped: int | None = setting.dense_tokens - retained
    else:
        skipped = setting.num_skipped if num_skipped is None else num_skipped
    if retained is None or skipped is None:
        raise UserError("--num-retained and --num-skipped are needed here: the preset gives none")
    rest = setting.dense_tokens - retained
    former, latter = switches.former_summary is not False, switches.latter_summary is not False
    return Budget(
        retained,
        skipped,
        summaries=int(former) + int(latter),
        pooled=int(former) * retained + int(latter) * skipped,
        merged_from=rest if skipped < rest else 0,
        last_visual_ffn=bool(switches.last_visual_ffn) and skipped > 0,
        fine=max(0, retained - setting.windows[0][1]) if setting.windows else 0,
        skip_kv=switches.skip_kv or "skipped",
    )


def check_budget(dense: int, retained: int, skipped: int) -> None:
    """`UserError` for more tokens than there are."""
    if retained + skipped > dense:
        raise UserError(
            f"--num-retained {retained} + --num-skipped {skipped} is more than the {dense} dense tokens; "
            "lower one of them, or raise --dense-tokens"
        )


def read_llm(text: str) -> LlmSize:
    """A name of `LLMS`, or `LlmSize`'s fields as `name=number,...`; `UserError` lists what is known."""
    if text in LLMS:
        return LLMS[text]
    known = [field.name for field in fields(LlmSize)]
    if "=" not in text:
        raise UserError(
            f"--llm-config: unknown language model {text!r}; known: {', '.join(LLMS)}; or sizes, {'=N,'.join(known)}=N"
        )
    values: dict[str, Any] = {}
    for part in text.split(","):
        name, _, value = part.strip().partition("=")
        if name not in known or not value.isdecimal() or int(value) < 1:
            raise UserError(f"--llm-config: cannot read {part.strip()!r}; write name=number of: {', '.join(known)}")
        values[name] = int(value)
    needed = [field.name for field in fields(LlmSize) if field.default is MISSING]
    absent = [name for name in needed if name not in values]
    if absent:
        raise UserError(f"--llm-config: {', '.join(absent)} missing; give all of: {', '.join(needed)}")
    heads, shared = values["num_attention_heads"], values["num_key_value_heads"]
    if heads % shared:
        raise UserError(f"--llm-config: num_attention_heads {heads} is no multiple of num_key_value_heads {shared}")
    if "head_dim" not in values and values["hidden_size"] % heads:
        raise UserError(
            f"--llm-config: hidden_size {values['hidden_size']} is no multiple of num_attention_heads {heads}; "
            "change one of them, or say head_dim"
        )
    return LlmSize(**values)
