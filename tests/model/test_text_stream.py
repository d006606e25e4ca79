"""A stream's pieces are the whole text cut at the first stop string, however tokens and stops lie to each other."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mta_ray.model.text_stream import TextStream


class Bytes:
    """A tokenizer whose tokens are UTF-8 bytes: characters come in parts."""

    def decode(self, ids, **_):
        return bytes(ids).decode("utf-8", errors="replace")


def cut(text: str, stops: list[str]) -> str:
    """The text before the first stop string that is complete; characters come one at a time."""
    for end in range(len(text) + 1):
        places = [text[:end].find(stop) for stop in stops if stop in text[:end]]
        if places:
            return text[: min(places)]
    return text


@settings(deadline=None, max_examples=200)
@given(st.text("abé中", max_size=12), st.lists(st.text("abé中", min_size=1, max_size=4), max_size=3))
def test_pieces_together_are_the_text_before_the_first_stop(text, stops):
    stream = TextStream(Bytes(), stops)
    sent = ""
    for byte in text.encode():
        sent += stream.push(byte)
        assert cut(text, stops).startswith(sent), "nothing is sent that is taken back"
    assert sent + stream.end() == cut(text, stops)
    assert stream.is_stopped == any(stop in text for stop in stops)


@settings(deadline=None, max_examples=200)
@given(st.text("a é\n", max_size=10), st.lists(st.text("a é\n", min_size=1, max_size=3), max_size=3))
def test_what_is_stripped_stops_nothing(text, stops):
    stream = TextStream(Bytes(), stops, strips=True)
    sent = "".join(stream.push(byte) for byte in text.encode()) + stream.end()
    assert sent == cut(text.lstrip(), stops)


@settings(deadline=None, max_examples=100)
@given(st.text("a é\n", max_size=10))
def test_where_a_tokens_text_begins(text):
    stream = TextStream(Bytes(), ["no such text"], strips=True)
    begins = []
    for byte in text.encode():
        begins.append(stream.chars)
        stream.push(byte)
    start = len(text) - len(text.lstrip())
    assert begins == [max(0, n - start) for n, char in enumerate(text) for _ in char.encode()]


@pytest.mark.parametrize("text", ["unbelievably good films, mostly", "it's 5.0 (really)"])
def test_word_pieces_keep_their_spaces(tiny_model, text):
    tokenizer = tiny_model().tokenizer
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    stream = TextStream(tokenizer)
    sent = "".join(stream.push(token) for token in [*ids, 102]) + stream.end()
    assert sent == tokenizer.decode(ids, clean_up_tokenization_spaces=False)
