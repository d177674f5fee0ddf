"""Under ZeRO-3 every rank must run the same modules in the same order, whatever is in its batch, or all wait for ever.

Held here in one process: the modules that start and end in a training step, those that gradient checkpointing runs
again (and leaves half-way, as soon as it has what it needs) among them.
"""

import pytest
import torch

from llava_sv.train import build
from llava_sv.train.flags import parse
from tests.train.tiny import SKIPPING


def built(world, *extra):
    model_args, data_args, args = parse(world.flags("skip", world.folder / "unused", *extra))
    _, model, _ = build.build(model_args, data_args, args)
    build.choose_trainable(model, model_args)
    return model.train()


def events_of_a_step(model, rows, views, packs=None):
    """(module, start or end) in order, of forward and backward. rows: ids of each sample; views: of each image."""
    side = model.config.vision_config["image_size"]
    width = max(map(len, rows))
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    mask = torch.tensor([[True] * len(row) + [False] * (width - len(row)) for row in rows])
    images = [torch.randn(count, 3, side, side) for count in views] or None
    sizes = [(2 * side, 2 * side) if count > 1 else (side, side) for count in views]
    events, hooks = [], []
    for name, module in model.named_modules():
        if next(module.parameters(recurse=False), None) is None:
            continue

        def log(what, name=name):
            return lambda *_: events.append((name, what))

        hooks += [module.register_forward_pre_hook(log("start")), module.register_forward_hook(log("end"))]
    labels = ids.masked_fill(~mask | (ids < 0), -100)
    model(
        input_ids=ids, attention_mask=mask, labels=labels, images=images, image_sizes=sizes, packs=packs
    ).loss.backward()
    for hook in hooks:
        hook.remove()
    return events


@pytest.mark.parametrize("family", SKIPPING)
@pytest.mark.parametrize("unfrozen", [False, True], ids=["frozen", "unfrozen"])
def test_the_same_modules_whatever_the_batch(world, family, unfrozen):
    model = built(world, *SKIPPING[family], "--unfreeze_mm_vision_tower", str(unfrozen))
    model.gradient_checkpointing_enable({"use_reentrant": False})
    most = 5 if family == "llava_hd" else 1
    batches = {
        "images": ([[5, -200, 6, 7], [5, -200, 6, 8]], [most, most]),
        "an image and a text": ([[5, -200, 6, 7], [5, 6, 7]], [most]),
        "images of one view": ([[5, -200, 6, 7], [5, 7]], [1]),
        "texts of one length": ([[5, 6, 7], [6, 7, 8]], []),
        "texts of two lengths": ([[5, 6, 7], [6, 7, 8, 9, 10]], []),
        "one text": ([[5, 6, 7]], []),
    }
    found = {name: events_of_a_step(model, *batch) for name, batch in batches.items()}
    model.set_attn_implementation("sdpa_varlen")
    found |= {
        f"{name}, packed": events_of_a_step(model, *batch, packs=[len(batch[0])]) for name, batch in batches.items()
    }
    assert len(found["images"]) > 100
    for name, events in found.items():
        assert events == found["images"], name
