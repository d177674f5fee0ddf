"""Train the tiny CLIP on toy pictures and their captions.

What arrives are a tokenizer and a number of steps; what leaves is a `CLIPModel` and its figures. `make_bases.py` calls
it. Three losses: (1) contrastive, CLS against captions, as CLIP's; (2) dense: each patch of the layer that LLaVA reads
(the last but one) names the colour, shape, quadrant or word it is part of, through linear heads that are thrown away;
(3) saliency: at that layer the cosine of a patch and CLS tells whether the patch is among those that show something,
which is what Skip-Vision's selection by likeness to CLS asks of an encoder.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from patches import GRID, NOTHING, WORD, patch_owners
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPConfig, CLIPModel, PreTrainedTokenizerFast

from llava_sv.data.toy_scene import COLOURS, PLACES, SHAPES, WORDS, Scene, describe, random_scene, render

SIZE = 64
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
"""OpenAI CLIP's."""

IGNORE = -100
HEADS = {"kind": 3, "colour": len(COLOURS), "shape": len(SHAPES), "place": len(PLACES), "word": len(WORDS)}


def make_clip(tokenizer: PreTrainedTokenizerFast) -> CLIPModel:
    """A CLIP of width 128: 5 vision layers on 64 patches of 8 pixels, 2 text layers."""
    shared = {"hidden_size": 128, "num_attention_heads": 4, "hidden_act": "quick_gelu", "projection_dim": 128}
    text = {
        "vocab_size": len(tokenizer),
        "num_hidden_layers": 2,
        "intermediate_size": 256,
        "max_position_embeddings": 77,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    vision = {"num_hidden_layers": 5, "intermediate_size": 512, "image_size": SIZE, "patch_size": SIZE // GRID}
    return CLIPModel(CLIPConfig(text_config=shared | text, vision_config=shared | vision, projection_dim=128))


def picture(scene: Scene) -> np.ndarray:
    """The scene as the image processor would hand it over before normalising: padded square, [64, 64, 3] uint8."""
    image = render(scene)
    side = max(image.size)
    square = Image.new("RGB", (side, side), tuple(int(255 * m) for m in MEAN))
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return np.asarray(square.resize((SIZE, SIZE), Image.Resampling.BICUBIC))


def normalise(pixels: Tensor) -> Tensor:
    """[B, 64, 64, 3] uint8 -> [B, 3, 64, 64] float."""
    mean, std = torch.tensor(MEAN), torch.tensor(STD)
    return ((pixels.float() / 255 - mean) / std).permute(0, 3, 1, 2).contiguous()


@dataclass
class Pictures:
    """pixels [S, 64, 64, 3] uint8; captions; salient [S, 64] bool; labels: head -> [S, 64] int, `IGNORE` if none."""

    pixels: Tensor
    captions: list[str]
    salient: Tensor
    labels: dict[str, Tensor]


def draw_pictures(count: int, seed: int) -> Pictures:
    """Draw `count` scenes and label their patches."""
    rng = random.Random(seed)
    scenes = [random_scene(rng) for _ in range(count)]
    owners, salient = (np.stack(part) for part in zip(*(patch_owners(s) for s in scenes), strict=True))
    labels = {name: np.full((count, GRID * GRID), IGNORE) for name in HEADS}
    labels["kind"] = np.select([owners == NOTHING, owners == WORD], [0, 2], default=1)
    for i, scene in enumerate(scenes):
        for j, shape in enumerate(scene.shapes):
            mine = owners[i] == j
            labels["colour"][i, mine] = list(COLOURS).index(shape.colour)
            labels["shape"][i, mine] = SHAPES.index(shape.shape)
            labels["place"][i, mine] = shape.place
        if scene.word:
            labels["word"][i, owners[i] == WORD] = WORDS.index(scene.word)
    return Pictures(
        torch.from_numpy(np.stack([picture(s) for s in scenes])),
        [describe(s) for s in scenes],
        torch.from_numpy(salient),
        {name: torch.from_numpy(label) for name, label in labels.items()},
    )


class Lessons(nn.Module):
    """The linear heads and the scale of saliency; thrown away after training."""

    def __init__(self, width: int = 128):
        super().__init__()
        self.heads = nn.ModuleDict({name: nn.Linear(width, classes) for name, classes in HEADS.items()})
        self.sharpness = nn.Parameter(torch.tensor(8.0))
        self.offset = nn.Parameter(torch.tensor(-2.0))

    def forward(self, hidden: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """hidden [B, 1 + 64, C] -> logits of each head [B, 64, classes], saliency logits [B, 64]."""
        cls, patches = hidden[:, :1], hidden[:, 1:]
        saliency = self.sharpness * F.cosine_similarity(cls, patches, dim=-1) + self.offset
        return {name: head(patches) for name, head in self.heads.items()}, saliency


def _encode(model: CLIPModel, tokenizer: PreTrainedTokenizerFast, pixels: Tensor, captions: list[str]):
    """-> image embeddings [B, 128], text embeddings [B, 128], hidden state of the last layer but one [B, 65, 128]."""
    vision = model.vision_model(pixel_values=normalise(pixels), output_hidden_states=True)
    text = tokenizer([c + tokenizer.eos_token for c in captions], padding=True, return_tensors="pt")
    pooled = model.text_model(input_ids=text.input_ids, attention_mask=text.attention_mask).pooler_output
    image = F.normalize(model.visual_projection(vision.pooler_output), dim=-1)
    return image, F.normalize(model.text_projection(pooled), dim=-1), vision.hidden_states[-2]


def train_clip(
    tokenizer: PreTrainedTokenizerFast,
    steps: int,
    seed: int,
    save: Callable[[CLIPModel], None],
    model: CLIPModel | None = None,
    pictures: int = 40000,
    batch_size: int = 64,
) -> CLIPModel:
    """Train on `pictures` pictures, from `model` or from nothing; `save` is called at times."""
    torch.manual_seed(seed)
    start = time.time()
    data, held_out = draw_pictures(pictures, seed), draw_pictures(512, 10**6)
    print(f"clip: drew {pictures} pictures in {time.time() - start:.0f}s", flush=True)
    model, lessons = (model or make_clip(tokenizer)).train(), Lessons()
    parameters = [*model.parameters(), *lessons.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, betas=(0.9, 0.98), weight_decay=0.02)

    def rate(step: int) -> float:
        return min(1.0, (step + 1) / 150) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / steps)))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    totals: dict[str, float] = {}
    for step in range(1, steps + 1):
        chosen = torch.randint(0, pictures, (batch_size,))
        losses = _losses(model, lessons, tokenizer, data, chosen)
        optimizer.zero_grad(set_to_none=True)
        sum(losses.values()).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        totals = {name: totals.get(name, 0.0) + loss.item() for name, loss in losses.items()}
        if step % 100 == 0:
            means = " ".join(f"{name} {total / 100:.3f}" for name, total in totals.items())
            print(f"clip step {step} {means} {time.time() - start:.0f}s", flush=True)
            totals = {}
        if step % 500 == 0 or step == steps:
            print("clip", clip_figures(model, lessons, tokenizer, held_out), flush=True)
            save(model)
    return model.eval()


def _losses(model: CLIPModel, lessons: Lessons, tokenizer: PreTrainedTokenizerFast, data: Pictures, chosen: Tensor):
    rows = chosen.tolist()
    image, text, hidden = _encode(model, tokenizer, data.pixels[chosen], [data.captions[i] for i in rows])
    logits = model.logit_scale.exp().clamp(max=100) * image @ text.T
    own = torch.arange(len(rows))
    named, saliency = lessons(hidden)
    losses = {
        "contrastive": 0.5 * 0.5 * (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)),
        "saliency": F.binary_cross_entropy_with_logits(saliency, data.salient[chosen].float()),
    }
    for name, scores in named.items():
        labels = data.labels[name][chosen]
        losses[name] = F.cross_entropy(scores.flatten(0, 1), labels.flatten(), ignore_index=IGNORE)
    return losses


@torch.no_grad()
def clip_figures(model: CLIPModel, lessons: Lessons, tokenizer: PreTrainedTokenizerFast, data: Pictures) -> dict:
    """Held-out: patch accuracy of each head, recall of owners in the top 16 by likeness to CLS, retrieval at 1."""
    model.eval()
    image, text, hidden = _encode(model, tokenizer, data.pixels, data.captions)
    named, saliency = lessons(hidden)
    figures = {}
    for name, scores in named.items():
        labels = data.labels[name]
        figures[name] = (scores.argmax(-1) == labels)[labels != IGNORE].float().mean().item()
    top = saliency.topk(16, dim=-1).indices
    kept = torch.zeros_like(data.salient).scatter(1, top, True)
    figures["salient_kept"] = (kept & data.salient).sum().item() / data.salient.sum().item()
    nearest = (image @ text.T).argmax(-1).tolist()
    figures["retrieval"] = sum(data.captions[i] == data.captions[j] for i, j in enumerate(nearest)) / len(nearest)
    model.train()
    return {name: round(value, 3) for name, value in figures.items()}
