"""What programs can ask: gradio_client, HTTP and, as tools, MCP. Their docstrings are what the callers read."""

import dataclasses
import uuid
from pathlib import Path

import gradio as gr

from sparsewsi.slides.remote import is_remote
from sparsewsi.web.desk import Desk
from sparsewsi.web.door import CALLER
from sparsewsi.web.errors import explain_errors
from sparsewsi.web.examples import EXAMPLES, open_example
from sparsewsi.web.gallery import find_sample
from sparsewsi.web.limits import check_question


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
    ) -> dict:
        """Open a whole-slide image, encode its patches and keep those the model selects.

        Args:
            slide: "phantom" or "cmu-1" for an example, a name of the gallery (docs/app.md), the address of a slide on
                a server that may be asked, or the path that POST /gradio_api/upload answered; not looked at when a file
                is given.
            file: a slide to upload.
            slide_mpp: micrometres per pixel of the scan, for slides that do not state it; 0 if they do.
            selector: "learned", or a training-free one such as "farthest".
        Returns:
            case (to be passed to ask and evidence), slide, num_patches, indices and coords (level-0 px) of the kept
            patches in raster order, ranks (by score among all patches, 1 = best), scores of the kept, summary, doubts,
            notice.
        """
        desk, session = self.desk, name_caller(request)
        with explain_errors():
            with desk.jobs.run(session, "slide") as job:
                if file:
                    path = desk.keep_upload(file["path"] if isinstance(file, dict) else file.path, session, job)
                elif slide in EXAMPLES:
                    path = open_example(slide)
                elif sample := find_sample(slide):
                    path, slide_mpp = sample.address, slide_mpp or sample.mpp
                elif is_remote(slide):
                    path = slide
                elif Path(slide).is_relative_to(desk.uploads):
                    path = desk.keep_upload(slide, session, job)
                else:
                    names = " or ".join(EXAMPLES)
                    raise ValueError(f"The slide must be {names}, an upload's path, or a file, got {slide[:40]!r}.")
                token = desk.show(path, job)
                opened = desk.analyse(token, str(path), slide_mpp or None, selector, job.name)
            if not desk.keep(opened):
                raise ValueError("This caller has opened another slide meanwhile; one at a time.")
            case = opened.case
            kept = case.selection.indices
            return {
                "case": token,
                "slide": case.bag.slide,
                "num_patches": case.selection.num_patches,
                "indices": kept.tolist(),
                "coords": case.bag.coords[kept].tolist(),
                "ranks": case.selection.ranks.tolist(),
                "scores": case.selection.scores[kept].tolist(),
                "summary": case.summary,
                "doubts": list(case.doubts),
                "notice": case.notice,
            }

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
            answer, probabilities (one per option), notice; where another reader answers also reader, sent (what left
            the server, and where to), cited (numbers of the patches it names: its own words) and again (what it takes
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
                text = "".join(desk.answer(opened, messages, given, job.name))
                found = desk.measure(opened, messages, text, given, job.name, evidence=False)
            said = {"answer": found.text, "probabilities": list(found.probs), "notice": opened.notice}
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
            effects in nats, in the order of analyze's indices; indices; ranks by score; sentence, what they mean;
            notice.
        """
        desk = self.desk
        with explain_errors():
            given, caller = options or [], name_caller(request)
            check_question(question, given, answer)
            opened = desk.find_case(case)
            with desk.jobs.run(caller, "question", case) as job:
                found = desk.measure(opened, [{"role": "user", "content": question}], answer, given, job.name)
            kept = opened.selection
            return {
                "indices": kept.indices.tolist(),
                "ranks": kept.ranks.tolist(),
                "effects": list(found.effects),
                "sentence": found.evidence,
                "notice": opened.notice,
            }


def name_caller(request: gr.Request) -> str:
    """The session of who calls; without one, and for every call of MCP, a session of its own."""
    return request.headers.get(CALLER) or request.session_hash or uuid.uuid4().hex
