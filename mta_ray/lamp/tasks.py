"""The LaMP tasks as one table of data: where a task's words lie in the files, how it asks, and how it is scored."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

MOVIE_TAGS = (
    "sci-fi",
    "based on a book",
    "comedy",
    "action",
    "twist ending",
    "dystopia",
    "dark comedy",
    "classic",
    "psychology",
    "fantasy",
    "romance",
    "thought-provoking",
    "social commentary",
    "violence",
    "true story",
)
NEWS_CATEGORIES = (
    "women",
    "religion",
    "politics",
    "style & beauty",
    "entertainment",
    "culture & arts",
    "sports",
    "science & technology",
    "travel",
    "business",
    "crime",
    "education",
    "healthy living",
    "parents",
    "food & drink",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """One kind of question that is asked on behalf of users. What all of them share is code; this is the rest."""

    name: str
    """What commands, files and reports call it."""
    lamp_id: str
    """LaMP's own name. Two forms of LaMP-2 exist; the bare id means the later one, movie tags."""
    aliases: tuple[str, ...] = ()
    """Other names that it goes by."""
    kind: Literal["label", "rating", "text"]
    """One of a closed list of labels, a number on a scale, or free text: decides the metrics."""
    content_fields: tuple[str, ...]
    """Profile fields that hold what was seen; the first that is present and not empty wins. None: a target alone."""
    target_field: str
    """Profile field that holds what the user made of it."""
    is_target_optional: bool = False
    """Whether a profile item may lack its target: raw LaMP-1 has no citations."""
    labels: tuple[str, ...] = ()
    """The allowed answers. Only a default: labels are data, and a data set may bring its own."""
    has_label_targets: bool = False
    """Whether profile targets are labels too (a citation's target is a paper, only its answer is a label)."""
    question: str
    """LaMP's wording, with {content}, {labels}, {option_1} and {option_2} where they go."""
    blank_question: str = ""
    """The wording where there is no content to ask about."""
    input_pattern: str
    """Regular expression that takes `content`, `labels`, `option_1` and `option_2` out of a LaMP `input`.

    In steps that are not taken back, `(?>...)`: else a long text with a step's words again and again takes hours.
    """
    context_wording: str
    """How one earlier item of the user is told before LaMP's question, with {content} and {target}."""
    content_word: str
    """Short word for what is seen, in prompts for small models."""
    target_word: str
    """Short word for the answer; every prompt ends with it and a colon."""
    max_new_tokens: int
    """How many tokens an answer may take (the released systems' settings)."""
    metrics: tuple[str, ...]
    """What `metrics.score` gives, the primary one first."""
    higher_is_better: bool = True
    """Direction of the primary metric."""

    @property
    def primary_metric(self) -> str:
        return self.metrics[0]

    @property
    def has_options(self) -> bool:
        """Whether a query offers two options of its own to choose from."""
        return "{option_1}" in self.question


_LABEL_METRICS = ("accuracy", "f1_macro")
_TEXT_METRICS = ("rouge_1", "rouge_L")

TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task(
            name="citation",
            lamp_id="LaMP-1",
            kind="label",
            content_fields=("title",),
            target_field="citation",
            is_target_optional=True,
            labels=("[1]", "[2]"),
            question='For an author who has written the paper with the title "{content}", which reference is related? '
            'Just answer with [1] or [2] without explanation. [1]: "{option_1}" [2]: "{option_2}"',
            input_pattern=r'for an author who has written the paper with the title "(?>(?P<content>.*?)", which '
            r'reference is related\?)(?>.*?\[1\]: ")(?>(?P<option_1>.*?)"\s*+\[2\]: ")(?P<option_2>.*)"',
            context_wording='the paper "{content}" cites "{target}"',
            content_word="paper",
            target_word="reference",
            max_new_tokens=5,
            metrics=_LABEL_METRICS,
        ),
        Task(
            name="movie_tagging",
            lamp_id="LaMP-2",
            aliases=("LaMP-2M",),
            kind="label",
            content_fields=("description",),
            target_field="tag",
            labels=MOVIE_TAGS,
            has_label_targets=True,
            question="Which tag does this movie relate to among the following tags? Just answer with the tag name "
            "without further explanation. tags: [{labels}] description: {content}",
            input_pattern=r"which tag does this movie relate to(?>.*?tags: \[)(?P<labels>[^\]]*+)\]\s*+"
            r"description: (?P<content>.*)",
            context_wording='the tag for the movie: "{content}" is "{target}"',
            content_word="description",
            target_word="tag",
            max_new_tokens=10,
            metrics=_LABEL_METRICS,
        ),
        Task(
            name="news_categorize",
            lamp_id="LaMP-2",
            aliases=("LaMP-2N",),
            kind="label",
            content_fields=("text", "title"),
            target_field="category",
            labels=NEWS_CATEGORIES,
            has_label_targets=True,
            question="Which category does this article relate to among the following categories? Just answer with the "
            "category name without further explanation. categories: [{labels}] article: {content}",
            input_pattern=r"which category does (?:this|the following) article relate to"
            r"(?>.*?(?=categories: \[|article: ))"
            r"(?:categories: \[(?P<labels>[^\]]*+)\]\s*+)?article: (?P<content>.*)",
            context_wording='the category for the article: "{content}" is "{target}"',
            content_word="article",
            target_word="category",
            max_new_tokens=10,
            metrics=_LABEL_METRICS,
        ),
        Task(
            name="product_rating",
            lamp_id="LaMP-3",
            kind="rating",
            content_fields=("text",),
            target_field="score",
            labels=("1", "2", "3", "4", "5"),
            has_label_targets=True,
            question="What is the score of the following review on a scale of 1 to 5? Just answer with 1, 2, 3, 4, or "
            "5 without further explanation. review: {content}",
            input_pattern=r"what is the score of the following review.*?review: (?P<content>.*)",
            context_wording='{target} is the score for "{content}"',
            content_word="review",
            target_word="score",
            max_new_tokens=3,
            metrics=("mae", "rmse"),
            higher_is_better=False,
        ),
        Task(
            name="news_headline",
            lamp_id="LaMP-4",
            kind="text",
            content_fields=("text",),
            target_field="title",
            question="Generate a headline for the following article: {content}",
            input_pattern=r"generate a headline for the following article: (?P<content>.*)",
            context_wording='"{target}" is the title for "{content}"',
            content_word="article",
            target_word="headline",
            max_new_tokens=50,
            metrics=_TEXT_METRICS,
        ),
        Task(
            name="scholarly_title",
            lamp_id="LaMP-5",
            kind="text",
            content_fields=("abstract",),
            target_field="title",
            question="Generate a title for the following abstract of a paper: {content}",
            input_pattern=r"generate a title for the following abstract of a paper: (?P<content>.*)",
            context_wording='"{target}" is the title for "{content}"',
            content_word="abstract",
            target_word="title",
            max_new_tokens=30,
            metrics=_TEXT_METRICS,
        ),
        Task(
            name="email_subject",
            lamp_id="LaMP-6",
            kind="text",
            content_fields=("text",),
            target_field="title",
            question="Generate a subject for the following email: {content}",
            input_pattern=r"generate a subject for the following email: (?P<content>.*)",
            context_wording='"{target}" is the title for "{content}"',
            content_word="email",
            target_word="subject",
            max_new_tokens=30,
            metrics=_TEXT_METRICS,
        ),
        Task(
            name="tweet_paraphrase",
            lamp_id="LaMP-7",
            kind="text",
            content_fields=(),
            target_field="text",
            question="Paraphrase the following tweet without any explanation before or after it: {content}",
            blank_question="Write a tweet as this person would, without any explanation before or after it.",
            input_pattern=r"paraphrase the following tweet without any explanation before or after it: (?P<content>.*)",
            context_wording='"{target}" is written by this person',
            content_word="tweet",
            target_word="paraphrase",
            max_new_tokens=50,
            metrics=_TEXT_METRICS,
        ),
    )
}


def task_named(name: str) -> Task:
    """The task of that name, LaMP id or alias (`movie_tagging`, `LaMP-2`, `lamp_2`)."""
    wanted = _plain(name)
    for task in TASKS.values():
        if wanted in map(_plain, (task.name, task.lamp_id, *task.aliases)):
            return task
    known = ", ".join(f"{task.name} ({task.lamp_id})" for task in TASKS.values())
    raise ValueError(f"unknown task {name!r}; give one of: {known}")


def goes_by(task: Task, name: str) -> bool:
    """Whether `name`, as an outputs file states it, may mean this task: both forms of LaMP-2 are called LaMP_2."""
    return _plain(name) in map(_plain, (task.name, task.lamp_id, *task.aliases))


def normalise_label(text: str) -> str:
    """The text as labels are compared: lower case, each run of other than letters and digits one space.

    Tokenizers do not give back what they got: WordPiece decodes "sci-fi" as "sci - fi" and "[1]" as "[ 1 ]".
    """
    return _NOT_ALPHANUMERIC.sub(" ", text.lower()).strip()


def distinct_labels(labels: Iterable[str], where: str) -> dict[str, str]:
    """Normalised label -> its first spelling. Spellings that differ in case and blanks alone are one label.

    Raises ValueError where other labels normalise alike (C++, C#), or one to nothing: answers could not be told apart.
    """
    spellings: dict[str, str] = {}
    for label in labels:
        key = normalise_label(label)
        first = spellings.setdefault(key, label)
        if not key:
            raise ValueError(f"{where}: the label {label!r} has no letter and no digit; rename it")
        if first != label and _unspaced(first) != _unspaced(label):
            raise ValueError(
                f"{where}: the labels {first!r} and {label!r} are the same but for signs, which answers are compared "
                "without; rename one of them"
            )
    return spellings


def _unspaced(label: str) -> str:
    return "".join(label.split()).casefold()


_NOT_ALPHANUMERIC = re.compile(r"[\W_]+")


def _plain(name: str) -> str:
    return normalise_label(name).replace(" ", "")
