"""The page is safe to open, needs nothing else, and leaves out what there is not."""

from __future__ import annotations

import re
from html.parser import HTMLParser

import pytest

from mta_ray.evaluation.page import render_page
from mta_ray.evaluation.summary import ReportFacts, summarise


class Page(HTMLParser):
    """Every tag and attribute of a page, its text, and whether the tags close in order."""

    VOID = frozenset({"meta", "br", "link", "img"})

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.handle_startendtag(tag, attrs)
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.text += " ".join(data.split()) + " "


def test_the_page_is_safe_and_needs_nothing(summary, facts, predictions, hostile):
    text = render_page(summary, facts, predictions)
    page = Page(text)
    assert text.startswith("<!doctype html>") and page.open == []
    assert not {"script", "link", "img", "image", "iframe", "object", "embed", "base", "form"} & set(page.tags)
    names = {name for name, _ in page.attributes}
    assert not {"src", "href", "srcset", "action"} & names
    assert not [name for name in names if name.startswith("on")]
    # what the pictures refer to lies in the page; other addresses are names of XML vocabularies
    assert all(value.startswith("#") for name, value in page.attributes if name == "xlink:href")
    assert set(re.findall(r"url\(.", text)) <= {"url(#"} and "@import" not in text
    assert {name for name, value in page.attributes if "://" in (value or "")} == {"xmlns", "xmlns:xlink"}
    assert text.count("://") == sum("://" in (value or "") for _, value in page.attributes)
    assert "default-src 'none'" in text
    # a hostile title (twice), stage, curve and setting are shown as text
    assert page.text.count(hostile) >= 5
    assert "nan" not in page.text.lower().split()


def test_no_name_is_there_twice(summary, facts, predictions):
    """A repeated id is harmless only where both are the same drawing."""
    text = render_page(summary, facts, predictions)
    named = re.findall(r'<path id="([^"]*)" (d="[^"]*")', text)
    assert len(set(named)) == len(dict(named)) > 0


def test_the_page_shows_no_user(predictions, facts, metrics, hostile):
    frame = predictions.assign(user_id=predictions["user_id"].str.replace(hostile, "Secret-Name-"), prediction="Secret")
    assert "Secret" not in render_page(summarise(frame, facts, metrics, samples=50), facts, frame)


def test_the_page_shows_every_figure(summary, facts, predictions):
    text = Page(render_page(summary, facts, predictions)).text
    assert "On 2 few-shot users with 4 queries, mta takes accuracy from 0.250 to 0.750" in text
    row = "mta merged, then a small stack trained on the history 0.750 0.833 +0.500 [+0.333, +1.000] 0.500 0.500 "
    assert row in re.sub(r" +", " ", text)
    assert "768 B" in text and "500 ms" in text and "295 KB" in text
    assert "mta against oppu" in text and "bank.rank 8" in re.sub(r" +", " ", text)
    assert "torch 2.13.0" in re.sub(r" +", " ", text)


@pytest.mark.parametrize("group", ["few_shot", "rest"])
def test_a_group_without_users_has_no_columns(predictions, facts, metrics, group):
    frame = predictions[predictions["few_shot"] == (group == "rest")]
    page = render_page(summarise(frame, facts, metrics, samples=50), facts, frame)
    assert ("the rest</th>" in page) == (group == "few_shot")


def test_a_report_without_map_curves_or_stages_leaves_those_parts_out(predictions, metrics):
    facts = ReportFacts(title="t", task="k", primary="accuracy", higher_is_better=True, anchors=0)
    text = render_page(summarise(predictions, facts, metrics, samples=50), facts, predictions)
    assert not [head for head in ("Who is served by whom", "Training", "Time", "Settings") if f"<h2>{head}" in text]
    assert Page(text).open == []
