"""The card's sections on the model itself: what it is, its parameters, its token budget, its FLOPs, its bases.

config.json and the weights' headers arrive, markdown leaves; nothing is loaded. Called by `card`.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from llava_sv.bench.checkpoint import PARTS, budget_of, llm_of, parameters_of, read_checkpoint, setting_of
from llava_sv.bench.counts import Question, compare, exact_flops
from llava_sv.eval.identity import weight_files as safetensors_of
from llava_sv.files import read_json
from llava_sv.model.token_counts import FAMILIES, TokenCounts, count_tokens, hd_grid
from llava_sv.model.token_groups import KV_LEVELS, TokenRole
from llava_sv.release.card_format import Book, count, flops, listed, plain, ratio, short, table
from llava_sv.release.card_sources import CardFile, Run
from llava_sv.release.weights import STEMS, Entry, entries_of, open_weights

TEXT_TOKENS = 200
"""Beside the image, where FLOPs are counted: `llava-sv flops`'s own default."""

FAMILY_NAMES = {"llava": "LLaVA", "llava_hd": "LLaVA-HD (an overview and tiles)", "cos": "CoS (Chain-of-Sight)"}
DECODERS = {"llava_llama": "LLaMA", "llava_mistral": "Mistral", "llava_qwen2": "Qwen2", "llava_qwen3": "Qwen3"}
ENCODERS = {"clip_vision_model": "CLIP", "siglip_vision_model": "SigLIP"}
OWN_FOLDERS = ("playground", "checkpoints")
"""Of this project: `checkpoints/x` is a folder, not organisation/name."""


@dataclass
class Model:
    """A checkpoint as far as its config and headers tell. config: `LlavaFields`; entries: its tensors, unread."""

    folder: Path
    config: Any
    entries: list[Entry]
    partial: bool = False
    """Adapters, or a projector alone: the rest lies elsewhere."""
    stored: str | None = None
    """Type that the weights will be stored in, where it is not the files' own."""

    @cached_property
    def parameters(self) -> dict[str, int]:
        """Part -> values in the weights' headers."""
        counts: dict[str, int] = {}
        for entry in self.entries:
            part = next((part for mark, part in PARTS.items() if mark in entry.name), "norms")
            size = 1
            for length in entry.shape:
                size *= length
            counts[part] = counts.get(part, 0) + size
        return counts

    @property
    def dtypes(self) -> list[str]:
        """Types that the weights are stored in."""
        written = {(self.stored if e.dtype.is_floating_point else None) or str(e.dtype) for e in self.entries}
        return sorted(one.removeprefix("torch.") for one in written)


def read_model(checkpoint: Path, stored: str | None = None, template: str | None = None) -> Model:
    """Config and headers; `stored` and `template` go before the type of the weights and the conversation template that
    are there. `UserError` for a broken config.json, with its line, and for weights that cannot be read."""
    read_json(checkpoint / "config.json", "llava-sv train")  # names the line of what is broken
    config = read_checkpoint(str(checkpoint), flag="checkpoint", may_be_dense=True)
    whole = any((checkpoint / f"{stem}{end}").is_file() for stem in STEMS for end in ("", ".index.json"))
    parts = [] if whole else safetensors_of(checkpoint)
    entries = [entry for path in parts for entry in entries_of(path)] if parts else open_weights(checkpoint)
    config.conv_template = template or config.conv_template
    return Model(checkpoint, config, entries, bool(parts), stored)


# -- what it is -----------------------------------------------------------------------------------------------------


def summary_line(model: Model, name: str) -> str:
    """The card's first sentence."""
    config, skip, tokens = model.config, model.config.skip_vision, count_tokens(model.config)
    what = f"{name} is a vision-language model that answers questions about images: {FAMILY_NAMES[config.mm_family]}"
    most = "up to " if config.mm_family == "llava_hd" else ""
    before = count(config.dense_tokens_per_image())
    if skip is None:
        return f"{what}. It is dense: an image is {most}{before} visual tokens, and each passes every layer."
    mean = " on average" if skip.adaptive else ""
    kept = f"Of {most}{before} visual tokens an image, {count(tokens.retained)} are kept whole{mean}"
    rest = (
        f"the rest are merged into {count(tokens.skipped)} that" if skip.merge else f"the other {count(tokens.skipped)}"
    )
    summaries = {0: "", 1: " One summary token is added."}.get(
        tokens.summaries, f" {tokens.summaries} summary tokens are added."
    )
    return f"{what}, with Skip-Vision. {kept}, {rest} pass {_passed(config)}.{summaries}"


def _passed(config: Any) -> str:
    """What skipped tokens pass, in words."""
    skip, layers = config.skip_vision, config.num_hidden_layers
    if not skip.skip_ffn:
        return "all layers"
    skipping = len(skip.layers_that_skip(layers))
    some = "" if skipping == layers else f" of {skipping} of {layers} decoder layers"
    return f"attention but not the feed-forward part{some}" if some else "attention but not the feed-forward layers"


def about(model: Model, bases: list[str], book: Book) -> list[str]:
    """The table of parts, and parameters by part."""
    config, vision = model.config, model.config.vision_config
    layer = config.mm_vision_select_layer
    states = (
        f"feature levels {plain(config.mm_vision_feature_levels)}"
        if config.mm_vision_feature_levels
        else f"hidden state {layer}"
    )
    encoder = (
        f"{ENCODERS.get(vision['model_type'], vision['model_type'])}, {vision['num_hidden_layers']} layers, width "
        f"{vision['hidden_size']}, {vision['image_size']} pixels in patches of {vision['patch_size']}, {states}"
    )
    decoder = (
        f"{DECODERS.get(config.model_type, config.model_type)}, {config.num_hidden_layers} layers, width "
        f"{config.hidden_size}, feed-forward {config.intermediate_size}, {config.num_attention_heads} heads "
        f"({config.num_key_value_heads} of keys and values), vocabulary of {count(config.vocab_size)}"
    )
    rows = [
        ("Family", FAMILY_NAMES[config.mm_family]),
        ("Decoder", decoder),
        ("Encoder", encoder),
        ("Projector", str(config.mm_projector_type)),
        ("Image preparation", _images(config)),
        ("Conversation template", book.say("conversation template", config.conv_template)),
        ("Made from", listed(bases) or book.say("base models", None)),
        ("Weights stored as", listed(model.dtypes)),
        ("Longest sequence", plain(config.tokenizer_model_max_length)),
    ]
    parts = [(part, count(size)) for part, size in sorted(model.parameters.items(), key=lambda pair: -pair[1])]
    what = "Parameters, counted in the weights' headers:"
    if model.partial:
        whole = count(sum(parameters_of(config).values()))
        what = (
            f"The folder holds adapters or a projector; the whole model has {whole} parameters (of config.json). "
            "Counted in the weights' headers:"
        )
    lines = [*table(("", ""), rows), what, ""]
    lines += table(("part", "parameters"), [*parts, ("**all**", f"**{count(sum(model.parameters.values()))}**")])
    if model.partial:
        return lines
    if "lm_head" not in model.parameters and "embedding" in model.parameters:
        lines += ["The output layer shares the embedding's weights.", ""]
    if "encoder" not in model.parameters:
        lines += [
            f"The encoder is not part of these weights; it is read from {short(str(config.mm_vision_tower))}.",
            "",
        ]
    return lines


def _images(config: Any) -> str:
    how = {"pad": "padded to a square", "square": "stretched to a square"}.get(
        config.image_aspect_ratio, str(config.image_aspect_ratio)
    )
    if config.mm_family != "llava_hd":
        return how
    grid = f"grid {config.hd_fixed_grid}" if config.hd_fixed_grid else f"up to {config.hd_max_tiles} tiles"
    return f"{how}; an overview and {grid}" if config.image_aspect_ratio != "anyres" else "anyres, as LLaVA-NeXT"


# -- tokens ---------------------------------------------------------------------------------------------------------


def tokens_section(model: Model) -> list[str]:
    """Tokens of an image by role, for every count that an image can have; then the switches."""
    config, skip = model.config, model.config.skip_vision
    sizes = FAMILIES[config.mm_family].sizes(config)
    rows = []
    for size in sizes:
        counts, dense = count_tokens(config, size), _dense(config, size)
        rows.append([_image_kind(config, size), *_token_cells(config, counts, dense)])
    rows = sorted({tuple(row): row for row in rows}.values(), key=lambda row: int(row[1].replace(",", "")))
    head = ("image", "dense", "retained", "skipped", "summaries", "in the sequence", "through the FFN", "in the cache")
    lines = ["Tokens of one image, from config.json:", "", *table(head, rows)]
    if skip is None:
        return [*lines, "This model is dense: every visual token passes every layer.", ""]
    lines += [
        "*Retained* tokens pass every layer. *Skipped* ones pass self-attention, not the feed-forward layer, in the "
        f"decoder layers that skip ({len(skip.layers_that_skip(config.num_hidden_layers))} of "
        f"{config.num_hidden_layers}). *In the cache*: whose keys and values are kept after prefill, at this "
        f"checkpoint's own level, `{skip.skip_kv}`.",
        "",
    ]
    if skip.adaptive:
        lines += [
            f"How many tokens an image retains depends on its content: {skip.retained_min} to {skip.retained_max}, "
            f"{skip.mean_retained} on average; the table shows the average.",
            "",
        ]
    switches = sorted((name, plain(value)) for name, value in skip.to_dict().items() if value is not None)
    return [*lines, *table(("switch", "value"), [(f"`{name}`", value) for name, value in switches])]


def _dense(config: Any, size: Any) -> TokenCounts:
    dense = copy.copy(config)
    dense.skip_vision = None
    return count_tokens(dense, size)


def _image_kind(config: Any, size: Any) -> str:
    if size is None or config.mm_family != "llava_hd":
        return "any"
    columns, rows = hd_grid(config, size)
    return f"{columns} x {rows} tiles" if columns * rows else "overview only"


def _token_cells(config: Any, counts: TokenCounts, dense: TokenCounts) -> list[str]:
    skip = config.skip_vision
    last = int(skip is not None and skip.last_visual_ffn and counts.skipped > 0)
    through = counts.retained + counts.summaries + last if skip is not None and skip.skip_ffn else counts.total
    figures = [dense.total, counts.retained, counts.skipped, counts.summaries, counts.total, through]
    return [count(value) for value in [*figures, kept_in_cache(config, counts)]]


def kept_in_cache(config: Any, counts: TokenCounts) -> int:
    """Visual tokens whose keys and values stay after prefill."""
    skip = config.skip_vision
    if skip is None:
        return counts.total
    gone = KV_LEVELS[skip.skip_kv]
    removed = counts.skipped - int(skip.last_visual_ffn and counts.skipped > 0) if TokenRole.SKIPPED in gone else 0
    return counts.total - removed - (counts.fine if TokenRole.FINE in gone else 0)


# -- FLOPs ----------------------------------------------------------------------------------------------------------


def flops_section(model: Model) -> list[str]:
    """Work over dense, by the paper's formula and exactly."""
    config = model.config
    setting, llm = setting_of(config), llm_of(config)
    if config.skip_vision is None:
        from llava_sv.bench.exact import Tokens

        total = exact_flops(llm, setting, Tokens(TEXT_TOKENS, setting.dense_tokens), 1)["total"]
        return [
            f"A prefill of one image and {TEXT_TOKENS} text tokens takes {flops(total)} (counted from config.json).",
            "",
        ]
    question = Question(config.mm_family, None, setting, llm, budget_of(config), TEXT_TOKENS, TEXT_TOKENS)
    found = compare(question)
    sides = found["dense"], found["skip"]
    by_formula = [side["paper_multiply_adds"] for side in sides]
    rows = [
        ("visual tokens in the decoder, the paper's formula", *(f"{count(value / 1e6)} M" for value in by_formula),
         by_formula[1] / by_formula[0]),
        ("prefill, everything counted", *(flops(side["prefill"]["total"]) for side in sides), found["exact_ratio"]),
        ("of it the decoder", *(flops(side["prefill"]["llm"]) for side in sides), found["exact_llm_ratio"]),
        ("a training step of one sample", *(flops(side["train"]["total"]) for side in sides), found["train_ratio"]),
    ]  # fmt: skip
    body = [(what, before, after, ratio(share)) for what, before, after, share in rows]
    return [
        f"Counted from config.json, not measured: the image with most tokens, {TEXT_TOKENS} text tokens beside it. "
        "The paper's formula counts a multiply-add once, and visual tokens only.",
        "",
        *table(("work", "dense", "this model", "this / dense"), body),
    ]


# -- bases ----------------------------------------------------------------------------------------------------------


def is_hub_id(name: str) -> bool:
    """Whether a name is organisation/name on the hub, not a folder."""
    return bool(re.fullmatch(r"[\w.-]+/[\w.-]+", name)) and name.split("/")[0] not in (*OWN_FOLDERS, ".", "..", "~")


def bases_of(given: Sequence[str], run: Run, model: Model) -> list[str]:
    """The models that this one was made from: as given, or as the run and the config name them."""
    return list(given) if given else [short(name) for name in _named(run, model)]


def _named(run: Run, model: Model) -> list[str]:
    """The models that the run or, after a conversion, config.json names: ids of the hub, or paths."""
    names = (run.settings.get("model_name_or_path"), run.settings.get("vision_tower") or model.config.mm_vision_tower)
    return [name for name in names if isinstance(name, str) and name]


def hub_bases(bases: list[str], given: Sequence[str], run: Run, model: Model) -> list[str]:
    """Those of `bases` that are on the hub. Folders are not: those that the run read, and `/models/clip`, which a card
    shows as `models/clip`. What the user gave is taken at its word."""
    paths = [] if given else [name for name in _named(run, model) if name != short(name)]
    local = {short(name) for name in [*(run.record.get("local_bases") or []), *paths]}
    return [name for name in bases if is_hub_id(name) and name not in local]


def licences(
    bases: list[str], on_hub: list[str], card_file: CardFile, manifest: dict[str, Any] | None, book: Book
) -> list[str]:
    """Licences of this model, its bases and its data, as recorded. on_hub: the bases that have a page there."""
    own = book.say("licence of these weights (card file: license)", card_file.license)
    rows = [("these weights", own + (f" ({card_file.license_link})" if card_file.license_link else ""))]
    for name in bases:
        look = f"https://huggingface.co/{name}" if name in on_hub else "the model's own page"
        rows.append((name, card_file.base_licenses.get(name) or _lacking(book, name, look)))
    rows += [(name, terms) for name, terms in sorted(card_file.base_licenses.items()) if name not in bases]
    for source in (manifest or {}).get("sources", []):
        if source.get("taken"):
            home = source.get("home") or "its owners' page"
            rows.append((f"data: {source['source']}", source.get("licence") or _lacking(book, source["source"], home)))
    if manifest is None:
        rows.append(("training data", book.say("licences of the training data", None) + ": look at its owners' pages"))
    return table(("of", "licence"), rows)


def _lacking(book: Book, name: str, look: str) -> str:
    book.lacks(f"licence of {name} (card file: base_licenses)")
    return f"not recorded: look at {look}"
