"""From arguments to what a Trainer needs: tokenizer, model, image processor, data set, and which parameters train.

Called by `train.train`; raises `UserError` for what the user can mend.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from llava_sv.arguments import DataArguments, ModelArguments, TrainingArguments
from llava_sv.cluster.agree import same_everywhere
from llava_sv.conversation import get_template
from llava_sv.data.dataset import LazySupervisedDataset
from llava_sv.data.index import open_records
from llava_sv.data.lengths import exact_lengths
from llava_sv.data.packing import PackedDataset
from llava_sv.errors import UserError
from llava_sv.model.attention import check_attn_implementation
from llava_sv.model.builders import build_model
from llava_sv.model.checkpoint_io import COME_AND_GO, PROJECTOR_KEY
from llava_sv.model.language_model.packed_attention import check_keeps_apart, packing_implementation
from llava_sv.train import lora
from llava_sv.train.checkpoint import PROJECTOR
from llava_sv.train.preflight import find_model
from llava_sv.train.preflight import read_config as read_json

DEFAULT_FAMILY = "llava"

NEW_AT_SFT = tuple(f"model.{PROJECTOR_KEY}{key}" for key in COME_AND_GO)
"""Weights that a checkpoint may lack or leave over: summaries come in when skipping does and go with it, the newline
with dense `anyres`."""

TILING = ("hd_max_tiles", "hd_fixed_grid", "image_grid_pinpoints")
"""Settings of a family that may change when training goes on from a whole model: how images are cut."""


def check_names(model_args: ModelArguments, training_args: TrainingArguments) -> None:
    """Refuse unknown templates, families, selections and attentions before anything is loaded."""
    from llava_sv.model.builders import get_builder
    from llava_sv.model.compression.select import get_selector

    if model_args.version is None:
        raise UserError("--version is needed: the conversation template, such as plain (pretraining), v1 or llama_3")
    get_template(model_args.version)
    family = model_args.mm_family or DEFAULT_FAMILY
    get_builder(family)
    check_attn_implementation(training_args.attn_implementation)
    if training_args.attn_implementation == "flex_attention" and training_args.device.type == "cpu":
        raise UserError("--attn_implementation flex_attention cannot train on a CPU; choose sdpa")
    of_tower = [flag for flag in training_args.own_rates() if "vision_tower" in flag]
    if of_tower and not model_args.unfreeze_mm_vision_tower:
        raise UserError(f"{of_tower[0]}: the vision encoder is frozen; add --unfreeze_mm_vision_tower True or drop it")
    model_args.skip_vision()
    model_args.family_settings()
    if model_args.sv_selection is not None:
        get_selector(model_args.sv_selection)


def compute_dtype(args: TrainingArguments) -> torch.dtype:
    """Weights' precision: DeepSpeed keeps its own float32 copy; elsewhere weights are float32 and autocast narrows."""
    if args.deepspeed and args.bf16:
        return torch.bfloat16
    if args.deepspeed and args.fp16:
        return torch.float16
    return torch.float32


def build(model_args: ModelArguments, data_args: DataArguments, args: TrainingArguments) -> tuple[Any, Any, Any]:
    """(tokenizer, model, image_processor), from base checkpoints or from a checkpoint of this project."""
    from llava_sv.model.loading import is_llava

    own = find_model(str(model_args.model_name_or_path))
    if own is not None and is_llava(read_json(own)):
        tokenizer, model, image_processor = _continue(own, model_args, data_args, args)
    else:
        tokenizer, model, image_processor = build_model(
            model_args.mm_family or DEFAULT_FAMILY,
            llm=str(model_args.model_name_or_path),
            vision_tower=str(model_args.vision_tower),
            skip_vision=model_args.skip_vision(),
            pretrain_mm_mlp_adapter=model_args.pretrain_mm_mlp_adapter,
            torch_dtype=lora.frozen_dtype(model_args, args, compute_dtype(args)),
            attn_implementation=args.attn_implementation,
            placement=lora.placement(model_args, args),
            **model_args.selected_state(),
            **model_args.family_settings(),
            **_settings(model_args, data_args, args),
        )
    if data_args.packing:
        name = packing_implementation(args.attn_implementation, model.config, args.model_max_length)
        model.set_attn_implementation(name or model.config._attn_implementation)
    tokenizer.model_max_length = args.model_max_length
    tokenizer.padding_side = "right"
    return tokenizer, model, image_processor


def _settings(model_args: ModelArguments, data_args: DataArguments, args: TrainingArguments) -> dict[str, Any]:
    """Config fields that each run of training sets anew."""
    return {
        "image_aspect_ratio": data_args.image_aspect_ratio,
        "tokenizer_model_max_length": args.model_max_length,
        "tokenizer_padding_side": "right",
        "conv_template": model_args.version,
    }


def _continue(own: Path, model_args: ModelArguments, data_args: DataArguments, args: TrainingArguments):
    """Go on from a whole LLaVA: its own encoder, projector and, unless flags say otherwise, skipping."""
    from llava_sv.mm_utils import load_image_processor
    from llava_sv.model.builders.tokenizer import load_tokenizer
    from llava_sv.model.checkpoint_io import load_projector
    from llava_sv.model.loading import check_config, described_by, load_whole, read_config
    from llava_sv.model.multimodal_encoder.builder import read_vision_config
    from llava_sv.model.token_counts import with_family_budget

    config = read_config(str(own), encoder_elsewhere(own, model_args.vision_tower))
    vision = config.vision_config or read_vision_config(config.mm_vision_tower, config.mm_vision_image_size).to_dict()
    _refuse_other_weights(own, described_by(config, vision), model_args)
    _set_anew(config, model_args, _settings(model_args, data_args, args))
    block = model_args.skip_vision(config.skip_vision.to_dict() if config.skip_vision else None)
    config.skip_vision = with_family_budget(described_by(config, vision), block) if block else None
    check_config(config, vision)
    model = load_whole(
        str(own),
        config,
        NEW_AT_SFT,
        lora.frozen_dtype(model_args, args, compute_dtype(args)),
        args.attn_implementation,
        unused_weights=NEW_AT_SFT,
        **lora.placement(model_args, args),
    )
    if model_args.pretrain_mm_mlp_adapter:
        load_projector(model, model_args.pretrain_mm_mlp_adapter)
    processor = own if (own / "preprocessor_config.json").is_file() else config.mm_vision_tower
    return load_tokenizer(str(own)), model, load_image_processor(str(processor), config.mm_vision_image_size)


def encoder_elsewhere(own: Path, vision_tower: str | None) -> str | None:
    """The folder that `--vision_tower` gives for the encoder which a checkpoint names and does not describe (LLaVA's
    own checkpoints do not); None where the flag says nothing of the kind."""
    if not vision_tower or not Path(vision_tower).is_dir() or read_json(own).get("vision_config") is not None:
        return None
    return vision_tower


def _refuse_other_weights(own: Path, config: Any, model_args: ModelArguments) -> None:
    """`UserError` for a flag that asks for another family, projector or encoder than the weights of `own` are made for.

    config: the checkpoint's, its encoder described.
    """
    given = {"mm_family": model_args.mm_family, "vision_tower": model_args.vision_tower}
    given |= model_args.selected_state() | model_args.family_settings()
    has = {name: getattr(config, name, None) for name in given}
    has |= {"vision_tower": config.mm_vision_tower, "mm_vision_image_size": config.vision_config["image_size"]}
    for name, value in given.items():
        if name not in TILING and value is not None and value != has[name] and not _same_place(value, has[name]):
            raise UserError(
                f"--{name} {value}: the checkpoint {own} has {has[name]}; drop the flag, or start from a "
                "language model (--pretrain_mm_mlp_adapter takes a pretrained projector along)"
            )


def _same_place(a: Any, b: Any) -> bool:
    """Whether two names are one folder, written differently."""
    return isinstance(a, str) and isinstance(b, str) and Path(a).is_dir() and Path(a).resolve() == Path(b).resolve()


def _set_anew(config: Any, model_args: ModelArguments, settings: dict[str, Any]) -> None:
    """`settings` and the given tiling into the config of a checkpoint; what it says of another way of tiling, and no
    flag asks for, goes back to its default."""
    from llava_sv.model.config import LlavaFields
    from llava_sv.model.loading import not_read

    given = model_args.family_settings()
    for name, value in (settings | {name: given[name] for name in TILING if name in given}).items():
        setattr(config, name, value)
    for name, _ in list(not_read(config)):
        if name in TILING and name not in given:
            setattr(config, name, getattr(LlavaFields, name))


def choose_trainable(model: Any, model_args: ModelArguments) -> None:
    """Set `requires_grad`: the projector alone when pretraining, else all but what is frozen.

    The vision tower is, unless asked for; then what it runs trains, and blocks after the selected one do not.
    """
    projector, tower = model.get_model().mm_projector, model.get_vision_tower()
    model.requires_grad_(not (model_args.tune_mm_mlp_adapter or model_args.freeze_backbone))
    tower.requires_grad_(False)
    if model_args.unfreeze_mm_vision_tower:
        model.config.unfreeze_mm_vision_tower = True  # as LLaVA has it: the checkpoint's encoder is its own from now on
        for parameter, _ in tower.used_parameters().values():
            parameter.requires_grad_(True)
    projector.requires_grad_(not model_args.freeze_mm_mlp_adapter)
    for part in (projector.summary, projector.image_newline):  # a checkpoint may lack them: they may be fresh
        if part is not None:
            part.requires_grad_(True)
    if not (model_args.lora_enable or any(parameter.requires_grad for parameter in model.parameters())):
        raise UserError("nothing is left to train: --freeze_backbone and --freeze_mm_mlp_adapter freeze it all")


def part_of(name: str) -> str:
    """Which part of the model a parameter belongs to."""
    if f"{PROJECTOR}.summary." in name:
        return "summaries"
    if f"{PROJECTOR}." in name:
        return "projector"
    if ".lora_" in name:
        return "language model adapters"
    return "vision tower" if "vision_tower." in name else "language model"


def count_parameters(model: Any) -> dict[str, tuple[int, int]]:
    """part -> (parameters, those that train); ZeRO-3's partitioned ones count whole."""
    counts: dict[str, tuple[int, int]] = {}
    for name, value in model.named_parameters():
        size = lora.numel(value)
        total, trained = counts.get(part_of(name), (0, 0))
        counts[part_of(name)] = (total + size, trained + size * value.requires_grad)
    return counts


def build_dataset(
    tokenizer: Any, image_processor: Any, data_args: DataArguments, version: str, image_config: Any
) -> LazySupervisedDataset:
    """The training records, prepared as they are read; `image_config` (the model's) says how images are cut."""
    records = open_records(str(data_args.data_path))
    return LazySupervisedDataset(records, tokenizer, image_processor, data_args, get_template(version), image_config)


def pack(model: Any, dataset: LazySupervisedDataset, args: TrainingArguments) -> PackedDataset:
    """The samples in packs of up to `--model_max_length` tokens. `UserError` where attention cannot keep them apart."""
    check_keeps_apart(model.config._attn_implementation, args.device)
    config = model.config
    lengths = same_everywhere(
        exact_lengths(
            dataset.records,
            dataset.tokenizer,
            dataset.template,
            config.visual_tokens_per_image,
            dataset.image_folder,
        )
    )
    return PackedDataset(
        dataset, lengths, args.model_max_length, args.seed if args.data_seed is None else args.data_seed
    )


def check_room(config: Any, dataset: LazySupervisedDataset, args: TrainingArguments) -> None:
    """`UserError` where an image alone may fill the whole sequence: the cut would take it, and all that follows it."""
    if not dataset.modalities().any():
        return
    most = config.visual_tokens_per_image()
    if most >= args.model_max_length:
        tiles = "--hd_max_tiles, " if config.mm_family == "llava_hd" else ""
        raise UserError(
            f"an image takes up to {most} tokens, but --model_max_length is {args.model_max_length}: it would be cut "
            f"away, and its answer with it; raise --model_max_length to more than {most} and a text's tokens, or let "
            f"an image take fewer ({tiles}--sv_num_retained, --sv_num_skipped)"
        )
