"""Agreement measures against the worked examples of their papers, and by hand."""

import pytest

from lego_pipeline.study.agreement import fleiss_kappa, krippendorff_alpha, pairwise_agreement

# Krippendorff (2011), section C: four observers, twelve units, "." where one did not look.
RELIABILITY = [
    ["1", "2", "3", "3", "2", "1", "4", "1", "2", None, None, None],
    ["1", "2", "3", "3", "2", "2", "4", "1", "2", "5", None, "3"],
    [None, "3", "3", "3", "2", "3", "4", "2", "2", "5", "1", None],
    ["1", "2", "3", "3", "2", "4", "4", "1", "2", "5", "1", None],
]
# Fleiss (1971) as it is often reprinted: 10 subjects, 14 raters, 5 categories.
FLEISS = [
    (0, 0, 0, 0, 14),
    (0, 2, 6, 4, 2),
    (0, 0, 3, 5, 6),
    (0, 3, 9, 2, 0),
    (2, 2, 8, 1, 1),
    (7, 7, 0, 0, 0),
    (3, 2, 6, 3, 0),
    (2, 5, 3, 2, 2),
    (6, 5, 2, 1, 0),
    (0, 2, 2, 3, 7),
]


def test_alpha_is_that_of_the_papers_example() -> None:
    units = [[value for value in unit if value is not None] for unit in zip(*RELIABILITY, strict=True)]
    assert krippendorff_alpha(units) == pytest.approx(0.743, abs=5e-4)


def test_kappa_is_that_of_the_usual_example() -> None:
    subjects = [[str(kind) for kind, n in enumerate(row) for _ in range(n)] for row in FLEISS]
    assert fleiss_kappa(subjects) == pytest.approx(0.210, abs=5e-4)


def test_full_agreement_is_one_and_steady_disagreement_is_below_zero() -> None:
    same, other = [["a", "a"], ["b", "b"]], [["a", "b"], ["b", "a"]]
    assert krippendorff_alpha(same) == fleiss_kappa(same) == pairwise_agreement(same) == 1
    assert krippendorff_alpha(other) == pytest.approx(-0.5)
    assert fleiss_kappa(other) == pytest.approx(-1)
    assert pairwise_agreement(other) == 0


def test_questions_with_one_answer_count_for_nothing() -> None:
    answers = [["a", "a"], ["b", "b"], ["a", "b"]]
    assert krippendorff_alpha([*answers, ["a"], []]) == krippendorff_alpha(answers)
    assert pairwise_agreement([*answers, ["a"]]) == pytest.approx(2 / 3)


@pytest.mark.parametrize("answers", [[], [["a"], ["b"]], [["a", "a"], ["a", "a"]]])
def test_where_nothing_can_be_said_there_is_no_value(answers: list[list[str]]) -> None:
    assert krippendorff_alpha(answers) is None and fleiss_kappa(answers) is None
