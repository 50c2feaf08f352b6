"""report.html: one file to read, print and file away.

K kept patches. Positions are in the level-0 frame, px.
"""

import base64
import io
from collections.abc import Collection, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from html import escape
from pathlib import Path

import numpy as np
from PIL import Image

from sparsewsi.bags.bag import Bag, Part, list_parts, locate, number_slides
from sparsewsi.files import write_text
from sparsewsi.model.config import SparseWSIConfig
from sparsewsi.model.evidence import format_effect
from sparsewsi.model.limits import Limits
from sparsewsi.model.selection import Selection
from sparsewsi.report.answer import Answer, name_llm, word_notice, word_scan
from sparsewsi.report.contradictions import word_contradictions
from sparsewsi.report.plots import tell_blank
from sparsewsi.report.record import digest_patches, list_versions
from sparsewsi.report.scope import is_guess, word_answer, word_tendency

MOST = 3  # pictures beside an answer
FOCUS = "kept patches that look alike, wherever on a slide they lie"
_STYLE = """
:root { color-scheme: light dark; --line: #8886; --soft: #8882; }
body { font: 15px/1.45 system-ui, sans-serif; max-width: 1100px; margin: 0 auto; padding: 16px; }
h1 { margin: 0; } h2 { margin: 1.6em 0 .4em; border-bottom: 1px solid var(--line); }
.notice, .warnings { border-left: 5px solid #e69f00; background: var(--soft); padding: 8px 12px; margin: 12px 0; }
.notice { font-weight: 600; } .warnings ul { margin: 0; padding-left: 1.2em; }
img { max-width: 100%; height: auto; } .overview { width: 100%; background: #fff; }
.patches { display: grid; grid-template-columns: repeat(auto-fill, minmax(150px, 1fr)); gap: 12px; }
figure { margin: 0; } figcaption { font-size: 12.5px; } .patches img { width: 100%; }
figure:target { outline: 3px solid #e69f00; outline-offset: 3px; }
.answer { border: 1px solid var(--line); border-radius: 6px; padding: 4px 14px; margin: 12px 0; break-inside: avoid; }
.text { white-space: pre-wrap; overflow-wrap: anywhere; }
.said { font-size: 20px; font-weight: 650; margin: 4px 0; } .said.guess { font-weight: 400; }
.most { grid-template-columns: repeat(3, 150px); }
summary { cursor: pointer; font-weight: 600; margin: 1em 0 .4em; }
@media print { details > * { display: revert; } }
table { border-collapse: collapse; } th, td { text-align: left; padding: 2px 14px 2px 0; vertical-align: top; }
td { overflow-wrap: anywhere; } th { font-weight: 600; } .number { font-variant-numeric: tabular-nums; }
"""


def write_report(
    path: str | Path,
    bag: Bag,
    selection: Selection,
    config: SparseWSIConfig,
    *,
    model: str,
    overviews: Sequence[Image.Image],
    patches: Sequence[np.ndarray] = (),
    answers: Sequence[Answer] = (),
    doubts: Sequence[str] = (),
    weights_sha256: str | None = None,
    selector: str = "learned",
    limits: Limits | None = None,
    marks: Mapping[int, str] | None = None,
    called: str = "",
    unlike: Collection[int] = (),
) -> None:
    """One HTML file to read, print and file away: no script, nothing fetched, every picture inside.

    overviews: each slide with its boxes (plots.draw_overlay). patches: uint8 (p, p, 3), best first (plots.cut_patches);
    none where the slide is not at hand. doubts: sentences that stand under the notice. marks: what the reader said of
    patches, by index. unlike: indices of those kept for being unlike the others. The answers and the pictures that they
    rest on come first, the rest is folded. Words of users and of the model are escaped. The slide is named by Bag.slide
    and digests only, the case as the reader called it.
    """
    assert len(patches) in (0, len(selection.indices)), "one picture per kept patch, or none"
    slides = {}
    for number, part in enumerate(list_parts(bag), 1):
        which = f" {number}" if bag.parts else ""
        slides[f"Slide{which}"] = f"{part.slide}, {_size(part)}"
        slides[f"Scan{which}"] = word_scan(part)
    facts = slides | {
        "Model": f"{model}, language model {name_llm(config)}",
        "Weights (sha256)": weights_sha256 or "not recorded",
        "Patch encoder": f"{bag.encoder}, patches read at "
        + (f"{bag.mpp:.4g} µm/px" if bag.mpp else "an unknown resolution"),
        "Patches": f"{len(selection.indices):,} of {selection.num_patches:,} "
        f"({100 * len(selection.indices) / max(selection.num_patches, 1):.2g} % of the tissue), selector: {selector}"
        + (f"; {len(unlike):,} of them kept for being unlike the others, not for their score" if unlike else ""),
        "All patches (sha256)": digest_patches(bag),
        "Versions": ", ".join(f"{name} {number}" for name, number in list_versions().items()),
        "Written": f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
    }
    below = "".join(f"<li>{escape(text)}</li>" for text in (*doubts, *filter(None, [bag.note])))
    parts = [
        f'<p class="notice">{escape(word_notice(config))}</p>',
        f'<p class="notice">{escape(against)}</p>' if (against := word_contradictions(answers)) else "",
        f'<div class="warnings"><ul>{below}</ul></div>' if below else "",
        *(
            _answer_html(number, answer, bag, selection, patches, limits or Limits())
            for number, answer in enumerate(answers, 1)
        ),
        *_overviews_html(bag, selection, overviews),
        "<h2>Kept patches, best score first</h2>",
        f'<div class="patches">{"".join(_figures(bag, selection, patches, answers, marks or {}, unlike))}</div>',
        "<details><summary>How this was made</summary><table>",
        *(f"<tr><th>{escape(name)}</th><td>{escape(value)}</td></tr>" for name, value in facts.items()),
        f'</table></details><p class="notice">{escape(word_notice(config))}</p>',
    ]
    page = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data:; '
        "style-src 'unsafe-inline'\">"
        f"<title>SparseWSI: {escape(bag.slide)}</title><style>{_STYLE}</style></head><body>"
        f"<h1>{escape(f'{called} ({bag.slide})' if called else bag.slide)}</h1>"
        f"{'' if called else '<p>This case was not named; the number is of its content.</p>'}"
        f"{chr(10).join(filter(None, parts))}</body></html>"
    )
    write_text(path, page)


def _overviews_html(bag: Bag, selection: Selection, overviews: Sequence[Image.Image]) -> Iterator[str]:
    """A picture of each slide, of several with its number, name and how many patches were kept of it."""
    numbers = number_slides(bag)[selection.indices]
    for number, (part, overview) in enumerate(zip(list_parts(bag), overviews)):
        told = f"Slide {number + 1} ({part.slide}): {int((numbers == number).sum())} of {part.patches:,} patches"
        if bag.parts:
            yield f"<h2>{escape(told)}</h2>"
        yield f'<img class="overview" alt="The slide with the kept patches" src="{_picture(overview)}">'


def _size(slide: Part) -> str:
    if slide.slide_size is None:
        return "size unknown"
    (width, height), mpp = slide.slide_size, slide.slide_mpp
    in_mm = f" ({width * mpp / 1000:.3g} x {height * mpp / 1000:.3g} mm)" if mpp else ""
    return f"{width:,} x {height:,} px{in_mm}"


def _answer_html(
    number: int, answer: Answer, bag: Bag, selection: Selection, patches: Sequence[np.ndarray], limits: Limits
) -> str:
    """A question, its answer with the pictures it rests on, its options; folded, all patches by their evidence."""
    rows = "".join(
        f'<tr><td>{escape(option)}</td><td class="number">{prob:.1%}</td></tr>'
        for option, prob in zip(answer.options, answer.probs)
    )
    if answer.refused:
        options = f" ({', '.join(answer.options)})" if answer.options else ""
        why = f"Refused, not put to the model: {answer.refused}"
        if answer.text:
            why = f"{answer.refused} Until then the model had said: {answer.text}"
        return (
            f'<section class="answer"><p class="text"><b>Q{number}. {escape(answer.heading)}</b>{escape(options)}</p>'
            f"<p>{escape(why)}</p>"
            + (f"<p>The reader's impression: {escape(answer.impression)}</p>" if answer.impression else "")
            + "</section>"
        )
    said = word_answer(answer, limits, () if answer.beside else selection.ranks.tolist())
    guess = " guess" if is_guess(answer, limits) else ""
    out = [
        f'<section class="answer"><p class="text"><b>Q{number}. {escape(answer.heading)}</b></p>',
        f"<p>Put to the model as: {escape(answer.question)}</p>" if answer.asked else "",
        f"<p>Answered from {escape(answer.beside)}, side by side with the patches of this report.</p>"
        if answer.beside
        else "",
        f'<p class="text said{guess}">{escape(said) or "(no answer)"}</p>',
        f"<p>{escape(answer.limit)}</p>" if answer.unvalidated else "",
        f"<p>{escape(tendency)}</p>" if (tendency := word_tendency(answer, limits)) else "",
        f"<p>{escape(answer.dependence)}</p>" if answer.rests else "",
        _most_html(answer, bag, selection, patches),
        f"<p>The reader's impression, before: {escape(answer.impression)}</p>" if answer.impression else "",
        f"<table><tr><th>Option</th><th>Probability</th></tr>{rows}</table>" if rows else "",
        f"<p>{escape(answer.limit)}</p>" if answer.limit and not answer.unvalidated else "",
        f"<p>{escape(told)}</p>" if (told := answer.unweighed or answer.evidence) else "",
        f"<p>Read by {escape(answer.reader)}, from pictures of the patches. {escape(answer.sent)}</p>"
        if answer.reader
        else "",
        f"<p>Cited by the reader, not measured: {_link(answer.cited)}.</p>"
        if answer.cited and not answer.beside
        else "",
    ]
    if answer.effects and not answer.beside:
        # The sort is stable: ties go to the better score.
        most_first = sorted(selection.best_first.tolist(), key=lambda place: -answer.effects[place])
        links = " · ".join(
            f'<a href="#patch-{selection.ranks[place]}">#{selection.ranks[place]}</a> '
            f"{format_effect(answer.effects[place])}"
            for place in most_first
        )
        foci = "; ".join(
            f"{escape(focus.name)} ({_link(focus.ranks)}) {format_effect(focus.effect)}" for focus in answer.foci
        )
        slides = " · ".join(f"slide {slide.name} {format_effect(slide.effect)}" for slide in answer.slides)
        out.append(
            "<details><summary>All patches by evidence</summary><p>How many times less likely the answer gets without "
            f'the patch; below 1: likelier. <span class="number">{links}</span>'
            f"{f'<br>Without a whole focus ({FOCUS}): {foci}' if foci else ''}"
            f"{f'<br>Without all patches of a slide: {slides}' if slides else ''}</p></details>"
        )
    return "".join([*out, "</section>"])


def _most_html(answer: Answer, bag: Bag, selection: Selection, patches: Sequence[np.ndarray]) -> str:
    """The pictures of the patches that the answer rests on most; none where it does not rest on the slide."""
    if not answer.effects or answer.beside or answer.rests == "not" or not len(patches):
        return ""
    best_first = selection.best_first.tolist()
    numbers = number_slides(bag)[selection.indices].tolist()
    slides = [f"Slide {number + 1}, " if bag.parts else "" for number in numbers]
    most = sorted(range(len(best_first)), key=lambda number: -answer.effects[best_first[number]])[:MOST]
    figures = (
        f'<figure><a href="#patch-{rank}"><img alt="Patch {rank}" src="{_picture(Image.fromarray(patches[number]))}">'
        f"</a><figcaption>{slides[best_first[number]]}#{rank}: "
        f"{format_effect(answer.effects[best_first[number]])}×{blank and f', {blank}'}</figcaption></figure>"
        for number in most
        for rank in [int(selection.ranks[best_first[number]])]
        for blank in [tell_blank(bag, int(selection.indices[best_first[number]]), patches[number])]
    )
    return f'<div class="patches most">{"".join(figures)}</div>'


def _link(ranks: Sequence[int]) -> str:
    return " · ".join(f'<a href="#patch-{rank}">#{rank}</a>' for rank in ranks)


def _figures(
    bag: Bag,
    selection: Selection,
    patches: Sequence[np.ndarray],
    answers: Sequence[Answer],
    marks: Mapping[int, str],
    unlike: Collection[int],
) -> Iterator[str]:
    """A figure per kept patch, best first: picture, rank, focus, score, place and its evidence for every answer."""
    own = [focus for answer in answers if not answer.beside for focus in answer.foci]
    foci = {rank: focus.name for focus in own for rank in focus.ranks}
    for number, place in enumerate(selection.best_first.tolist()):
        rank, index = int(selection.ranks[place]), int(selection.indices[place])
        at = _place(bag, index)
        shares = [f"the reader says: {escape(marks[index])}"] if index in marks else []
        for i, answer in enumerate(answers, 1):
            if answer.effects and not answer.beside:
                above = sum(effect > answer.effects[place] for effect in answer.effects)
                shares.append(f"Q{i}: {format_effect(answer.effects[place])}, evidence rank {above + 1}")
        picture, blank = "", ""
        if len(patches):
            blank = tell_blank(bag, index, patches[number])
            picture = f'<img alt="Patch {rank}" src="{_picture(Image.fromarray(patches[number]))}">'
        why = "kept for being unlike the others, not for its score" if index in unlike else ""
        focus = f"focus {escape(foci[rank])}" if rank in foci else ""
        scored = f"<b>#{rank}</b> score {float(selection.scores[index]):.3g}"
        lines = [scored, *filter(None, [focus, blank, why]), at, *shares]
        yield f'<figure id="patch-{rank}">{picture}<figcaption>{"<br>".join(lines)}</figcaption></figure>'


def _place(bag: Bag, index: int) -> str:
    """The middle of a patch on its slide, and which slide that is where the bag is of several."""
    at = locate(bag, index)
    x, y = at.x + at.patch_size / 2, at.y + at.patch_size / 2
    text = f"x {x * at.slide_mpp:,.0f}, y {y * at.slide_mpp:,.0f} µm" if at.slide_mpp else f"x {x:g}, y {y:g} px"
    return f"slide {at.number + 1}: {text}" if bag.parts else text


def _picture(image: Image.Image) -> str:
    """A data URI; JPEG, which is a fifth of PNG for tissue."""
    data = io.BytesIO()
    image.convert("RGB").save(data, "JPEG", quality=88)
    return f"data:image/jpeg;base64,{base64.b64encode(data.getvalue()).decode()}"
