"""`num_retained: auto`: the exact count against torch's own counter, with what the images really retained."""

from __future__ import annotations

import pytest
import torch

from llava_sv.bench.checkpoint import budget_of, llm_of, setting_of
from llava_sv.bench.clock import flop_counter
from llava_sv.bench.flops import Question
from llava_sv.bench.models import make_batch, make_pair
from llava_sv.bench.sizes import SIZES
from llava_sv.model.compression.adaptive import find_threshold
from llava_sv.model.config import SkipVisionConfig
from llava_sv.model.token_groups import TokenRole
from llava_sv.train.adaptive import scores_of

SIZE = SIZES["tiny"]["llava"]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def auto():
    """(model, batch): images of random pixels, whose scores differ little; bounds and threshold leave them a choice."""
    _, model = make_pair(SIZE, CPU, torch.float32)
    mean, skipped = SIZE.num_retained, SIZE.num_skipped
    bounds = {"retained_min": mean - 3, "retained_max": mean + 4}
    skip = SkipVisionConfig(num_retained="auto", num_skipped=skipped, retained_mean=mean, **bounds)
    model.config.skip_vision = model.get_model().mm_projector.skip = skip
    batch = make_batch(SIZE, CPU, torch.float32)
    skip.retained_threshold, _ = find_threshold(scores_of(model, iter(batch.images), CPU), skip)
    return model, batch


def test_the_ffn_ran_on_what_the_images_retained(auto):
    """Per layer, from torch's counter: text, retained and summary rows; the whole is the average image's within 1%."""
    model, batch = auto
    skip, llm = model.config.skip_vision, SIZE.llm
    model.eval()
    with torch.inference_mode():
        counts = [int((group.roles == TokenRole.RETAINED).sum()) for group in model.encode_images(batch.images)]
        with flop_counter() as counter:
            model(input_ids=batch.input_ids, images=batch.images, logits_to_keep=1)
    by_module = {module: sum(ops.values()) for module, ops in counter.get_flop_counts().items()}
    rows = SIZE.batch * (SIZE.text_tokens + 2) + sum(counts)
    for layer in range(llm.num_hidden_layers):
        ffn = next(flops for module, flops in by_module.items() if module.endswith(f"model.layers.{layer}.mlp"))
        assert ffn == rows * 6 * llm.hidden_size * llm.intermediate_size
    assert skip.retained_min <= min(counts) < max(counts) <= skip.retained_max
    config = model.config
    asked = Question("llava", None, setting_of(config), llm_of(config), budget_of(config), SIZE.text_tokens, 8)
    expected = SIZE.batch * asked.forward("skip", head_tokens=1)["total"]
    apart = sum(count - skip.mean_retained for count in counts)
    expected += apart * 6 * llm.hidden_size * llm.intermediate_size * llm.num_hidden_layers
    assert counter.get_total_flops() == pytest.approx(expected, rel=0.01)
