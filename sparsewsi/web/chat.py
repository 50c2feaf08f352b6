"""Words of a chat: what a model or a user wrote is shown as plain text, and only our own links are links.

A message's first block is what was said; the blocks after it are about it and are not said to the model.
"""

import html
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from sparsewsi.model.evidence import WORTH, format_effect
from sparsewsi.model.foci import Focus
from sparsewsi.model.prompt import format_question
from sparsewsi.model.selection import Selection
from sparsewsi.report.answer import OTHER_QUESTION, Answer, FocusEffect
from sparsewsi.report.scope import Suggestion


@dataclass(frozen=True)
class Question:
    """What was asked. The chat shows it; it is never read back from what is shown.

    put:        what the model is asked instead: of "where is the carcinoma?" whether there is any, to point at
    impression: what the reader wrote before the answer was shown
    refused:    why it was not put to the model, or why its answer is not whole; "" for one that was answered
    said:       what the model had said of one whose answer is not whole
    """

    text: str
    options: tuple[str, ...] = ()
    put: str = ""
    impression: str = ""
    refused: str = ""
    said: str = ""


MOST_CITED, MOST_FOCI = 3, 2  # patches and foci shown in an answer
GRADES = (
    "Measured by asking without each patch, each focus and all of them. Strongly: the answer then gets 10 times less "
    "likely or more; partly: 2 times or more. It tells nothing about the answer being right."
)
Questions = Mapping[int, Question]  # by their place in the chat


def inert(text: str) -> str:
    """Text that Markdown and HTML show as it is: no markup, link, image or formula. html.unescape gives it back."""
    special = r"[&<>\[\]*_~`#|\\$@]|:(?=//)|(?<=www)\.|^[-=+](?=[-=+\s])"
    plain = re.sub(r"^[ \t]+", "", text, flags=re.MULTILINE)
    return re.sub(special, lambda found: f"&#{ord(found[0])};", plain, flags=re.MULTILINE | re.IGNORECASE)


def text_of(message: Mapping[str, Any]) -> str:
    """What was said: the first block, without what stands under it."""
    content = message["content"]
    first = content if isinstance(content, str) else content[0] if content else ""
    return html.unescape(first if isinstance(first, str) else str(first.get("text", "")))


def show_question(question: Question) -> dict[str, Any]:
    """A user's message: the question and, after an empty line, its options, one a line."""
    options = () if question.put else question.options
    return {"role": "user", "content": inert("\n\n".join(filter(None, [question.text, "\n".join(options)])))}


def show_next(question: Question) -> str:
    """HTML of a question that waits for the answer before it."""
    return f"<p><b>Next:</b> {inert(question.text)} <small>(Stop puts it back into the box)</small></p>"


def read_edit(text: str, before: Question) -> Question:
    """The question that an edited message of show_question asks; one that had no options gets none."""
    question, _, lines = text.strip().rpartition("\n\n") if before.options else (text, "", "")
    options = read_options(lines)
    return Question(question.strip(), options) if question.strip() and options else Question(text.strip())


def read_options(text: str) -> tuple[str, ...]:
    """Answer options, one a line."""
    return tuple(line.strip() for line in text.splitlines() if line.strip())


def turns_of(
    chat: list, questions: Questions, history: bool = True, said: Mapping[int, str] | None = None
) -> tuple[list[dict[str, str]], tuple[str, ...]]:
    """The chat up to the last question as the model takes it, or without history that one; and its options.

    said: what was answered, by its place in the chat, which may show it otherwise
    """
    asked = back_to_question(chat)
    last = len(asked) - 1
    turns = []
    for place, message in enumerate(asked[:last] if history else []):
        text = (said or {}).get(place, "" if shows_both(message) else text_of(message))
        if place in questions:
            text = format_question(questions[place].text, questions[place].options)
        turns.append({"role": message["role"], "content": text})
    question = questions.get(last, Question(text_of(asked[last])))
    return [*turns, {"role": "user", "content": question.put or question.text}], question.options


def show_answer(text: str, blocks: Sequence[str] = ()) -> dict[str, Any]:
    """An assistant's message: its words, and under them what is known of them, HTML of our own."""
    return {"role": "assistant", "content": [inert(text.strip()) or "(no answer)", *blocks]}


def show_evidence(
    answer: Answer,
    selection: Selection,
    impression: str = "",
    numbers: Sequence[int] = (),
    named: bool = True,
    beneath: Sequence[str] = (),
) -> list[str]:
    """HTML of what was measured: a bar per option, how far it depends on the patches, the foci and patches as pictures.

    That such answers were not validated stands before all of it.

    Of another reader also which patches it cites, marked as its own words.
    beneath: what else is to be read before what was measured
    numbers: of a case of several slides, that of each kept patch's slide, from 1: citations name it
    named: whether the viewer shows these foci; else their letters are others'

    A link to #patch-5, or to #focus-B-5 of whose patches #5 weighs most, is shown as a picture by the viewer, which has
    the address of the slide.
    """
    blocks, on = [], dict(zip(selection.ranks.tolist(), (f"Slide {number}, " for number in numbers)))
    if answer.unvalidated:
        blocks.append(f"<p class='unvalidated'>{inert(answer.limit)}</p>")
    blocks += [f"<p class='beneath'>{inert(told)}</p>" for told in beneath if told]
    if answer.asked:
        blocks.append(f"<p class='small'>Put to the model as: {inert(answer.question)}</p>")
    if impression:
        blocks.append(f"<p class='small'>Your impression before: {inert(impression)}</p>")
    if answer.probs:
        order = sorted(zip(answer.probs, answer.options), key=lambda pair: -pair[0])
        bars = "".join(
            f"<span>{inert(option)}</span><span class='bar{' first' if place == 0 else ''}'>"
            f"<span style='width:{prob:.1%}'></span></span><b>{prob:.0%}</b>"
            for place, (prob, option) in enumerate(order)
        )
        blocks.append(f"<div class='bars' title='The model&#39;s own probabilities, not calibrated'>{bars}</div>")
    if answer.rests:
        blocks.append(
            f"<span class='rests {answer.rests}' title='{GRADES}'>depends on the patches: {answer.rests}</span> "
            f"<span class='small'>({OTHER_QUESTION})</span>"
        )
    if answer.effects and answer.rests != "not":  # pictures would look like evidence
        effects, patches = np.asarray(answer.effects), selection.ranks.tolist()
        most = [i for i in np.argsort(-effects, kind="stable")[:MOST_CITED] if effects[i] > 0]
        worth = (focus for focus in answer.foci if named and focus.effect >= WORTH)
        foci = sorted(worth, key=lambda focus: -focus.effect)
        heaviest = [find_heaviest(focus, answer, selection) for focus in foci[:MOST_FOCI]]
        links = [
            _link(f"focus-{focus.name}-{rank}", _begin(f"{on.get(rank, '')}focus {focus.name}"), focus.effect)
            for focus, rank in zip(foci, heaviest)
        ]
        links += [
            _link(f"patch-{patches[i]}", f"{on.get(patches[i], '')}#{patches[i]}", float(effects[i])) for i in most
        ]
        blocks.append(f"<div class='rest' title='{inert(answer.evidence)}'>{''.join(links)}</div>")
    if answer.rests:
        shown = answer if named else replace(answer, foci=())  # whose grade is that of all
        blocks.append(f"<p class='small'>{shown.weighed}</p>")
    if not answer.effects and (told := answer.unweighed or answer.evidence):
        blocks.append(f"<p class='small'>{inert(told)}</p>")
    if answer.cited:
        links = ", ".join(f"<a href='#patch-{rank}'>{on.get(rank, '')}#{rank}</a>" for rank in answer.cited)
        blocks.append(f"<p class='small'>Cited by the reader, not measured: {links}</p>")
    if answer.limit and not answer.unvalidated:
        blocks.append(f"<p class='small'>{inert(answer.limit)}</p>")
    return ["".join(blocks)] if blocks else []


def find_heaviest(focus: FocusEffect, answer: Answer, selection: Selection) -> int:
    """The number of the patch of a focus that the answer rests on most."""
    effects = dict(zip(selection.ranks.tolist(), answer.effects))
    return max(focus.ranks, key=lambda rank: effects.get(rank, -np.inf))


def _begin(text: str) -> str:
    """A sentence's beginning."""
    return text[:1].upper() + text[1:]


def show_suggestions(suggestions: Sequence[Suggestion]) -> str:
    """HTML of questions that can be tapped: #ask-0 is the first of them."""
    chips = "".join(
        f"<a class='chip' href='#ask-{number}' title='{inert(one.told)}'>{inert(one.text)}</a>"
        for number, one in enumerate(suggestions)
    )
    return f"<div class='chips'>{chips}</div>"


def show_without(foci: Sequence[Focus], kept: int, sent: str) -> str:
    """HTML of the foci without which a question can be asked again: #without-A is one tap. kept: patches of all

    sent: what leaves this program with each question
    """
    chips = "".join(
        f"<a class='chip' href='#without-{focus.name}' title='{inert(f'One more request. {sent}')}'>"
        f"focus {focus.name} ({kept - len(focus.places)} pictures)</a>"
        for focus in foci
    )
    told = "<p class='small'>Ask again, one more request, without:</p>"
    return f"<div class='again'>{told}<div class='chips'>{chips}</div></div>"


def _link(target: str, name: str, effect: float) -> str:
    """A picture that leads to a patch or a focus, and how many times less likely the answer is without it."""
    return f"<a href='#{target}'><span>{name}{f' · {format_effect(effect)}×' if effect >= WORTH else ''}</span></a>"


Column = tuple[str, str, Sequence[str]]  # title, what was answered, and blocks of our own HTML
COMPARED = "<div class='compare'>"


def compare(columns: Sequence[Column], classes: Sequence[str] = ("", "")) -> str:
    """Answers as HTML beside each other."""
    cells = (
        f"<div class='{kind}'><h4>{inert(title)}</h4><p class='text'>{inert(text.strip()) or '…'}</p>"
        f"{''.join(blocks)}</div>"
        for (title, text, blocks), kind in zip(columns, classes)
    )
    return f"{COMPARED}{''.join(cells)}</div>"


def show_both(
    left: Column, right: Column, whole: bool = True, impression: str = "", limit: str = "", agree: bool = False
) -> dict[str, Any]:
    """An assistant's message of a comparison. Links of the right one lead to the viewer on the right.

    whole: whether the right one is all there; before that nothing is said of both
    impression, limit: as of Answer, once for both
    agree: the answers are the same, whatever is to be doubted of each
    """
    texts = [text.strip().rstrip(".") for _, text, _ in (left, right)]
    same = texts[0].casefold() == texts[1].casefold()
    differ = "Both answer the same, with other doubts" if agree else "They differ"
    first = "…" if not whole else f"Both: {texts[0]}" if same else differ
    before = f"<p class='small'>Your impression before: {inert(impression)}</p>" if impression else ""
    after = f"<p class='small'>{inert(limit)}</p>" if limit else ""
    return show_answer(first, [before + compare([left, right], ["", "other"]) + after])


def shows_both(message: Mapping[str, Any]) -> bool:
    """Whether show_both made it."""
    return COMPARED in str(message["content"])


def back_to_question(chat: list) -> list:
    """The chat up to and with the user's last turn. Raises ValueError if nothing was asked."""
    asked = [i for i, message in enumerate(chat) if message["role"] == "user"]
    if not asked:
        raise ValueError("Ask a question first.")
    return chat[: asked[-1] + 1]
