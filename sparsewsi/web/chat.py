"""Words of a chat: what a model or a user wrote is shown as plain text, and only our own links are links.

A message's first block is what was said; the blocks after it are about it and are not said to the model.
"""

import html
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from sparsewsi.model.prompt import format_question
from sparsewsi.model.selection import Selection
from sparsewsi.report.answer import Answer, format_effect


@dataclass(frozen=True)
class Question:
    """What was asked. The chat shows it; it is never read back from what is shown."""

    text: str
    options: tuple[str, ...] = ()


MOST_CITED = 3  # patches shown in an answer
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
    return {"role": "user", "content": inert("\n\n".join(filter(None, [question.text, "\n".join(question.options)])))}


def read_edit(text: str, before: Question) -> Question:
    """The question that an edited message of show_question asks; one that had no options gets none."""
    question, _, lines = text.strip().rpartition("\n\n") if before.options else (text, "", "")
    options = read_options(lines)
    return Question(question.strip(), options) if question.strip() and options else Question(text.strip())


def read_options(text: str) -> tuple[str, ...]:
    """Answer options, one a line."""
    return tuple(line.strip() for line in text.splitlines() if line.strip())


def turns_of(chat: list, questions: Questions, history: bool = True) -> tuple[list[dict[str, str]], tuple[str, ...]]:
    """The chat up to the last question as the model takes it, or without history that one; and its options."""
    asked = back_to_question(chat)
    last = len(asked) - 1
    turns = []
    for place, message in enumerate(asked[:last] if history else []):
        text = text_of(message)
        if place in questions:
            text = format_question(questions[place].text, questions[place].options)
        turns.append({"role": message["role"], "content": text})
    question = questions.get(last, Question(text_of(asked[last])))
    return [*turns, {"role": "user", "content": question.text}], question.options


def show_answer(text: str, notice: str, blocks: Sequence[str] = ()) -> dict[str, Any]:
    """An assistant's message: its words, and under them what is known of them, HTML of our own."""
    return {"role": "assistant", "content": [inert(text.strip()) or "(no answer)", *blocks]}


def show_evidence(answer: Answer, selection: Selection) -> list[str]:
    """HTML of what was measured: a bar per option, on how much of the slide it rests, and the patches as pictures.

    A link to #patch-5 is shown as that patch's picture by the viewer, which has the address of the slide.
    """
    blocks = []
    if answer.probs:
        order = sorted(zip(answer.probs, answer.options), reverse=True)
        bars = "".join(
            f"<span>{inert(option)}</span><span class='bar{' first' if place == 0 else ''}'>"
            f"<span style='width:{prob:.1%}'></span></span><b>{prob:.0%}</b>"
            for place, (prob, option) in enumerate(order)
        )
        blocks.append(f"<div class='bars' title='The model&#39;s own probabilities, not calibrated'>{bars}</div>")
    if answer.effects:
        effects, patches = np.asarray(answer.effects), selection.ranks.tolist()
        most = [i for i in np.argsort(-effects, kind="stable")[:MOST_CITED] if effects[i] > 0]
        links = "".join(show_citation(patches[i], float(effects[i])) for i in most)
        blocks.append(f"<div class='rest'>{links}</div>")
        blocks.append(f"<p class='small'>{inert(answer.evidence)}</p>")
    if answer.limit:
        blocks.append(f"<p class='small'>{inert(answer.limit)}</p>")
    return ["".join(blocks)] if blocks else []


def show_citation(rank: int, effect: float) -> str:
    """A link to a patch: its number, and how many times less likely the answer is without it."""
    return f"<a href='#patch-{rank}'><span>#{rank} · {format_effect(effect)}×</span></a>"


def compare(columns: Sequence[tuple[str, str, Sequence[str]]]) -> str:
    """Answers as HTML beside each other: title, text, and blocks of our own HTML."""
    cells = (
        f"<div><h4>{html.escape(title)}</h4><p class='text'>{html.escape(text.strip()) or '…'}</p>"
        f"{''.join(blocks)}</div>"
        for title, text, blocks in columns
    )
    return f"<div class='compare'>{''.join(cells)}</div>"


def back_to_question(chat: list) -> list:
    """The chat up to and with the user's last turn. Raises ValueError if nothing was asked."""
    asked = [i for i, message in enumerate(chat) if message["role"] == "user"]
    if not asked:
        raise ValueError("Ask a question first.")
    return chat[: asked[-1] + 1]
