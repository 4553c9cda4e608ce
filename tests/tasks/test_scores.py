"""Tests the scores of classes: against scikit-learn, in metrics.json, and in compare."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from support import tiny_classifier
from support.optional import sklearn_metrics

from lora_ext.tasks import TaskError
from lora_ext.tasks.finetune import results
from lora_ext.tasks.finetune.run import finetune
from lora_ext.tasks.finetune.scores import accuracy, macro_f1, scores, weighted_f1
from lora_ext.tasks.finetune.settings import Settings
from lora_ext.tasks.finetune.task_data import load_sides

pytestmark = [
    pytest.mark.cpu_only("the Trainer chooses the device"),
    pytest.mark.filterwarnings("ignore:.*ill-defined"),
]


def test_macro_f1_weighs_the_classes_that_occur_alike():
    predicted, expected = np.array([0, 0, 1, 2, 2]), np.array([0, 1, 1, 2, 2])
    assert macro_f1(predicted, expected) == pytest.approx((2 / 3 + 2 / 3 + 1) / 3)
    assert accuracy(predicted, expected) == pytest.approx(0.8)
    assert macro_f1(np.array([0, 0]), np.array([0, 0])) == 1.0


@pytest.mark.parametrize("answered", [4, 2])  # with 2, two classes are never answered
def test_scores_are_scikit_learns(answered: int):
    rng = np.random.default_rng(answered)
    expected, predicted = rng.integers(0, 4, 200), rng.integers(0, answered, 200)
    found = scores(predicted, expected, labels := ["a", "b", "c", "d"])
    assert found["confusion"] == sklearn_metrics.confusion_matrix(expected, predicted).tolist()
    report = sklearn_metrics.classification_report(
        expected, predicted, output_dict=True, zero_division=0, target_names=labels
    )
    assert found["accuracy"] == pytest.approx(report["accuracy"])
    assert found["macro_f1"] == pytest.approx(report["macro avg"]["f1-score"])
    assert found["weighted_f1"] == pytest.approx(report["weighted avg"]["f1-score"])
    for one in found["classes"]:
        theirs = report[one["label"]]
        assert (one["precision"], one["recall"]) == pytest.approx((theirs["precision"], theirs["recall"]))
        assert (one["f1"], one["support"]) == pytest.approx((theirs["f1-score"], theirs["support"]))


def test_classes_without_texts_count_nothing():
    assert weighted_f1(np.array([0, 0, 2]), np.array([0, 0, 0])) == pytest.approx(0.8)
    found = scores(np.array([0, 1]), np.array([0, 1]), ["a", "b", "never"])
    assert found["macro_f1"] == found["weighted_f1"] == 1.0
    assert found["classes"][2] == {"label": "never", "precision": 0.0, "recall": 0.0, "f1": 0.0, "support": 0}


# --- files of their own for the sides ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_classifier.save_model(tmp_path_factory.mktemp("model"))


def files(directory: Path, test: list[tuple[str, str]], validation: list[tuple[str, str]]) -> Settings:
    texts = dict(tiny_classifier.reviews(120, seed=1))
    for text, _ in [*test[2:], *validation]:
        texts.pop(text, None)
    rows = {"train": list(texts.items()), "test": test, "validation": validation}
    paths = {name: str(tiny_classifier.save_reviews(directory / f"{name}.csv", found)) for name, found in rows.items()}
    return Settings(
        data=paths["train"], test_file=paths["test"], validation_file=paths["validation"], max_length=32, epochs=0.2
    )


def test_a_label_without_training_texts_is_refused_with_its_file(tmp_path: Path):
    rows = [*tiny_classifier.reviews(9, seed=2), ("the film is odd", "mixed")]
    with pytest.raises(TaskError, match=r"validation\.csv: labels \[mixed\] occur in .* first in line 11; .* neg, pos"):
        load_sides(files(tmp_path, tiny_classifier.reviews(9, seed=3), rows), lambda line: None)
    with pytest.raises(TaskError, match=r"test\.csv: labels \[mixed\] occur in the test texts only, first in line 11"):
        load_sides(files(tmp_path, rows, tiny_classifier.reviews(9, seed=3)), lambda line: None)


@pytest.mark.full
def test_leakage_is_counted_and_the_page_says_so(model: Path, tmp_path: Path):
    test = [("the film is good", "pos"), ("The  FILM is bad", "neg"), *tiny_classifier.reviews(20, seed=4)]
    validation = [("the film is good", "pos"), *tiny_classifier.reviews(10, seed=5)]
    settings = files(tmp_path, test, validation)
    with open(settings.data, "a", newline="") as file:
        file.write("the film is bad,neg\nthe film is good,pos\n")
    metrics = finetune(Settings(**{**vars(settings), "model": str(model)}), tmp_path / "run", say=(said := []).append)
    assert metrics["duplicates"]["train in test"] == 2 and metrics["duplicates"]["validation in test"] >= 1
    assert any("train.csv: 2 texts are left out, because" in line for line in said)
    assert sum(sum(row) for row in metrics["after"]["confusion"]) == metrics["examples"]["test"] == 22
    console = results.table(metrics)
    assert "test weighted F1" in console and re.search(r"\n    neg +precision \d\.\d{3}, recall", console)
    assert set(metrics["validation"]) == {"loss", "accuracy", "macro_f1", "weighted_f1"}
