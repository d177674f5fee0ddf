"""A process of its own: checkpoints loaded by transformers alone, their answers to stdin's questions written to a file.

    python -I without_package.py WHAT ANSWERS FOLDER...

WHAT is `without` (llava_sv cannot be imported, nor what only training needs) or `both` (it is imported after the
folder's own code, and asked too). Run by test_self_contained.py; it imports nothing of the package by itself.
"""

import json
import sys

ONLY_TRAINING = ("accelerate", "datasets", "deepspeed", "matplotlib", "peft", "pyarrow")
COLOURS = ("red", "blue", "green")
SIZES = ((40, 30), (32, 32), (90, 20))


def questions():
    """Two ragged conversations in transformers' form, one with two pictures."""
    from PIL import Image

    red, blue, wide = ({"type": "image", "image": Image.new("RGB", s, c)} for s, c in zip(SIZES, COLOURS))
    text = [{"type": "text", "text": words} for words in ("is it red?", "a circle</s> <image> is", "yes")]
    return [
        [{"role": "user", "content": [red, text[0]]}],
        [
            {"role": "user", "content": [blue, wide, text[1]]},
            {"role": "assistant", "content": "blue"},
            {"role": "user", "content": [text[2]]},
        ],
    ]


def answers(folder, **options):
    """Everything that must be the same with and without the package, by plain Auto classes."""
    import torch
    from transformers import AutoModelForImageTextToText, AutoProcessor

    processor = AutoProcessor.from_pretrained(folder, **options)
    model = AutoModelForImageTextToText.from_pretrained(folder, **options).eval()
    inputs = processor.apply_chat_template(
        questions(), add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    with torch.no_grad():
        found = {"logits": model(**inputs).logits, "input_ids": inputs["input_ids"], "images": inputs["images"]}
    for level in ("none", "skipped"):
        found[level] = model.generate(**inputs, max_new_tokens=5, min_new_tokens=5, do_sample=False, skip_kv=level)
    found["text"] = processor.batch_decode(found["skipped"], skip_special_tokens=True)
    found["modules"] = [type(part).__module__ for part in (processor, model, model.config)]
    return found


def saved_again(folder, out):
    """Model and processor, loaded by the folder's code and saved into `out`: loaded from there, by each Auto class."""
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor

    for kind in (AutoModelForImageTextToText, AutoProcessor):
        kind.from_pretrained(folder, trust_remote_code=True).save_pretrained(out)
    kinds = (AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor)
    return [type(kind.from_pretrained(out, trust_remote_code=True)).__module__ for kind in kinds]


def refused(folder):
    """What each Auto class says without the flag, and that no line of the folder's code has run."""
    from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

    said = []
    for kind in (AutoConfig, AutoModelForImageTextToText, AutoProcessor):
        try:
            kind.from_pretrained(folder, trust_remote_code=False)
        except ValueError as error:
            said.append(str(error))
    assert not [name for name in sys.modules if name.startswith("transformers_modules.")]
    return said


def main():
    what, out, *folders = sys.argv[1:]
    if what == "without":
        for name in ("llava_sv", *ONLY_TRAINING):
            sys.modules[name] = None
    import torch

    found = {"refused": refused(folders[0]), "without": [answers(one, trust_remote_code=True) for one in folders]}
    if what == "both":
        found["saved again"] = saved_again(folders[0], f"{out}.saved")
        import llava_sv

        found["package"] = [answers(one) for one in folders]
        found["package, flag"] = [answers(one, trust_remote_code=True) for one in folders]
        found["version"] = llava_sv.__version__
    found["imported"] = sorted({name.split(".")[0] for name in sys.modules if sys.modules[name] is not None})
    torch.save(found, out)
    print(json.dumps(found["imported"]))


if __name__ == "__main__":
    main()
