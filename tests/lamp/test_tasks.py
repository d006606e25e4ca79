import re

import pytest

from mta_ray.lamp.readers import _pattern
from mta_ray.lamp.tasks import TASKS, distinct_labels, normalise_label, task_named


def test_a_task_is_found_by_name_lamp_id_and_alias():
    assert task_named("movie_tagging") is task_named("LaMP-2") is task_named("lamp_2") is TASKS["movie_tagging"]
    assert task_named("LaMP-2N") is TASKS["news_categorize"]
    assert [task_named(f"LaMP-{n}").name for n in range(1, 8)] == [
        "citation",
        "movie_tagging",
        "product_rating",
        "news_headline",
        "scholarly_title",
        "email_subject",
        "tweet_paraphrase",
    ]


def test_an_unknown_task_lists_the_known_ones():
    with pytest.raises(ValueError, match="unknown task 'LaMP-9'.*movie_tagging.*LaMP-7"):
        task_named("LaMP-9")


@pytest.mark.parametrize("task", TASKS.values(), ids=lambda task: task.name)
def test_what_the_question_puts_in_the_pattern_takes_out(task):
    content = 'A "quoted" text: with [brackets] and {braces}, article: and all.'
    text = task.question.format(content=content, labels="one, two & three", option_1='The "first"', option_2="2nd [x]")
    found = _pattern(task).fullmatch(text).groupdict()
    expected = {"content": content, "labels": "one, two & three", "option_1": 'The "first"', "option_2": "2nd [x]"}
    assert found == {name: expected[name] for name in found}
    assert set(re.findall(r"\{(\w+)\}", task.question)) == set(found)
    assert [t.name for t in TASKS.values() if _pattern(t).fullmatch(text)] == [task.name]


@pytest.mark.parametrize(
    ("task", "opening", "again"),
    [
        ("citation", 'for an author who has written the paper with the title "', '", which reference is related?'),
        (
            "citation",
            'for an author who has written the paper with the title "',
            '", which reference is related? [1]: "',
        ),
        ("movie_tagging", "which tag does this movie relate to ", "tags: ["),
        ("news_categorize", "which category does this article relate to ", "categories: ["),
    ],
)
def test_a_step_again_and_again_is_no_question(task, opening, again):
    # Hours, with steps that are taken back.
    assert _pattern(TASKS[task]).fullmatch(opening + again * 30_000 + '[1]: "' * 30_000) is None


def test_labels_are_compared_as_tokenizers_leave_them():
    assert normalise_label("sci - fi") == normalise_label("Sci-Fi ") == "sci fi"
    assert normalise_label("[ 1 ]") == normalise_label("[1]") != normalise_label("[2]")
    assert normalise_label("Food & Drink") == normalise_label("food&drink")
    assert normalise_label("comedy") != normalise_label("dark comedy")


def test_labels_that_answers_cannot_tell_apart_are_refused():
    assert distinct_labels(["Action", "sci-fi", "action", "Sci - Fi"], "x") == {"action": "Action", "sci fi": "sci-fi"}
    with pytest.raises(ValueError, match=r"films.json: the labels 'C\+\+' and 'C#' are the same but for signs"):
        distinct_labels(["Java", "C++", "C#"], "films.json")
    with pytest.raises(ValueError, match="the label '👍' has no letter and no digit"):
        distinct_labels(["good", "👍"], "films.json")
    for task in TASKS.values():
        assert tuple(distinct_labels(task.labels, task.name).values()) == task.labels
