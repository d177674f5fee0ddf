"""QLoRA where it can run: a CUDA device and bitsandbytes."""

import pytest
import torch

from llava_sv.model import adapters
from llava_sv.model.builder import load_pretrained_model
from llava_sv.train.metrics import read_metrics
from tests.train.lora_runs import LORA, logits, run

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize(("bits", "kind"), [("4", "Linear4bit"), ("8", "Linear8bitLt")])
def test_qlora_trains_saves_and_loads(world, tmp_path, bits, kind):
    pytest.importorskip("bitsandbytes")
    argv = world.flags("skip", tmp_path, *LORA, "--bf16", "True", "--bits", bits, "--gradient_checkpointing", "True")
    argv[argv.index("--use_cpu") + 1] = "False"
    model, printed = run(argv)
    quantised = {name for name, module in model.named_modules() if type(module).__name__ == kind}
    assert len(quantised) == 14
    assert all(name.startswith("model.layers.") for name in quantised)
    assert {p.dtype for name, p in model.named_parameters() if p.requires_grad} == {torch.float32}
    assert "language model            37,856 parameters, 0 train" in printed
    losses = [row["loss"] for row in read_metrics(tmp_path / "metrics.jsonl")]
    assert len(losses) == 4
    assert all(0 < loss < 10 for loss in losses)
    _, merged, processor, _ = load_pretrained_model(str(tmp_path), device="cuda")
    _, beside, processor, _ = load_pretrained_model(str(tmp_path), **{f"load_{bits}bit": True})
    assert adapters.is_attached(beside)
    assert (logits(beside, processor) - logits(merged, processor)).abs().mean() < 0.1
