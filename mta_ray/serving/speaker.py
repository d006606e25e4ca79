"""From an engine's pieces to the parts of an answer: text that is certain, and why it ended."""

from __future__ import annotations

from mta_ray.model.requests import Piece, RequestFailed
from mta_ray.model.text_stream import TextStream
from mta_ray.serving.exchange import Ask, Finish, Part, ToldToken
from mta_ray.serving.wording import Prompts


class Speaker:
    """One answer's pieces as text."""

    def __init__(self, prompts: Prompts, ask: Ask) -> None:
        self.tokens = 0
        self._tokenizer = prompts.backbone.tokenizer
        # A worded question ends with a colon, and its answer begins with a space.
        strips = ask.text is None and prompts.chat == "task"
        self._stream = TextStream(self._tokenizer, ask.stops, strips=strips)
        self._wants_logprobs = ask.sampling.logprobs is not None

    def part(self, piece: Piece) -> Part | None:
        """What can be sent after this piece; none where no text is certain yet."""
        if piece.finish == "cancelled":
            raise RequestFailed("the engine was closed")
        text = ""
        told: tuple[ToldToken, ...] = ()
        if piece.token is not None:
            self.tokens += 1
            told = (self._told(piece),) if self._wants_logprobs else ()
            text = self._stream.push(piece.token)
        finish: Finish | None = None
        if piece.finish is not None and not self._stream.is_stopped:
            text += self._stream.end()
            finish = "length" if piece.finish == "length" else "stop"
        if self._stream.is_stopped:
            finish = "stop"
        if not text and not told and finish is None:
            return None
        return Part(text=text, tokens=self.tokens, told=told, finish=finish)

    def _told(self, piece: Piece) -> ToldToken:
        def text(token: int) -> str:
            return str(self._tokenizer.decode([token]))

        assert piece.token is not None
        return ToldToken(
            text=text(piece.token),
            offset=self._stream.chars,
            logprob=piece.logprob or 0.0,
            alternatives=tuple((text(token), logprob) for token, logprob in piece.alternatives),
        )
