"""Flags of parameter-efficient training, declared and checked by themselves: LLaVA's names and values.

`arguments.ModelArguments` is built upon them, so a command line ends here; `train.lora` acts on them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from llava_sv.errors import UserError

BIASES = ("none", "all", "lora_only")
BITS = (16, 8, 4)
QUANT_TYPES = ("nf4", "fp4")
DEFAULTS = {"lora_r": 64, "lora_alpha": 16, "lora_dropout": 0.05, "lora_bias": "none"}
"""What a LoRA run takes where its flags are silent; None as a flag's value tells that it was not given."""


def _flag(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass
class LoraArguments:
    """Adapters on the language model, and the precision of the frozen weights below them."""

    lora_enable: bool = _flag(False, "Train low-rank adapters on the language model; its own weights stay as they are.")
    lora_r: int | None = _flag(None, "LoRA: rank of each adapter [64].")
    lora_alpha: int | None = _flag(None, "LoRA: an adapter's output is weighted by alpha / r [16].")
    lora_dropout: float | None = _flag(None, "LoRA: dropout before each adapter [0.05].")
    lora_bias: str | None = _flag(
        None, "LoRA: biases of the language model that train: none, all, lora_only (of adapted layers) [none]."
    )
    lora_target_modules: str | None = _flag(
        None, "LoRA: linear layers of the decoder to adapt, by name, such as q_proj,v_proj [all of them]."
    )
    lora_weight_path: str | None = _flag(
        None, "LoRA: an adapter folder to start from, its projector included (same rank and layers)."
    )
    bits: int = _flag(16, "Frozen weights of the language model: 16, or 8 or 4 bits (QLoRA; CUDA and bitsandbytes).")
    double_quant: bool | None = _flag(None, "--bits 4: quantise the quantisation's constants too [True].")
    quant_type: str | None = _flag(None, "--bits 4: nf4 or fp4 [nf4].")

    def check_lora(self) -> None:
        """`UserError` for values that are out of range, and for flags that go with another one which is not there."""
        if self.bits not in BITS:
            raise UserError(f"--bits: expected 16, 8 or 4, got {self.bits}")
        if not self.lora_enable:
            self._refuse_without_lora()
        if getattr(self, "tune_mm_mlp_adapter", False) and self.lora_enable:
            raise UserError("--tune_mm_mlp_adapter trains the projector alone: drop it or --lora_enable")
        if self.lora_r is not None and self.lora_r < 1:
            raise UserError(f"--lora_r: expected a rank of 1 or more, got {self.lora_r}")
        if self.lora_alpha is not None and self.lora_alpha < 1:
            raise UserError(f"--lora_alpha: expected 1 or more, got {self.lora_alpha}")
        if self.lora_dropout is not None and not 0 <= self.lora_dropout < 1:
            raise UserError(f"--lora_dropout: expected a share from 0 to below 1, got {self.lora_dropout}")
        for name, value, known in (
            ("lora_bias", self.lora_bias, BIASES),
            ("quant_type", self.quant_type, QUANT_TYPES),
        ):
            if value is not None and value not in known:
                raise UserError(f"--{name}: unknown {value!r}; known: {', '.join(known)}")
        for name in ("double_quant", "quant_type"):
            if getattr(self, name) is not None and self.bits != 4:
                raise UserError(f"--{name} is for --bits 4: add it, or drop the flag")
        if self.lora_target_modules is not None and not self.lora_targets():
            raise UserError("--lora_target_modules: names no layer; write names with commas, such as q_proj,v_proj")
        if self.lora_weight_path and getattr(self, "pretrain_mm_mlp_adapter", None):
            raise UserError(
                "--lora_weight_path brings its projector along: drop it or --pretrain_mm_mlp_adapter "
                "(scripts/v1_5/finetune_skip_lora.sh does so with LORA_WEIGHTS)"
            )

    def _refuse_without_lora(self) -> None:
        for name in (*DEFAULTS, "lora_target_modules", "lora_weight_path"):
            if getattr(self, name) not in (None, ""):
                raise UserError(f"--{name} without --lora_enable True: add it, or drop the flag")
        if self.bits != 16:
            raise UserError(f"--bits {self.bits}: quantised weights cannot train by themselves; add --lora_enable True")

    def lora_targets(self) -> list[str]:
        """The layers that `--lora_target_modules` names; empty: all."""
        return [name.strip() for name in (self.lora_target_modules or "").split(",") if name.strip()]

    def lora_value(self, name: str) -> Any:
        """The value of a flag of `DEFAULTS`."""
        given = getattr(self, name)
        return DEFAULTS[name] if given is None else given

    def lora_settings(self) -> dict[str, Any] | None:
        """What makes two LoRA runs the same run, as JSON keeps it; None without LoRA."""
        if not self.lora_enable:
            return None
        settings = {name.removeprefix("lora_"): self.lora_value(name) for name in DEFAULTS}
        settings |= {"target_modules": sorted(self.lora_targets()), "weight_path": self.lora_weight_path or None}
        if self.bits != 16:
            settings["bits"] = self.bits
        if self.bits == 4:
            settings |= {"double_quant": self.double_quant is not False, "quant_type": self.quant_type or "nf4"}
        return settings
