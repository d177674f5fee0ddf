"""The other end of `smoke`: a clean process that loads a release by transformers' Auto classes and asks it once.

Run as a file, `python -I smoke_worker.py JOB`, with the job's settings as JSON in JOB; it writes what it saw to the
job's `result`. It imports nothing of this project by itself: one way of loading is without it.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any


class Refusing:
    """An import finder that knows no package of `name`, wherever it is installed."""

    def __init__(self, name: str) -> None:
        self.name = name

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        """`ModuleNotFoundError` for the package and all that is in it."""
        if name == self.name or name.startswith(f"{self.name}."):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def load(job: dict[str, Any]) -> tuple[Any, Any, Any]:
    """(config, processor, model) by Auto classes."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    options: dict[str, Any] = {}
    kind = "AutoModelForCausalLM"
    if job["without"]:
        sys.meta_path.insert(0, Refusing(job["without"]))  # type: ignore[arg-type]
        options["trust_remote_code"] = True
    else:
        __import__(job["package"])
    config = transformers.AutoConfig.from_pretrained(job["folder"], **options)
    if job["without"] and "AutoModelForImageTextToText" in (getattr(config, "auto_map", None) or {}):
        kind = "AutoModelForImageTextToText"
    tokenizer = transformers.AutoTokenizer.from_pretrained(job["folder"], **options)
    processor = transformers.AutoProcessor.from_pretrained(job["folder"], **options)
    assert processor.tokenizer.get_vocab() == tokenizer.get_vocab(), "AutoTokenizer and AutoProcessor disagree"
    model = getattr(transformers, kind).from_pretrained(job["folder"], dtype="auto", **options)
    return kind, processor, model.eval().to(job["device"])


def ask(job: dict[str, Any], kind: str, processor: Any, model: Any) -> dict[str, Any]:
    """Logits against the job's, and the greedy answer."""
    import torch
    from PIL import Image
    from safetensors.torch import load_file

    content = [{"type": "image"}, {"type": "text", "text": job["question"]}]
    chat = [{"role": "user", "content": content}]
    prompt = processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    picture = Image.open(job["picture"]).convert("RGB")
    inputs = processor(text=[prompt], images=[picture], return_tensors="pt").to(job["device"])
    wanted = load_file(job["reference"])["logits"]
    with torch.inference_mode():
        logits = model(**inputs).logits[0].float().cpu()
        tokens = model.generate(**inputs, max_new_tokens=job["new_tokens"], do_sample=False)
    tokens = tokens[0].tolist()
    given = inputs["input_ids"][0].tolist()
    new = tokens[len(given) :] if tokens[: len(given)] == given else tokens
    seen: dict[str, Any] = {
        "loaded_by": kind,
        "class": f"{type(model).__module__.split('.')[0]}.{type(model).__name__}",
        "dtype": str(model.dtype).removeprefix("torch."),
        "text": processor.decode(new, skip_special_tokens=True),
        "shape": list(logits.shape),
    }
    if logits.shape == wanted.shape:
        seen["largest_difference"] = float((logits - wanted).abs().max())
    return seen


def main() -> None:
    """Do the job that the first argument names."""
    began = time.perf_counter()
    with open(sys.argv[1], encoding="utf-8") as file:
        job = json.load(file)
    sys.path[:0] = job["path"]
    import torch

    torch.set_num_threads(job["threads"])
    kind, processor, model = load(job)
    seen = ask(job, kind, processor, model)
    if job["without"] and job["without"] in sys.modules:
        raise ImportError(f"{job['without']} was imported all the same")
    seen["seconds"] = round(time.perf_counter() - began, 1)
    with open(job["result"], "w", encoding="utf-8") as file:
        json.dump(seen, file)


if __name__ == "__main__":
    main()
