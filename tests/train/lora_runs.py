"""For the tests of LoRA: a run that keeps its model, its weights before, and logits of a model with a picture."""

import contextlib
import io

import pytest
import torch
from PIL import Image
from transformers import set_seed

from llava_sv.constants import IMAGE_TOKEN_INDEX
from llava_sv.mm_utils import process_images
from llava_sv.train import build, lora
from llava_sv.train import train as entry
from llava_sv.train.flags import parse

FAMILIES = {
    "llava": [],
    "llava_hd": ["--hd_max_tiles", "2", "--sv_num_retained", "16", "--sv_num_skipped", "6"],
    "cos": [
        *("--mm_projector_type", "cos_336", "--mm_vision_image_size", "64", "--unfreeze_mm_vision_tower", "True"),
        *("--sv_num_retained", "80", "--sv_num_skipped", "6", "--model_max_length", "1024"),
    ],
}
LORA = ["--lora_enable", "True", "--lora_r", "4", "--lora_alpha", "8", "--max_steps", "4"]


def built(argv):
    """(model, arguments) as training builds them, before the first step."""
    model_args, data_args, args = parse(argv)
    set_seed(args.seed)
    _, model, _ = build.build(model_args, data_args, args)
    build.choose_trainable(model, model_args)
    lora.attach(model, model_args, args)
    return model, model_args, args


def run(argv):
    """(the model as it trained, what was printed)."""
    kept = []
    finish = entry.finish
    out = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out):
        patch.setattr(entry, "finish", lambda trainer, *rest: (kept.append(trainer.model), finish(trainer, *rest)))
        assert entry.train(argv=argv) == 0
    return (kept[0] if kept else None), out.getvalue()


def logits(model, image_processor):
    """[T, K] of a prompt with one picture, in float32."""
    picture = Image.new("RGB", (40, 60), (200, 30, 60))
    device = model.get_model().embed_tokens.weight.device
    pixels = [views.to(device) for views in process_images([picture], image_processor, model.config)]
    ids = torch.tensor([[3, 40, IMAGE_TOKEN_INDEX, 41, 50, 60, 70]], device=device)
    model.eval()
    with torch.no_grad():
        return model(input_ids=ids, images=pixels, image_sizes=[picture.size]).logits[0].float().cpu()
