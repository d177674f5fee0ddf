"""A folder of adapters and its base to one whole checkpoint in the usual layout.

Called by `release.convert`. Weights are added on the CPU in the wider precision of adapter and base, and kept in the
base's.
"""

from __future__ import annotations

from pathlib import Path

from llava_sv.errors import UserError
from llava_sv.model.adapters import CONFIG, base_of, is_adapter
from llava_sv.model.builder import load_pretrained_model
from llava_sv.release.folders import check_output, replacing_folder


def merge_lora(adapter: str, base: str | None, output: str, force: bool = False) -> None:
    """Write `output`: weights, config, tokenizer, image processor, as full fine-tuning leaves them.

    base: the model that the adapters were trained on; default: the one that they remember. Raises `UserError` for what
    does not fit together, and for an `output` that exists without `force`.
    """
    if not is_adapter(adapter):
        raise UserError(f"--merge-lora {adapter}: no {CONFIG} there; give the folder that a LoRA run wrote")
    base = base_of(adapter, base)
    check_output(Path(output), {"the adapter": adapter, "the base": base, "the current folder": "."}, force)
    tokenizer, model, image_processor, _ = load_pretrained_model(adapter, base, device="cpu", device_map=None)
    model.config.use_cache = True
    with replacing_folder(Path(output)) as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        image_processor.save_pretrained(folder)
    print(f"{output}: {adapter} merged into its base; load it as any checkpoint")
