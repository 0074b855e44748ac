"""The latent network against golden numbers, the released files' layout and a naive rewriting of the equations."""

import json

import pytest
import torch

from diffit import DiffiT, create_model
from diffit.nn.attention import relative_position_index
from tests.conftest import GOLDEN
from tests.golden_models import NAMES, golden_network, golden_tensors, relative_error
from tests.small_models import count_parameters


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_prediction(golden_latent, name):
    model = golden_network(golden_latent, name)
    x, t, y, out = golden_tensors(golden_latent, name, "x", "t", "y", "out")
    assert relative_error(model(x, t, y), out) < 1e-5


@pytest.mark.parametrize("image_size", [256, 512])
def test_released_layout(image_size):
    released = json.loads((GOLDEN / "official_state_dict.json").read_text())[f"diffit_{image_size}"]
    with torch.device("meta"):
        model = create_model("Diffit", input_size=image_size // 8)
    ours = {name: [list(value.shape), "float32"] for name, value in model.state_dict().items()}
    index = {name for name in released["state_dict"] if name.endswith("relative_position_index")}
    assert len(index) == 28
    assert ours == {name: entry for name, entry in released["state_dict"].items() if name not in index}
    assert count_parameters(model) == released["parameters"]


@pytest.mark.parametrize("name", NAMES)
def test_index_of_the_released_files(golden_latent, name):
    stored = torch.from_numpy(golden_latent[f"{name}/state_dict/blocks.0.attn.relative_position_index"])
    assert torch.equal(relative_position_index(int(len(stored) ** 0.5)), stored)


def test_initial_prediction_is_zero():
    model = DiffiT(input_size=4, hidden_size=16, depth=1, num_heads=2, num_classes=3)
    assert model(torch.randn(2, 4, 4, 4), torch.tensor([1, 2]), torch.tensor([0, 3])).abs().max() == 0


def test_labels_drop_in_training_only():
    model = DiffiT(input_size=4, hidden_size=16, depth=1, num_heads=2, num_classes=3, class_dropout_prob=1.0)
    torch.nn.init.normal_(model.final_layer.linear.weight)
    x, t = torch.randn(2, 4, 4, 4), torch.tensor([1, 2])
    label, null = torch.tensor([0, 1]), torch.tensor([3, 3])
    torch.testing.assert_close(model(x, t, label), model(x, t, null))
    kept = torch.tensor([False, True])
    model.eval()
    torch.testing.assert_close(model(x, t, label, kept)[1], model(x, t, null)[1])
    assert not torch.allclose(model(x, t, label), model(x, t, null))


def test_unfitting_sizes_are_refused():
    with pytest.raises(ValueError, match="patch size 3"):
        DiffiT(input_size=8, patch_size=3)
    with pytest.raises(ValueError, match="5 heads"):
        DiffiT(hidden_size=48, num_heads=5)
    with pytest.raises(ValueError, match="Diffit-XXL"):
        create_model("Diffit-XXL")
    with pytest.raises(ValueError, match="detph"):
        create_model("Diffit", detph=30)


@pytest.mark.parametrize(
    ("name", "C", "depth", "heads"),
    [("Diffit-S", 384, 12, 6), ("Diffit-B", 768, 12, 12), ("Diffit-L", 1024, 24, 16), ("Diffit", 1152, 28, 16)],
)
def test_zoo_sizes(name, C, depth, heads):
    """Counted by hand for 16x16 tokens: the widths, depths and heads that users know from DiT."""
    block = 15 * C**2 + 12 * C + 31**2 * heads  # two qkv maps, projection, MLP; biases; relative position biases
    ends = 256 * C + 17 * C + 1001 * C + 32 * C + 32  # positions, patches, classes, head
    time = 256 * C + C + C**2 + C
    with torch.device("meta"):
        assert count_parameters(create_model(name)) == depth * block + ends + time
