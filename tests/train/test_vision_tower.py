"""The vision encoder trained in SFT: what of it trains, at which rate, what is saved; and CoS' two stages."""

import itertools
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from llava_sv.errors import UserError
from llava_sv.model.builder import load_pretrained_model
from llava_sv.train import build
from llava_sv.train.flags import parse
from llava_sv.train.llava_trainer import LLaVATrainer, split_parameters
from llava_sv.train.metrics import read_metrics
from llava_sv.train.train import main
from tests.train import runs
from tests.train.runs import run

torch.set_num_threads(1)

UNFREEZE = ("--unfreeze_mm_vision_tower", "True")
COS = ("--mm_family", "cos", "--mm_projector_type", "cos_336", "--model_max_length", "512")
FAMILIES = {"llava": (), "llava_hd": ("--mm_family", "llava_hd"), "cos": COS}
DEPTHS = {"embeddings": 0, "pre_layrnorm": 0, "encoder.layers.0": 1, "encoder.layers.1": 2}
"""Parts of the 3-block encoder that run up to hidden state -2 (LLaVA), or to block 1 (CoS), and their depth."""


def built(world, *extra, stage="sft"):
    """(model, arguments) as training builds them."""
    model_args, data_args, args = parse(world.flags(stage, world.folder / "unused", *extra))
    build.check_names(model_args, args)
    torch.manual_seed(args.seed)
    _, model, _ = build.build(model_args, data_args, args)
    build.choose_trainable(model, model_args)
    return model, args


def depth_of(name):
    """By the parameter's name alone; None for what never runs."""
    part = name.split("vision_model.")[1]
    return next((depth for start, depth in DEPTHS.items() if part.startswith(start)), None)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_runs_trains_and_no_more(world, family):
    frozen, _ = built(world, *FAMILIES[family])
    model, _ = built(world, *FAMILIES[family], *UNFREEZE)
    for (name, old), (_, new) in zip(frozen.named_parameters(), model.named_parameters(), strict=True):
        if "vision_tower" in name:
            assert not old.requires_grad
            assert new.requires_grad == (depth_of(name) is not None), name
        else:
            assert old.requires_grad
            assert new.requires_grad


@pytest.mark.parametrize(
    ("flags", "rates"),
    [
        ([], {0: None, 1: None, 2: None}),
        (["--mm_vision_tower_lr", "4e-4"], {0: 4e-4, 1: 4e-4, 2: 4e-4}),
        (["--mm_vision_tower_lr_decay", "0.5"], {0: 0.25e-3, 1: 0.5e-3, 2: 1e-3}),
        (["--mm_vision_tower_lr", "4e-4", "--mm_vision_tower_lr_decay", "0.5"], {0: 1e-4, 1: 2e-4, 2: 4e-4}),
        (["--mm_vision_tower_lr", "1e-4", "--mm_vision_tower_lr_decay", "0.9"], {0: 0.81e-4, 1: 0.9e-4, 2: 1e-4}),
    ],
)
def test_rates_by_depth(world, flags, rates):
    """The block that is read has the tower's rate; each one below it `decay` times the next one's."""
    common = ("--weight_decay", "0.1", "--mm_projector_lr", "2e-3")
    model, args = built(world, *UNFREEZE, *common, *flags, stage="skip")
    names = {id(value): name for name, value in model.named_parameters()}
    decay = {name for name in names.values() if "norm" not in name and not name.endswith("bias")}
    groups = split_parameters(model, decay, args)
    held = [names[id(value)] for group in groups for value in group["params"]]
    assert sorted(held) == sorted(name for name, value in model.named_parameters() if value.requires_grad)
    for group, name in [(one, names[id(value)]) for one in groups for value in one["params"]]:
        wanted = rates[depth_of(name)] if "vision_tower" in name else 2e-3 if "mm_projector" in name else None
        assert group.get("lr") == (None if wanted is None else pytest.approx(wanted, rel=1e-12)), name
        assert group["weight_decay"] == (0.1 if name in decay else 0.0)
        assert ("vision tower" in group["name"]) == ("vision_tower" in name)
    labels = [group["name"] for group in groups]
    assert len(set(labels)) == len(labels)
    by_depth = ["vision tower, embedding", "vision tower, block 0", "vision tower, block 1"]
    parts = ["language model", "projector", *(by_depth if len(set(rates.values())) > 1 else ["vision tower"])]
    every = list(itertools.chain(*((part, f"{part}, no weight decay") for part in parts)))
    assert labels == every


@pytest.mark.parametrize("family", FAMILIES)
def test_a_run_changes_saves_and_reloads_it(world, tmp_path, family):
    flags = (*FAMILIES[family], *UNFREEZE, "--max_steps", "3", "--mm_vision_tower_lr_decay", "0.9")
    before = dict(built(world, *FAMILIES[family])[0].get_vision_tower().named_parameters())
    printed = run(world.flags("skip", tmp_path, *flags, "--gradient_checkpointing", "True"))
    trains = sum(value.numel() for name, value in before.items() if depth_of(name) is not None)
    assert f"{trains:,} train" in printed
    after = dict(load_pretrained_model(str(tmp_path), device="cpu")[1].get_vision_tower().named_parameters())
    for name, value in after.items():
        assert torch.equal(value, before[name]) == (depth_of(name) is None), name
    saved = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(saved[f"model.vision_tower.{name}"], value) for name, value in after.items())


def batch_of(model, images=3):
    side = model.config.vision_config["image_size"]
    ids = torch.tensor([[5, -200, 6, 7, 8]] * images)
    pixels = torch.randn(images, 3, side, side, generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "attention_mask": ids != 0, "labels": ids.clamp(min=0), "images": pixels}


@pytest.mark.parametrize("family", ["llava", "cos"])
def test_gradient_checkpointing_reaches_the_encoder_which_runs_once(world, family):
    """All views in one call; its blocks run again for the backward pass, with the same gradients."""
    gradients = []
    for checkpointing in (False, True):
        model, _ = built(world, *FAMILIES[family], *UNFREEZE)
        model.train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        calls = {"tower": 0, "block": 0, "unused": 0}

        def count(name, calls=calls):
            return lambda *_: calls.__setitem__(name, calls[name] + 1)

        tower = model.get_vision_tower()
        blocks = tower.model.encoder.layers
        tower.register_forward_hook(count("tower"))
        blocks[0].self_attn.register_forward_hook(count("block"))
        blocks[2].self_attn.register_forward_hook(count("unused"))
        model(**batch_of(model)).loss.backward()
        assert calls == {"tower": 1, "block": 1 + checkpointing, "unused": 0}
        gradients.append({name: p.grad for name, p in tower.named_parameters()})
    for name, plain in gradients[0].items():
        if depth_of(name) is None:
            assert plain is None
            assert gradients[1][name] is None
        else:
            assert plain.abs().max() > 0 or name.endswith("k_proj.bias")
            torch.testing.assert_close(gradients[1][name], plain, rtol=1e-6, atol=1e-9)


def test_a_batch_without_images_leaves_no_parameter_out(world):
    """DDP waits for every parameter that trains: a dummy view gives each a gradient, of zero."""
    model, _ = built(world, *COS, *UNFREEZE)
    model.train()
    ids = torch.tensor([[5, 6, 7]])
    model(input_ids=ids, attention_mask=ids != 0, labels=ids).loss.backward()
    for name, value in model.named_parameters():
        assert (value.grad is not None) == value.requires_grad, name
        if "vision_tower" in name and value.requires_grad:
            assert not value.grad.any()


def test_a_frozen_encoder_keeps_no_graph(world):
    model, _ = built(world, *COS)
    model.train()
    features = model.get_vision_tower()(batch_of(model)["images"])
    assert not any(level.requires_grad for level in features.levels)


def test_cos_from_pretraining_to_sft(world, tmp_path):
    """cos_80 at the encoder's size, projector only; then cos_336 at twice that, everything trains, skipping."""
    pretrain, sft = tmp_path / "pretrain", tmp_path / "sft"
    run(world.flags("pretrain", pretrain, "--mm_family", "cos", "--mm_projector_type", "cos_80", "--max_steps", "2"))
    adapter = ("--pretrain_mm_mlp_adapter", str(pretrain / "mm_projector.bin"))
    own_rates = ("--mm_vision_tower_lr", "1e-4", "--mm_vision_tower_lr_decay", "0.9")
    budget = ("--sv_num_retained", "80", "--sv_num_skipped", "64")
    run(world.flags("skip", sft, *COS, *adapter, *UNFREEZE, *own_rates, *budget, "--max_steps", "2"))
    model = load_pretrained_model(str(sft), device="cpu")[1]
    assert model.config.visual_tokens_per_image((64, 48)) == 80 + 64 + 2
    assert len(model.get_model().mm_projector.scales) == 3
    assert len(read_metrics(sft / "metrics.jsonl")) == 2


@pytest.mark.parametrize(
    ("extra", "said"),
    [
        (["--mm_vision_tower_lr", "1e-4"], "--mm_vision_tower_lr: the vision encoder is frozen; add --unfreeze"),
        (["--mm_vision_tower_lr_decay", "0.9"], "--mm_vision_tower_lr_decay: the vision encoder is frozen"),
        ([*UNFREEZE, "--mm_vision_tower_lr", "0"], "--mm_vision_tower_lr: expected a rate above 0, got 0.0"),
        ([*UNFREEZE, "--mm_vision_tower_lr", "-1"], "--mm_vision_tower_lr: expected a rate above 0, got -1.0"),
        ([*UNFREEZE, "--mm_vision_tower_lr", "nan"], "--mm_vision_tower_lr: expected a rate above 0, got nan"),
        ([*UNFREEZE, "--mm_vision_tower_lr_decay", "0"], "expected a share above 0 and up to 1, got 0.0"),
        ([*UNFREEZE, "--mm_vision_tower_lr_decay", "1.1"], "expected a share above 0 and up to 1, got 1.1"),
        ([*UNFREEZE, "--tune_mm_mlp_adapter", "True"], "--tune_mm_mlp_adapter saves the projector alone; drop it"),
        (
            ["--mm_family", "cos", "--mm_vision_image_size", "60"],
            "60 pixels are no multiple of the encoder's patch of 8",
        ),
        (["--mm_family", "cos", "--mm_projector_type", "mlp2x_gelu"], "does not go with family 'cos', which takes"),
        (["--mm_projector_type", "cos_80"], "does not go with family 'llava', which takes linear"),
        (
            ["--mm_family", "cos", "--mm_projector_type", "cos_1296"],
            "cos_1296: 16 windows a side do not divide the encoder's grid of 8 x 8",
        ),
    ],
)
def test_a_mistake_ends_in_one_line(world, tmp_path, capsys, extra, said):
    assert main(world.flags("sft", tmp_path, *extra)) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ")
    assert said in error


def test_an_optimizer_with_groups_of_its_own_is_refused(world):
    model, args = built(world, *UNFREEZE, "--mm_vision_tower_lr", "1e-4")
    trainer = SimpleNamespace(
        model=model,
        args=args,
        optimizer=None,
        get_decay_parameter_names=lambda model: [],
        get_optimizer_cls_and_kwargs=lambda args, model: (torch.optim.SGD, {"optimizer_dict": {}}),
    )
    with pytest.raises(UserError, match=r"--mm_vision_tower_lr: --optim .* chooses its own groups; drop one"):
        LLaVATrainer.create_optimizer(trainer)


@pytest.mark.parametrize("section", ["optimizer", "scheduler"])
def test_deepspeed_s_own_sections_would_take_the_rates_away(world, tmp_path, section):
    flags = world.flags("sft", tmp_path, *UNFREEZE, "--mm_vision_tower_lr_decay", "0.9")
    with pytest.raises(UserError, match=f'--mm_vision_tower_lr_decay with an "{section}" section'):
        parse([*flags, "--deepspeed", f'{{"{section}": {{}}}}'])


@pytest.mark.slow
def test_cos_under_zero3_gives_the_same_losses(world, tmp_path):
    """Two processes with the encoder partitioned, interpolated, trained by depth, and the projector scaled up."""
    pretrain, one, two = tmp_path / "pretrain", tmp_path / "one", tmp_path / "two"
    run(world.flags("pretrain", pretrain, "--mm_family", "cos", "--mm_projector_type", "cos_80", "--max_steps", "2"))
    common = (
        *COS, *UNFREEZE, "--pretrain_mm_mlp_adapter", str(pretrain), "--mm_vision_tower_lr", "5e-4",
        "--mm_vision_tower_lr_decay", "0.8", "--max_steps", "4", "--group_by_modality_length", "True",
        "--sv_num_retained", "80", "--sv_num_skipped", "64",
    )  # fmt: skip
    runs.train(world.flags("skip", one, *common, "--per_device_train_batch_size", "4"))
    zero = ("--deepspeed", "scripts/zero3.json", "--gradient_checkpointing", "True")
    runs.train(world.flags("skip", two, *common, *zero), runs.TWO)
    losses = [runs.losses(output) for output in (one, two)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    towers = [load_pretrained_model(str(o), device="cpu")[1].get_vision_tower().state_dict() for o in (one, two)]
    for name, value in towers[0].items():
        torch.testing.assert_close(towers[1][name], value, rtol=1e-3, atol=1e-4)
