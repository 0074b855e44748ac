"""One step of training in its variants: in parts, recomputed, in fp16, with several averages; and that it learns."""

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from diffit.cli.train import parse_train
from diffit.distributed import World
from diffit.models.config import create_model
from diffit.training.ema import ramped_decay
from diffit.training.loop import Training
from diffit.training.parallel import blocks, recompute_blocks
from tests.small_models import write_fashion_files
from tests.training.runs import TINY, Poisoned, log_of, run, training

SIZES = {
    "Diffit-S": {"input_size": 8, "hidden_size": 16, "depth": 2, "num_heads": 2},
    "ImageDiffit-Tiny": {"input_size": 16, "dropout": 0.3},
}


def gradients(trained):
    """Of the first batch, by parameter."""
    torch.manual_seed(0)
    trained.stepper.accumulate(trained.batches[0])
    return {name: p.grad for name, p in trained.model.named_parameters() if p.requires_grad}


def test_parts_of_a_batch_add_up_to_its_gradient(flags, tmp_path):
    whole = training(flags, tmp_path / "whole")
    torch.nn.init.normal_(whole.model.head.weight, std=0.1)  # it starts at zero, and so would most gradients
    parts = training(flags, tmp_path / "parts", "--accumulate", "4")
    parts.model.load_state_dict(whole.model.state_dict())
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


def test_a_batch_that_cannot_be_parted_is_refused(flags, tmp_path):
    with pytest.raises(ValueError, match="--batch_size 8 cannot be shared by 1 processes in 3 parts"):
        training(flags, tmp_path, "--accumulate", "3")


@pytest.mark.parametrize("name", SIZES)
def test_recomputing_blocks_changes_no_gradient(name):
    torch.manual_seed(0)
    plain = create_model(name, **SIZES[name])
    for parameter in plain.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    again = create_model(name, **SIZES[name])
    again.load_state_dict(plain.state_dict())
    recompute_blocks(again)
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


def test_the_loss_scale_falls_with_a_step_that_this_process_would_have_taken(flags, tmp_path):
    """Another process, or a loss whose gradient is finite, may be the reason: the scale stays the same in all."""
    stepper = training(flags, tmp_path, "--precision", "fp16").stepper
    stepper.scaler.load_state_dict(stepper.scaler.state_dict() | {"scale": 2.0**8})
    batch = training(flags, tmp_path).batches[0]
    before = [p.clone() for p in stepper.trained]
    for wrong, scale in ((1.0, 2.0**7), (0.0, 2.0**7)):
        stepper.optimizer.zero_grad()
        stepper.accumulate(batch)
        stepper.scaler.unscale_(stepper.optimizer)
        assert all(p.grad.isfinite().all() for p in stepper.trained)
        stepper._update(torch.tensor(wrong))
        assert stepper.scaler.get_scale() == scale
        same = [torch.equal(p, q) for p, q in zip(stepper.trained, before, strict=True)]
        assert all(same) if wrong else not all(same)


class NoReads(TorchDispatchMode):
    """Context in which the values of a tensor steer nothing on the host."""

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        name = operation.overloadpacket.__name__
        assert name not in ("_local_scalar_dense", "nonzero", "equal", "masked_select"), f"{name} waits for the device"
        return operation(*args, **(kwargs or {}))


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_step_reads_nothing_but_what_became_of_the_step_before(flags, tmp_path, precision):
    with pytest.raises(AssertionError, match="waits"), NoReads():
        bool(torch.ones(()) > 0)
    trained = training(flags, tmp_path, "--precision", precision, "--accumulate", "2", "--optimizer.grad_clip", "1")
    stepper, batches, known = trained.stepper, Poisoned(trained.batches, {0, 1, 2, 3}), []
    for step in range(4):
        batch = batches[step]
        with NoReads():
            stepper.take(batch, step, asked=step == 1)
        known.append((stepper.skips.total, stepper.stop))
    assert known == [(0, False), (1, False), (2, True), (3, False)]
    stepper.settle()
    stepper.settle()
    assert stepper.skips.total == 4
    assert stepper.means() is None


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("precision", ["tf32", "bf16", "fp16"])
def test_no_step_waits_for_a_gpu(flags, tmp_path, precision):
    more = ["--device", "cuda", "--precision", precision, "--optimizer.grad_clip", "1"]
    trained = Training(parse_train([*flags, "--run_dir", str(tmp_path), *more]), torch.device("cuda"), World())
    batches, before = Poisoned(trained.batches, {5}), torch.cuda.get_sync_debug_mode()
    for step in range(8):
        torch.cuda.set_sync_debug_mode("error" if step > 1 else before)  # the first steps copy tables to the device
        try:
            trained.stepper.take(batches[step], step, asked=False)
        finally:
            torch.cuda.set_sync_debug_mode(before)
    trained.stepper.settle()
    assert trained.stepper.skips.total >= 1


def test_several_averages_at_once(flags, tmp_path):
    several = training(flags, tmp_path / "several", "--ema_decay", "[0.9, 0.2]")
    expected = {decay: several.model.head.weight.detach().clone() for decay in (0.9, 0.2)}
    take = several.stepper.take

    def follow(batch, step, asked):
        take(batch, step, asked)
        for decay in expected:
            now = ramped_decay(decay, step + 1)
            expected[decay] = now * expected[decay] + (1 - now) * several.model.head.weight.detach()

    several.stepper.take = follow
    several.run()
    assert list(several.averages) == ["ema.safetensors", "ema_0.2.safetensors"]
    for ema, value in zip(several.averages.values(), expected.values(), strict=True):
        torch.testing.assert_close(ema.model.head.weight, value)
    run(flags, tmp_path / "one", "--ema_decay", "0.9")
    first, one = (tmp_path / name / "checkpoints/00000006/ema.safetensors" for name in ("several", "one"))
    assert first.read_bytes() == one.read_bytes()
    with pytest.raises(ValueError, match=r"no ema_0.7.safetensors"):
        training(flags, tmp_path / "several", "--ema_decay", "[0.9, 0.7]")


def test_16_images_can_be_learnt_by_heart(tmp_path):
    """In 100 steps the loss falls 2.5-fold: its mean over the first and the last 20."""
    random = np.random.default_rng(0)
    images = np.kron(random.integers(0, 256, (16, 7, 7), dtype=np.uint8), np.ones((1, 4, 4), np.uint8))
    files = write_fashion_files(tmp_path / "fashion", images=images)
    more = ["--data.path", str(files), "--batch_size", "16", "--steps", "100", "--log_every", "20"]
    run([*TINY, *more, "--save_every", "100", "--optimizer.lr", "1e-2"], tmp_path / "run")
    lines = log_of(tmp_path / "run")
    assert lines[-1]["loss"] < lines[0]["loss"] / 2.5
