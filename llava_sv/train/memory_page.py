"""A memory plan as the page that a person reads. Called by `memory_plan`, which makes the plan."""

from __future__ import annotations

from typing import Any

from llava_sv.constants import GIB


def render(plan: dict[str, Any]) -> str:
    """The page a person reads."""
    model, run, device = plan["model"], plan["run"], plan["device"]
    kinds = list(model["sequence"])
    lines = ["memory plan: no weights were read, nothing was run", ""]
    for part, (total, trained) in model["parameters"].items():
        lines.append(f"  {part:<24} {total:>16,} parameters, {trained:,} train")
    lengths = ", ".join(f"{kind} {length}" for kind, length in model["sequence"].items())
    lines.append(f"  {'tokens a sample':<24} {model['text_tokens']} of text and an image: {lengths}")
    lines.append(f"  {'batch':<24} {run['batch']} a device x {run['world_size']} x {run['accumulation']} accumulated")
    lines.append(f"  {'checkpointing':<24} {'on' if run['checkpointing'] else 'off'}")
    lines += ["", f"GiB a device        {''.join(f'{kind:>12}' for kind in kinds)}{'on the host':>14}"]
    for row in plan["rows"]:
        figures = "".join(f"{row[kind]['device_bytes'] / GIB:>12.1f}" for kind in kinds)
        host = row[kinds[-1]]["host_bytes"] / GIB
        mark = "  <- this command" if row["own"] else ""
        lines.append(f"  {_short(row['layout']):<18}{figures}{host:>14.1f}{mark}")
    own = next(row for row in plan["rows"] if row["own"])
    lines += ["", f"{run['layout']}, part by part, GiB at the worst moment"]
    names = dict.fromkeys(name for kind in kinds for name in _breakdown(own[kind]))
    for name in names:
        lines.append(f"  {name:<34}" + "".join(f"{_breakdown(own[kind]).get(name, 0) / GIB:>10.2f}" for kind in kinds))
    lines.append(f"  {'the moment':<34}" + "".join(f"  {kind}: {own[kind]['phase']}" for kind in kinds))
    return "\n".join([*lines, "", *_advice_lines(plan, device)])


def _short(layout: str) -> str:
    return layout.replace("optimizer and weights on the host", "offload").replace("optimizer on the host", "offload")


def _breakdown(facts: dict[str, Any]) -> dict[str, int]:
    """Parts, activations by module, then what is assumed for allocator and driver."""
    parts = {name: size for name, size in facts["parts"].items() if name != "activations"}
    parts |= {f"activations: {name}": size for name, size in facts["activations"].items()}
    return {**parts, "allocator and CUDA (assumed)": facts["device_bytes"] - facts["tensor_bytes"]}


def _advice_lines(plan: dict[str, Any], device: dict[str, Any]) -> list[str]:
    advice, run = plan["advice"], plan["run"]
    verdict = "fits" if advice["fits"] else "does not fit"
    lines = [f"{device['gib']:g} GiB a device ({device['from']}): this command {verdict}."]
    if not advice["batch"]:
        return lines
    suggested = (
        f"Largest that fits: --per_device_train_batch_size {advice['batch']} --gradient_checkpointing "
        f"{advice['checkpointing']}"
    )
    if run["global_batch"] is not None:
        suggested += (
            f" --gradient_accumulation_steps {advice['accumulation']} (a global batch of {run['global_batch']})"
        )
        suggested += f"; scripts: PER_DEVICE_BATCH={advice['batch']} CHECKPOINTING={advice['checkpointing']}"
    return [*lines, suggested]
