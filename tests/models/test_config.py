"""Configs of networks: what a file of before does not say is the default."""

import inspect
import json
from dataclasses import asdict

import pytest

from diffit.checkpoint.weights import CheckpointConfig
from diffit.models.config import ZOO, DiffiTConfig, ImageDiffiTConfig
from diffit.models.image import ImageDiffiT
from diffit.models.latent import DiffiT

ADDED = ("conditioning", "time_embedding", "encoder", "decoder")


@pytest.mark.parametrize("name", ["Diffit-Fashion", "ImageDiffit-Tiny"])
def test_checkpoints_without_the_variants_are_tmsa_and_positional(name):
    config = CheckpointConfig(name, ZOO[name])
    tree = json.loads(config.to_json())
    tree["network"] = {key: value for key, value in tree["network"].items() if key not in ADDED}
    assert CheckpointConfig.from_json(json.dumps(tree)) == config
    kept = {key: value for key, value in asdict(config.network).items() if key in ADDED}
    assert kept.pop("conditioning") == "tmsa"
    assert kept.pop("time_embedding") == "positional"
    assert set(kept.values()) <= {"diffit"}


@pytest.mark.parametrize(("network", "config"), [(DiffiT, DiffiTConfig), (ImageDiffiT, ImageDiffiTConfig)])
def test_a_network_and_its_config_have_the_same_defaults(network, config):
    arguments = inspect.signature(network).parameters.values()
    assert {each.name: each.default for each in arguments} == asdict(config())
