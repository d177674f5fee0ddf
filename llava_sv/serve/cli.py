"""`llava-sv chat`: talk with a checkpoint about images; answers stream as they are made.

Called by `llava_sv.cli`. Without `--prompt` it asks again and again; the conversation so far goes along each time.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

from PIL import Image
from transformers import TextStreamer

from llava_sv.errors import UserError
from llava_sv.generation import (
    Assistant,
    check_image_paths,
    decode,
    generate,
    load_for_inference,
    make_batch,
    user_turn,
)
from llava_sv.mm_utils import load_image
from llava_sv.model.token_groups import KV_LEVELS


def build_parser() -> argparse.ArgumentParser:
    """All flags of `llava-sv chat`."""
    parser = argparse.ArgumentParser(
        prog="llava-sv chat",
        description="Talk with a checkpoint about one or more images. /reset forgets the conversation, /exit leaves.",
        epilog="example: llava-sv chat --model-path checkpoints/tiny-skip --image-file "
        "playground/data/toy/images/bench-000000.jpg",
    )
    parser.add_argument(
        "--model-path", required=True, help="a checkpoint folder (a pretrained projector alone needs --model-base)"
    )
    parser.add_argument(
        "--model-base",
        help="language model of a lone projector, or base of LoRA adapters (default: theirs)",
    )
    parser.add_argument(
        "--vision-tower", help="folder of the encoder that the checkpoint names and does not hold (default: that name)"
    )
    parser.add_argument("--image-file", action="append", default=[], help="an image; give it again for more of them")
    parser.add_argument("--prompt", help="ask this once and leave, instead of a conversation")
    parser.add_argument("--system", help="system message (default: the template's)")
    parser.add_argument("--skip-kv", choices=list(KV_LEVELS), help="skip KV-cache level (default: the checkpoint's)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy (default: %(default)s)")
    parser.add_argument("--top-p", type=float, help="sample from the likeliest tokens of this total probability")
    parser.add_argument(
        "--num-beams", type=int, default=1, help="beams; more than one does not stream (default: %(default)s)"
    )
    parser.add_argument("--max-new-tokens", type=int, default=512, help="longest answer (default: %(default)s)")
    parser.add_argument("--conv-template", help="conversation template (default: the checkpoint's)")
    parser.add_argument("--attn-implementation", help="sdpa, eager, flash_attention_2 (default: the model's)")
    parser.add_argument("--device", help="cpu, cuda or cuda:N (default: cuda where there is one)")
    parser.add_argument("--load-8bit", action="store_true", help="8-bit weights (bitsandbytes, CUDA)")
    parser.add_argument("--load-4bit", action="store_true", help="4-bit weights (bitsandbytes, CUDA)")
    return parser


class Chat:
    """A conversation: its images, its turns so far, and how answers are drawn."""

    def __init__(
        self, assistant: Assistant, images: list[Image.Image], generation: dict[str, Any], skip_kv: str | None
    ):
        self.assistant = assistant
        self.images = images
        self.generation = generation
        self.skip_kv = skip_kv
        self.turns: list[dict[str, str]] = []
        self.system: str | None = None

    def reset(self) -> None:
        """Forget all turns; the images stay."""
        self.turns = []

    def ask(self, text: str, streamer: TextStreamer | None = None) -> str:
        """One turn. The images go before the first message. Returns the answer, which `streamer` has shown."""
        turns = [*self.turns, user_turn(text, 0 if self.turns else len(self.images))]
        batch = make_batch(self.assistant, [turns], [self.images], system=self.system)
        tokens = generate(self.assistant, batch, skip_kv=self.skip_kv, streamer=streamer, **self.generation)
        answer = decode(self.assistant, tokens)[0]
        self.turns = [*turns, {"from": "gpt", "value": answer}]
        return answer


def generation_settings(args: argparse.Namespace) -> dict[str, Any]:
    """transformers' settings for the flags; `UserError` for values that cannot be meant."""
    if args.temperature < 0:
        raise UserError(f"--temperature must be 0 or more, got {args.temperature}")
    if args.top_p is not None and args.temperature == 0:
        raise UserError("--top-p samples, and --temperature is 0; give a temperature above 0, such as 0.7")
    if args.max_new_tokens < 1:
        raise UserError(f"--max-new-tokens must be 1 or more, got {args.max_new_tokens}")
    if args.num_beams < 1:
        raise UserError(f"--num-beams must be 1 or more, got {args.num_beams}")
    settings: dict[str, Any] = {"max_new_tokens": args.max_new_tokens, "num_beams": args.num_beams}
    if args.temperature == 0:
        return {**settings, "do_sample": False}
    return {**settings, "do_sample": True, "temperature": args.temperature, "top_p": args.top_p or 1.0}


def converse(chat: Chat, make_streamer: Any) -> None:
    """Read messages from stdin until it ends or says /exit."""
    interactive = sys.stdin.isatty()
    while True:
        try:
            message = input("you: " if interactive else "").strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return
        if message == "/exit":
            return
        if message == "/reset":
            chat.reset()
            print("(forgotten)")
        elif message:
            _answer(chat, message, make_streamer)


def _answer(chat: Chat, message: str, make_streamer: Any) -> None:
    """Ask and show; beams cannot stream, so their answer is printed whole."""
    streamer = None if chat.generation["num_beams"] > 1 else make_streamer()
    answer = chat.ask(message, streamer)
    if streamer is None:
        print(answer, flush=True)


def main(argv: list[str]) -> int:
    """`llava-sv chat ...`."""
    args = build_parser().parse_args(argv)
    settings = generation_settings(args)
    paths = check_image_paths(args.image_file)
    images = [load_image(path) for path in paths]
    assistant = load_for_inference(
        args.model_path,
        args.model_base,
        conv_template=args.conv_template,
        device=args.device,
        vision_tower=args.vision_tower,
        attn_implementation=args.attn_implementation,
        load_8bit=args.load_8bit,
        load_4bit=args.load_4bit,
    )
    if images and not assistant.has_vision:
        raise UserError(f"{args.model_path} has no vision tower: it cannot be shown {args.image_file[0]}")
    chat = Chat(assistant, images, settings, args.skip_kv)
    chat.system = args.system

    def make_streamer() -> TextStreamer:
        return TextStreamer(assistant.tokenizer, skip_prompt=True, skip_special_tokens=True)

    if args.prompt is not None:
        _answer(chat, args.prompt, make_streamer)
    else:
        converse(chat, make_streamer)
    return 0
