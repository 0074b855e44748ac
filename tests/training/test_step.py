"""One step of training in its variants: in parts, recomputed, in fp16, with several averages; and that it learns."""

import numpy as np
import pytest
import torch

from diffit.models.config import create_model
from diffit.system.distributed import World
from diffit.training import loop
from diffit.training.ema import ramped_decay
from diffit.training.parallel import apply_activation_checkpointing, blocks
from diffit.training.step import train_step
from tests.small_models import write_fashion_files
from tests.training.runs import TINY, begun, log_of, replaced, run

SIZES = {
    "Diffit-S": {"input_size": 8, "hidden_size": 16, "depth": 2, "num_heads": 2},
    "ImageDiffit-Tiny": {"input_size": 16, "dropout": 0.3},
}


def gradients(run):
    """Of the first batch, by parameter; they are still there after the step."""
    train_step(run.state, run.batch, run.config, World())
    return {name: p.grad for name, p in run.state.model.named_parameters() if p.requires_grad}


def test_parts_of_a_batch_add_up_to_its_gradient(flags, tmp_path):
    whole = begun(flags, tmp_path / "whole")
    torch.nn.init.normal_(whole.state.model.head.weight, std=0.1)  # it starts at zero, and so would most gradients
    parts = begun(flags, tmp_path / "parts", "--accumulate", "4")
    parts.state.model.load_state_dict(whole.state.model.state_dict())
    expected, found = gradients(whole), gradients(parts)
    scale = max(value.abs().max() for value in expected.values())
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6 * scale.item())


def test_parts_give_the_same_run(flags, tmp_path):
    run(flags, tmp_path / "whole")
    run(flags, tmp_path / "parts", "--accumulate", "4")
    for key in ("loss", "grad_norm"):
        whole, parts = ([line[key] for line in log_of(tmp_path / name)] for name in ("whole", "parts"))
        np.testing.assert_allclose(parts, whole, rtol=1e-5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("accumulate", ["1", "2"])
def test_a_compiled_step_is_the_eager_one_on_a_gpu(flags, tmp_path, accumulate):
    """The gradients of three steps; AdamW, at a rate of zero, keeps both at the same weights."""
    settings = ["--device", "cuda", "--optimizer.lr", "0", "--accumulate", accumulate]
    eager = begun(flags, tmp_path / "eager", *settings)
    torch.nn.init.normal_(eager.state.model.head.weight, std=0.1)
    compiled = begun(flags, tmp_path / "compiled", *settings, "--compile", "True")
    compiled.state.model.load_state_dict(eager.state.model.state_dict())
    for _ in range(3):
        expected, found = gradients(eager), gradients(compiled)
        scale = max(value.abs().max() for value in expected.values())
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5 * scale.item())


def test_a_batch_that_cannot_be_parted_is_refused(flags, tmp_path):
    with pytest.raises(ValueError, match="--batch_size 8 cannot be shared by 1 ranks in 3 parts"):
        run(flags, tmp_path, "--accumulate", "3")


@pytest.mark.parametrize("name", SIZES)
def test_recomputing_blocks_changes_no_gradient(name):
    torch.manual_seed(0)
    plain = create_model(name, **SIZES[name])
    for parameter in plain.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    again = create_model(name, **SIZES[name])
    again.load_state_dict(plain.state_dict())
    apply_activation_checkpointing(again)
    size = SIZES[name]["input_size"]
    x = torch.randn(2, plain.in_channels, size, size)
    saved = []
    for model in (plain, again):
        torch.manual_seed(1)  # dropout is drawn again as it was
        kept = set()

        def keep(tensor, kept=kept):
            kept.add((tensor.untyped_storage()._cdata, tensor.untyped_storage().nbytes()))
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            output = model(x, torch.tensor([0.1, 0.2]), torch.tensor([0, 0]))
        output.square().sum().backward()
        saved.append(sum(size for _, size in kept))
    assert saved[1] < saved[0]
    assert len(blocks(plain)) > 1
    for (key, one), two in zip(plain.named_parameters(), again.parameters(), strict=True):
        if one.requires_grad:
            assert torch.equal(one.grad, two.grad), key


def test_fp16_scales_its_loss_and_resumes_with_the_scale(flags, tmp_path):
    # bf16's range is float32's; fp16's is not: the scale, which starts too high for this loss, comes down.
    more = ["--precision", "fp16", "--optimizer.lr", "1e-4"]
    run(flags, tmp_path / "whole", *more, "--steps", "12")
    run(flags, tmp_path / "again", *more, "--steps", "4")
    run(flags, tmp_path / "again", *more, "--steps", "12")
    assert log_of(tmp_path / "again") == log_of(tmp_path / "whole")
    run(flags, tmp_path / "fp32", "--steps", "12", "--optimizer.lr", "1e-4")
    lines = log_of(tmp_path / "whole")
    assert lines[-1]["loss_scale"] == 2**16 / 2 ** lines[-1]["skipped"]
    half, full = (
        [line["loss"] for line in log_of(tmp_path / name) if line["loss"] is not None] for name in ("whole", "fp32")
    )
    assert half[-1] == pytest.approx(full[-1], rel=0.01)
    assert half[-1] != full[-1]


def test_blocks_are_never_silently_left_out():
    for refused in (blocks, apply_activation_checkpointing):
        with pytest.raises(ValueError, match="Linear names no blocks to recompute or to shard: give it a method"):
            refused(torch.nn.Linear(2, 2))


def test_the_loss_scale_falls_with_a_step_that_this_rank_would_have_taken(flags, tmp_path, monkeypatch):
    """Another rank may be the reason: the scale stays the same in all."""
    started = begun(flags, tmp_path, "--precision", "fp16")
    state, batch = started.state, started.batch
    state.scaler.load_state_dict(state.scaler.state_dict() | {"scale": 2.0**8})
    trained = state.optimizer.param_groups[0]["params"]
    before = [p.clone() for p in trained]
    for wrong, scale in ((1.0, 2.0**7), (0.0, 2.0**7)):

        def agree(agreed, operation, wrong=wrong):
            assert agreed.tolist() == [0, 0]  # nothing is wrong in this rank
            agreed[0] = wrong

        monkeypatch.setattr("diffit.training.step.dist.all_reduce", agree)
        train_step(state, batch, started.config, World(size=2), [False])
        assert bool(state.skipped_in_a_row) == wrong
        assert all(p.grad.isfinite().all() for p in trained)
        assert state.scaler.get_scale() == scale
        same = [torch.equal(p, q) for p, q in zip(trained, before, strict=True)]
        assert all(same) if wrong else not all(same)


def test_the_loss_scale_falls_with_a_loss_whose_gradient_is_finite(flags, tmp_path):
    started = begun(flags, tmp_path, "--precision", "fp16")
    state = started.state
    state.scaler.load_state_dict(state.scaler.state_dict() | {"scale": 2.0**8})
    losses = state.process.training_losses

    class Infinite:
        def training_losses(self, *args):
            found = losses(*args)
            return type(found)(found.loss + float("inf"), found.mse, found.vb)

    state.process = Infinite()
    train_step(state, started.batch, started.config, World())
    assert all(p.grad.isfinite().all() for p in state.optimizer.param_groups[0]["params"])
    assert state.skipped == 1
    assert state.scaler.get_scale() == 2.0**7


def test_a_stop_request_is_answered_in_its_step(flags, tmp_path):
    started = begun(flags, tmp_path)
    assert train_step(started.state, started.batch, started.config, World(), [False]) == [False]
    assert train_step(started.state, started.batch, started.config, World(), [True]) == [True]
    assert started.state.step == 2


def test_several_averages_at_once(flags, tmp_path):
    expected, states = {}, []

    def follow(state, *others):
        if not expected:
            expected.update({decay: state.model.head.weight.detach().clone() for decay in (0.9, 0.2)})
        result = train_step(state, *others)
        for decay in expected:
            now = ramped_decay(decay, state.step)
            expected[decay] = now * expected[decay] + (1 - now) * state.model.head.weight.detach()
        states.append(state)
        return result

    with replaced(loop, "train_step", follow):
        run(flags, tmp_path / "several", "--ema_decay", "[0.9, 0.2]")
    assert list(states[-1].emas) == ["ema.safetensors", "ema_0.2.safetensors"]
    for ema, value in zip(states[-1].emas.values(), expected.values(), strict=True):
        torch.testing.assert_close(ema.model.head.weight, value)
    run(flags, tmp_path / "one", "--ema_decay", "0.9")
    first, one = (tmp_path / name / "checkpoints/00000006/ema.safetensors" for name in ("several", "one"))
    assert first.read_bytes() == one.read_bytes()
    with pytest.raises(ValueError, match=r"no ema_0.7.safetensors"):
        run(flags, tmp_path / "several", "--ema_decay", "[0.9, 0.7]")


def test_16_images_can_be_learnt_by_heart(tmp_path):
    """In 100 steps the loss falls 2.5-fold: its mean over the first and the last 20."""
    random = np.random.default_rng(0)
    images = np.kron(random.integers(0, 256, (16, 7, 7), dtype=np.uint8), np.ones((1, 4, 4), np.uint8))
    files = write_fashion_files(tmp_path / "fashion", images=images)
    more = ["--data.path", str(files), "--batch_size", "16", "--steps", "100", "--log_every", "20"]
    run([*TINY, *more, "--save_every", "100", "--optimizer.lr", "1e-2"], tmp_path / "run")
    lines = log_of(tmp_path / "run")
    assert lines[-1]["loss"] < lines[0]["loss"] / 2.5
