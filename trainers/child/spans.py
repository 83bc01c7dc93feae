"""Where the turns of an assistant lie in a rendered conversation. Pure.

Most templates only add to what they rendered before: a turn is what it adds. Some rewrite earlier turns (they cut off thoughts, or
show the system's words before the last question). There the same text is rendered once more with marks around each turn's words,
single characters for private use: without them it must be the same, and where they lie the words lie."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from trainers.child.chat import Chat, Turn, with_calls

Span = tuple[int, int]
MARKS = range(0xF0000, 0xFFFFE)
THOUGHT_END = "</think>"


class Unplaced(ValueError):
    """A turn that is not shown, or not as it is."""


def spans_of(chat: Chat, weights: Sequence[int]) -> list[Span]:
    """Where the assistant's turns of weight 1 lie in `chat.whole`, each with what ends it. Raises Unplaced."""
    marked: Marked | None = None
    found: list[Span] = []
    for index, (turn, weight) in enumerate(zip(chat.turns, weights, strict=True)):
        if turn["role"] != "assistant" or weight == 0:
            continue
        span = _added(chat, index)
        if span is None and _says_something(turn):
            marked = Marked.of(chat, index) if marked is None else marked
            span = marked.span(index)
        if span is None:
            continue
        if found and span[0] < found[-1][1]:
            raise Unplaced(f"turn {index + 1} is not where it belongs")
        found.append(span)
    return found


def _says_something(turn: Turn) -> bool:
    return bool((turn.get("content") or "").strip() or turn.get("tool_calls"))


def _added(chat: Chat, index: int) -> Span | None:
    """What the template adds for the turn to those before. None where it rewrites them."""
    if index == 0:
        return None  # many templates refuse to render no message at all
    before = chat.show(chat.turns[:index], ask=True)
    last = index + 1 == len(chat.turns)
    after = (chat.whole if last else chat.show(chat.turns[: index + 1])).rstrip()
    if not chat.whole.startswith(after) or not after.startswith(before):
        return None
    return len(before), len(after)


@dataclass
class _Own:
    """The marks of one turn: where its words may begin, where they end, and in its calls."""

    starts: list[str] = field(default_factory=list)
    ends: list[str] = field(default_factory=list)
    calls: list[str] = field(default_factory=list)

    def all(self) -> list[str]:
        return [*self.starts, *self.ends, *self.calls]


@dataclass(frozen=True)
class Marked:
    """A conversation with marks in its turns. `places`: where in `whole`, which has none, each mark that shows once lies."""

    chat: Chat
    whole: str
    own: list[_Own]
    places: dict[str, int]

    @classmethod
    def of(cls, chat: Chat, index: int) -> Marked:
        """Raises Unplaced, which names the turn at `index`. Marks in what others say would tell more, but a template may look at how
        that begins and ends."""
        for roles in (None, ("assistant",)):
            marks = (chr(code) for code in MARKS if chr(code) not in chat.whole)
            own = [_Own() for _ in chat.turns]
            turns = [
                turn if roles and turn["role"] not in roles else _marked(turn, mine, marks)
                for turn, mine in zip(chat.turns, own, strict=True)
            ]
            marked = cls(replace(chat, turns=turns), chat.whole, own, {})
            plain, places = marked.read(marked.chat.whole)
            if plain == chat.whole:
                return replace(marked, places=places)
        raise Unplaced(f"turn {index + 1} cannot be told from the rest: the template changes what is said in it")

    @cached_property
    def _pattern(self) -> re.Pattern[str]:
        return re.compile(f"[{''.join(mark for own in self.own for mark in own.all())}]")

    def read(self, text: str) -> tuple[str, dict[str, int]]:
        """Without the marks, and where in that each lay that shows once."""
        found = [(match[0], match.start() - before) for before, match in enumerate(self._pattern.finditer(text))]
        shown = Counter(mark for mark, _ in found)
        return self._pattern.sub("", text), {mark: place for mark, place in found if shown[mark] == 1}

    def span(self, index: int) -> Span:
        """Raises Unplaced."""
        own = sorted((mark for mark in self.own[index].all() if mark in self.places), key=self.places.__getitem__)
        if not own:
            raise Unplaced(f"the words of turn {index + 1} are not shown, or more than once")
        start, end = self._start(index, own[0]), self._end(index, own[-1])
        others = (self.places.get(mark) for other, one in enumerate(self.own) if other != index for mark in one.all())
        if start is None or end is None or any(place is not None and start < place < end for place in others):
            raise Unplaced(f"turn {index + 1} cannot be told from what is around it")
        return start, end

    def _start(self, index: int, first: str) -> int | None:
        """Behind what asks for the turn, where that stands here as it is: all that follows is the model's to write. Else at its
        words."""
        limit, turns, position = self.places[first], self.chat.turns[:index], 0
        if turns:
            asked, marks = self.read(self.chat.show(turns, ask=True))
            before = max((mark for mark in marks if mark in self.places), key=marks.__getitem__, default=None)
            position = 0 if before is None else self.places[before]
            asks = asked[0 if before is None else marks[before] :]
            prompts = asked != self.read(self.chat.show(turns))[0]
            if prompts and position <= limit and self.whole[position:limit].startswith(asks):
                return position + len(asks)
        if first not in self.own[index].starts:
            return None
        while limit > position and self.whole[limit - 1] == " ":  # it and the word behind it may be one token
            limit -= 1
        return limit

    def _end(self, index: int, last: str) -> int | None:
        """Behind what ends the turn where it is the last one, or else the special token that ends it here."""
        place = self.places[last]
        text, marks = self.read(self.chat.show(self.chat.turns[: index + 1]))
        if last in marks:
            rest = text[marks[last] :].rstrip()
            if self.whole.startswith(rest, place):
                return place + len(rest)
        if last not in self.own[index].ends:
            return None
        special = [re.escape(one.content) for one in self.chat.tokenizer.added_tokens_decoder.values() if one.special]
        ended = re.compile(rf"\s*(?:{'|'.join(special)})").match(self.whole, place) if special else None
        return place if ended is None else ended.end()


def _marked(turn: Turn, own: _Own, marks: Iterator[str]) -> Turn:
    """Blanks around the words and a thought before them are what templates cut off: the marks stand inside."""

    def of(kind: list[str]) -> str:
        kind.append(next(marks))
        return kind[-1]

    content = turn.get("content") or ""
    if words := content.strip():
        before, after = content[: -len(content.lstrip())], content[len(content.rstrip()) :]
        answer = words.rpartition(THOUGHT_END)[2].lstrip()
        thought = words[: len(words) - len(answer)]
        begun = of(own.starts) + thought if thought else ""
        turn = {**turn, "content": before + begun + of(own.starts) + answer + of(own.ends) + after}
    return with_calls(turn, lambda one: {**one, "name": of(own.calls) + one["name"]})
