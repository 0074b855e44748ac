"""What a class label means: names before numbers, exact spellings before any case, synonyms, and nothing by guess."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from diffit import DiffiTPipeline
from diffit.checkpoint.config import default_config
from diffit.sampling.labels import class_names, known_labels, resolve_labels

IMAGENET = class_names(default_config("Diffit"))


def config_of(names, num_classes):
    return replace(default_config("Diffit-S", num_classes=num_classes), class_names=tuple(names))


def test_texts_and_numbers():
    names = ("Cat", "dog", "7", "cat")
    assert resolve_labels(["Cat", "cat", "DOG", "0", "7"], names) == [0, 3, 1, 0, 2]
    assert resolve_labels([0, np.int64(3), torch.tensor(1)], names) == [0, 3, 1]
    assert resolve_labels([], ()) == []
    for wrong, message in (
        ("CAT", "means the classes 0, 3"),
        ("5", "no class '5': choose a number from 0 to 3 or one of Cat, dog"),
        (4, "no class '4'"),
        (-1, "no class '-1'"),
        (1.5, "a name or a whole number, not 1.5"),
        (None, "a name or a whole number, not None"),
    ):
        with pytest.raises(ValueError, match=message):
            resolve_labels([wrong], names)


def test_where_all_names_are_numbers_a_text_is_a_name():
    names = ("3", "7", "012")
    assert resolve_labels(["7", "12", "012", 1], names) == [1, 2, 2, 1]
    with pytest.raises(ValueError, match="no class '0': choose one of 3, 7, 012"):
        resolve_labels(["0"], names)
    assert resolve_labels(["10", "9"], ("0", "1", "10", "9")) == [2, 3]  # a checkpoint of an older order


def test_names_that_stand_twice_in_imagenet():
    assert resolve_labels(["Cardigan", "cardigan", "tank suit"], IMAGENET) == [264, 474, 639]
    assert resolve_labels(["gong"], IMAGENET) == [577]  # its name; a synonym of class 494
    for name, numbers in (("crane", "134, 517"), ("maillot", "638, 639"), ("CARDIGAN", "264, 474")):
        with pytest.raises(ValueError, match=f"'{name}' means the classes {numbers}: give one"):
            resolve_labels([name], IMAGENET)


def test_synonyms_of_imagenet():
    assert resolve_labels(["white shark", "Carcharodon carcharias", "GOLDEN retriever"], IMAGENET) == [2, 2, 207]
    folders = ("n01443537", "n01484850", "own")  # named by WordNet, as ImageNet's folders are
    assert resolve_labels(["white shark", "goldfish", "own"], folders) == [1, 0, 2]
    with pytest.raises(ValueError, match="no class 'tench'"):
        resolve_labels(["tench"], folders)
    with pytest.raises(ValueError, match="no class 'white shark'"):
        resolve_labels(["white shark"], ("cat", "dog"))


@pytest.mark.parametrize("names", [IMAGENET, ("3", "7", "12"), ("cat", "Cat", "dog", "dog"), ("n01443537", "7", "0")])
def test_known_labels_are_those_that_resolve(names):
    known = known_labels(names)
    assert resolve_labels([*known], names) == [*known.values()]
    for name in names:
        if name not in known:
            with pytest.raises(ValueError, match="means the classes"):
                resolve_labels([name], names)
    assert ("white shark" in known) == (names is IMAGENET)


def test_the_pipeline_agrees(tmp_path):
    pipeline = DiffiTPipeline.from_pretrained("Diffit-Fashion")
    assert pipeline.labels["Ankle boot"] == 9
    assert len(pipeline.labels) == 10
    assert pipeline.get_label_ids([*pipeline.labels]) == [*pipeline.labels.values()]
    assert pipeline.get_label_ids("ankle BOOT") == [9]


def test_names_must_fit_the_network():
    assert class_names(config_of(["cat", "dog"], 4)) == ["cat", "dog", "2", "3"]
    with pytest.raises(ValueError, match="names 40 classes and its network has 10"):
        class_names(config_of([f"c{number}" for number in range(40)], 10))


def test_all_stands_for_every_class_in_turn_unless_a_class_is_called_so():
    assert resolve_labels(["all"], ["cat", "dog", "eel"]) == [0, 1, 2]
    assert resolve_labels(["all"], ["some", "all"]) == [1]
    with pytest.raises(ValueError, match="no class 'all'"):
        resolve_labels(["all", "cat"], ["cat", "dog"])
