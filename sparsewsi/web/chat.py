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
    """An assistant's message: its words, what is known of them, and the notice."""
    return {"role": "assistant", "content": [inert(text.strip()) or "(no answer)", *blocks, notice]}


def show_evidence(answer: Answer, selection: Selection) -> list[str]:
    """Markdown of what was measured: option probabilities, and the patches that weigh most as links."""
    blocks = []
    if answer.probs:
        order = sorted(zip(answer.probs, answer.options), reverse=True)
        chances = " · ".join(f"{inert(option)} **{prob:.0%}**" for prob, option in order)
        blocks.append(f"Probability of each option (the model's own, not calibrated): {chances}")
    if answer.limit:
        blocks.append(inert(answer.limit))
    if answer.effects:
        effects, patches = np.asarray(answer.effects), selection.ranks.tolist()
        most = [i for i in np.argsort(-effects, kind="stable")[:3] if effects[i] > 0]
        links = ", ".join(f"[#{patches[i]}](#patch-{patches[i]}) {format_effect(float(effects[i]))}×" for i in most)
        blocks.append(f"Evidence (how many times less likely without the patch): {links or 'none'}. {answer.evidence}")
    return blocks


def compare(columns: Sequence[tuple[str, str, Sequence[str]]], notice: str) -> str:
    """Answers as HTML beside each other: title, text, and blocks of our own Markdown."""

    def block(text: str) -> str:
        text = re.sub(r"\[(#\d+)\]\((#patch-\d+)\)", r'<a href="\2">\1</a>', text)
        return "<p>" + re.sub(r"[*]{2}(.+?)[*]{2}", r"<b>\1</b>", text) + "</p>"

    cells = (
        f"<div><h4>{html.escape(title)}</h4><p class='text'>{html.escape(text.strip()) or '…'}</p>"
        f"{''.join(map(block, blocks))}</div>"
        for title, text, blocks in columns
    )
    return f"<div class='compare'>{''.join(cells)}</div><p class='small'>{html.escape(notice)}</p>"


def back_to_question(chat: list) -> list:
    """The chat up to and with the user's last turn. Raises ValueError if nothing was asked."""
    asked = [i for i, message in enumerate(chat) if message["role"] == "user"]
    if not asked:
        raise ValueError("Ask a question first.")
    return chat[: asked[-1] + 1]
