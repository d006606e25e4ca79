"""The report shows every method and no user; the answers in LaMP's form have the scores that the tables show."""

from __future__ import annotations

import json
from html.parser import HTMLParser

import pytest
from benchmark_rows import HOSTILE
from rich.console import Console

from mta_ray.comparison.figures import frontier
from mta_ray.comparison.report import write_benchmark_report
from mta_ray.comparison.submissions import write_submissions
from mta_ray.comparison.tables import quality_rows, terminal_table, value
from mta_ray.lamp.metrics import score
from mta_ray.lamp.tasks import goes_by, task_named


@pytest.fixture(scope="module")
def home(tmp_path_factory, results, costs, facts):
    folder = tmp_path_factory.mktemp("benchmark")
    write_benchmark_report(folder, results[results["dataset"] == "movies"], costs, facts, samples=50)
    return folder


@pytest.fixture(scope="module")
def report(home):
    return json.loads((home / "report.json").read_text())


class Cells(HTMLParser):
    """The texts of a page's table cells."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.cells: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)

    def handle_data(self, data):
        if self.tags[-1:] in (["th"], ["td"]):
            self.cells.append(data.strip())


def test_the_page_shows_every_method_and_no_user(home):
    text = (home / "report.html").read_text()
    page = Cells(text)
    assert {"mta", "mta+rag", "rag", "zebra", "k=1", "oracle", "non_personalised", "movies"} <= set(page.cells)
    assert "script" not in page.tags and "nan" not in text.lower().split()
    assert page.tags.count("svg") == 6  # three groups of users, history, bytes, parts
    assert "alert" not in text  # which every user id holds


def test_tables_are_as_wide_as_their_headings(home):
    blocks = (home / "table.md").read_text().split("\n\n")
    tables = [block.splitlines() for block in blocks if block.startswith("|")]
    assert len(tables) == 5 + 1 + 1  # those of the pictures but for bytes, leaks, settings
    for table in tables:
        assert len({line.count(" | ") for line in table}) == 1


def test_a_row_says_what_was_judged(report):
    movies = report["datasets"]["movies"]
    row = next(row for row in quality_rows(movies, "few_shot") if row[0] == "zebra")
    figures = movies["budgets"]["all"]["zebra"]["few_shot"]
    interval = figures["per_user"]["over_mta"]
    assert row[1].startswith(f"{figures['metrics']['accuracy']:.3f} [")
    assert row[2] == f"{figures['metrics']['f1_macro']:.3f}"
    assert row[5] == f"{interval['mean']:+.3f} [{interval['low']:+.3f}, {interval['high']:+.3f}]".replace("-", "−")
    assert row[8] == "91 B"
    # an error is shown as it is, its interval from low to high
    assert value({"mean": -1.0, "low": -1.5, "high": -0.5}, False) == "1.000 [0.500, 1.500]"


def test_the_frontier_holds_what_nothing_cheaper_beats():
    def entry(kept: float, quality: float) -> dict:
        return {"few_shot": {"costs": {"bytes_per_user": kept}, "metrics": {"mae": quality}}}

    methods = {
        "mta": entry(100, 0.3),
        "oppu": entry(900, 0.2),
        "rag": entry(500, 0.3),
        "non_personalised": entry(0, 0.6),
    }
    methods |= {"oracle": entry(0, 0.0), "zebra": entry(0, 0.5)}
    dataset = {"primary": "mae", "higher_is_better": False, "budgets": {"all": methods}}
    assert frontier(dataset, "few_shot") == ["zebra", "mta", "oppu"]


def test_submissions_score_as_the_tables_say(home, report):
    place, judged = home / "submissions" / "movies", report["datasets"]["movies"]
    golds = json.loads((place / "golds.json").read_text())
    task = task_named(judged["task"])
    assert golds["task"] == "LaMP_2" and goes_by(task, golds["task"])
    answers = {gold["id"]: gold["output"] for gold in golds["golds"]}
    assert len(answers) == judged["queries"]
    for name in ("zebra-all-0", "zebra-all-2", "mta+rag-all-0", "rag-all-0", "mta-2-1", "mta-k=1-all-1"):
        said = json.loads((place / f"{name}.json").read_text())
        assert said["task"] == golds["task"] and [row["id"] for row in said["golds"]] == list(answers)
    found = score(task, [row["output"] for row in said["golds"]], list(answers.values()))
    assert found == pytest.approx(judged["ablations"]["mta:k=1"]["all"]["metrics"])


def test_submissions_say_ratings_as_they_are(tmp_path, results):
    """A scorer reads a number from them; what is none stays none."""
    rows = results[results["dataset"] == "ratings"]
    write_submissions(tmp_path, rows.assign(prediction="-3 !"))
    said = json.loads((tmp_path / "ratings" / "oracle-all-0.json").read_text())["golds"]
    assert {row["output"] for row in said} == {"-3 !"}


def test_submissions_say_labels_as_lamps_scorer_compares_them_letter_by_letter(tmp_path, results):
    """As a tokenizer gives them back: in lower case, marks set apart."""
    rows = results[results["dataset"] == "movies"]
    worn = rows.assign(prediction=rows["prediction"].str.replace("-", " - ").str.upper() + " ")
    write_submissions(tmp_path, worn.assign(prediction=worn["prediction"].where(rows["seed"] != 2, "no tag")))
    golds = json.loads((tmp_path / "movies" / "golds.json").read_text())["golds"]
    said = json.loads((tmp_path / "movies" / "oracle-all-0.json").read_text())["golds"]
    assert [row["output"] for row in said] == [row["output"] for row in golds]
    unknown = json.loads((tmp_path / "movies" / "zebra-all-2.json").read_text())["golds"]
    assert {row["output"] for row in unknown} == {"no tag"}


def test_ids_that_users_share_are_told_apart(tmp_path, results):
    same = results[results["dataset"] == "movies"].assign(query_id=lambda r: r["query_id"].str[-1])
    write_submissions(tmp_path, same)
    golds = json.loads((tmp_path / "movies" / "golds.json").read_text())["golds"]
    assert len(golds) == 18 and golds[0]["id"] == f"{HOSTILE}00/0"


def test_a_terminal_of_80_columns_is_wide_enough(report):
    console = Console(width=80)
    with console.capture() as capture:
        console.print(terminal_table("movies", report["datasets"]["movies"]))
    assert max(map(len, capture.get().splitlines())) <= 80
    assert "mta+rag" in capture.get()
