"""DINOv2's features: preprocessing against Pillow, the position embedding against a closed form.

With random weights copied over, all of ViT-S/14 and ViT-L/14 was compared with the authors' code: equal to the bit.
"""

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from diffit.evaluation.dinov2 import NETWORK, extractor, load_features, resize_position


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    return timm.create_model(NETWORK, num_classes=0, embed_dim=24, depth=1, num_heads=2)


def test_images_are_resized_as_a_whole_and_seen_by_the_class_token(network):
    images = np.random.default_rng(0).integers(0, 256, (2, 40, 56, 3), dtype=np.uint8)
    features = extractor(network, torch.device("cpu"))
    (found,) = features(torch.from_numpy(images))
    resized = [np.asarray(Image.fromarray(image).resize((224, 224), Image.Resampling.BICUBIC)) for image in images]
    x = (np.stack(resized) / 255 - IMAGENET_DEFAULT_MEAN) / IMAGENET_DEFAULT_STD
    expected = network.forward_features(torch.from_numpy(x).permute(0, 3, 1, 2).float())[:, 0]
    torch.testing.assert_close(found, expected, rtol=0, atol=5e-3)  # Pillow rounds to whole greys, and clips
    grey = torch.from_numpy(images[..., :1])
    torch.testing.assert_close(features(grey)[0], features(grey.expand(-1, -1, -1, 3))[0])


def test_the_position_embedding_is_read_where_the_authors_read_it():
    """By Keys' cubic convolution (PyTorch has a = -0.75) at the points (i + 1/2) 37/16.1 - 1/2 of both axes."""
    embedding = torch.randn(1, 1 + 37 * 37, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    resized = resize_position(embedding)
    distance = ((torch.arange(16, dtype=torch.float64) + 0.5) * 37 / 16.1 - 0.5)[:, None] - torch.arange(37)
    d, a = distance.abs(), -0.75
    near, far = (a + 2) * d**3 - (a + 3) * d**2 + 1, a * (d**3 - 5 * d**2 + 8 * d - 4)
    weights = torch.where(d <= 1, near, torch.where(d < 2, far, 0.0))  # [16, 37]
    expected = torch.einsum("iy,jx,yxc->ijc", weights, weights, embedding[0, 1:].view(37, 37, 3))
    torch.testing.assert_close(resized[0, :1], embedding[0, :1])
    inside = slice(1, 15)  # the outermost points read beyond the border
    torch.testing.assert_close(resized[0, 1:].view(16, 16, 3)[inside, inside], expected[inside, inside])


def test_weights_of_another_network_are_one_sentence(tmp_path):
    path = tmp_path / "weights.pth"
    torch.save({"a": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match=r"cannot load DINOv2 from .*weights\.pth .*--features dinov2:FILE"):
        load_features(path, torch.device("cpu"))
