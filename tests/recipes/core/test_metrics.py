"""Figures of classification against scikit-learn, closed formulas and the bootstrap done the long way."""

import json
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as sklearn_metrics

from bigbatch.recipes.core.metrics import calibration_error, classification_figures, higher_is_better, render


def softmax(logits: np.ndarray) -> np.ndarray:
    exponentials = np.exp(logits - logits.max(1, keepdims=True))
    return exponentials / exponentials.sum(1, keepdims=True)


def answers(num_examples: int, num_labels: int, skill: float = 1.5, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Draw labels, and probabilities that know something about them."""
    generator = np.random.default_rng(seed)
    labels = generator.integers(num_labels, size=num_examples)
    logits = generator.normal(size=(num_examples, num_labels)) + skill * np.eye(num_labels)[labels]
    return softmax(logits), labels


def tags(num_examples: int, num_labels: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Draw sets of labels, as floats, and probabilities that know something about them."""
    generator = np.random.default_rng(seed)
    labels = generator.random((num_examples, num_labels)) < 0.3
    return 1 / (1 + np.exp(-generator.normal(size=labels.shape) - 2 * labels + 1)), labels.astype(np.float32)


NAMES = ("a", "b", "c", "d")


def test_figures_of_several_labels_are_scikit_learns():
    probabilities, labels = answers(500, 4)
    predicted = probabilities.argmax(1)
    figures = classification_figures(probabilities, labels, NAMES)
    report = sklearn_metrics.classification_report(labels, predicted, target_names=NAMES, output_dict=True)
    assert figures.scalars["accuracy"] == report["accuracy"]
    for ours, theirs in (("precision", "precision"), ("recall", "recall"), ("f1", "f1-score")):
        assert figures.scalars[f"{ours}_macro"] == pytest.approx(report["macro avg"][theirs], abs=1e-12)
        assert figures.scalars[f"{ours}_micro"] == pytest.approx(report["accuracy"], abs=1e-12)
        for name in NAMES:
            assert figures.per_class[ours][name] == figures.scalars[f"{ours}/{name}"]
            assert figures.per_class[ours][name] == pytest.approx(report[name][theirs], abs=1e-12)
    assert figures.support == {name: report[name]["support"] for name in NAMES}
    auroc = sklearn_metrics.roc_auc_score(labels, probabilities, multi_class="ovr")
    assert figures.scalars["auroc"] == pytest.approx(auroc, abs=1e-12)
    assert figures.confusion == sklearn_metrics.confusion_matrix(labels, predicted).tolist()
    assert figures.notes == []


def test_of_two_labels_the_second_is_the_one_that_auroc_ranks():
    probabilities, labels = answers(300, 2)
    figures = classification_figures(probabilities, labels, ("ham", "spam"))
    assert figures.scalars["auroc"] == sklearn_metrics.roc_auc_score(labels, probabilities[:, 1])
    assert figures.scalars["f1/spam"] == pytest.approx(sklearn_metrics.f1_score(labels, probabilities.argmax(1)))
    assert set(figures.intervals) == {"accuracy", "f1_macro", "f1/ham", "f1/spam"}


def test_figures_of_sets_of_labels_are_scikit_learns():
    probabilities, labels = tags(400, 4)
    figures = classification_figures(probabilities, labels, NAMES, multi_label=True, threshold=0.4)
    predicted, truth = probabilities >= 0.4, labels.astype(bool)
    assert figures.scalars["subset_accuracy"] == sklearn_metrics.accuracy_score(truth, predicted)
    assert "accuracy" not in figures.scalars
    for average in ("macro", "micro"):
        for rate, score in (
            ("precision", sklearn_metrics.precision_score),
            ("recall", sklearn_metrics.recall_score),
            ("f1", sklearn_metrics.f1_score),
        ):
            expected = score(truth, predicted, average=average)
            assert figures.scalars[f"{rate}_{average}"] == pytest.approx(expected, abs=1e-12)
    ranked = sklearn_metrics.average_precision_score(truth, probabilities)
    assert figures.scalars["average_precision"] == pytest.approx(ranked, abs=1e-12)
    assert figures.scalars["auroc"] == pytest.approx(sklearn_metrics.roc_auc_score(truth, probabilities), abs=1e-12)
    assert figures.support == dict(zip(NAMES, truth.sum(0).tolist(), strict=True))


def test_a_lone_label_that_a_text_has_or_not_is_judged_as_such():
    probabilities, labels = tags(200, 1)
    figures = classification_figures(probabilities, labels, ["x"], multi_label=True)
    expected = sklearn_metrics.f1_score(labels[:, 0], probabilities[:, 0] >= 0.5)
    assert figures.scalars["f1/x"] == figures.scalars["f1_macro"] == pytest.approx(expected, abs=1e-12)
    assert figures.scalars["f1_micro"] == pytest.approx(expected, abs=1e-12)


def test_a_label_is_given_from_the_threshold_on():
    probabilities = np.array([[0.25, 0.75], [0.5, 0.1]], dtype=np.float32)
    figures = classification_figures(probabilities, np.array([[0, 1], [1, 0]]), ("x", "y"), True, threshold=0.5)
    assert figures.scalars["subset_accuracy"] == 1.0


def test_the_calibration_error_is_the_papers_sum_over_bins():
    # A bin of four at 0.7, three of them right; one of one at 1.0, wrong; 0.8 = 12 / 15 belongs to the bin below 0.8.
    probabilities = np.array([0.7, 0.7, 0.7, 0.7, 1.0, 0.8, 0.79])
    outcomes = np.array([1, 1, 1, 0, 0, 1, 0], dtype=bool)
    expected = (4 * abs(3 / 4 - 0.7) + 1 * abs(0 - 1.0) + 2 * abs(1 / 2 - 0.795)) / 7
    assert calibration_error(probabilities, outcomes) == pytest.approx(expected, abs=1e-12)


def test_confidence_that_comes_true_has_no_calibration_error_and_its_opposite_has_all():
    generator = np.random.default_rng(0)
    probabilities = generator.random(200_000)
    assert calibration_error(probabilities, generator.random(200_000) < probabilities) < 0.005
    assert calibration_error(np.ones(10), np.zeros(10, dtype=bool)) == 1.0


def test_a_label_without_examples_is_left_out_of_the_ranking_and_named():
    probabilities, labels = answers(200, 4)
    labels[labels == 3] = 0
    figures = classification_figures(probabilities, labels, NAMES)
    each = [sklearn_metrics.roc_auc_score(labels == column, probabilities[:, column]) for column in range(3)]
    assert figures.scalars["auroc"] == pytest.approx(np.mean(each), abs=1e-12)
    assert figures.notes == ["auroc without d: no example has the label, or every one"]


def test_examples_of_one_label_alone_have_no_auroc():
    figures = classification_figures(np.array([[0.9, 0.1], [0.2, 0.8]]), np.array([0, 0]), ("x", "y"))
    assert "auroc" not in figures.scalars
    assert len(figures.notes) == 1
    assert figures.scalars["f1/y"] == 0.0


def test_macro_averages_are_over_the_labels_that_occur_as_in_scikit_learn():
    probabilities, labels = answers(50, 4)
    probabilities[:, 3], labels[labels == 3] = 0, 1
    expected = sklearn_metrics.f1_score(labels, probabilities.argmax(1), average="macro")
    assert classification_figures(probabilities, labels, NAMES).scalars["f1_macro"] == pytest.approx(expected)


@pytest.mark.parametrize("multi_label", [False, True])
def test_the_intervals_are_those_of_resampling_one_example_at_a_time(multi_label):
    probabilities, labels = (tags if multi_label else answers)(300, 3)
    names = ("x", "y", "z")
    figures = classification_figures(probabilities, labels, names, multi_label, bootstrap_samples=4000)
    predicted = probabilities >= 0.5 if multi_label else probabilities.argmax(1)
    generator = np.random.default_rng(5)
    slow = {name: [] for name in ("accuracy", "f1_macro", "f1/z")}
    for _ in range(300):
        rows = generator.integers(300, size=300)
        slow["accuracy"].append(sklearn_metrics.accuracy_score(labels[rows], predicted[rows]))
        f1 = sklearn_metrics.f1_score(labels[rows], predicted[rows], average=None)
        slow["f1_macro"].append(f1.mean())
        slow["f1/z"].append(f1[2])
    for name, values in slow.items():
        ours = figures.intervals["subset_accuracy" if multi_label and name == "accuracy" else name]
        # The ends of 300 samples stray by a tenth of the width.
        assert ours == pytest.approx(np.quantile(values, [0.025, 0.975]), abs=0.3 * (ours[1] - ours[0]))


def test_an_interval_of_the_accuracy_has_the_width_of_the_normal_approximation():
    probabilities, labels = answers(10_000, 5)
    figures = classification_figures(probabilities, labels, "vwxyz", confidence=0.9)
    accuracy, (low, high) = figures.scalars["accuracy"], figures.intervals["accuracy"]
    assert high - low == pytest.approx(2 * 1.645 * np.sqrt(accuracy * (1 - accuracy) / 10_000), rel=0.08)
    assert (low + high) / 2 == pytest.approx(accuracy, abs=0.001)


@settings(max_examples=60, deadline=None)
@given(
    num_examples=st.integers(1, 60),
    num_labels=st.integers(1, 6),
    seed=st.integers(0, 2**32 - 1),
    multi_label=st.booleans(),
)
def test_figures_do_not_depend_on_the_order_and_lie_where_they_must(num_examples, num_labels, seed, multi_label):
    num_labels = max(num_labels, 1 if multi_label else 2)
    probabilities, labels = (tags if multi_label else answers)(num_examples, num_labels, seed=seed)
    names = [str(label) for label in range(num_labels)]
    first = classification_figures(probabilities, labels, names, multi_label, bootstrap_samples=200)
    order = np.random.default_rng(seed).permutation(num_examples)
    again = classification_figures(probabilities[order], labels[order], names, multi_label, bootstrap_samples=200)
    assert again.intervals == first.intervals
    assert again.scalars == pytest.approx(first.scalars, abs=1e-9)
    assert (again.confusion, again.support, again.notes) == (first.confusion, first.support, first.notes)
    assert all(0 <= value <= 1 for value in first.scalars.values())
    assert all(0 <= low <= high <= 1 for low, high in first.intervals.values())
    accuracy = "subset_accuracy" if multi_label else "accuracy"
    low, high = first.intervals[accuracy]
    assert low <= first.scalars[accuracy] <= high
    assert np.sum(first.confusion) == (0 if multi_label else num_examples)
    assert json.loads(json.dumps(first._asdict()))["scalars"] == first.scalars


def test_a_classifier_without_a_mistake_is_sure_of_it():
    figures = classification_figures(np.eye(10), np.arange(10), "abcdefghij")
    assert figures.intervals["f1_macro"] == (1.0, 1.0)
    assert figures.scalars["calibration_error"] == 0.0


def test_as_many_examples_and_labels_as_banking77_has_take_less_than_two_seconds():
    probabilities, labels = answers(3080, 77, skill=4.0)
    begin = time.process_time()
    figures = classification_figures(probabilities, labels, [f"intent {label}" for label in range(77)])
    assert time.process_time() - begin < 2
    low, high = figures.intervals["f1_macro"]
    assert low < figures.scalars["f1_macro"] < high
    assert not any("/" in name for name in figures.scalars)


@pytest.mark.parametrize(
    ("metric", "higher"),
    [
        ("accuracy", True),
        ("f1/spam", True),
        ("auroc", True),
        ("loss", False),
        ("perplexity", False),
        ("bits_per_character", False),
        ("calibration_error", False),
    ],
)
def test_the_direction_of_a_figure_is_known_by_its_name(metric, higher):
    assert higher_is_better(metric) is higher


def test_the_rendered_tables_hold_the_figures_and_no_markup_of_a_label_is_obeyed():
    probabilities, labels = answers(500, 3, skill=0.5)
    figures = classification_figures(probabilities, labels, ("[red]x", "two\nlines", "z"))
    text = render(figures)
    (line,) = [line for line in text.splitlines() if line.startswith("accuracy")]
    low, high = figures.intervals["accuracy"]
    assert line.split() == ["accuracy", f"{figures.scalars['accuracy']:.4f}", f"{low:.4f}", "-", f"{high:.4f}"]
    assert "[red]x" in text
    assert "two lines" in text
    worst = max(count for true, row in enumerate(figures.confusion) for given, count in enumerate(row) if true != given)
    assert text.split("times\n")[1].splitlines()[0].endswith(f" {worst}")


def test_of_many_labels_the_worst_are_shown():
    probabilities, labels = answers(2000, 40)
    names = [f"label{number:02}" for number in range(40)]
    figures = classification_figures(probabilities, labels, names)
    text = render(figures)
    worst = min(names, key=lambda name: figures.per_class["f1"][name])
    assert text.split("examples\n")[1].startswith(worst)
    assert "the 20 labels of 40 with the lowest f1" in text
