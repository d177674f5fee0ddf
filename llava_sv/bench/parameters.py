"""How many parameters a model has, part by part, from its sizes alone; and the paper's Table 1, by formula.

Called by `counts` and `paper_table`; plain arithmetic, compared with real models by the tests. Biases of CLIP and of
the projector are counted; LLaMA has none (`checkpoint.parameters_of` counts a checkpoint's own, whatever its decoder).
C width, M FFN width, L layers, N tokens.
"""

from __future__ import annotations

from typing import Any

from llava_sv.bench.presets import EncoderSize, LlmSize, Setting


def llm_parameters(llm: LlmSize) -> dict[str, int]:
    """Of a LLaMA-shaped decoder and its output layer."""
    attention = 2 * llm.hidden_size * llm.head_dim * (llm.num_attention_heads + llm.num_key_value_heads)
    embedding = llm.vocab_size * llm.hidden_size
    return {
        "embedding": embedding,
        "attention": llm.num_hidden_layers * attention,
        "ffn": llm.num_hidden_layers * 3 * llm.hidden_size * llm.intermediate_size,
        "norms": (2 * llm.num_hidden_layers + 1) * llm.hidden_size,
        "lm_head": 0 if llm.tie_word_embeddings else embedding,
    }


def encoder_parameters(encoder: EncoderSize) -> int:
    """Of a CLIP vision transformer, the blocks and the norm after the selected layer included."""
    width, inner = encoder.hidden_size, encoder.intermediate_size
    block = 4 * (width**2 + width) + 2 * width * inner + inner + width + 4 * width
    embeddings = 3 * encoder.patch_size**2 * width + width + (encoder.patches + 1) * width
    return embeddings + encoder.num_layers * block + 4 * width


def projector_parameters(setting: Setting, llm_width: int) -> int:
    """Of the MLP, or of CoS' resampler: queries, and three norms, four linear layers and an MLP a level and scale."""
    width = setting.encoder.hidden_size
    if not setting.windows:
        first = width * llm_width + llm_width if setting.projector_depth else 0
        return first + max(setting.projector_depth - 1, 0) * (llm_width**2 + llm_width)
    attend = 6 * width + 4 * (width**2 + width) + (4 * width**2 + 4 * width) + (4 * width**2 + width)
    queries = sum(count for _, count in setting.windows) * width
    return queries + len(setting.windows) * setting.levels * attend + 2 * width + width * llm_width + llm_width


def parameters(llm: LlmSize, setting: Setting, summaries: int) -> dict[str, int]:
    """Of the whole model."""
    return {
        **llm_parameters(llm),
        "encoder": encoder_parameters(setting.encoder),
        "projector": projector_parameters(setting, llm.hidden_size),
        "summaries": summaries * llm.hidden_size,
    }


def table_1(llm: LlmSize, tokens: int) -> dict[str, dict[str, Any]]:
    """The paper's Table 1: parameters and multiply-adds of FFN, attention and embedding, and their shares.

    `share` is of all of the language model's parameters, which count an output layer beside the embedding;
    `flops_share` is of a layer's work on `tokens` positions. The table's complexity of attention's projections,
    1.5 N C^2, leaves out one of two C^2 (queries or outputs): its own parameter count has both, 2.5 C^2 a layer.
    """
    counts = llm_parameters(llm)
    whole, width = sum(counts.values()), llm.hidden_size
    layers = llm.num_hidden_layers
    work = {
        "ffn": tokens * counts["ffn"],
        "attention": tokens * counts["attention"] + 2 * layers * tokens**2 * llm.num_attention_heads * llm.head_dim,
        "embedding": 0,
    }
    formulas = {
        "ffn": f"{counts['ffn'] / layers / width**2:g} L N C^2",
        "attention": f"2 L N^2 C + {counts['attention'] / layers / width**2:g} L N C^2",
        "embedding": "-",
    }
    return {
        name: {
            "complexity": formulas[name],
            "multiply_adds": work[name],
            "flops_share": work[name] / sum(work.values()),
            "parameters": counts[name],
            "share": counts[name] / whole,
        }
        for name in work
    }
