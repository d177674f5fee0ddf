"""LoRA adapters in a model and in a folder: put in place, read, written, merged.

The layout is peft's and LLaVA's: adapter_config.json and adapter_model.safetensors hold the adapters,
non_lora_trainables.bin (and .safetensors) what trained beside them in full, the projector at least. The model keeps its
own class: peft's layers stand where linear layers stood. Called by training, by `builder` and by `release`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from llava_sv.errors import UserError
from llava_sv.files import read_json, replacing, write_json
from llava_sv.model.checkpoint_io import PROJECTOR_KEY, gathered, read_weights
from llava_sv.model.llava_layout import NEWLINE, OUR_NEWLINE

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model"
OTHERS = "non_lora_trainables"
FILES = (CONFIG, *(f"{name}.{kind}" for name in (WEIGHTS, OTHERS) for kind in ("safetensors", "bin")))
"""All files of an adapter folder that hold or describe weights."""

ADAPTER = "default"
"""peft's name for the one adapter of a model: part of parameter names, not of the files' keys."""

PREFIX = "base_model.model."
"""Before every key in the files: names as seen from peft's wrapper."""

LAYERS = "model.layers."
"""Before the names of all modules that may be adapted."""

OUTSIDE = r"(.*\.)?(vision_tower|mm_projector|lm_head)(\..*)?"
"""Modules that are never adapted though one of theirs may be called as a layer of the decoder is (CLIP's q_proj)."""


def is_adapter(path: str) -> bool:
    """Whether this is a folder of adapters rather than of a model."""
    return os.path.isfile(os.path.join(path, CONFIG))


def linear_names(model: Any) -> list[str]:
    """Names of the decoder's linear layers, each kind once: q_proj, k_proj, ..."""
    names = (name for name, module in model.named_modules() if isinstance(module, nn.Linear))
    return sorted({name.rpartition(".")[2] for name in names if name.startswith(LAYERS)})


def check_targets(model: Any, targets: list[str]) -> None:
    """`UserError` for a name that no linear layer of the decoder bears."""
    every = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    for target in targets:
        if not any(name.startswith(LAYERS) and f".{name}".endswith(f".{target}") for name in every):
            raise UserError(
                f"--lora_target_modules: no linear layer of the decoder is called {target!r}; "
                f"there are: {', '.join(linear_names(model))}"
            )


def make_config(rank: int, alpha: int, dropout: float, bias: str, targets: list[str], base: str) -> Any:
    """peft's LoraConfig of adapters on `targets`."""
    from peft import LoraConfig

    return LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        bias=bias,  # type: ignore[arg-type]
        target_modules=targets,
        exclude_modules=OUTSIDE,
        task_type="CAUSAL_LM",
        base_model_name_or_path=base,
    )


def inject(model: Any, config: Any) -> None:
    """Put fresh adapters into `model`, in place; afterwards they alone train (with the biases that `config` names)."""
    from peft import inject_adapter_in_model

    inject_adapter_in_model(config, model, ADAPTER)
    for name, parameter in model.named_parameters():
        if is_outside(name):  # peft's bias="all" would take the encoder's and the projector's too
            parameter.requires_grad_(False)
    model._hf_peft_config_loaded = True  # what transformers asks before it trains a quantised model


def is_outside(name: str) -> bool:
    """Whether a parameter belongs to the encoder, the projector or the output layer."""
    return re.fullmatch(OUTSIDE, name) is not None


def is_attached(model: Any) -> bool:
    """Whether this model has adapters."""
    return bool(getattr(model, "peft_config", None))


def merge(model: Any) -> None:
    """Add each adapter to the weight it adapts, and take it out. The sum is made in the wider type of the two."""
    from peft.tuners.lora import LoraLayer

    for name, module in list(model.named_modules()):
        if not isinstance(module, LoraLayer):
            continue
        layer = module.get_base_layer()
        with torch.no_grad():
            delta = module.get_delta_weight(ADAPTER)  # type: ignore[attr-defined]
            layer.weight.data = (layer.weight.data + delta).to(layer.weight.dtype)
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, layer)
    del model.peft_config
    model._hf_peft_config_loaded = False


# -- writing ----------------------------------------------------------------------------------------------------------


def trained_state(model: Any, keep: bool = True) -> dict[str, Tensor]:
    """Everything that a folder of adapters holds, on the CPU: what trains, what `load_state` brought, the projector.

    Under ZeRO-3 each parameter is gathered in turn: every rank must call it, and those that do not write pass
    keep=False.
    """
    state: dict[str, Tensor] = {}
    brought = getattr(model, "brought_by_adapters", ())
    for name, parameter in model.named_parameters():
        if parameter.requires_grad or PROJECTOR_KEY in name or name in brought:
            with _whole(parameter):
                if keep:
                    state[name] = parameter.detach().cpu().clone().contiguous()
    return state


@contextmanager
def _whole(parameter: nn.Parameter) -> Iterator[None]:
    """The whole parameter, to be read, also under ZeRO-3."""
    if not hasattr(parameter, "ds_id"):
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters([parameter]):
        yield


def save(folder: str | Path, model: Any, state: dict[str, Tensor]) -> None:
    """Write adapters and what trained beside them; adapter_config.json, by which the folder is known, comes last."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    adapters = {PREFIX + name.replace(f".{ADAPTER}.", "."): t for name, t in state.items() if not is_outside(name)}
    others = {PREFIX + name: tensor for name, tensor in state.items() if is_outside(name)}
    for name, tensors in ((WEIGHTS, adapters), (OTHERS, others)):
        with replacing(folder / f"{name}.safetensors") as temporary:
            save_file(tensors, temporary, metadata={"format": "pt"})
    with replacing(folder / f"{OTHERS}.bin") as temporary:
        torch.save(others, temporary)
    config = model.peft_config[ADAPTER]
    trains, config.inference_mode = config.inference_mode, True
    try:
        _save_config(folder, config)
    finally:
        config.inference_mode = trains


def _save_config(folder: Path, config: Any) -> None:
    values = {k: sorted(v) if isinstance(v, set) else getattr(v, "value", v) for k, v in config.to_dict().items()}
    write_json(folder / CONFIG, values)


# -- reading ----------------------------------------------------------------------------------------------------------


def read_config(path: str) -> Any:
    """peft's LoraConfig of the folder; `UserError` for another kind of adapter, or one that cannot be read."""
    from peft import LoraConfig

    where = os.path.join(path, CONFIG)
    values = read_json(where, "training with --lora_enable True")
    kind = values.get("peft_type") if isinstance(values, dict) else None
    if kind != "LORA":
        raise UserError(f"{where}: holds adapters of peft_type {kind!r}; only LORA is read")
    if values.get("modules_to_save"):
        raise UserError(f"{where}: modules_to_save is not supported; what trains in full goes to {OTHERS}.bin")
    try:
        config = LoraConfig.from_pretrained(path)
    except (TypeError, ValueError, KeyError) as error:
        raise UserError(f"{where}: not a LoRA configuration ({' '.join(str(error).split())})") from error
    if config.exclude_modules is None and not isinstance(config.target_modules, str):
        config.exclude_modules = OUTSIDE
    return config


def base_of(path: str, given: str | None) -> str:
    """The model that the adapters in `path` were trained on: `given`, or the one that the folder remembers.

    `UserError` where there is none, or it is not there.
    """
    values = read_json(os.path.join(path, CONFIG), "training with --lora_enable True")
    base = given or values.get("base_model_name_or_path")
    if not base:
        raise UserError(f"adapter {path}: does not say on which model it was trained; name it with --model-base")
    base = str(base)
    if not os.path.isdir(base) and (base.startswith((".", "/", "~")) or base.count("/") != 1):
        said = "--model-base names" if given else "it was trained on"
        mend = "give an existing folder" if given else "name the model with --model-base"
        raise UserError(f"adapter {path}: {said} {base}, which is not there; {mend}")
    if os.path.isdir(base) and is_adapter(base):
        raise UserError(f"adapter {path}: its base {base} is an adapter itself; merge it first (llava-sv convert)")
    return base


SAME_SHAPE = ("hidden_size", "num_hidden_layers", "intermediate_size", "num_attention_heads", "vocab_size")


def check_base(path: str, base: str, config: Any, base_config: dict[str, Any]) -> None:
    """`UserError` where the base is of another shape than the model that the adapters were trained on.

    config: the adapter folder's; base_config: what config.json of the base holds.
    """
    kind, base_kind = (str(t).removeprefix("llava_") for t in (config.model_type, base_config.get("model_type")))
    names = {"qwen": "qwen2", "llava": "llama"}
    if names.get(kind, kind) != names.get(base_kind, base_kind):
        raise UserError(f"adapter {path}: was trained on a {kind} model, but its base {base} is a {base_kind} model")
    for name in SAME_SHAPE:
        was, now = getattr(config, name, None), base_config.get(name)
        if was is not None and now is not None and was != now:
            raise UserError(
                f"adapter {path}: was trained on a model with {name} {was}, but its base {base} has {now}; "
                "name the right one with --model-base"
            )


def weights_file(path: str, name: str) -> str | None:
    """The file of `name` (`WEIGHTS` or `OTHERS`) in the folder, safetensors first."""
    files = (os.path.join(path, f"{name}.{kind}") for kind in ("safetensors", "bin"))
    return next((file for file in files if os.path.isfile(file)), None)


def read_state(path: str, whole_projector: bool = True) -> dict[str, Tensor]:
    """Parameter name in a model with adapters -> weight, of all that the folder holds.

    whole_projector: without the projector's file it is a `UserError`.
    """
    files = {name: weights_file(path, name) for name in (WEIGHTS, OTHERS)}
    if files[WEIGHTS] is None:
        raise UserError(f"adapter {path}: has no {WEIGHTS}.safetensors or .bin; was it copied as a whole?")
    if files[OTHERS] is None and whole_projector:
        raise UserError(
            f"adapter {path}: has no {OTHERS}.bin, which holds the projector; was it copied as a whole, "
            "or is its base a whole LLaVA (--model-base)?"
        )
    state: dict[str, Tensor] = {}
    for file in files.values():
        for key, tensor in (read_weights(file) if file else {}).items():
            state[_name_of(key)] = tensor
    return state


def _name_of(key: str) -> str:
    """A file's key as a parameter's name: without peft's prefix, with the adapter's name."""
    name = key[len(PREFIX) :] if key.startswith(PREFIX) else key.removeprefix("base_model.")
    name = OUR_NEWLINE if name == NEWLINE else name
    return re.sub(r"\.(lora_[A-Za-z_]+)(\.weight)?$", rf".\1.{ADAPTER}.weight", name)


def load_state(model: Any, path: str, whole_projector: bool = True) -> None:
    """Load the folder's weights into a model whose adapters are in place. Each takes the file's precision if it is an
    adapter's, else keeps its own.

    `UserError` names weights that the model lacks, that the folder lacks, or whose shapes differ.
    """
    state = read_state(path, whole_projector)
    wanted = dict(model.named_parameters())
    extra = sorted(name for name in state if name not in wanted)
    must = {name for name in wanted if f".{ADAPTER}." in name or (whole_projector and PROJECTOR_KEY in name)}
    missing = sorted(must - set(state))
    for names, what in ((missing, "lacks"), (extra, "has, unlike the model,")):
        if names:
            raise UserError(
                f"adapter {path}: {what} {len(names)} weight(s), {names[0]} first; does {CONFIG} belong to these "
                "weights, and are rank, layers and base those it was trained with?"
            )
    with torch.no_grad(), gathered([wanted[name] for name in state]):
        for name, tensor in state.items():
            target = wanted[name]
            if not target.numel():  # another rank of ZeRO-3 holds it
                continue
            if target.shape != tensor.shape:
                raise UserError(
                    f"adapter {path}: {name} has shape {list(tensor.shape)}, the model wants {list(target.shape)}"
                )
            target.copy_(tensor)
    model.brought_by_adapters = set(state)  # an encoder that trained earlier and is frozen now must not get lost


def attach_saved(model: Any, path: str, whole_projector: bool = True) -> None:
    """Put the folder's adapters into `model`, in the precision they were saved in, with what trained beside them."""
    config = read_config(path)
    config.inference_mode = True
    try:
        inject(model, config)
    except ValueError as error:
        raise UserError(f"adapter {path}: fits no layer of its base ({str(error).splitlines()[0]})") from error
    state = read_state(path, whole_projector)
    for name, parameter in model.named_parameters():
        if f".{ADAPTER}." in name and name in state:
            parameter.data = parameter.data.to(state[name].dtype)
    load_state(model, path, whole_projector)
    model.requires_grad_(False)
