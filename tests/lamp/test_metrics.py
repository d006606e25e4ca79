import math

import numpy as np
import pytest

from mta_ray.lamp.metrics import query_score, score, score_of_terms, terms
from mta_ray.lamp.tasks import TASKS

MOVIE, RATING, TITLE = TASKS["movie_tagging"], TASKS["product_rating"], TASKS["news_headline"]


def test_accuracy_and_macro_f1_by_hand():
    golds = ["sci-fi", "sci-fi", "comedy", "action"]
    predictions = ["sci - fi", "comedy", " Comedy.", "no such tag"]
    # sci-fi: precision 1, recall 1/2, F1 2/3. comedy: precision 1/2, recall 1, F1 2/3. action: 0.
    values = score(MOVIE, predictions, golds, labels=["sci-fi", "comedy", "action"])
    assert values == {"accuracy": 0.5, "f1_macro": pytest.approx(4 / 9)}
    # The list is fixed: a label that nobody has lowers the mean all the same.
    wider = score(MOVIE, predictions, golds, labels=["sci-fi", "comedy", "action", "romance"])
    assert wider["f1_macro"] == pytest.approx(1 / 3)
    assert score(MOVIE, predictions, golds)["f1_macro"] == pytest.approx(4 / 3 / 15)


def test_labels_that_answers_cannot_tell_apart_are_an_error():
    assert query_score(MOVIE, "action", "Action", labels=["Action", "action", "comedy"]) == 1
    assert score(MOVIE, ["action"], ["Action"], labels=["Action", "action"]) == {"accuracy": 1, "f1_macro": 1}
    for labels in (["C++", "C#"], ["👍", "good"]):
        with pytest.raises(ValueError, match="rename"):
            score(MOVIE, labels[:1], labels[:1], labels=labels)


def test_rating_errors_by_hand():
    # off by 1; no number, counted as 5 (off by 3); beyond the scale, as it is (off by 4)
    values = score(RATING, ["4", "good", "9"], ["5", "2", "5"])
    assert values == {"mae": pytest.approx(8 / 3), "rmse": pytest.approx(math.sqrt(26 / 3))}
    assert score(RATING, ["nan", "4.0"], ["3", "4"])["mae"] == 1
    assert score(RATING, ["55", "-1.5"], ["5", "1"])["mae"] == pytest.approx((50 + 2.5) / 2)


def test_rouge_by_hand():
    # 5 of 5 words said are among the 6: P 1, R 5/6. Longest common sequence "the cat the mat": P 4/5, R 4/6.
    values = score(TITLE, ["the cat the mat sat"], ["The cat sat on the mat"])
    assert values == {"rouge_1": pytest.approx(10 / 11), "rouge_L": pytest.approx(8 / 11)}
    # words are compared as they are, without their stems
    assert score(TITLE, ["running cat", ""], ["run cat", "dog"]) == {"rouge_1": 0.25, "rouge_L": 0.25}


def test_a_query_score_is_higher_where_the_answer_is_better():
    assert query_score(MOVIE, "sci - fi", "sci-fi") == 1 > query_score(MOVIE, "fantasy", "sci-fi") == 0
    assert query_score(MOVIE, "u. s. news", "u.s. news", labels=["u.s. news", "sports"]) == 1
    assert query_score(TASKS["citation"], "[ 2 ]", "[2]") == 1
    assert [query_score(RATING, said, "4") for said in ("4", "2", "?")] == [0, -2, -3]
    assert query_score(TITLE, "the cat the mat sat", "the cat sat on the mat") == pytest.approx(10 / 11)


@pytest.mark.parametrize(
    ("task", "words"),
    [
        (MOVIE, ["sci-fi", "Sci - Fi", "comedy", "action", "romance", "no such tag"]),
        (RATING, ["1", "2", "5", "4.0", "-1.5", "good"]),
        (TITLE, ["the cat sat", "the cat the mat", "a dog", "dog"]),
    ],
)
def test_sums_of_terms_give_the_scores_of_any_sample_of_queries(task, words):
    rng = np.random.default_rng(1)
    golds = rng.choice(words[:-1] if task is not RATING else words[:4], 60).tolist()
    said = rng.choice(words, 60).tolist()
    found = terms(task, said, golds)
    samples = [rng.integers(60, size=size) for size in (1, 2, 7, 60, 200)]
    sums, queries = np.stack([found[at].sum(0) for at in samples]), np.array([float(len(at)) for at in samples])
    scores = score_of_terms(task, sums, queries)
    for number, at in enumerate(samples):
        wanted = score(task, [said[n] for n in at], [golds[n] for n in at])
        wanted.pop("f1_macro", None)  # has no samples
        assert {name: values[number] for name, values in scores.items()} == pytest.approx(wanted)


@pytest.mark.parametrize(("predictions", "golds"), [([], []), (["a"], ["a", "b"])])
def test_lists_must_match(predictions, golds):
    with pytest.raises(ValueError, match="give one for each gold"):
        score(TITLE, predictions, golds)


def test_a_gold_outside_the_labels_is_an_error_and_does_not_show_itself():
    with pytest.raises(ValueError, match="none of the 15 labels") as caught:
        score(MOVIE, ["comedy"], ["my secret"])
    assert "secret" not in str(caught.value)


def test_golds_in_which_rouge_sees_no_word_are_told_once(caplog):
    task = TASKS["email_subject"]
    assert score(task, ["Grüße"], ["Grüße"])["rouge_1"] == 1 and not caplog.records
    for golds in (["привет мир", "hello"], ["你好", "hello"]):
        assert score(task, golds, golds)["rouge_1"] == 0.5
    assert [record.getMessage().partition(",")[0] for record in caplog.records] == [
        "email_subject: gold answers hold no Latin letter and no digit"
    ]
