"""A slide as one model sees it: the one road to an answer and to its files, for page, command line and API.

    case = open_case(model, bag, path)
    for piece in case.answer(model, [{"role": "user", "content": "Which tissue is this?"}]): ...
    answer = case.measure(model, messages, text)
    case.write("out", [answer])

Nothing here loads a model: what needs one takes it as an argument. N patches, K kept.
"""

import io
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from sparsewsi.bags.bag import Bag, list_parts, number_slides
from sparsewsi.files import write_bytes
from sparsewsi.model.config import SparseWSIConfig
from sparsewsi.model.evidence import Evidence
from sparsewsi.model.foci import Focus, find_foci
from sparsewsi.model.limits import Limits
from sparsewsi.model.novelty import Summary
from sparsewsi.model.selection import Selection
from sparsewsi.model.selector import LEARNED, SELECTORS, check_selector, evenly, pick_highest, select_learned
from sparsewsi.model.words import Words
from sparsewsi.readers.pictures import PictureReader, Pictures, find_cited
from sparsewsi.report import annotations, figure, html, plots, qupath, record, table, umap
from sparsewsi.report.answer import NOT_VALIDATED, Answer, FocusEffect, summarise, word_notice
from sparsewsi.report.contradictions import word_against
from sparsewsi.report.doubts import find_doubts
from sparsewsi.report.scope import is_guess, word_answer
from sparsewsi.slides.refusals import SlideError
from sparsewsi.slides.slide import Slide, open_slide

FILES = ("report.html", "overlay.png", "umap.png", "patches.csv", "patches.geojson", "selection.json")
ANNOTATIONS = "annotations.dcm"  # of DICOM slides, where highdicom is installed
FIGURES = ("figure.png", "figure.svg")  # for a talk; written where they are asked for by name
OVERVIEW = 2000  # px, longer side of the slide's overview in files
SHOWN_OVERVIEW = 1024  # px, of the overview that a reader may be shown

Messages = Sequence[Mapping[str, str]]
Paths = str | Path | Sequence[str | Path] | None
Opening = Callable[[Path, float | None], Slide]  # opens a slide by its path and um/px
Progress = Callable[[int, int], None]  # is told (done, in all) between two parts of the work; what it raises ends that


class Reader(Protocol):
    """What answers from a selection: SparseWSI, by its own LLM; its docstrings say what each method promises.

    Wherever a Case takes one it takes a PictureReader, too, which is shown the patches themselves.
    """

    def answer(
        self, selection: Selection, messages: Messages, options: Sequence[str] | None = None
    ) -> Iterator[str]: ...

    def option_probs(
        self,
        selection: Selection,
        question: str | Messages,
        options: Sequence[str],
        progress: Progress | None = None,
    ) -> Tensor: ...

    def leave_one_out(
        self,
        selection: Selection,
        messages: Messages,
        answer: str,
        options: Sequence[str] | None = None,
        progress: Progress | None = None,
        groups: Sequence[Sequence[int]] = (),
    ) -> Evidence: ...


class Model(Reader, Protocol):
    """What also selects patches: SparseWSI."""

    config: SparseWSIConfig
    name: str
    weights_sha256: str | None
    trained_on: Summary | None
    limits: Limits

    def select(
        self,
        bag: Bag,
        k: int | None = None,
        selector: str = "learned",
        seed: int = 0,
        question: str = "",
        progress: Progress | None = None,
    ) -> Selection: ...

    def tokens_of(self, bag: Bag, indices: Tensor) -> Tensor: ...

    def words(self, bag: Bag, progress: Progress | None = None) -> Words: ...


class _Undrawn(Exception):
    """A picture that is left out."""


@dataclass(frozen=True, eq=False)
class Case:
    """A slide, the patches that were kept of it, and what is known of how that was done. Holds no model, no open slide.

    path:           the slide; None where only its features are at hand
    paths:          of a case of several slides (bag.parts) all of them, in order, where they are at hand
    slide_mpp:      um/px of the scan if it was given by hand, else None
    selector, max_patches: how the selection was made; max_patches: at most so many patches were encoded, None: all
    unlike:         indices of patches that were kept for being unlike the others: by its score none of them would be
    config, model, weights_sha256, trained_on, limits: of the model that made it; `model` is its name for people
    """

    bag: Bag
    selection: Selection
    config: SparseWSIConfig
    model: str
    weights_sha256: str | None = None
    trained_on: Summary | None = None
    limits: Limits = field(default_factory=Limits)
    path: Path | None = None
    slide_mpp: float | None = None
    selector: str = "learned"
    max_patches: int | None = None
    paths: tuple[Path, ...] = ()
    unlike: frozenset[int] = frozenset()

    @property
    def summary(self) -> str:
        """One line for people: slide, model, encoder, K of N, resolution."""
        told = summarise(self.bag, self.selection, self.config, self.model)
        few = f"{len(self.unlike):,} of the patches kept for being unlike the others, not for their score"
        return f"{told} · {few}" if self.unlike else told

    @property
    def notice(self) -> str:
        """What stands under every answer."""
        return word_notice(self.config)

    @cached_property
    def doubts(self) -> tuple[str, ...]:
        """What a reader should know before believing an answer, gravest first; the bag's own note is not among them."""
        ranked = self.config.selection == "scores"
        ranked &= not (self.config.diversity and self.selector in ("learned", "mmr"))
        return tuple(find_doubts(self.bag, self.selection, self.trained_on, self.config.mpp, ranked))

    def answer(
        self,
        reader: Reader | PictureReader,
        messages: Messages,
        options: Sequence[str] = (),
        pictures: Pictures | None = None,
    ) -> Iterator[str]:
        """The answer to the user's last message, piece by piece. Closing the iterator stops it.

        pictures: what a reader of pictures is shown, from `cut`; None: the slide is opened for it by its path
        Raises ValueError where a reader of pictures has no slide to be shown patches of, SlideError if it is damaged.
        """
        if isinstance(reader, PictureReader):
            return reader.answer(pictures or self._show(reader), messages, list(options) or None)
        return reader.answer(self.selection, messages, list(options) or None)

    def continue_answer(self, reader: Reader | PictureReader, messages: Messages, pieces: Sequence[str]) -> str:
        """The last of the pieces of an answer in words, as people may be told it: the first one after what is to be
        doubted of any answer to this question."""
        said = "".join(pieces).lstrip()
        if len(said) > len(pieces[-1]) or not said:
            return pieces[-1] if said else ""
        name = reader.name if isinstance(reader, PictureReader) else ""
        return word_answer(Answer(messages[-1]["content"], said, reader=name), self.limits, begun=True)

    def measure(
        self,
        reader: Reader | PictureReader,
        messages: Messages,
        text: str,
        options: Sequence[str] = (),
        *,
        evidence: bool = True,
        progress: Progress | None = None,
        pictures: Pictures | None = None,
    ) -> Answer:
        """What is known of an answer: `judge` and, if wanted, `weigh`."""
        answer = self.judge(reader, messages, text, options, pictures, progress)
        return self.weigh(reader, messages, answer, progress, pictures) if evidence else answer

    def judge(
        self,
        reader: Reader | PictureReader,
        messages: Messages,
        text: str | None,
        options: Sequence[str] = (),
        pictures: Pictures | None = None,
        progress: Progress | None = None,
    ) -> Answer:
        """What is known of an answer at once: its options' probabilities, how often such answers were right.

        Of a reader of pictures: who it is, what was sent to it, which patches it cites.

        messages, options, pictures: as they were given to `answer`; text: what came back, or None for the likeliest
        option, which is what the model's own LLM answers
        progress: called between the passes that long options take
        """
        question, given, text = messages[-1]["content"], text, (text or "").strip()
        answer = Answer(question, text, tuple(options))
        if isinstance(reader, PictureReader):
            cited = find_cited(text, self.selection.ranks.tolist())
            answer = replace(answer, reader=reader.name, sent=reader.sends, cited=cited, limit=NOT_VALIDATED)
            if not reader.likelihoods:
                return answer
        if options:
            if isinstance(reader, PictureReader):
                found = reader.option_probs(pictures or self._show(reader), messages, options)
            else:
                found = reader.option_probs(self.selection, messages, options, progress)
            answer = replace(answer, probs=tuple(found.tolist()))
            if given is None:
                answer = replace(answer, text=options[int(np.argmax(answer.probs))].strip())
        if not answer.reader:
            answer = replace(answer, limit=self.limits.judge(question, list(answer.probs), answer.options))
        return answer

    def weigh(
        self,
        reader: Reader | PictureReader,
        messages: Messages,
        answer: Answer,
        progress: Progress | None = None,
        pictures: Pictures | None = None,
    ) -> Answer:
        """The answer, with what it loses without each patch, each focus and all of them.

        Of a reader of pictures only where that gives likelihoods; else with a sentence that says so.

        messages, pictures: as they were given to `judge`
        progress: called with (passes done, passes in all); what it raises ends the work
        """
        text, options, answer = answer.text, list(answer.options) or None, replace(answer, unweighed="")
        if not text:
            return answer
        if isinstance(reader, PictureReader):
            if not reader.likelihoods:
                unknown = f"{reader.name} gives no likelihoods, so what this answer rests on is not measured."
                return replace(answer, evidence=f"{unknown} {reader.again}".strip())
            found = reader.leave_one_out(pictures or self._show(reader), messages, text, options, progress)
        else:
            groups = [*self.foci, *self._by_slide]
            places = [group.places for group in groups]
            found = reader.leave_one_out(self.selection, messages, text, options, progress, places)
            weighed = self._weigh(groups, found.group_effects.tolist())
            answer = replace(answer, foci=weighed[: len(self.foci)], slides=weighed[len(self.foci) :])
        answer = replace(answer, effects=tuple(found.effects.tolist()), evidence=found.sentence)
        return replace(answer, without_all=found.without_any)

    @cached_property
    def foci(self) -> tuple[Focus, ...]:
        """The groups that the kept patches form, each on one slide."""
        bag, kept, numbers = self.bag, self.selection.indices, self.numbers
        sides = torch.tensor([part.patch_size for part in list_parts(bag)])[numbers]
        ranks = self.selection.ranks.tolist()
        return tuple(find_foci(bag.coords[kept], bag.features[kept], sides, ranks, numbers))

    @cached_property
    def numbers(self) -> Tensor:
        """(K,) int64: the number, from 0, of the slide that each kept patch is of."""
        return number_slides(self.bag)[self.selection.indices]

    @property
    def _by_slide(self) -> list[Focus]:
        """The kept patches of each slide, named by its number from 1, where they are of several."""
        numbers = self.numbers.tolist()
        found = sorted(set(numbers))
        groups = [Focus(str(n + 1), tuple(i for i, other in enumerate(numbers) if other == n)) for n in found]
        return groups if len(groups) > 1 else []

    def _weigh(self, groups: Sequence[Focus], effects: Sequence[float]) -> tuple[FocusEffect, ...]:
        """What was measured of each group; nothing where nothing was."""
        ranks = self.selection.ranks.tolist()
        return tuple(
            FocusEffect(group.name, tuple(sorted(ranks[place] for place in group.places)), effect)
            for group, effect in zip(groups, effects)
        )

    def choose(
        self,
        model: Model,
        k: int,
        selector: str = "learned",
        pinned: Collection[int] = (),
        dropped: Collection[int] = (),
    ) -> "Case":
        """What if: the same slide with other patches. Pinned ones stay, dropped ones go, the selector fills up to k.

        pinned, dropped: indices of patches, in 0..N-1. Raises ValueError for others, for an unknown selector, and if
        nothing is left to answer from.
        """
        bag, scores = self.bag, self.selection.scores
        check_selector(selector)
        own = self.config.own_selector if selector == "learned" else selector
        if not all(0 <= index < len(scores) for index in (*pinned, *dropped)):
            raise ValueError(f"{bag.slide} has patches 0 to {len(scores) - 1:,}; another was pinned or dropped.")
        free = torch.ones(len(scores), dtype=torch.bool)
        free[[*pinned, *dropped]] = False
        stay, rest = torch.tensor(sorted(set(pinned)), dtype=torch.int64), free.nonzero()[:, 0]
        if not len(stay) and not len(rest):
            raise ValueError("Every patch was dropped. Keep at least one.")
        room, unlike = max(0, k - len(stay)), frozenset[int]()
        if not room or not len(rest):
            filled = rest[:0]
        elif own in LEARNED:
            filled = rest[select_learned(own, scores[rest], bag.features[rest], room, self.config.diversity)]
            unlike = frozenset(filled.tolist()) - set(rest[pick_highest(scores[rest], room)].tolist())
        elif own == "evenly":
            filled = rest[evenly(len(rest), room)]
        else:
            filled = rest[SELECTORS[own](bag.features[rest], bag.coords[rest], room, 0)]
        indices = torch.cat([stay, filled]).sort().values
        selection = replace(self.selection, indices=indices, tokens=model.tokens_of(bag, indices))
        return replace(self, selection=selection, selector=selector, unlike=unlike)

    def without(self, focus: Focus) -> "Case":
        """The case without the patches of a focus; nothing takes their place."""
        ranks = self.selection.ranks.tolist()
        selection = self.selection.without([ranks[place] for place in focus.places])
        return replace(self, selection=selection, unlike=self.unlike & set(selection.indices.tolist()))

    def write(
        self,
        folder: str | Path,
        answers: Sequence[Answer] = (),
        names: Collection[str] = FILES,
        opening: Opening | None = None,
        marks: Mapping[int, str] | None = None,
        called: str = "",
    ) -> tuple[str, ...]:
        """Write files of these names, of FILES, FIGURES or ANNOTATIONS, into a folder, which is made; whole or none.

        marks: what the reader said of patches, by index: "agree" or "disagree"
        called: what the reader calls the case, for the report alone
        opening: how slides are opened, one at a time; None: in this process. Without a path the report holds no
        patches, and boxes are drawn on a plain canvas
        What costs nothing to make is saved first. Returns the names of the files that were written: a map that cannot
        be drawn is left out with a warning. Of several slides each has a patches-<number>.geojson and, of DICOM files,
        an annotations-<number>.dcm. Raises SlideError or OSError, once the others are written, if a slide cannot be
        read any more or the disk is full.
        """
        if not set(names) <= {*FILES, *FIGURES, ANNOTATIONS}:
            raise ValueError(f"the files of a case are {', '.join((*FILES, *FIGURES))}; got {', '.join(names)}.")
        folder, bag, selection = Path(folder), self.bag, self.selection
        made = {"model": self.model, "weights_sha256": self.weights_sha256, "selector": self.selector}
        chosen = {"max_patches": self.max_patches, "answers": answers, "marks": marks, **made}
        looked: list[tuple[list[tuple[np.ndarray, float]], list[np.ndarray]]] = []

        def draw(larger: float = 1) -> tuple[list[Image.Image], list[np.ndarray]]:
            if not looked:
                looked.append(self._look(OVERVIEW, opening))
            wholes, patches = looked[0]
            return [plots.draw_overlay(*one, bag, selection, n, larger) for n, one in enumerate(wholes)], patches

        def draw_whole() -> Image.Image:
            return plots.lay_side_by_side(draw(plots.count_columns(len(list_parts(bag))))[0], OVERVIEW)

        def write_report(path: Path) -> None:
            overviews, patches = draw()
            shown = {
                "called": called,
                "overviews": overviews,
                "patches": patches,
                "answers": answers,
                "doubts": self.doubts,
                "unlike": self.unlike,
            }
            html.write_report(path, bag, selection, self.config, limits=self.limits, marks=marks, **shown, **made)

        def write_map(path: Path) -> None:
            try:
                points = umap.map_features(bag.features, selection)
                picture = umap.draw_map(points, selection)
            except Exception as error:  # numba without a folder for its cache, no memory: a map is not worth the rest
                raise _Undrawn(f"{path.name} was left out, as the map could not be drawn ({error}).") from error
            write_bytes(path, _encode_png(picture))

        def write_annotations(path: Path, number: int = 0) -> None:
            slide = self.slides[number] if self.slides else ""
            try:
                annotations.write_annotations(
                    path, bag, selection, slide, self.model, self.weights_sha256, number=number
                )
            except ValueError as error:
                raise _Undrawn(f"{path.name} was left out. {error}") from error

        def write_figure(path: Path) -> None:
            whole, (_, patches) = draw_whole(), looked[0]
            try:
                drawn_map = umap.draw_map(umap.map_features(bag.features, selection), selection)
            except Exception:  # as above: the rest is worth having
                drawn_map = None
            own = [answer for answer in answers if not answer.beside and not answer.refused]
            last = own[-1] if own else None
            told = {"title": bag.slide, "notice": f"{self.summary}. {self.notice}"}
            if last is not None:
                said = word_answer(last, self.limits, selection.ranks.tolist())
                grounds = " ".join(filter(None, [word_against(last, own[:-1]), *last.grounds]))
                told |= {"question": last.heading, "title": said, "grounds": grounds}
            bold = last is None or not is_guess(last, self.limits)
            data = figure.draw_figure(path.suffix[1:], whole, patches, selection, drawn_map, **told, bold=bold)
            write_bytes(path, data)

        writers: dict[str, Callable[[Path], None]] = {  # what costs least comes first
            "selection.json": lambda path: record.write_selection(path, bag, selection, self.config, **chosen),
            "patches.csv": lambda path: table.write_csv(path, bag, selection, marks),
            "patches.geojson": lambda path: qupath.write_geojson(path, bag, selection, marks),
            ANNOTATIONS: write_annotations,
            "report.html": write_report,
            "overlay.png": lambda path: write_bytes(path, _encode_png(draw_whole())),
            "umap.png": write_map,
            **dict.fromkeys(FIGURES, write_figure),
        }
        squares = {"bag": bag, "selection": selection, "marks": marks}
        jobs: list[tuple[str, Callable[[Path], None]]] = []
        for name in filter(names.__contains__, writers):
            if not bag.parts or name not in ("patches.geojson", ANNOTATIONS):
                jobs.append((name, writers[name]))
                continue
            for number in range(len(bag.parts)):  # a file each
                mine = name.replace(".", f"-{number + 1}.")
                if name != ANNOTATIONS:
                    jobs.append((mine, partial(qupath.write_geojson, number=number, **squares)))
                elif self.slides and (self.numbers == number).any() and annotations.can_annotate(self.slides[number]):
                    jobs.append((mine, partial(write_annotations, number=number)))
        written, failed = [], []
        for name, write in jobs:
            try:
                write(folder / name)
                written.append(name)
            except _Undrawn as reason:
                warnings.warn(str(reason), stacklevel=2)
            except (SlideError, OSError) as error:  # a full disk may still have room for what is smaller
                failed.append(error)
        if failed:
            raise failed[0]
        return tuple(written)

    def cut(self, overview: bool = False, opening: Opening | None = None) -> Pictures:
        """The kept patches as they were encoded; with a picture of the whole if it is wanted. opening: see write

        Raises ValueError without the slide, SlideError if it is damaged.
        """
        if not self.slides:
            raise ValueError(
                "Only the features of this slide are at hand, and this reader needs its pictures. Pass the slide."
            )
        wholes, best_first = self._look(SHOWN_OVERVIEW if overview else 0, opening)
        patches = tuple(best_first[place] for place in self.selection.best_first.argsort().tolist())
        pictures = [Image.fromarray(whole) for whole, _ in wholes]
        shown = np.asarray(plots.lay_side_by_side(pictures, SHOWN_OVERVIEW)) if overview else None
        return Pictures(patches, tuple(self.selection.ranks.tolist()), self.bag.mpp, shown)

    @cached_property
    def pictures(self) -> Pictures:
        """The kept patches as they were encoded. Raises as cut does."""
        return self.cut()

    def _show(self, reader: PictureReader) -> Pictures:
        """What this reader is shown."""
        return self.cut(overview=True) if reader.overview else self.pictures

    @property
    def slides(self) -> tuple[Path, ...]:
        """The slides that are at hand, in order."""
        return self.paths or ((self.path,) if self.path is not None else ())

    def _look(
        self, side: int, opening: Opening | None = None
    ) -> tuple[list[tuple[np.ndarray, float]], list[np.ndarray]]:
        """The slides' thumbnails (side > 0) with level-0 px per px, and the kept patches, best first.

        One slide is open at a time, each at the um/px that it was encoded with. Where they are not at hand there are
        canvases and no patches.
        """
        if not self.slides:
            return [plots.draw_canvas(self.bag, number=number) for number in range(len(list_parts(self.bag)))], []
        opening = opening or _open
        wholes, cut = [], []
        for number, (path, part) in enumerate(zip(self.slides, list_parts(self.bag))):
            with opening(path, part.slide_mpp if self.bag.parts else self.slide_mpp) as slide:
                wholes += [slide.thumbnail(side)] if side else []
                cut.append(iter(plots.cut_patches(slide, self.bag, self.selection, number)))
        return wholes, [next(cut[number]) for number in self.numbers[self.selection.best_first].tolist()]


def _open(path: Path, slide_mpp: float | None) -> Slide:
    return open_slide(path, slide_mpp=slide_mpp)


def open_case(
    model: Model,
    bag: Bag,
    path: Paths = None,
    *,
    k: int | None = None,
    selector: str = "learned",
    slide_mpp: float | None = None,
    max_patches: int | None = None,
    question: str = "",
    progress: Progress | None = None,
) -> Case:
    """Let the model select k patches (default: config.num_tokens) of a bag. See Case for the other arguments.

    path: of a bag of several slides (sparsewsi.bags.bag.join) all of theirs, in order
    progress: called between the parts of a large bag
    Raises ValueError as SparseWSI.select does.
    """
    selection = model.select(bag, k, selector, question=question, progress=progress)
    case = _make(model, bag, selection, path, slide_mpp, selector, max_patches)
    return replace(case, unlike=_find_unlike(case))


def replay_case(
    model: Model, bag: Bag, made: record.Record, path: Paths = None, *, slide_mpp: float | None = None
) -> Case:
    """The case of a selection.json, without scoring. Raises ValueError where record, bag and model do not fit."""
    made.check(bag)
    selection = Selection(made.indices, made.scores, model.tokens_of(bag, made.indices), len(made.scores))
    return _make(model, bag, selection, path, slide_mpp, made.selector, made.max_patches)  # pinned or not: unknown


def _find_unlike(case: Case) -> frozenset[int]:
    """Of a selection nobody pinned a patch of: Case.unlike."""
    own = case.config.own_selector if case.selector == "learned" else case.selector
    if own not in LEARNED or (own == "learned" and not case.config.diversity):
        return frozenset()
    kept = case.selection.indices.tolist()
    return frozenset(kept) - set(pick_highest(case.selection.scores, len(kept)).tolist())


def _make(
    model: Model,
    bag: Bag,
    selection: Selection,
    path: Paths,
    slide_mpp: float | None,
    selector: str,
    max_patches: int | None,
) -> Case:
    paths = (path,) if isinstance(path, (str, Path)) else tuple(path or ())
    assert len(paths) in (0, max(1, len(bag.parts))), "one path for each slide, or none"
    return Case(
        bag,
        selection,
        config=model.config,
        model=model.name,
        weights_sha256=model.weights_sha256,
        trained_on=model.trained_on,
        limits=model.limits,
        path=Path(paths[0]) if paths and not bag.parts else None,
        paths=tuple(map(Path, paths)) if bag.parts else (),
        slide_mpp=slide_mpp,
        selector=selector,
        max_patches=max_patches,
    )


def _encode_png(image: Image.Image) -> bytes:
    data = io.BytesIO()
    image.save(data, "PNG")
    return data.getvalue()
