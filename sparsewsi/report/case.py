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
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from sparsewsi.bags.bag import Bag
from sparsewsi.files import write_bytes
from sparsewsi.model.config import SparseWSIConfig
from sparsewsi.model.evidence import Evidence
from sparsewsi.model.foci import Focus, find_foci
from sparsewsi.model.limits import Limits
from sparsewsi.model.novelty import Summary
from sparsewsi.model.selection import Selection
from sparsewsi.model.selector import LEARNED, SELECTORS, check_selector, evenly, select_learned
from sparsewsi.model.words import Words
from sparsewsi.readers.pictures import PictureReader, Pictures, find_cited
from sparsewsi.report import annotations, figure, html, plots, qupath, record, table, umap
from sparsewsi.report.answer import Answer, FocusEffect, summarise, word_notice
from sparsewsi.report.doubts import find_doubts
from sparsewsi.report.scope import word_answer
from sparsewsi.slides.refusals import SlideError
from sparsewsi.slides.slide import Slide, open_slide

FILES = ("report.html", "overlay.png", "umap.png", "patches.csv", "patches.geojson", "selection.json")
ANNOTATIONS = "annotations.dcm"  # of DICOM slides, where highdicom is installed
FIGURES = ("figure.png", "figure.svg")  # for a talk; written where they are asked for by name
OVERVIEW = 2000  # px, longer side of the slide's overview in files
NOT_VALIDATED = "This reader was not validated here: how often it is right on such questions is unknown."
SHOWN_OVERVIEW = 1024  # px, of the overview that a reader may be shown

Messages = Sequence[Mapping[str, str]]
Paths = str | Path | Sequence[str | Path] | None


class Reader(Protocol):
    """What answers from a selection: SparseWSI, by its own LLM; its docstrings say what each method promises.

    Wherever a Case takes one it takes a PictureReader, too, which is shown the patches themselves.
    """

    def answer(
        self, selection: Selection, messages: Messages, options: Sequence[str] | None = None
    ) -> Iterator[str]: ...

    def option_probs(self, selection: Selection, question: str, options: Sequence[str]) -> Tensor: ...

    def leave_one_out(
        self,
        selection: Selection,
        messages: Messages,
        answer: str,
        options: Sequence[str] | None = None,
        progress: Callable[[int, int], None] | None = None,
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
        self, bag: Bag, k: int | None = None, selector: str = "learned", seed: int = 0, question: str = ""
    ) -> Selection: ...

    def tokens_of(self, bag: Bag, indices: Tensor) -> Tensor: ...

    def words(self, bag: Bag) -> Words: ...


class _Undrawn(Exception):
    """A picture that is left out."""


@dataclass(frozen=True, eq=False)
class Case:
    """A slide, the patches that were kept of it, and what is known of how that was done. Holds no model, no open slide.

    path:           the slide; None where only its features are at hand
    paths:          of a case of several slides (bag.parts) all of them, in order, where they are at hand
    slide_mpp:      um/px of the scan if it was given by hand, else None
    selector, max_patches: how the selection was made; max_patches: at most so many patches were encoded, None: all
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

    @property
    def summary(self) -> str:
        """One line for people: slide, model, encoder, K of N, resolution."""
        return summarise(self.bag, self.selection, self.config, self.model)

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

    def measure(
        self,
        reader: Reader | PictureReader,
        messages: Messages,
        text: str,
        options: Sequence[str] = (),
        *,
        evidence: bool = True,
        progress: Callable[[int, int], None] | None = None,
        pictures: Pictures | None = None,
    ) -> Answer:
        """What is known of an answer: its options' probabilities and, if wanted, what it loses without each patch.

        Of a reader of pictures: who it is, what was sent to it, which patches it cites; and, only where it gives
        likelihoods, the same as of the model's own LLM.

        messages, options, pictures: as they were given to `answer`; text: what came back
        progress: called with (passes done, passes in all) of the evidence; what it raises ends the work
        """
        question, text = messages[-1]["content"], text.strip()
        answer = Answer(question, text, tuple(options))
        if isinstance(reader, PictureReader):
            cited = find_cited(text, self.selection.ranks.tolist())
            answer = replace(answer, reader=reader.name, sent=reader.sends, cited=cited, limit=NOT_VALIDATED)
            if not reader.likelihoods:
                unknown = f"{reader.name} gives no likelihoods, so what this answer rests on is not measured."
                unknown = f"{unknown} {reader.again}".strip()
                return replace(answer, evidence=unknown if evidence and text else "")
        seen: Any = pictures or self._show(reader) if isinstance(reader, PictureReader) else self.selection
        if options:
            answer = replace(answer, probs=tuple(reader.option_probs(seen, question, options).tolist()))
        if not answer.reader:
            answer = replace(answer, limit=self.limits.judge(question, list(answer.probs)))
        if not evidence or not text:
            return answer
        if isinstance(reader, PictureReader):
            found = reader.leave_one_out(seen, messages, text, list(options) or None, progress)
        else:
            groups = [focus.places for focus in self.foci]
            found = reader.leave_one_out(seen, messages, text, list(options) or None, progress, groups)
        answer = replace(answer, effects=tuple(found.effects.tolist()), evidence=found.sentence)
        return replace(answer, without_all=found.without_any, foci=self._weigh(found.group_effects.tolist()))

    @cached_property
    def foci(self) -> tuple[Focus, ...]:
        """The groups that the kept patches form."""
        bag, kept = self.bag, self.selection.indices
        ranks = self.selection.ranks.tolist()
        return tuple(find_foci(bag.coords[kept], bag.features[kept], bag.patch_size, ranks))

    def _weigh(self, effects: Sequence[float]) -> tuple[FocusEffect, ...]:
        """What was measured of each focus; nothing where nothing was."""
        ranks = self.selection.ranks.tolist()
        return tuple(
            FocusEffect(focus.name, tuple(sorted(ranks[place] for place in focus.places)), effect)
            for focus, effect in zip(self.foci, effects)
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
        room = max(0, k - len(stay))
        if not room or not len(rest):
            filled = rest[:0]
        elif own in LEARNED:
            filled = rest[select_learned(own, scores[rest], bag.features[rest], room, self.config.diversity)]
        elif own == "evenly":
            filled = rest[evenly(len(rest), room)]
        else:
            filled = rest[SELECTORS[own](bag.features[rest], bag.coords[rest], room, 0)]
        indices = torch.cat([stay, filled]).sort().values
        selection = replace(self.selection, indices=indices, tokens=model.tokens_of(bag, indices))
        return replace(self, selection=selection, selector=selector)

    def write(
        self,
        folder: str | Path,
        answers: Sequence[Answer] = (),
        names: Collection[str] = FILES,
        slide: Slide | None = None,
        marks: Mapping[int, str] | None = None,
    ) -> tuple[str, ...]:
        """Write files of these names, of FILES, FIGURES or ANNOTATIONS, into a folder, which is made; whole or none.

        marks: what the reader said of patches, by index: "agree" or "disagree"
        slide: the slide, open; None: it is opened by its path. Without either the report holds no patches, and boxes
        are drawn on a plain canvas
        What costs nothing to make is saved first. Returns the names of the files that were written: a map that cannot
        be drawn is left out with a warning. Of several slides each has a patches-<number>.geojson. Raises SlideError or
        OSError, once the others are written, if the slide cannot be read any more or the disk is full.
        """
        if not set(names) <= {*FILES, *FIGURES, ANNOTATIONS}:
            raise ValueError(f"the files of a case are {', '.join((*FILES, *FIGURES))}; got {', '.join(names)}.")
        folder, bag, selection = Path(folder), self.bag, self.selection
        made = {"model": self.model, "weights_sha256": self.weights_sha256, "selector": self.selector}
        chosen = {"max_patches": self.max_patches, "answers": answers, "marks": marks, **made}
        drawn: list[tuple[Image.Image, list]] = []

        def draw() -> tuple[Image.Image, list]:
            if not drawn:
                drawn.append(self._draw(slide))
            return drawn[0]

        def write_report(path: Path) -> None:
            overview, patches = draw()
            shown = {"overview": overview, "patches": patches, "answers": answers, "doubts": self.doubts}
            html.write_report(path, bag, selection, self.config, limits=self.limits, marks=marks, **shown, **made)

        def write_map(path: Path) -> None:
            try:
                points = umap.map_features(bag.features, selection)
                picture = umap.draw_map(points, selection)
            except Exception as error:  # numba without a folder for its cache, no memory: a map is not worth the rest
                raise _Undrawn(f"{path.name} was left out, as the map could not be drawn ({error}).") from error
            write_bytes(path, _encode_png(picture))

        def write_annotations(path: Path) -> None:
            try:
                annotations.write_annotations(path, bag, selection, self.path or "", self.model, self.weights_sha256)
            except ValueError as error:
                raise _Undrawn(f"{path.name} was left out. {error}") from error

        def write_figure(path: Path) -> None:
            overview, patches = draw()
            try:
                drawn_map = umap.draw_map(umap.map_features(bag.features, selection), selection)
            except Exception:  # as above: the rest is worth having
                drawn_map = None
            last = answers[-1] if answers else None
            title = f"{last.question} {word_answer(last, self.limits)}" if last else bag.slide
            data = figure.draw_figure(
                path.suffix[1:], overview, patches, selection, drawn_map, title, f"{self.summary}. {self.notice}"
            )
            write_bytes(path, data)

        writers: dict[str, Callable[[Path], None]] = {  # what costs least comes first
            "selection.json": lambda path: record.write_selection(path, bag, selection, self.config, **chosen),
            "patches.csv": lambda path: table.write_csv(path, bag, selection, marks),
            "patches.geojson": lambda path: qupath.write_geojson(path, bag, selection, marks),
            ANNOTATIONS: write_annotations,
            "report.html": write_report,
            "overlay.png": lambda path: write_bytes(path, _encode_png(draw()[0])),
            "umap.png": write_map,
            **dict.fromkeys(FIGURES, write_figure),
        }
        if bag.parts:
            place = list(writers).index("patches.geojson")
            squares = {"bag": bag, "selection": selection, "marks": marks}
            ours = {
                f"patches-{number + 1}.geojson": partial(qupath.write_geojson, number=number, **squares)
                for number in range(len(bag.parts))
            }
            others = [(name, write) for name, write in writers.items() if name != "patches.geojson"]
            writers = dict([*others[:place], *ours.items(), *others[place:]])
            names = {*names, *ours} if "patches.geojson" in names else names
        written, failed = [], []
        for name, write in writers.items():
            if name in names:
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

    def cut(self, slides: Sequence[Slide], overview: bool = False) -> Pictures:
        """The kept patches as they were encoded, of the open slides; with a picture of the whole if it is wanted.

        Raises SlideError if a slide is damaged.
        """
        best_first = plots.cut_patches(slides, self.bag, self.selection)
        patches = tuple(best_first[place] for place in self.selection.best_first.argsort().tolist())
        whole = self._overview(slides, SHOWN_OVERVIEW)[0] if overview else None
        return Pictures(patches, tuple(self.selection.ranks.tolist()), self.bag.mpp, whole)

    @cached_property
    def pictures(self) -> Pictures:
        """The kept patches as they were encoded. Raises ValueError without the slide, SlideError if it is damaged."""
        return self._cut(overview=False)

    def _show(self, reader: PictureReader) -> Pictures:
        """What this reader is shown."""
        return self._cut(overview=True) if reader.overview else self.pictures

    def _cut(self, overview: bool) -> Pictures:
        if not self._paths:
            raise ValueError(
                "Only the features of this slide are at hand, and this reader needs its pictures. Pass the slide."
            )
        with self._open() as slides:
            return self.cut(slides, overview)

    @property
    def _paths(self) -> tuple[Path, ...]:
        """The slides that are at hand, in order."""
        return self.paths or ((self.path,) if self.path is not None else ())

    @contextmanager
    def _open(self) -> Iterator[list[Slide]]:
        """All slides of the case."""
        with ExitStack() as stack:
            yield [stack.enter_context(open_slide(path, slide_mpp=self.slide_mpp)) for path in self._paths]

    def _overview(self, slides: Sequence[Slide], max_side: int) -> tuple[np.ndarray, float]:
        """uint8 (h, w, 3) of the slide, or of several one below another, and level-0 px per px."""
        if self.bag.parts:
            return plots.draw_together(slides, self.bag, max_side)
        return slides[0].thumbnail(max_side)

    def _draw(self, slide: Slide | None) -> tuple[Image.Image, list]:
        """The overview with boxes, and the kept patches, best first; without the slide a canvas and no patches."""
        if slide is None and not self._paths:
            return plots.draw_overlay(*plots.draw_canvas(self.bag), self.bag, self.selection), []
        with self._open() if slide is None else nullcontext([slide]) as slides:
            overview = plots.draw_overlay(*self._overview(slides, OVERVIEW), self.bag, self.selection)
            return overview, plots.cut_patches(slides, self.bag, self.selection)


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
) -> Case:
    """Let the model select k patches (default: config.num_tokens) of a bag. See Case for the other arguments.

    path: of a bag of several slides (sparsewsi.bags.bag.join) all of theirs, in order
    Raises ValueError as SparseWSI.select does.
    """
    selection = model.select(bag, k, selector, question=question)
    return _make(model, bag, selection, path, slide_mpp, selector, max_patches)


def replay_case(
    model: Model, bag: Bag, made: record.Record, path: Paths = None, *, slide_mpp: float | None = None
) -> Case:
    """The case of a selection.json, without scoring. Raises ValueError where record, bag and model do not fit."""
    made.check(bag)
    selection = Selection(made.indices, made.scores, model.tokens_of(bag, made.indices), len(made.scores))
    return _make(model, bag, selection, path, slide_mpp, made.selector, made.max_patches)


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
