"""What programs can ask: gradio_client, HTTP and, as tools, MCP. Their docstrings are what the callers read."""

import dataclasses
import uuid
from pathlib import Path
from typing import Any

import gradio as gr

from sparsewsi.bags.bag import own_coords
from sparsewsi.report.contradictions import word_against
from sparsewsi.report.record import describe_slides
from sparsewsi.report.scope import word_answer
from sparsewsi.slides.remote import is_remote
from sparsewsi.web.desk import CaseSlide, Desk
from sparsewsi.web.door import CALLER
from sparsewsi.web.errors import explain_errors, say_which
from sparsewsi.web.examples import EXAMPLES, open_example
from sparsewsi.web.gallery import find_sample
from sparsewsi.web.jobs import Job
from sparsewsi.web.limits import check_question, check_slides


class Api:
    """The public functions of one desk."""

    def __init__(self, desk: Desk) -> None:
        self.desk = desk

    def analyze(
        self,
        request: gr.Request,
        slide: str = "phantom",
        file: gr.FileData | None = None,
        slide_mpp: float = 0,
        selector: str = "learned",
        slides: list[str] | None = None,
        files: list[gr.FileData] | None = None,
    ) -> dict:
        """Open a whole-slide image, encode its patches and keep those the model selects; or several as one case.

        Args:
            slide: "phantom" or "cmu-1" for an example, a name of the gallery (docs/app.md), the address of a slide on
                a server that may be asked, or the path that POST /gradio_api/upload answered; not looked at when a file
                or several are given.
            file: a slide to upload.
            slide_mpp: micrometres per pixel of the scan, for slides that do not state it; 0 if they do.
            selector: "learned", or a training-free one such as "farthest".
            slides: up to 12 slides of one case, each named as in slide; patches are kept among those of all.
            files: slides to upload, in place of slides or after them.
        Returns:
            case (to be passed to ask and evidence), slide, num_patches, indices and coords (level-0 px of the patch's
            own slide) of the kept patches in raster order, slide by slide, slide_numbers (from 1) of the kept, ranks
            (by score among all patches, 1 = best), scores of the kept, slides (number, name, num_patches, mpp of the
            scan and size of each), summary, doubts, notice.
        """
        desk, session = self.desk, name_caller(request)
        with explain_errors():
            several = [*(slides or []), *(files or [])]
            given = several or [file or slide]
            check_slides(len(given))
            with desk.jobs.run(session, "slide") as job:
                places = []
                for number, one in enumerate(given, 1):
                    with say_which(f"Slide {number}" if several else ""):
                        places.append(self._find(one, session, slide_mpp, job, beside=number > 1))
                shown: list[CaseSlide] = []
                for one in places:
                    shown.append(desk.show(one, job, beside=bool(shown)))
                desk.sweep(session)
                done: tuple[CaseSlide, ...] = ()
                for number, one in enumerate(shown, 1):
                    with say_which(f"Slide {number}" if several else ""):
                        opened = desk.analyse(one, done, selector, job.name)
                    done = opened.slides
            if not desk.keep(opened):
                raise ValueError("This caller has opened another slide meanwhile; one at a time.")
            case = opened.case
            kept = case.selection.indices
            return {
                "case": opened.token,
                "slide": case.bag.slide,
                "num_patches": case.selection.num_patches,
                "indices": kept.tolist(),
                "coords": own_coords(case.bag)[kept].tolist(),
                "slide_numbers": (case.numbers + 1).tolist(),
                "ranks": case.selection.ranks.tolist(),
                "scores": case.selection.scores[kept].tolist(),
                "slides": describe_slides(case.bag),
                "summary": case.summary,
                "doubts": list(case.doubts),
                "notice": case.notice,
            }

    def _find(self, given: Any, session: str, slide_mpp: float, job: Job, beside: bool) -> CaseSlide:
        """The slide that a caller means, by name or as an upload, which moves to the session's folder."""
        desk = self.desk
        if not isinstance(given, str):
            path = desk.keep_upload(given["path"] if isinstance(given, dict) else given.path, session, job, beside)
        elif given in EXAMPLES:
            path = open_example(given)
        elif sample := find_sample(given):
            path, slide_mpp = sample.address, slide_mpp or sample.mpp
        elif is_remote(given):
            path = given
        elif Path(given).is_relative_to(desk.uploads):
            path = desk.keep_upload(given, session, job, beside)
        else:
            names = " or ".join(EXAMPLES)
            raise ValueError(f"The slide must be {names}, an upload's path, or a file, got {given[:40]!r}.")
        return CaseSlide("", str(path), slide_mpp or None)

    def ask(
        self,
        request: gr.Request,
        case: str,
        question: str,
        options: list[str] | None = None,
        without: list[int] | None = None,
    ) -> dict:
        """Ask about an analysed slide.

        Args:
            case: what analyze returned.
            question: the question, in words.
            options: answer options of a multiple-choice question.
            without: ranks of patches that are not to be shown, such as those of a focus.
        Returns:
            headline, which is what may be shown to people: the answer, after whatever speaks against believing it;
            answer, the model's own words, and probabilities (one per option), neither to be shown alone; limit, how
            often such answers were right; notice, after a sentence that names the answers about this case which
            contradict this one, if any do; where another reader answers also reader, sent (what left the
            server, and where to), cited (numbers of the patches it names: its own words) and again (what it takes
            to ask once more, without some patches).
        """
        desk = self.desk
        with explain_errors():
            given, caller = options or [], name_caller(request)
            check_question(question, given)
            opened, messages = desk.find_case(case), [{"role": "user", "content": question}]
            if without:
                opened = dataclasses.replace(opened, selection=opened.selection.without(without))
            with desk.jobs.run(caller, "question", case) as job:
                own = given and desk.reader is None  # the likeliest option is the answer
                text = None if own else "".join(desk.answer(opened, messages, given, job.name))
                found = desk.judge(opened, messages, text, given, job.name)
            said = {"headline": word_answer(found, opened.limits), "answer": found.text}
            against = "" if without else word_against(found, desk.remember(case, found))
            notice = " ".join(filter(None, [against, opened.notice]))
            said |= {"probabilities": list(found.probs), "limit": found.limit, "notice": notice}
            if not found.reader or desk.reader is None:
                return said
            told = {name: getattr(found, name) for name in ("reader", "sent", "cited")}
            return said | told | {"again": desk.reader.again}

    def evidence(
        self, request: gr.Request, case: str, question: str, answer: str, options: list[str] | None = None
    ) -> dict:
        """How much an answer loses when each of the kept patches is left out.

        Args:
            case: what analyze returned.
            question: the question.
            answer: an answer to it, such as the one that ask returned.
            options: answer options, if it was a multiple-choice question.
        Returns:
            headline, which is what may be shown to people: the answer, after whatever speaks against believing it,
            also that the slide does not decide it; rests, how far it depends on the patches, right or wrong:
            "strongly", "partly" or "not"; effects in nats, in the order of analyze's indices; indices; slide_numbers;
            ranks by score; slides, of a case of several what the answer loses without all patches of each; sentence,
            what they mean; notice.
        """
        desk = self.desk
        with explain_errors():
            given, caller = options or [], name_caller(request)
            check_question(question, given, answer)
            opened = desk.find_case(case)
            with desk.jobs.run(caller, "question", case) as job:
                messages = [{"role": "user", "content": question}]
                found = desk.weigh(opened, messages, desk.judge(opened, messages, answer, given, job.name), job.name)
            kept = opened.selection
            return {
                "headline": word_answer(found, opened.limits),
                "rests": found.rests,
                "indices": kept.indices.tolist(),
                "slide_numbers": (opened.numbers + 1).tolist(),
                "ranks": kept.ranks.tolist(),
                "effects": list(found.effects),
                "slides": {slide.name: slide.effect for slide in found.slides},
                "sentence": found.unweighed or found.evidence,
                "notice": opened.notice,
            }


def name_caller(request: gr.Request) -> str:
    """The session of who calls; without one, and for every call of MCP, a session of its own."""
    return request.headers.get(CALLER) or request.session_hash or uuid.uuid4().hex
