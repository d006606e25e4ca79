"""The vocabulary of the simulated world, as data: what texts are made of, without meaning any user's taste."""

from __future__ import annotations

EDITIONS = {"product_rating": 2, "news_headline": 2}
"""Of the texts of a task; what was made with another one is no longer current. Tasks that are not here are at 1."""


def edition(task: str) -> int:
    """Of the texts of a task."""
    return EDITIONS.get(task, 1)


THEMES: dict[str, tuple[str, ...]] = {
    "sci-fi": ("robots", "a starship", "an alien signal", "a time machine", "cloned astronauts", "a colony on mars"),
    "based on a book": (
        "a famous novel",
        "a bestselling memoir",
        "an old manuscript",
        "a classic tale",
        "a poet's diary",
        "a library",
    ),
    "comedy": (
        "hilarious pranks",
        "a clumsy uncle",
        "silly disguises",
        "a talking dog",
        "wedding mishaps",
        "slapstick",
    ),
    "action": ("car chases", "gunfights", "an explosive heist", "martial arts", "a rescue mission", "hired commandos"),
    "twist ending": (
        "a shocking secret",
        "a hidden identity",
        "a false confession",
        "a double agent",
        "a final reveal",
        "an unseen clue",
    ),
    "dystopia": (
        "a totalitarian regime",
        "ration cards",
        "mass surveillance",
        "a ruined city",
        "forbidden thoughts",
        "a walled state",
    ),
    "dark comedy": (
        "a botched funeral",
        "absurd murders",
        "cynical undertakers",
        "a cheerful hitman",
        "awkward corpses",
        "gallows humour",
    ),
    "classic": (
        "a silent film star",
        "golden age glamour",
        "a black and white romance",
        "a legendary director",
        "a grand old studio",
        "vintage songs",
    ),
    "psychology": ("troubled memories", "a therapist", "obsession", "split personalities", "nightmares", "a mind game"),
    "fantasy": ("dragons", "a wizard", "an enchanted sword", "elves", "a cursed kingdom", "a magic ring"),
    "romance": (
        "forbidden love",
        "a summer kiss",
        "old sweethearts",
        "love letters",
        "a wedding vow",
        "a broken heart",
    ),
    "thought-provoking": (
        "a moral dilemma",
        "the meaning of life",
        "free will",
        "a philosopher",
        "big questions",
        "faith and doubt",
    ),
    "social commentary": (
        "inequality",
        "a protest march",
        "racism",
        "corrupt politics",
        "factory workers",
        "immigrant families",
    ),
    "violence": ("brutal torture", "bloody revenge", "gang war", "a serial killer", "street fights", "a massacre"),
    "true story": (
        "real events",
        "a historic trial",
        "an actual survivor",
        "a documented disaster",
        "a real hero",
        "newspaper archives",
    ),
}
"""Movie tag to the phrases that show it in a description."""

PEOPLE = (
    "a teacher",
    "two sisters",
    "a young sailor",
    "an old farmer",
    "a nurse",
    "three friends",
    "a lawyer",
    "a widow",
    "a cook",
    "twins",
)
PLACES = (
    "in paris",
    "in a small town",
    "at sea",
    "in the desert",
    "in tokyo",
    "on an island",
    "in the mountains",
    "in chicago",
    "up north",
    "in brazil",
)
FILLERS = (
    "one winter",
    "after the war",
    "last summer",
    "years later",
    "at night",
    "by chance",
    "against all odds",
    "slowly",
    "once more",
    "in the end",
)

MOVIE_TEMPLATES = (
    "{when} {who} {where} and {a}, with {b} and {c}",
    "{a} and {b} meet {c} as {who} leaves home {where}",
    "{who} finds {a}; {b} follows, then {c} {where}",
    "{where} {who} cannot escape {a}, {b} or {c}",
    "a tale of {a} and {b}, where {who} {when} faces {c}",
)

ASPECTS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "price": (
        ("a bargain", "great value", "cheap for what it is"),
        ("far too expensive", "overpriced", "not worth the money"),
    ),
    "quality": (("solid build", "well made", "feels sturdy"), ("broke quickly", "flimsy parts", "poorly made")),
    "looks": (("gorgeous design", "lovely colour", "looks stunning"), ("ugly finish", "dull colour", "looks cheap")),
    "delivery": (
        ("arrived early", "fast shipping", "well packed"),
        ("arrived late", "box was damaged", "shipping took weeks"),
    ),
    "support": (
        ("helpful support", "kind staff", "quick refund"),
        ("rude support", "no reply to mails", "refund refused"),
    ),
    "ease": (
        ("easy to set up", "simple to use", "clear manual"),
        ("confusing to set up", "hard to use", "useless manual"),
    ),
}
"""What a review speaks of, said well and said badly."""
PRODUCTS = ("lamp", "kettle", "backpack", "headset", "jacket", "blender", "watch", "tent", "keyboard", "chair")
REVIEW_TEMPLATES = (
    "this {product}, {number} days old: {a}, {b}, {c}. {who} used it {when}",
    "bought the {product} {when}. {a} but also {b}. {c}. {who} has had it for {number} days",
    "{a}. {b}. {c}. that is my {product} after {number} days, {when}, with {who}",
    "my new {product} has {a} and {b}, plus {c}, said {who} {when} after {number} days",
)

SUBJECTS = (
    "the mayor",
    "a local bakery",
    "the river bridge",
    "young doctors",
    "the city zoo",
    "rail workers",
    "a tech startup",
    "the school board",
    "farmers",
    "the museum",
)
EVENTS = (
    "opens a new site",
    "wins an award",
    "faces a strike",
    "cuts its budget",
    "plans a festival",
    "loses a lawsuit",
    "finds a lost letter",
    "doubles its staff",
    "bans phones",
    "raises prices",
)
REASONS = (
    "because of the drought",
    "after a long vote",
    "to save money",
    "despite the protests",
    "for the children",
    "under new rules",
    "with public help",
    "as winter comes",
)
ARTICLE_TEMPLATES = (
    "{subject} {where} {event} {reason}, {who} told us {when} on {month} {day}",
    "{month} {day}: {reason}, {subject} {event} {where}, {who} says, and {when} more is known",
    "reports from {place}, {month} {day}: {subject} {event} {reason}. {who} saw it {when}",
)
MONTHS = (
    "january",
    "february",
    "march",
    "april",
    "may",
    "june",
    "july",
    "august",
    "september",
    "october",
    "november",
    "december",
)
HEADLINE_STYLES = (
    "{subject} {event}",
    "why {subject} {event}",
    "{place}: {subject} {event}",
    "breaking news: {subject} {event} {reason}",
    "you won't believe how {subject} {event}",
    "opinion: what it means when {subject} {event}",
)
"""Ways to headline the same article."""
