"""What LLaVA's config.json leaves open: its conversation template, and whether the hub that it names can be asked."""

from __future__ import annotations

import socket

from llava_sv.model.checkpoint_io import out_of_reach
from llava_sv.model.llava_layout import likely_template
from tests.model.liuhaotian import V15, V16, V16_MISTRAL


def test_a_hub_that_may_be_asked(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("llava_sv.model.checkpoint_io.getproxies", dict)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_: [()])
    assert not out_of_reach()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert out_of_reach()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_: (_ for _ in ()).throw(OSError()))
    assert out_of_reach()
    monkeypatch.setattr("llava_sv.model.checkpoint_io.getproxies", lambda: {"https": "http://proxy:3128"})
    assert not out_of_reach(), "a proxy may know the name"


def test_the_template_follows_the_language_model():
    assert likely_template(V15) == "v1"
    assert likely_template(V16_MISTRAL) == "mistral_instruct"
    assert likely_template(V16 | {"vocab_size": 64000}) == "chatml"
    assert likely_template(V15 | {"vocab_size": 128256}) == "llama_3"
    assert likely_template(V15 | {"_name_or_path": "meta-llama/Llama-2-13b-chat-hf"}) == "llama_2"
